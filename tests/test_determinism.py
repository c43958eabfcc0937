"""The same seed gives the same numbers, whatever else the machine does: short pretrainings in processes of their own."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Where NumPy's arrays lie in memory and the order of sets vary from process to process, and the second one has to share its core.
PRETRAIN = """
import hashlib, multiprocessing, sys
import numpy as np

def hog():
    while True: np.linalg.qr(np.ones((300, 300)))

if __name__ == "__main__":
    for _ in range(int(sys.argv[1])): multiprocessing.get_context("fork").Process(target=hog, daemon=True).start()
    moved = bytes(4097 * int(sys.argv[1]))
    from scimlora.examples import baron, pollen
    from scimlora.pretrain import Recipe, as_study, choose_genes, make_corpus, train
    studies = [as_study("pancreas_baron_h1", baron()), as_study("brain_pollen2014", pollen())]
    encoder, head, losses = train(make_corpus(studies, choose_genes(studies)), Recipe(epochs=1))
    print(hashlib.sha256(b"".join(v.numpy().tobytes() for v in [*encoder.state_dict().values(), *head.state_dict().values()])).hexdigest())
"""


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrain") / "pretrain.py"
    path.write_text(PRETRAIN)

    def run(threads, hogs, order):
        env = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONHASHSEED": order, "SCIMLORA_PROGRESS": order}
        done = subprocess.run([sys.executable, path, str(hogs)], env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout
    return run


def test_pretraining_is_the_same_beside_other_work(pretrained): assert pretrained("1", 0, "0") == pretrained("1", 2, "1")


def test_benchmarks_settle_the_number_of_threads_before_numpy_asks():
    "A base has another SHA-256 with another number of threads, and fits are kept under that."
    scripts = [p for p in (Path(__file__).parent.parent / "benchmarks").glob("*.py") if re.search(r"import .*\b(pretrain|Bases)\b", p.read_text(encoding="utf-8"))]
    assert {"science.py", "forgetting.py", "settings.py"} <= {p.name for p in scripts}
    for p in scripts:
        text = p.read_text(encoding="utf-8")
        assert text.index('os.environ.setdefault("OMP_NUM_THREADS", "1")') < text.index("\nimport numpy" if "\nimport numpy" in text else "\nfrom suite"), p.name
