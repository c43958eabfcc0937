"What makes it fast changes no answer: shared first layer, reading ahead, a cluster; and a start loads only what it needs."
import itertools
import os
import signal
import subprocess
import sys
import threading

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scimlora import predict
from scimlora.base import load_base
from scimlora.core import InputError
from scimlora.data import Alignment, align_cells
from scimlora.files import CellFile
from scimlora.kernels import run_both, run_layers, threads
from scimlora.predict import Predictor, annotate_file
from scimlora.rows import ahead

HEAVY = {"torch", "peft", "transformers", "scanpy", "scimilarity", "sklearn", "numba", "matplotlib", "seaborn", "distributed", "streamlit"}


def loaded_by(code):
    "The names of the modules that a fresh process has loaded after running `code`."
    run = subprocess.run([sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


def test_import_and_help_load_no_numbers_machinery():
    assert not loaded_by("import scimlora") & (HEAVY | {"pandas", "anndata", "numpy", "typer"})
    code = "from scimlora.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    assert not loaded_by(code) & (HEAVY | {"pandas", "anndata", "scipy", "fastapi"})


def test_serving_loads_no_training_machinery(bundle_dir):
    code = f"""
from scimlora.serve import answer, create_app
predictor = create_app({str(bundle_dir)!r}).state.service.models.get()
assert answer(predictor, [{{'INS': 9.0, 'IAPP': 7.5}}])[0]['cell_type']"""
    assert not loaded_by(code) & HEAVY


def test_annotating_few_cells_loads_no_compiler(bundle_dir, cells_file, tmp_path):
    code = f"from scimlora.cli import main\ntry: main(['annotate', {str(bundle_dir)!r}, {str(cells_file)!r}, '--out', {str(tmp_path / 'out.csv')!r}])\nexcept SystemExit as e: assert e.code == 0"
    assert not loaded_by(code) & HEAVY


def test_embedding_a_matrix_loads_what_it_needs():
    code = """
import scipy.sparse as sp
from scimlora.base import load_base
base = load_base("mini")
assert base.embed(sp.random(5, len(base.genes), 0.05, format="csr", random_state=0)).shape == (5, base.latent)"""
    assert not loaded_by(code) & (HEAVY | {"pandas", "anndata"})


def test_the_encoder_is_built_when_it_is_asked_for_and_is_the_one_that_embeds(other_cells):
    import torch

    base = load_base("mini")
    X = align_cells(other_cells, base.genes).X[:20]
    z = base.embed(X)
    assert isinstance(base.weights, dict) and "_encoder" not in vars(base)
    with torch.no_grad(): assert np.abs(base.encoder(torch.from_numpy(X.toarray())).numpy() - z).max() < 1e-5
    base.encoder.network[-1].bias += 1
    assert (base.weights["network.2.bias"] == load_base("mini").weights["network.2.bias"].astype(np.float32) + 1).all(), "the weights are the module's from then on"


def test_both_embeddings_share_the_first_layer(bundle_dir, other_cells):
    predictor = Predictor(bundle_dir)
    X = align_cells(other_cells, predictor.genes).X
    assert all(a.weight is b.weight for a, b in zip(predictor.base.layers, predictor.layers)) and predictor.layers[0].left.shape[1] == predictor.bundle.adapter_config["r"]
    frozen, z = run_both(predictor.base.layers, predictor.layers, X)
    assert np.abs(frozen - load_base("mini").embed(X)).max() < 1e-5
    assert np.abs(z - run_layers(predictor.layers, X)).max() < 1e-5
    assert np.abs(z - frozen).max() > 1e-2


def test_many_cells_get_the_answers_of_few(bundle_dir, other_cells):
    predictor = Predictor(bundle_dir)
    cells = align_cells(other_cells, predictor.genes)
    many = predictor.predict(cells)
    few = [predictor.predict(cells[a:a + 40]) for a in range(0, len(cells), 40)]
    assert np.abs(many.proba - np.concatenate([p.proba for p in few])).max() < 1e-5
    assert (many.reason == np.concatenate([p.reason for p in few])).all()
    z, frozen = predictor.embeddings(cells)
    assert np.array_equal(z, many.embedding) and np.abs(frozen - predictor.base.embed(cells.X)).max() < 1e-6


@pytest.fixture
def small_chunks(monkeypatch):
    "Files are read 7 cells at a time."
    monkeypatch.setattr(CellFile, "chunks", lambda self, *_: [slice(a, min(a + 7, self.n_obs)) for a in range(0, self.n_obs, 7)])


@pytest.mark.parametrize("ending", ["csv", "h5ad"])
def test_streaming_equals_memory(bundle_dir, cells_file, small_chunks, tmp_path, ending):
    predictor, out = Predictor(bundle_dir), tmp_path / f"out.{ending}"
    table = annotate_file(predictor, cells_file, out).table
    want = predictor.predict(ad.read_h5ad(cells_file))
    assert (table.cell_type == want.label).all() and (table.reason == want.reason).all()
    assert np.abs(table.confidence - want.confidence).max() < 1e-3
    if ending == "h5ad": assert np.abs(ad.read_h5ad(out).obsm["X_scimlora"] - want.embedding).max() < 1e-5
    else: assert pd.read_csv(out).cell_id.tolist() == ad.read_h5ad(cells_file).obs_names.tolist()


@pytest.mark.parametrize("ending", ["csv", "h5ad"])
@pytest.mark.parametrize("where", ["reader", "model", "writer"])
def test_a_failure_leaves_nothing(bundle_dir, cells_file, small_chunks, tmp_path, monkeypatch, where, ending):
    predictor, calls, threads = Predictor(bundle_dir), itertools.count(1), threading.active_count()

    def third(f):
        def run(*args, **kwargs):
            if next(calls) == 3: raise InputError("the third one is broken")
            return f(*args, **kwargs)
        return run

    owner, name = {"reader": (Alignment, "cells"), "model": (Predictor, "predict"), "writer": (predict.Predictions, "columns")}[where]
    monkeypatch.setattr(owner, name, third(getattr(owner, name)))
    with pytest.raises(InputError, match="third one"): annotate_file(predictor, cells_file, tmp_path / "folder" / f"out.{ending}")
    assert list(tmp_path.glob("folder/*")) == [] and list(tmp_path.glob("folder/.*")) == []
    assert threading.active_count() <= threads


def test_ahead_holds_one_and_ends():
    taken, threads = [], threading.active_count()

    def numbers():
        for i in range(1000):
            taken.append(i)
            yield i

    for i in ahead(numbers()):
        if i == 10: break
    assert len(taken) <= 14 and threading.active_count() <= threads


def worker(address, log):
    "A Dask worker in a process of its own, with no nanny that would start it again."
    return subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"],
                            stdout=log, stderr=log, env=dict(os.environ, OMP_NUM_THREADS="1"))


def test_dask_goes_on_when_a_worker_is_killed(bundle_dir, cells_file, small_chunks, tmp_path):
    distributed = pytest.importorskip("distributed")
    from scimlora.cluster import on_dask

    predictor = Predictor(bundle_dir)
    want = annotate_file(predictor, cells_file, tmp_path / "here.csv").table
    with distributed.LocalCluster(n_workers=0, dashboard_address=None) as cluster, distributed.Client(cluster) as client, (tmp_path / "log").open("w") as log:
        workers = [worker(cluster.scheduler_address, log) for _ in range(2)]
        try:
            client.wait_for_workers(2, timeout=60)
            engine, killed = on_dask(cluster.scheduler_address), []

            def and_kill(predictor, alignment):
                for i, item in enumerate(engine(predictor, alignment)):
                    if i == 2:
                        workers[0].send_signal(signal.SIGKILL)
                        killed.append(workers[0].wait(10))
                    yield item

            got = annotate_file(predictor, cells_file, tmp_path / "there.csv", engine=and_kill).table
            assert killed == [-signal.SIGKILL] and workers[1].poll() is None
        finally:
            for w in workers:
                if w.poll() is None: w.kill()
                w.wait()
    assert got.equals(want)


def test_dask_refuses_in_one_line(classifier, cells_file, tmp_path, bundle_dir):
    pytest.importorskip("distributed")
    from scimlora.cluster import on_dask

    with pytest.raises(InputError, match="no Dask scheduler answers"):
        annotate_file(Predictor(bundle_dir), cells_file, tmp_path / "out.csv", engine=on_dask("tcp://127.0.0.1:9"))
    with pytest.raises(InputError, match="in memory cannot be sent"):
        annotate_file(Predictor(classifier.bundle), cells_file, tmp_path / "out.csv", engine=on_dask())
    assert not (tmp_path / "out.csv").exists()


def test_the_command_line_says_what_it_takes(bundle_dir, cells_file, tmp_path):
    for option, value in (("--engine", "spark"), ("--precision", "int3"), ("--scheduler", "tcp://127.0.0.1:9"), ("--device", "tpu")):
        run = subprocess.run([sys.executable, "-m", "scimlora", "annotate", bundle_dir, cells_file, "--out", tmp_path / "out.csv", option, value], capture_output=True, text=True)
        assert run.returncode == 2 and len(run.stderr.strip().splitlines()) == 1 and not (tmp_path / "out.csv").exists()


def test_what_a_predictor_makes_once_is_made_once_for_all_chunks(bundle_dir, cells_file, small_chunks, tmp_path, monkeypatch):
    made, hierarchy = [], predict.hierarchy
    monkeypatch.setattr(predict, "hierarchy", lambda labels: made.append(labels) or hierarchy(labels))
    predictor = Predictor(bundle_dir)
    predictor.bundle.calibration.min_confidence = 1.1  # nothing is sure enough, so that broader names are looked for in every chunk
    annotate_file(predictor, cells_file, tmp_path / "out.csv")
    assert 1 <= len(made) <= threads() and predictor.within(0.5)._centroids is predictor._centroids  # threads that begin together may each make it
