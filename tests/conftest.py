"""What several test files share: a few real cells, a bundle tuned on them, and the command line in one call."""
import multiprocessing
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("SCIMLORA_PROGRESS", "0")

TYPES = ("acinar", "alpha", "beta", "delta", "ductal", "gamma")


@pytest.fixture(autouse=True)
def own_main():
    "Streamlit's test driver leaves the page in place of `__main__`, and every process that a later test starts would run it again."
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main


def some_cells(n_per_type, types=TYPES, skip=0):
    "Baron's pancreas cells: n of each type, spread over the three libraries; `skip` passes over the first ones."
    from scimlora.examples import baron

    cells = baron()
    order = np.random.default_rng(0).permutation(cells.n_obs)
    names = cells.obs.cell_type.to_numpy(str)[order]
    rows = np.concatenate([order[names == t][skip:skip + n_per_type] for t in types])
    return cells[np.sort(rows)].copy()


@pytest.fixture(scope="session")
def baron_cells():
    "150 real cells of six types with counts; copy before you change them."
    return some_cells(25)


@pytest.fixture(scope="session")
def other_cells():
    "120 more cells of the same types that no bundle here was tuned on."
    return some_cells(20, skip=25)


@pytest.fixture(scope="session")
def classifier(baron_cells):
    "A Classifier tuned on `baron_cells`, in memory."
    from scimlora import Classifier

    # The last epoch and a high rate: an adapter that is far from nothing, so that tests which ignore it fail.
    return Classifier.tune(baron_cells, "cell_type", "library", epochs=3, lr=5e-3, keep_best=False)


@pytest.fixture(scope="session")
def bundle_dir(classifier, tmp_path_factory):
    "The same classifier saved as a bundle folder; copy before you damage it."
    return classifier.save(tmp_path_factory.mktemp("bundles") / "pancreas")


@pytest.fixture(scope="session")
def cells_file(other_cells, tmp_path_factory):
    "`other_cells` as an h5ad file."
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    other_cells.write_h5ad(path)
    return path


@dataclass
class Ended:
    "How a call of the command line ended."
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capfd):
    """Call the command line in this process: `cli("doctor", path).code`.

    Warnings that Python would print on a terminal are counted as lines of stderr, as a user sees them.
    """
    from scimlora.cli import main

    def call(*args):
        capfd.readouterr()
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("default")
            for quiet in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", quiet)
            try: main([str(a) for a in args])
            except SystemExit as e: code = e.code
        out, err = capfd.readouterr()
        return Ended(code, out, err + "".join(f"{w.category.__name__}: {w.message}\n" for w in shown))

    return call


@pytest.fixture(scope="session")
def command():
    "The installed command `scimlora`."
    return str(Path(sys.executable).with_name("scimlora"))


@pytest.fixture(scope="session")
def cli_process(command):
    "Call the installed command in a process of its own, as a shell does."

    def call(*args, **kw):
        done = subprocess.run([command, *map(str, args)], capture_output=True, text=True, timeout=120, **kw)
        return Ended(done.returncode, done.stdout, done.stderr)

    return call


def _in_fork(args, out, err, file_limit):
    import resource

    from scimlora.cli import main

    for path, fd in ((out, 1), (err, 2)): os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    if file_limit: resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    main(args)


@pytest.fixture(scope="session")
def cli_fork(tmp_path_factory):
    """Call the command line in a process of its own, quickly: torch and anndata are loaded once, and each call is a fork.

    For calls that may end the process. `file_limit` is the largest file in bytes, as on a full disk. The code of a
    process that a signal ended is negative.
    """
    ctx = multiprocessing.get_context("forkserver")
    ctx.set_forkserver_preload(["scimlora.cli", "scimlora.classifier", "anndata"])
    said = tmp_path_factory.mktemp("said")

    def call(*args, file_limit=0):
        p = ctx.Process(target=_in_fork, args=([str(a) for a in args], said / "out", said / "err", file_limit))
        p.start()
        p.join(120)
        assert not p.is_alive(), p.kill()
        return Ended(p.exitcode, (said / "out").read_text(), (said / "err").read_text())

    return call


@pytest.fixture(scope="session")
def shared():
    "Open a file of ../shared/data by name, or skip the test and say what is missing."
    from scimlora import InputError, examples

    def get(name):
        try: return examples.shared(name)
        except InputError as e: pytest.skip(str(e))

    return get
