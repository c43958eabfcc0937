"""Every command from end to end on a few real cells, with the files, columns and keys that shared/DESIGN.md promises."""
import contextlib
import csv
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scimlora import __version__, Base, Classifier, examples
from scimlora.bundle import load_bundle, save_bundle
from scimlora.cli import main
from scimlora.core import read_json, sha256
from scimlora.genes import place_genes

CSV = ["cell_id", "cell_type", "confidence", "unassigned", "top3", "reason"]
SCORES = {"n_cells", "n_classes", "accuracy", "top3_accuracy", "macro_f1", "balanced_accuracy", "ece", "per_class"}
BASELINES = {"majority", "base_knn", "base_linear", "base_linear_bn_recalibrated", "logreg_genes"}
BUNDLE = {"manifest.json", "adapter_config.json", "adapter_model.safetensors", "head.safetensors", "label_classes.txt", "calibration.json", "genepath.safetensors", "README.md"}


def scimlora(*args):
    "Run a command that must succeed; returns what it printed."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end: main([str(a) for a in args])
    assert end.value.code == 0, err.getvalue()
    return out.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory, baron_cells, other_cells):
    "The whole way by the command line: prepare, tune, evaluate, errors, report. `said` keeps what each printed."
    d = tmp_path_factory.mktemp("run")
    ad.concat([baron_cells, other_cells]).write_h5ad(d / "atlas.h5ad")
    said = {"prepare": scimlora("prepare", d / "atlas.h5ad", "--label", "cell_type", "--donor", "library", "--out", d, "--test", 0.3)}
    said["tune"] = scimlora("tune", d / "train.h5ad", "--label", "cell_type", "--donor", "library", "--out", d / "bundle", "--epochs", 2, "--seed", 5)
    said["evaluate"] = scimlora("evaluate", d / "bundle", d / "test.h5ad", "--out", d)
    said["errors"] = scimlora("errors", d / "bundle", d / "test.h5ad", "--label", "cell_type", "--out", d)
    said["report"] = scimlora("report", d)
    return d, said


# doctor ---------------------------------------------------------------------------------------------------------------


def test_doctor_fits_on_one_screen(cells_file):
    said = scimlora("doctor", cells_file)
    assert "120 cells × 20,125 genes" in said and "counts (whole numbers)" in said
    assert "cell_type: " in said and "library: " in said and "verdict   can be used" in said
    assert len(said.splitlines()) <= 24


def test_doctor_as_json(cells_file):
    found = json.loads(scimlora("doctor", cells_file, "--json"))
    assert {"file", "cells", "genes", "ok", "error", "findings", "labels", "donors", "problems"} <= found.keys()
    assert found["file"] == "cells.h5ad" and found["cells"] == 120 and found["genes"] == 20125 and found["ok"] is True
    to = place_genes(ad.read_h5ad(cells_file).var_names, Base.load("mini").genes)
    assert found["findings"]["genes_matched"] == len(set(to[to >= 0]))
    assert found["findings"]["values_kind"] == "counts" and found["labels"]["cell_type"]["beta"] == 20


# prepare --------------------------------------------------------------------------------------------------------------


def test_prepare_holds_whole_donors_out(run):
    d, said = run
    info = read_json(d / "prepare.json")
    assert json.loads(said["prepare"]) == info["split"]
    train, test = ad.read_h5ad(d / "train.h5ad"), ad.read_h5ad(d / "test.h5ad")
    assert info["split"]["kind"] == "donor" and info["split"]["column"] == "library"
    assert not set(train.obs.library) & set(test.obs.library)
    assert set(info["split"]["groups"]["train"]) == set(train.obs.library)
    assert set(info["split"]["groups"]["test"]) == set(test.obs.library)
    assert train.n_obs + test.n_obs == 270 and info["leaks"] == {"donors": [], "identical_cells": 0}


def test_prepare_aligns_by_name_and_keeps_counts(run):
    d, _ = run
    train, atlas = ad.read_h5ad(d / "train.h5ad"), ad.read_h5ad(d / "atlas.h5ad")
    assert list(train.var_names) == Base.load("mini").genes
    for gene in ("INS", "GCG", "SST", "PRSS1"):
        assert np.array_equal(train[:, gene].X.toarray(), atlas[train.obs_names, gene].X.toarray()), gene
    assert (train.obs.cell_type.astype(str) == atlas.obs.cell_type[train.obs_names].astype(str)).all()


def test_prepare_caps_training_cells_only(cells_file, tmp_path):
    scimlora("prepare", cells_file, "--label", "cell_type", "--out", tmp_path, "--test", 0.5, "--max-per-class", 4)
    counts = {s: ad.read_h5ad(tmp_path / f"{s}.h5ad").obs.cell_type.value_counts() for s in ("train", "test")}
    assert set(counts["train"]) == {4} and set(counts["test"]) == {10}
    assert read_json(tmp_path / "prepare.json")["left_out"]["over_the_cap"] == 36


# tune -----------------------------------------------------------------------------------------------------------------


def test_tune_leaves_the_files_of_a_bundle(run):
    d, _ = run
    assert {p.name for p in (d / "bundle").iterdir()} == BUNDLE | {"baselines.safetensors"}
    for p in (d / "bundle").iterdir():
        start = p.read_bytes()[:2]
        assert start != b"PK" and not start.startswith(b"\x80"), f"{p.name} looks like a pickle"
    assert (d / "bundle" / "label_classes.txt").read_text().split() == ["acinar", "alpha", "beta", "delta", "ductal", "gamma"]


def test_tune_without_baselines(cells_file, tmp_path):
    scimlora("tune", cells_file, "--label", "cell_type", "--out", tmp_path / "b", "--epochs", 1, "--set", "steps=0", "--no-baselines")
    assert {p.name for p in (tmp_path / "b").iterdir()} == BUNDLE
    assert list(tmp_path.iterdir()) == [tmp_path / "b"]


def test_the_manifest_says_where_a_bundle_comes_from(run):
    d, _ = run
    m, mini = read_json(d / "bundle" / "manifest.json"), Base.load("mini")
    assert m["schema_version"] == 3 and m["seed"] == 5 and m["label"] == "cell_type" and m["donor"] == "library"
    assert m["base"] == {"name": "mini", "sha256": {f: sha256(mini.path / f) for f in ("encoder.ckpt", "gene_order.tsv")}}
    assert "log1p" in m["normalisation"] and "10,000" in m["normalisation"]
    assert m["split"] == read_json(d / "prepare.json")["split"], "the donors held out, by name, as prepare recorded them"
    assert list(m["labels"]) == ["acinar", "alpha", "beta", "delta", "ductal", "gamma"]
    assert {"python", "torch", "peft", "numpy", "anndata", "scimlora"} <= m["versions"].keys()
    assert m["config"]["epochs"] == 2 and m["config"]["r"] == 4 and m["config"]["alpha"] == 8
    assert "metrics" in m


def test_calibration_holds_temperature_and_thresholds(run):
    cal = read_json(run[0] / "bundle" / "calibration.json")
    assert {"temperature", "min_confidence", "max_unlike", "conformal"} <= cal.keys()
    assert cal["temperature"] > 0 and 0 <= cal["min_confidence"] <= 1 and cal["cells"] > 0


def test_the_model_card_has_front_matter(run):
    card = (run[0] / "bundle" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "\nlibrary_name: peft\n" in card and "\nbase_model: mini\n" in card
    assert "library" in card and "`ductal`" in card


def test_tune_takes_every_option(cells_file, tmp_path):
    options = ["--r", 4, "--alpha", 8, "--dropout", 0.1, "--lr", 0.005, "--epochs", 1, "--batch", 32, "--targets", "no-first", "--balance", 0.5, "--units", "counts"]
    scimlora("tune", cells_file, "--label", "cell_type", "--out", tmp_path / "b", *options, "--no-baselines", "--title", "Islets")
    m, adapter = read_json(tmp_path / "b" / "manifest.json"), read_json(tmp_path / "b" / "adapter_config.json")
    assert {k: m["config"][k] for k in ("r", "alpha", "dropout", "lr", "epochs", "batch", "targets", "balance")} == dict(
        r=4, alpha=8, dropout=0.1, lr=0.005, epochs=1, batch=32, targets="no-first", balance=0.5)
    assert adapter["r"] == 4 and adapter["lora_alpha"] == 8 and "network.0.1" not in adapter["target_modules"]
    assert m["title"] == "Islets"


def test_the_original_recipe(cells_file, tmp_path):
    scimlora("tune", cells_file, "--label", "cell_type", "--out", tmp_path / "b", "--recipe", "original", "--epochs", 1, "--no-baselines")
    c = read_json(tmp_path / "b" / "manifest.json")["config"]
    assert (c["r"], c["alpha"], c["dropout"], c["lr"], c["batch"], c["epochs"]) == (8, 16, 0.05, 1e-4, 64, 1)


# evaluate, errors, report ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(run, tmp_path_factory):
    "An evaluation with cells of another tissue, written into a copy of the bundle."
    from scimlora.examples import pollen

    d, out = run[0], tmp_path_factory.mktemp("recorded")
    shutil.copytree(d / "bundle", out / "bundle")
    pollen().write_h5ad(out / "brain.h5ad")
    scimlora("evaluate", out / "bundle", d / "test.h5ad", "--out", out, "--retention", out / "brain.h5ad", "--record")
    return out


def test_forgetting_is_measured_on_cells_of_other_tissues(recorded):
    out = recorded
    f = read_json(out / "metrics.json")["forgetting"]
    assert f["source"] == "brain.h5ad" and f["cells"] == 301 and [r["alpha"] for r in f["curve"]] == [0, 0.25, 0.5, 0.75, 1]
    assert f["curve"][0]["neighbour_overlap"] == 1 > f["curve"][-1]["neighbour_overlap"] and 1 - f["curve"][0]["cosine"] < 1e-6
    assert f["curve"][-1]["target_macro_f1"] == pytest.approx(read_json(out / "metrics.json")["macro_f1"], abs=1e-9)
    assert (out / "forgetting.png").read_bytes()[:4] == b"\x89PNG" and (out / "forgetting.csv").exists()


def test_an_evaluation_is_recorded_in_the_bundle(run, recorded, tmp_path):
    m, table = read_json(recorded / "bundle" / "manifest.json"), pd.read_csv(recorded / "cells.csv")
    kept, metrics = m["metrics"], read_json(recorded / "metrics.json")
    assert m["metrics_on"] == "test.h5ad" and {k: kept[k] for k in metrics} == metrics and f"| macro_f1 | {metrics['macro_f1']:.3f} |" in (recorded / "bundle" / "README.md").read_text()
    assert np.trace(kept["confusion"]["cells"]) == (table.label == table.cell_type).sum() and sum(b["cells"] for b in kept["reliability"]) == metrics["n_cells"]
    same = ("adapter_model.safetensors", "head.safetensors", "genepath.safetensors", "baselines.safetensors", "calibration.json")
    assert all((recorded / "bundle" / f).read_bytes() == (run[0] / "bundle" / f).read_bytes() for f in same if (run[0] / "bundle" / f).exists())


def test_nothing_is_recorded_in_what_the_package_brings(run, cli, tmp_path):
    ended = cli("evaluate", "blood", run[0] / "test.h5ad", "--out", tmp_path / "run", "--record")
    assert ended.code == 2 and "comes with the package" in ended.err and ended.err.count("\n") == 1


def test_prediction_sets_hold_more_the_more_is_wanted(run):
    m = read_json(run[0] / "metrics.json")
    s = m["prediction_sets"]
    assert list(s) == ["0.95", "0.90", "0.80"] and s["0.95"]["coverage"] >= s["0.90"]["coverage"] >= s["0.80"]["coverage"] >= m["accuracy"]
    assert s["0.95"]["labels"] >= s["0.80"]["labels"] >= 1 and 0 <= m["brier"] <= 2


def test_metrics_have_the_promised_keys(run):
    m = read_json(run[0] / "metrics.json")
    assert SCORES | {"baselines", "retention", "trainable_parameters", "trainable_fraction", "seconds"} <= m.keys()
    assert set(m["baselines"]) == BASELINES
    for name, b in m["baselines"].items(): assert SCORES <= b.keys(), name
    for scores in (m, *m["baselines"].values()):
        for c in scores["per_class"].values(): assert set(c) == {"precision", "recall", "f1", "support"}
    assert m["retention"]["off_difference"] == 0
    assert 0 < m["trainable_fraction"] < 0.1 and m["trainable_parameters"] > 1000


def test_metrics_are_those_of_the_cells(run):
    "Computed again from what `annotate` says of the same cells, by scikit-learn."
    from sklearn.metrics import balanced_accuracy_score, f1_score

    d, _ = run
    scimlora("annotate", d / "bundle", d / "test.h5ad", "--out", d / "test.csv")
    said, true, m = pd.read_csv(d / "test.csv").cell_type, ad.read_h5ad(d / "test.h5ad").obs.cell_type.to_numpy(str), read_json(d / "metrics.json")
    assert m["n_cells"] == len(true) and m["n_classes"] == 6
    assert m["accuracy"] == pytest.approx((said == true).mean())
    assert m["macro_f1"] == pytest.approx(f1_score(true, said, average="macro"))
    assert m["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(true, said))
    train = ad.read_h5ad(d / "train.h5ad").obs.cell_type.value_counts()
    assert m["baselines"]["majority"]["accuracy"] == pytest.approx((true == train.index[0]).mean())
    assert m["accuracy"] > 0.9 > m["baselines"]["majority"]["accuracy"]


def test_evaluate_writes_tables_and_plots(run):
    d, said = run
    for name in ("comparison", "confusion", "reliability", "confused_pairs"): assert (d / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    table = pd.read_csv(d / "comparison.csv", index_col=0)
    assert set(table.index) == BASELINES | {"lora", "gene_path", "scimlora"}
    assert table.loc["scimlora", "accuracy"] == pytest.approx(read_json(d / "metrics.json")["accuracy"])
    assert pd.read_csv(d / "confusion.csv", index_col=0).to_numpy().sum() == read_json(d / "metrics.json")["n_cells"]
    for name in BASELINES | {"lora", "gene_path", "scimlora"}: assert name in said["evaluate"], name


def test_errors_are_those_of_the_cells(run):
    d, said = run
    e, m = read_json(d / "errors.json"), read_json(d / "metrics.json")
    assert e["n_cells"] == m["n_cells"] and e["n_wrong"] == round(m["n_cells"] * (1 - m["accuracy"]))
    assert said["errors"].startswith(f"{e['n_wrong']} of {e['n_cells']} cells are called wrongly")
    assert (d / "confused_pairs.csv").exists() and len(pd.read_csv(d / "hardest_cells.csv")) == min(25, e["n_cells"])


def test_the_report_is_written_in_markdown_and_html(run):
    d, said = run
    assert said["report"].strip() == str(d / "Design_Analysis_Report.md")
    text, page = ((d / f"Design_Analysis_Report.{e}").read_text(encoding="utf-8") for e in ("md", "html"))
    m = read_json(d / "metrics.json")
    assert f"{m['macro_f1']:.3f}" in text and f"{m['macro_f1']:.3f}" in page
    for name in BASELINES: assert name in text, name
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=.https?:", page), "the report opens without a network"


# annotate -------------------------------------------------------------------------------------------------------------


def test_annotate_to_csv(bundle_dir, cells_file, other_cells, classifier, tmp_path):
    before = sha256(cells_file)
    said = scimlora("annotate", bundle_dir, cells_file, "--out", tmp_path / "new folder" / "labels.csv")
    assert said.startswith(f"{tmp_path}/new folder/labels.csv: 120 cells, ")
    table, p = pd.read_csv(tmp_path / "new folder" / "labels.csv", keep_default_na=False), classifier.predictor.predict(other_cells)
    assert list(table.columns) == CSV
    assert list(table.cell_id) == list(other_cells.obs_names)
    assert list(table.cell_type) == list(p.label) and np.abs(table.confidence - p.confidence).max() <= 5.1e-5
    assert table.unassigned.dtype == bool and list(table.unassigned) == list(p.unassigned)
    assert ((table.reason != "") == table.unassigned).all()
    for text, label, confidence in zip(table.top3, table.cell_type, table.confidence):
        pairs = [t.rsplit(":", 1) for t in text.split(";")]
        assert len(pairs) == 3 and pairs[0][0] == label and abs(float(pairs[0][1]) - confidence) < 1e-3
        assert [float(v) for _, v in pairs] == sorted((float(v) for _, v in pairs), reverse=True)
    assert sha256(cells_file) == before


def test_annotate_to_h5ad(bundle_dir, cells_file, other_cells, classifier, tmp_path):
    scimlora("annotate", bundle_dir, cells_file, "--out", tmp_path / "out.h5ad")
    a, p = ad.read_h5ad(tmp_path / "out.h5ad"), classifier.predictor.predict(other_cells)
    new = ["scimlora_label", "scimlora_confidence", "scimlora_unassigned", "scimlora_top3"]
    assert set(new) | {"scimlora_reason"} == set(a.obs) - set(other_cells.obs)
    assert list(a.obs.scimlora_label.astype(str)) == list(p.label) and list(a.obs.scimlora_label.cat.categories) == classifier.classes_
    assert np.abs(a.obs.scimlora_confidence - p.confidence).max() < 1e-5 and a.obs.scimlora_unassigned.dtype == bool
    assert a.obsm["X_scimlora"].shape == (120, 128) and np.abs(a.obsm["X_scimlora"] - p.embedding).max() < 1e-5
    assert np.abs(np.linalg.norm(a.obsm["X_scimlora"], axis=1) - 1).max() < 1e-5
    made = json.loads(a.uns["scimlora"])
    assert {"base", "normalisation", "input", "calibration", "classes", "versions"} <= made.keys() and made["base"]["name"] == "mini"
    # What was there is as it was.
    assert (a.X != other_cells.X).nnz == 0 and list(a.var_names) == list(other_cells.var_names)
    pd.testing.assert_frame_equal(a.obs[list(other_cells.obs)], other_cells.obs, check_categorical=False, check_dtype=False)


def test_python_says_what_the_command_line_says(bundle_dir, cells_file, other_cells, tmp_path):
    scimlora("annotate", bundle_dir, cells_file, "--out", tmp_path / "out.h5ad")
    by_cli, by_python = ad.read_h5ad(tmp_path / "out.h5ad"), other_cells.copy()
    assert Classifier.load(bundle_dir).annotate(by_python) is None
    for c in ("scimlora_label", "scimlora_unassigned", "scimlora_top3", "scimlora_reason"):
        assert list(by_cli.obs[c].astype(str)) == list(by_python.obs[c].astype(str)), c
    assert np.abs(by_cli.obsm["X_scimlora"] - by_python.obsm["X_scimlora"]).max() < 1e-5


def test_another_laboratory_and_another_technology(bundle_dir, tmp_path):
    "Tuned on 150 of Baron's cells (inDrop counts), asked about Enge's (Smart-seq2, CPM, other gene order)."
    path = examples.shared_dir() and examples.shared_dir() / "pancreas_enge2017_cpm.h5ad"
    if not (path and path.exists()): pytest.skip("pancreas_enge2017_cpm.h5ad is not here: set SCIMLORA_DATA to the folder that holds it")
    said = scimlora("annotate", bundle_dir, path, "--out", tmp_path / "out.csv")
    assert "279 cells" in said
    table = pd.read_csv(tmp_path / "out.csv").set_index("cell_id")
    true = ad.read_h5ad(path).obs.cell_type.astype(str)
    shared = true[true.isin(["alpha", "beta", "delta", "gamma", "acinar", "ductal"])]
    assert len(shared) > 150
    assert (table.cell_type[shared.index] == shared).mean() > 0.8
    strangers = true[~true.isin(set(shared))]
    assert table.unassigned[strangers.index].mean() > table.unassigned[shared.index].mean(), "types never taught are doubted more often"


# Help, weight, and a process that is killed -----------------------------------------------------------------------------

COMMANDS = ["doctor", "prepare", "tune", "merge", "evaluate", "errors", "report", "annotate", "serve", "demo", "pretrain"]


def test_help_lists_every_command():
    said = scimlora("--help")
    for c in COMMANDS: assert re.search(rf"^\s+{c}\s+\S", said, re.M), c


def test_version():
    assert scimlora("--version") == f"scimlora {__version__}\n"
    assert "--version" in scimlora("--help")


@pytest.mark.parametrize("args", [[], ["space"]])
def test_nothing_asked_for_shows_the_help(args, capsys):
    with pytest.raises(SystemExit) as end: main(args)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("Usage: ") and len(said.splitlines()) > 5


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name):
    said = scimlora(name, "--help")
    assert said.startswith("Usage: ") and f" {name} " in said.splitlines()[0]
    options = re.findall(r"^\s+(--[a-z-]+)(.*(?:\n {20,}.*)*)", said, re.M)
    assert options
    for option, text in options: assert re.search(r"[a-z]{3}", re.sub(r"INTEGER|TEXT|FLOAT|PATH|\[.*?\]|--\S+", "", text)), f"{option} says nothing"


def test_the_installed_command_runs(cli_process, bundle_dir, cells_file, tmp_path):
    "In a process of its own, with notes in its standard error and nothing else."
    ended = cli_process("annotate", bundle_dir, cells_file, "--out", tmp_path / "out.csv")
    assert ended.code == 0 and ended.out.count("\n") == 1 and all(line.startswith("note: ") for line in ended.err.splitlines())
    with open(tmp_path / "out.csv", newline="") as f: assert next(csv.reader(f)) == CSV


def test_annotating_and_serving_need_no_heavy_package(bundle_dir, cells_file, tmp_path):
    code = f"""
import sys
from scimlora.predict import Predictor
from scimlora.serve import answer, create_app
p = Predictor({str(bundle_dir)!r})
create_app(p)
assert answer(p, [{{"INS": 900, "IAPP": 50, "ADCYAP1": 3}}])[0]["cell_type"] == "beta"
from scimlora.cli import main
try: main(["annotate", {str(bundle_dir)!r}, {str(cells_file)!r}, "--out", {str(tmp_path / "o.csv")!r}])
except SystemExit as e: assert e.code == 0
print(*[m for m in ("torch", "peft", "transformers", "scanpy", "scimilarity", "sklearn", "matplotlib", "seaborn", "numba") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == ""


def test_importing_the_package_is_quick():
    "The best of three, as the machine may be busy."
    def once():
        done = subprocess.run([sys.executable, "-X", "importtime", "-c", "import scimlora, sys; print('torch' in sys.modules)"], capture_output=True, text=True)
        assert done.stdout.strip() == "False"
        return int(re.findall(r"\|\s+(\d+) \| scimlora$", done.stderr, re.M)[0]) / 1e6

    assert min(once() for _ in range(3)) < 0.3


def _save_forever(source, target):
    bundle = load_bundle(source)
    for i in range(10**6):
        bundle.manifest["title"] = f"version {i}"
        save_bundle(bundle, target)


def test_killed_while_saving_leaves_a_whole_bundle_or_none(bundle_dir, tmp_path):
    "kill -9 at twelve random moments of a process that saves one bundle over another without a pause."
    ctx, moment, found, cut = multiprocessing.get_context("forkserver"), random.Random(0), 0, 0
    ctx.set_forkserver_preload(["scimlora.cli", "scimlora.classifier", "anndata"])
    want = {p.name: sha256(p) for p in bundle_dir.iterdir() if p.suffix == ".safetensors"}
    for round in range(12):
        target = tmp_path / f"round{round}" / "bundle"
        target.parent.mkdir()
        p = ctx.Process(target=_save_forever, args=(bundle_dir, target))
        p.start()
        deadline = time.monotonic() + 60
        while not target.exists() and time.monotonic() < deadline: time.sleep(0.002)
        time.sleep(moment.uniform(0, 0.1))
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        cut += any(f != target for f in target.parent.iterdir())
        if target.exists():
            found += 1
            assert re.fullmatch(r"version \d+", load_bundle(target).manifest["title"])
            assert {f.name for f in target.iterdir()} == {f.name for f in bundle_dir.iterdir()}
            assert {n: sha256(target / n) for n in want} == want
        # What the killed process left beside it is in nobody's way.
        save_bundle(load_bundle(bundle_dir), target)
        assert load_bundle(target).classes
    assert found, "in no round was there a bundle: the test did not test"
    assert cut, "in no round was a save cut off: the test did not test"


@pytest.mark.parametrize("seconds", [0.2, 0.8])
def test_tune_killed_leaves_the_old_bundle(seconds, command, bundle_dir, cells_file, tmp_path):
    shutil.copytree(bundle_dir, tmp_path / "bundle")
    p = subprocess.Popen([command, "tune", cells_file, "--label", "cell_type", "--out", tmp_path / "bundle", "--epochs", "2000", "--no-baselines"])
    time.sleep(2 + seconds)
    assert p.poll() is None
    p.kill()
    p.wait()
    assert {f.name: sha256(f) for f in (tmp_path / "bundle").iterdir()} == {f.name: sha256(f) for f in bundle_dir.iterdir()}
    assert list(tmp_path.iterdir()) == [tmp_path / "bundle"]
