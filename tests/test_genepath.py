"""Two paths to one answer: what the gene path must hold, and who is heard when."""
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from scimlora import Classifier, InputError
from scimlora.data import align_cells
from scimlora.genepath import coverage, embedding_share, fit_genepath
from scimlora.predict import FEW_GENES, genes_to_cells
from scipy.special import softmax

MARKERS = ("INS", "IAPP", "GCG", "TTR", "SST", "RBP4", "PPY", "AQP3", "PRSS1", "REG1A", "CPA1", "KRT19", "KRT7", "KRT18")


def macro(y, called): return f1_score(np.asarray(y, str), np.asarray(called, str), average="macro")


def without(cells, rng, share=0.8, names=MARKERS):
    "Cells of a study whose gene list lacks some markers and a share of the rest."
    return cells[:, (rng.random(cells.n_vars) >= share) & ~np.isin(cells.var_names, names)].copy()


def cell_of(cells, i, zeros=False):
    row = np.asarray(cells.X[i].todense()).ravel()
    return {g: float(v) for g, v in zip(cells.var_names, row) if v or zeros}


def test_missing_genes_cost_less_than_half_of_what_they_cost_logistic_regression(classifier, baron_cells, other_cells):
    genes, y = classifier.predictor.genes, other_cells.obs.cell_type
    lr = LogisticRegression(max_iter=300).fit(align_cells(baron_cells, genes).X, baron_cells.obs.cell_type.astype(str))
    lost = []
    for seed in range(3):
        fewer = without(other_cells, np.random.default_rng(seed))
        lost.append([macro(y, m.predict(a)) - macro(y, m.predict(b)) for m, a, b in
                     ((lr, align_cells(other_cells, genes).X, align_cells(fewer, genes).X), (classifier, other_cells, fewer))])
    theirs, ours = np.mean(lost, 0)
    assert theirs > 0.05 and ours < theirs / 2, (theirs, ours)


def test_a_panel_is_named_from_its_markers(classifier, other_cells):
    few = other_cells[:, np.isin(other_cells.var_names, MARKERS)].copy()
    assert few.n_vars == len(MARKERS) and macro(few.obs.cell_type, classifier.predict(few)) > 0.85
    p = classifier.predict_proba(few)
    assert abs(p.max(1).mean() - (classifier.predict(few) == few.obs.cell_type.to_numpy(str)).mean()) < 0.2, "its confidence is worth something"


@pytest.mark.parametrize("n_genes", [len(MARKERS), 3000])
def test_a_cell_with_its_zeros_is_the_file(classifier, other_cells, n_genes):
    "What the service is given, and what annotate reads."
    keep = np.isin(other_cells.var_names, MARKERS)
    keep[np.random.default_rng(0).choice(other_cells.n_vars, n_genes - keep.sum(), replace=False)] = True
    part = other_cells[:5, keep].copy()
    part.X = sp.csr_matrix(part.X)
    cells = genes_to_cells([cell_of(part, i, zeros=True) for i in range(5)], classifier.predictor.genes, "counts")
    assert np.abs(classifier.predictor.predict(cells).proba - classifier.predict_proba(part)).max() < 1e-6
    assert cells.panel.all() == (n_genes < FEW_GENES)


def test_a_whole_cell_may_leave_out_its_zeros(classifier, other_cells):
    a = other_cells[:5].copy()
    a.X = sp.csr_matrix(a.X)
    cells = genes_to_cells([cell_of(a, i) for i in range(5)], classifier.predictor.genes, "counts")
    assert np.abs(classifier.predictor.predict(cells).proba - classifier.predict_proba(a)).max() < 1e-3


def test_the_joined_answer_is_what_calibration_says(classifier, other_cells):
    p, cells = classifier.predictor, align_cells(other_cells, classifier.predictor.genes)
    encoder, genes = p.paths(cells, *p.embeddings(cells))
    c = p.bundle.calibration
    assert c.encoder_weight == p.bundle.manifest["choice"]["encoder_weight"] == 0.2, "this encoder is no worse than the genes"
    by_hand = softmax(encoder / c.encoder_temperature, axis=1) ** c.encoder_weight * softmax(genes / c.gene_temperature, axis=1) ** (1 - c.encoder_weight)
    by_hand = by_hand ** (1 / c.temperature)
    assert np.abs(by_hand / by_hand.sum(1, keepdims=True) - classifier.predict_proba(other_cells)).max() < 1e-9


def test_presets(baron_cells, other_cells, tmp_path):
    proba = {}
    for preset, weight in (("lora", 1.0), ("genes", 0.0)):
        clf = Classifier.tune(baron_cells, "cell_type", preset=preset, epochs=1, steps=0, baselines=False)
        assert clf.bundle.manifest["choice"]["encoder_weight"] == weight and preset in clf.bundle.manifest["choice"]["preset"]
        path = clf.save(tmp_path / preset)
        assert (path / "genepath.safetensors").exists() == (preset == "genes")
        proba[preset] = Classifier.load(path).predict_proba(other_cells)
        assert np.abs(proba[preset] - clf.predict_proba(other_cells)).max() < 1e-5
    assert np.abs(proba["lora"] - proba["genes"]).max() > 0.05
    with pytest.raises(InputError, match="preset 'magic': choose one of auto"): Classifier.tune(baron_cells, "cell_type", preset="magic", epochs=1)


def test_few_cells_all_train_and_all_are_checked(baron_cells):
    clf = Classifier.tune(baron_cells[::3].copy(), "cell_type", epochs=1, steps=0, baselines=False)
    m = clf.bundle.manifest
    assert m["training"]["cells"] == m["training"]["validation"] == clf.bundle.calibration.cells == 50
    assert m["validation"]["folds"] == 3 and "all of them train" in m["validation"]["notes"][0]
    assert m["choice"]["why"] and 0 <= m["choice"]["macro_f1"] <= 1


def test_an_encoder_that_guesses_is_not_heard(baron_cells):
    "No adapter, head at random, one step: the genes are far ahead on held-out cells."
    clf = Classifier.tune(baron_cells, "cell_type", epochs=1, steps=0, batch=1000, head_init="random", lr=1e-6, baselines=False)
    assert clf.bundle.calibration.encoder_weight == 0 and "gene path answers alone" in clf.bundle.manifest["choice"]["why"]


def test_an_adapter_that_forgets_is_kept_weaker(baron_cells, tmp_path):
    "Trained with a step far too long, it loses other tissues; a quarter of it says the same of these cells."
    from scimlora.examples import pollen

    settings = dict(lr=0.02, a_rate=1.0, teach=0.0, baselines=False, seed=0)
    whole = Classifier.tune(baron_cells, "cell_type", **settings)
    kept = Classifier.tune(baron_cells, "cell_type", retention=pollen(), **settings)
    c = kept.bundle.manifest["choice"]
    curve = {r["strength"]: r for r in c["retention"]["curve"]}
    assert 0 < c["strength"] < 1 and curve[c["strength"]]["kept"] > curve[1.0]["kept"] + 0.05
    assert curve[c["strength"]]["macro_f1"] >= curve[1.0]["macro_f1"] - 0.005 and "instead of" in c["why_strength"]
    assert kept.bundle.adapter_config["lora_alpha"] == pytest.approx(whole.bundle.adapter_config["lora_alpha"] * c["strength"])
    back = Classifier.load(kept.save(tmp_path / "b"))
    assert np.abs(back.predict_proba(baron_cells) - kept.predict_proba(baron_cells)).max() < 1e-5
    assert "strength" not in whole.bundle.manifest["choice"], "nothing was measured, so nothing is claimed"


def test_a_base_of_ones_own_is_found_again(baron_cells, tmp_path, monkeypatch):
    "Tuned on a folder, opened from elsewhere with no word on where the base is; the bundle itself names no path."
    import shutil

    from scimlora.base import base_path

    monkeypatch.setenv("SCIMLORA_CACHE", str(tmp_path / "cache"))
    shutil.copytree(base_path("mini"), tmp_path / "mine" / "atlas-base")
    clf = Classifier.tune(baron_cells, "cell_type", base=tmp_path / "mine" / "atlas-base", epochs=1, steps=0, baselines=False)
    path = clf.save(tmp_path / "b")
    monkeypatch.chdir(tmp_path / "cache")
    assert np.abs(Classifier.load(path).predict_proba(baron_cells) - clf.predict_proba(baron_cells)).max() < 1e-5
    assert str(tmp_path) not in (path / "manifest.json").read_text()
    (tmp_path / "cache" / "bases.json").write_text("{")
    with pytest.raises(InputError, match="--base DIR"): Classifier.load(path)


def test_the_line_reads_the_embedding_only_where_the_base_knows_the_cells(classifier, baron_cells):
    base, y = classifier.predictor.base, np.unique(baron_cells.obs.cell_type, return_inverse=True)[1]
    cells = align_cells(baron_cells, base.genes)
    known = coverage(base, base.embed(cells.X), y)
    share, why = embedding_share(known)
    assert f"{known:.2f}" in why and np.isnan(coverage(replace(base, path=None), base.embed(cells.X), y))
    with_it, without_it = (fit_genepath(base, cells.X, y, y.max() + 1, cells.measured, share=s) for s in (0.35, 0.0))
    assert with_it.embedding.any() and not without_it.embedding.any()
    assert fit_genepath(base, cells.X, y, y.max() + 1, cells.measured).embedding.any() == (share > 0)
    assert not fit_genepath(replace(base, path=None), cells.X, y, y.max() + 1, cells.measured).embedding.any(), "a base without labels of its own cannot tell"
    choice = classifier.bundle.manifest["choice"]
    assert choice["embedding_share"] == embedding_share(choice["coverage"])[0] and classifier.bundle.genepath.embedding.any() == (choice["embedding_share"] > 0)
