"""What `errors` and `report` say of a run: every statement held against the cells, and sections for what is missing."""
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from scimlora.causes import CAUSES, Scored, doublet_scores, label_issues, probable_causes, type_profiles
from scimlora.core import read_json
from scimlora.data import Alignment, align_cells, log1p_cp10k
from scimlora.ontology import find_term, load_ontology


@pytest.fixture(scope="module")
def strangers(other_cells):
    "Test cells of the six types, and 30 of a type that the classifier was never taught."
    import anndata as ad

    from conftest import some_cells

    new = some_cells(30, ("activated_stellate",))
    cells = ad.concat([other_cells, new])
    cells.obs["donor"] = np.array(["d1", "d2", "d3"])[np.arange(cells.n_obs) % 3]
    cells.obs["tissue"] = "pancreas"
    return cells


@pytest.fixture(scope="module")
def run(strangers, bundle_dir, tmp_path_factory):
    "A run's folder after evaluate, errors and report; `said` is what errors printed."
    import contextlib
    import io

    from scimlora.cli import main

    d = tmp_path_factory.mktemp("run")
    shutil.copytree(bundle_dir, d / "bundle")
    strangers.write_h5ad(d / "test.h5ad")
    for args in (["evaluate", d / "bundle", d / "test.h5ad", "--out", d], ["errors", d / "bundle", d / "test.h5ad", "--donor", "donor", "--out", d], ["report", d]):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end: main([str(a) for a in args])
        assert not end.value.code
        if args[0] == "errors": said = out.getvalue()
    return d, said


@pytest.fixture(scope="module")
def called(strangers, classifier):
    return classifier.predictor.predict(strangers)


def test_every_file_is_there_and_agrees_with_the_cells(run, strangers, called):
    d, said = run
    e, label = read_json(d / "errors.json"), strangers.obs.cell_type.to_numpy(str)
    taught = label != "activated_stellate"
    counts, shares = (pd.read_csv(d / f"confusion_{n}.csv", index_col=0) for n in ("counts", "normalised"))
    assert counts.to_numpy().sum() == taught.sum() == e["n_cells"]
    for a in counts.index:
        for b in counts.columns: assert counts.loc[a, b] == ((label == a) & (called.label == b)).sum(), (a, b)
    assert np.allclose(shares, counts / counts.sum(1).clip(lower=1).to_numpy()[:, None])
    assert e["n_wrong"] == (label != called.label)[taught].sum() and said.startswith(f"{e['n_wrong']} of {e['n_cells']} cells {'is' if e['n_wrong'] == 1 else 'are'} called wrongly")
    for name in ("confused_pairs", "confusion_clustered", "causes", "umap"): assert (d / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    umap = pd.read_csv(d / "umap.csv")
    assert len(umap) == taught.sum() and np.isfinite(umap[["base_1", "base_2", "adapted_1", "adapted_2"]]).all().all()


def test_each_donor_and_each_type_has_its_row(run, strangers, called):
    d, _ = run
    label, right = strangers.obs.cell_type.to_numpy(str), strangers.obs.cell_type.to_numpy(str) == called.label
    taught = label != "activated_stellate"
    donors, types = pd.read_csv(d / "per_donor.csv").set_index("donor"), pd.read_csv(d / "per_type_errors.csv").set_index("label")
    assert set(donors.index) == {"d1", "d2", "d3"} and set(types.index) == set(label[taught])
    for name, t in donors.iterrows():
        rows = taught & (strangers.obs.donor == name).to_numpy()
        assert t.cells == rows.sum() and t.accuracy == pytest.approx(right[rows].mean()) and t.confidence == pytest.approx(called.confidence[rows].mean())
        assert t.unassigned == called.unassigned[rows].sum()
    for name, t in types.iterrows(): assert t.accuracy == pytest.approx(right[label == name].mean()), name


def test_types_never_taught_have_a_table_of_their_own(run, strangers, called):
    d, said = run
    row, = read_json(d / "errors.json")["unseen"]
    rows = (strangers.obs.cell_type == "activated_stellate").to_numpy()
    assert row["label"] == "activated_stellate" and row["cells"] == 30
    assert row["confidence"] == pytest.approx(called.confidence[rows].mean()) and row["unassigned"] == pytest.approx(called.unassigned[rows].mean())
    assert row["called_share"] == pytest.approx((called.label[rows] == row["called"]).mean()) and "activated_stellate, never taught: 30 cells" in said


def test_each_hard_cell_has_one_cause_with_numbers(run):
    d, _ = run
    hard, counted = pd.read_csv(d / "hardest_cells.csv"), pd.read_csv(d / "causes.csv")
    assert set(hard.cause) <= set(CAUSES) and hard.evidence[hard.cause != "unlike every class"].str.contains(r"\d").all()
    assert counted.wrong_cells.sum() == read_json(d / "errors.json")["n_wrong"] and counted.right_share.sum() == pytest.approx(1)
    wrong = hard[hard.wrong]
    assert list(wrong.index) == list(range(len(wrong))) and wrong.confidence.is_monotonic_decreasing


def test_confident_learning_finds_planted_label_noise(other_cells, classifier):
    p = classifier.predictor.predict(other_cells)
    label = other_cells.obs.cell_type.to_numpy(object).copy()
    rows = np.flatnonzero((p.label == label) & (p.confidence > .8))[::8]
    truth = label[rows].copy()
    label[rows] = [next(c for c in p.classes if c != v) for v in truth]
    found, limits = label_issues(p.proba, label, p.classes)
    assert (found[rows] == truth).mean() > .8 and limits.keys() == set(label)
    j = p.classes.index("beta")
    assert limits["beta"] == pytest.approx(p.proba[label == "beta", j].mean())


def test_doublets_of_real_cells_score_higher(other_cells, classifier):
    genes = classifier.predictor.genes
    counts, label = Alignment(other_cells, genes).linear(slice(0, other_cells.n_obs)), other_cells.obs.cell_type.to_numpy(object)
    X, rng = log1p_cp10k(counts), np.random.default_rng(0)
    i, j = rng.integers(0, len(label), (2, 200))
    i, j = i[label[i] != label[j]], j[label[i] != label[j]]
    profiles = type_profiles(X, label)
    one, two = doublet_scores(X, profiles), doublet_scores(log1p_cp10k(counts[i] + counts[j]), profiles)
    assert two.gain.median() > one.gain.quantile(.95) and two.doublet.mean() > 5 * one.doublet.mean()


def test_totals_decide_low_counts_and_donors_decide_donor_effects(other_cells, classifier):
    cells = align_cells(other_cells, classifier.predictor.genes)
    label = other_cells.obs.cell_type.to_numpy(object)
    classes, n = classifier.classes_, len(label)
    proba = np.full((n, len(classes)), .05)
    donor = np.array(["a", "b"], object)[np.arange(n) % 2]
    called = np.where((label == "alpha") & (donor == "b"), "beta", label)         # donor b's alpha cells are wrong, all of them
    proba[np.arange(n), [classes.index(c) for c in called]] = .6
    total = np.full(n, 5000.0)
    s = Scored(cells, label, proba / proba.sum(1, keepdims=True), classes, np.full(n, "", object), donor, total)
    t = probable_causes(s)
    blamed = t[(t.label == "alpha") & (t.donor == "b")]
    assert (blamed.donor_q < .05).all() and (blamed.donor_rate == 1).all() and (t[(t.label == "alpha") & (t.donor == "a")].donor_q > .5).all()
    assert (t.cause != "low counts").all()
    s.total = np.where(np.arange(n) == np.flatnonzero(label == "beta")[0], 10.0, total)
    assert (probable_causes(s).cause == "low counts").sum() == 1


def test_labels_find_their_terms_and_a_file_of_ones_own_wins(run, cli, tmp_path):
    d, _ = run
    cl, terms = load_ontology(), read_json(d / "errors.json")["ontology"]["terms"]
    assert terms["beta"] == find_term("beta", "pancreas")[0] and cl.names[terms["alpha"]] == "pancreatic A cell"
    (tmp_path / "mine.csv").write_text("label,id\nbeta,CL:0000540\n", encoding="utf-8")
    assert cli("errors", d / "bundle", d / "test.h5ad", "--terms", tmp_path / "mine.csv", "--out", tmp_path / "out").code == 0
    o = read_json(tmp_path / "out" / "errors.json")["ontology"]
    assert o["terms"]["beta"] == "CL:0000540" and o["terms"]["alpha"] == terms["alpha"]
    for p in o["pairs"]: assert p["distance"] == cl.distance(o["terms"][p["label"]], o["terms"][p["predicted"]]) and p["relation"] == cl.relation(o["terms"][p["predicted"]], o["terms"][p["label"]])
    (tmp_path / "mine.csv").write_text("label,id\nbeta,CL:1\n", encoding="utf-8")
    ended = cli("errors", d / "bundle", d / "test.h5ad", "--terms", tmp_path / "mine.csv", "--out", tmp_path / "bad")
    assert ended.code == 2 and "is no cell type" in ended.err and not (tmp_path / "bad").exists()


def test_without_counts_and_donors_it_says_what_could_not_be_seen(run, strangers, cli, tmp_path):
    d, _ = run
    logged = strangers[strangers.obs.cell_type != "activated_stellate"].copy()
    logged.X = log1p_cp10k(logged.X)
    logged.write_h5ad(tmp_path / "log.h5ad")
    ended = cli("errors", d / "bundle", tmp_path / "log.h5ad", "--out", tmp_path / "out")
    e = read_json(tmp_path / "out" / "errors.json")
    assert ended.code == 0 and "no counts" in ended.err and "no donors were named" in ended.err
    assert e["donors"] == [] and e["unseen"] == [] and not (tmp_path / "out" / "per_donor.csv").exists()


def test_a_donor_column_that_is_not_there(run, cli, tmp_path):
    d, _ = run
    ended = cli("errors", d / "bundle", d / "test.h5ad", "--donor", "patient", "--out", tmp_path / "out")
    assert ended.code == 2 and "no donor column 'patient'" in ended.err


def test_the_report_has_nine_sections_and_its_numbers_are_the_files(run):
    d, _ = run
    text, page, m = (d / "Design_Analysis_Report.md").read_text(encoding="utf-8"), (d / "Design_Analysis_Report.html").read_text(encoding="utf-8"), read_json(d / "metrics.json")
    assert re.findall(r"^## (\d)\. ", text, re.M) == [str(i) for i in range(1, 10)]
    assert f"{m['macro_f1']:.3f}" in text and f"{m['ece']:.3f}" in text and f"{m['brier']:.3f}" in text
    assert read_json(d / "bundle" / "manifest.json")["base"]["sha256"]["encoder.ckpt"] in text
    assert all((d / name).exists() for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)) and 'src="data:image/png;base64,' in page
    assert not re.search(r'src="(?!data:)', page), "the page is one file"
    card = (d / "bundle" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: peft") and f"| accuracy | {m['accuracy']:.3f} |" in card and "activated_stellate, never taught" in card


@pytest.mark.parametrize("gone, command", [("metrics.json", "scimlora evaluate"), ("errors.json", "scimlora errors")])
def test_the_report_says_which_command_makes_what_is_missing(run, cli, tmp_path, gone, command):
    shutil.copytree(run[0], tmp_path / "run")
    (tmp_path / "run" / gone).unlink()
    assert cli("report", tmp_path / "run").code == 0
    text = (tmp_path / "run" / "Design_Analysis_Report.md").read_text(encoding="utf-8")
    assert f"There is no `{gone}` in the run's folder; `{command}` makes it." in text and text.count("\n## ") == 9


def test_the_report_of_a_bundle_with_paths_and_without_baselines(run, cli, tmp_path):
    from scimlora.core import write_json

    shutil.copytree(run[0], tmp_path / "run")
    m = read_json(tmp_path / "run" / "metrics.json")
    one = {k: m[k] for k in ("accuracy", "top3_accuracy", "macro_f1", "balanced_accuracy", "ece")}
    write_json(tmp_path / "run" / "metrics.json", m | dict(baselines={}, best_baseline=None, paths={"lora": one | dict(macro_f1=.123), "gene_path": one | dict(macro_f1=.456)}))
    (tmp_path / "run" / "bundle" / "baselines.safetensors").unlink(missing_ok=True)
    assert cli("report", tmp_path / "run").code == 0
    text = (tmp_path / "run" / "Design_Analysis_Report.md").read_text(encoding="utf-8")
    assert "no baseline was fitted" in text and "--no-baselines" in text
    assert re.search(r"\| lora \|.* 0\.123 ", text) and re.search(r"\| gene_path \|.* 0\.456 ", text)
