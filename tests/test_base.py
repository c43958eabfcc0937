"""A base goes to SCimilarity's format and back, and both packages embed alike."""
import json

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from scimlora.base import Base, load_base, load_head, save_base
from scimlora.encoder import Encoder
from scimlora.core import InputError


@pytest.fixture
def cells():
    return sp.random(40, 300, 0.1, format="csr", dtype=np.float32, random_state=0) * np.float32(5)


@pytest.fixture
def rand():
    torch.manual_seed(0)
    encoder = Encoder(300, (32, 16), 8)
    with torch.no_grad():
        for _ in range(5): encoder(torch.rand(64, 300) * 3)  # BatchNorm's statistics are no longer 0 and 1
    return Base(encoder.eval().requires_grad_(False), [f"G{i}" for i in range(300)], {0: "alpha", 1: "beta"})


@pytest.fixture(scope="module")
def mini(): return load_base("mini")


def test_round_trip(rand, cells, tmp_path):
    back = rand.save(tmp_path / "rand")
    assert np.array_equal(back.embed(cells), rand.embed(cells))
    assert back.genes == rand.genes and back.labels == rand.labels
    half = rand.save(tmp_path / "half", half=True)
    cosine = (half.embed(cells) * rand.embed(cells)).sum(1)
    assert cosine.min() > 0.99999


def test_folded_is_the_module(rand, cells):
    with torch.no_grad(): want = rand.encoder(torch.from_numpy(cells.toarray())).numpy()
    assert np.abs(rand.embed(cells) - want).max() < 1e-6


@pytest.mark.parametrize("half", [False, True])
def test_scimilarity_opens_a_random_base(rand, cells, tmp_path, half):
    upstream = pytest.importorskip("scimilarity.cell_embedding")
    base = rand.save(tmp_path / "rand", half=half)
    theirs = upstream.CellEmbedding(str(tmp_path / "rand"))
    assert np.abs(theirs.get_embeddings(cells) - base.embed(cells)).max() < 1e-4
    assert theirs.int2label == base.labels and theirs.gene_order == base.genes


def test_scimilarity_opens_mini():
    upstream = pytest.importorskip("scimilarity.cell_annotation")
    mini = load_base("mini")
    cells = sp.random(50, len(mini.genes), 0.08, format="csr", dtype=np.float32, random_state=1) * np.float32(6)
    theirs = upstream.CellAnnotation(str(mini.path))
    assert np.abs(theirs.get_embeddings(cells) - mini.embed(cells)).max() < 1e-4
    assert theirs.knn.get_current_count() == len(theirs.idx2label)
    assert set(theirs.idx2label.values()) <= set(mini.labels.values())


def test_mini_is_whole():
    mini = load_base("mini")
    card = json.loads((mini.path / "card.json").read_text(encoding="utf-8"))
    assert card["genes"] == len(mini.genes) and card["classes"] == list(mini.labels.values())
    assert {"INS", "GCG", "CD3D", "MS4A1", "NKG7", "ALB", "GFAP", "MBP"} <= set(mini.genes)
    assert not {"no_feature", "alignment_not_unique", "ambiguous"} & set(mini.genes)
    assert not any("baron" in d["dataset"] for d in card["data"])
    readme = (mini.path / "README.md").read_text(encoding="utf-8")
    assert all(d["dataset"] in readme for d in card["data"])


def test_a_damaged_base_says_so(rand, tmp_path):
    rand.save(tmp_path / "rand")
    (tmp_path / "rand" / "gene_order.tsv").write_text("INS\nGCG\n", encoding="utf-8")
    with pytest.raises(InputError, match="gene_order.tsv has 2 genes"): load_base(tmp_path / "rand")
    (tmp_path / "rand" / "gene_order.tsv").unlink()
    with pytest.raises(InputError, match="lacks gene_order.tsv"): load_base(tmp_path / "rand")


def test_mini_annotates_with_no_fine_tuning(mini, other_cells, cells_file, cli, tmp_path):
    e = cli("annotate", "mini", cells_file, "--out", tmp_path / "out.csv")
    assert e.code == 0 and "nothing was calibrated" in e.err
    said = pd.read_csv(tmp_path / "out.csv").cell_type
    right = (said.to_numpy() == ("pancreatic " + other_cells.obs.cell_type.astype(str)).to_numpy()).mean()
    assert right > 0.7 and set(said) <= set(mini.labels.values())
    z = mini.embed(other_cells)
    W, b = load_head(mini.path)
    assert list(said) == [list(mini.labels.values())[i] for i in (z * z.shape[1] ** 0.5 @ W.T + b).argmax(1)]


def test_a_base_without_a_label_head_says_so(mini, cells_file, cli, tmp_path):
    save_base(mini, tmp_path / "bare")
    e = cli("annotate", tmp_path / "bare", cells_file, "--out", tmp_path / "out.csv")
    assert e.code == 2 and "has no label head" in e.err and e.err.count("\n") == 1
