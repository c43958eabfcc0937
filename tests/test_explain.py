"""Explanations and answers: genes that carried a call, sentences that rest on sources, and what is refused, by command line and HTTP."""
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient

from scimlora import Classifier, InputError
from scimlora.ask import ask
from scimlora.attribution import RULES, attribute, removal_test
from scimlora.data import align_cells
from scimlora.explain import explain
from scimlora.predict import Predictor
from scimlora.serve import create_app
from scimlora.sources import Sources, check_sentences, cited

INS = {"INS": 9.5, "IAPP": 7.0, "TTR": 4.2}


@pytest.fixture(scope="module")
def predictor(classifier): return classifier.predictor


@pytest.fixture(scope="module")
def cells(predictor, other_cells): return align_cells(other_cells, predictor.genes)


def call(cli, *args):
    ended = cli(*args)
    return ended.code, ended.out, ended.err


def rests(sentences, sources): return not check_sentences(sentences, Sources(sources))[1]


# Attribution ------------------------------------------------------------------------------------------------------------------


def test_contributions_add_up(predictor, cells):
    "To the log-odds that are served, of the called class and of any other."
    n = len(cells)
    for classes in (None, np.arange(n) % len(predictor.classes)):
        f = attribute(predictor, cells, classes)
        p = predictor.predict(cells).proba[np.arange(n), f.classes].astype(float)
        assert np.abs(f.log_odds - np.log(p / (1 - p)))[(p > 1e-6) & (p < 1 - 1e-6)].max() < 1e-2
        assert np.median(np.abs(f.values.sum(1) - (f.log_odds - f.start))) < 0.02
        assert (f.values[:, ~np.isin(predictor.genes, cells.genes)] == 0).all()


@pytest.mark.parametrize("method", ["lora", "full", "bn", "linear"])
def test_every_kind_of_adapter(baron_cells, cells, method):
    "Weights of their own, corrections of low rank, and none at all: what is walked is what is served."
    p = Classifier.tune(baron_cells, "cell_type", epochs=1, baselines=False, method=method).predictor
    some = cells[:12]
    f, proba = attribute(p, some), p.predict(some).proba
    own = proba[np.arange(12), f.classes]
    assert np.abs(1 / (1 + np.exp(-f.log_odds)) - own).max() < 1e-4


def test_an_encoder_that_answers_alone(baron_cells, cells):
    p = Classifier.tune(baron_cells, "cell_type", epochs=2, baselines=False, preset="lora").predictor
    f = attribute(p, cells[:20])
    assert np.abs(f.values.sum(1) - (f.log_odds - f.start)).max() < 0.5


def test_taking_the_genes_away(predictor, cells):
    "The genes that carried the call cost more than as many others, in nearly every cell."
    t = removal_test(predictor, cells, counts=(5,)).pivot(index="cell", columns="rule", values="lost")
    assert (t[RULES[0]] > t[RULES[2]]).mean() > 0.95 and (t[RULES[0]] > t[RULES[3]]).mean() > 0.95


def test_the_same_seed_gives_the_same_numbers(predictor, cells):
    a, b = (explain(predictor, cells[:30], seed=2) for _ in range(2))
    assert a.to_dict() == b.to_dict()


# Sentences --------------------------------------------------------------------------------------------------------------------


def test_every_sentence_cites_a_source(predictor, cells):
    for label in predictor.classes:
        e = explain(predictor, cells[:10], label)
        assert rests(e.sentences, e.sources), e.sentences
        for s in e.sentences: assert cited(s) and s.endswith("].")


def test_a_source_taken_away_takes_its_sentence_away(predictor, cells):
    e = explain(predictor, cells[:10])
    for key in e.sources:
        kept, dropped = check_sentences(e.sentences, Sources({k: v for k, v in e.sources.items() if k != key}))
        assert all(key in cited(s) for s, _ in dropped) and len(kept) + len(dropped) == len(e.sentences)


@pytest.mark.parametrize("genes", [INS, {"PRSS1": 8.0}, {"CD19": 3}, {"INS": 3, "GCG": 3}, {"ACTB": 5}])
def test_a_handful_of_genes(predictor, genes):
    e = explain(predictor, predictor.read([genes]))
    assert rests(e.sentences, e.sources) and set(e.genes.gene) <= set(genes)
    assert all(np.isfinite(v) for v in e.removal.values())
    json.dumps(e.to_dict(), allow_nan=False)


def test_answers_rest_on_their_sources(predictor):
    for q in ("Which cells make insulin?", "INS or GCG?", "what is a beta cell", "oxygen transport in blood", "xyzzy"):
        a = ask(q, predictor, engine="words")
        assert rests(a.sentences, a.sources), q
    a = ask("INS or GCG?", predictor, engine="words")
    assert a.genes == ["INS", "GCG"] and not a.terms and any("beta expresses INS most" in s for s in a.sentences)


# Command line -----------------------------------------------------------------------------------------------------------------


def test_explain_writes_what_it_says(cli, bundle_dir, cells_file, tmp_path):
    rc, out, err = call(cli, "explain", bundle_dir, cells_file, "--label", "alpha", "--out", tmp_path / "why")
    assert rc == 0, err
    e = json.loads((tmp_path / "why/explanation.json").read_text())
    assert e["label"] == "alpha" and rests(e["sentences"], e["sources"]) and e["sentences"][0] in out
    assert pd.read_csv(tmp_path / "why/genes.csv").gave.is_monotonic_decreasing
    assert {"genes.png", "terms.csv", "explanation.md"} <= {p.name for p in (tmp_path / "why").iterdir()}
    assert "are called alpha, and are explained" in err


@pytest.mark.parametrize("args, words", [
    (["--cells", "nobody"], "no cell 'nobody'"), (["--cells", ","], "no cell is named"), (["--label", "neuron"], "no label 'neuron'"),
    (["--obo", "go.obo"], "--obo and --gaf belong together"), (["--obo", "no.obo", "--gaf", "no.gaf"], "no.obo")])
def test_explain_refuses(cli, bundle_dir, cells_file, tmp_path, args, words):
    rc, out, err = call(cli, "explain", bundle_dir, cells_file, "--out", tmp_path / "why", *args)
    assert rc == 2 and words in err and err.count("\n") == 1 and not (tmp_path / "why").exists()


def test_an_ontology_cut_in_half(cli, bundle_dir, cells_file, tmp_path):
    "The term that the second one hangs from is gone, or the last stanza is not whole."
    obo = "format-version: 1.2\n\n[Term]\nid: GO:0000001\nname: one\nnamespace: biological_process\n\n[Term]\nid: GO:0000002\nname: two\nnamespace: biological_process\nis_a: GO:0000003\n\n"
    (tmp_path / "go.obo").write_text(obo), (tmp_path / "go.gaf").write_text("!gaf-version: 2.2\n")
    rc, out, err = call(cli, "explain", bundle_dir, cells_file, "--out", tmp_path / "why", "--obo", tmp_path / "go.obo", "--gaf", tmp_path / "go.gaf")
    assert rc == 2 and "GO:0000003" in err and err.count("\n") == 1


def test_ask(cli, bundle_dir):
    rc, out, err = call(cli, "ask", "Which cells express INS?", "--bundle", bundle_dir, "--engine", "words", "--json")
    a = json.loads(out)
    assert rc == 0 and a["genes"] == ["INS"] and rests(a["sentences"], a["sources"])
    for q, words in (("", "is empty"), ("why " * 300, "at most 500")):
        rc, out, err = call(cli, "ask", q)
        assert rc == 2 and words in err and err.count("\n") == 1
    rc, out, err = call(cli, "ask", "insulin", "--engine", "guess")
    assert rc == 2 and "guess" in err


# HTTP -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def http(predictor): return TestClient(create_app(predictor, log=False), raise_server_exceptions=False)


def test_http_says_what_python_says(http, predictor):
    said = http.post("/explain", json={"expression": INS}).json()
    assert said == json.loads(json.dumps(explain(predictor, predictor.read([INS])).to_dict()))
    assert http.post("/ask", json={"question": "INS?"}).json() == json.loads(json.dumps(ask("INS?", predictor, engine="words").to_dict()))


@pytest.mark.parametrize("route, body", [
    ("explain", {}), ("explain", {"expression": {}}), ("explain", {"expression": {"NOPE1": 3}}), ("explain", {"expression": INS, "label": "neuron"}),
    ("explain", {"expression": {"INS": -1}}), ("explain", {"expression": INS, "genes": 3}), ("explain", {"expression": {"INS": 0}}),
    ("ask", {}), ("ask", {"question": ""}), ("ask", {"question": "?!"}), ("ask", {"question": "x" * 501}), ("ask", {"question": 3}), ("ask", {"question": "\ud800"})])
def test_http_refuses(http, route, body):
    r = http.post(f"/{route}", content=json.dumps(body), headers={"content-type": "application/json"})
    assert r.status_code == 422 and r.json()["detail"], r.text


def test_a_question_of_anything(http):
    for q in ("<script>alert(1)</script> INS", "' OR 1=1 --", "é" * 400, "[F1] [CL:0000169] 7.7", "../../etc/passwd", "INS " * 120):
        r = http.post("/ask", json={"question": q})
        assert r.status_code == 200 and rests(r.json()["sentences"], r.json()["sources"]), q


# A language model -------------------------------------------------------------------------------------------------------------


class Inventing(BaseHTTPRequestHandler):
    "An endpoint that repeats the first finding, and makes others up."

    def do_POST(self):
        user = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][1]["content"]
        first = user.split("\n")[1]
        text = f"{first}\nIt also makes somatostatin [GO:9999999].\nIts confidence is 0.123456 [F1].\nTrust me."
        self.send_response(200), self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

    def log_message(self, *a): pass


def test_what_a_language_model_makes_up_is_dropped(predictor, cells, monkeypatch, cli, bundle_dir):
    server = HTTPServer(("127.0.0.1", 0), Inventing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("SCIMLORA_LLM_URL", f"http://127.0.0.1:{server.server_port}/v1"), monkeypatch.setenv("SCIMLORA_LLM_MODEL", "inventor")
        app = TestClient(create_app(predictor, log=False), raise_server_exceptions=False)
        said, plain = app.post("/explain", json={"expression": INS}).json(), explain(predictor, predictor.read([INS]))
        assert said["sentences"] == plain.sentences[:1] and len(said["notes"]) == 4 and "written by inventor" in said["notes"][0]
        rc, out, err = call(cli, "ask", "INS", "--bundle", bundle_dir)
        assert rc == 0 and "dropped, since there is no source GO:9999999" in out
    finally: server.shutdown(), server.server_close()
    said = app.post("/explain", json={"expression": INS}).json()
    assert said["sentences"] == plain.sentences and "cannot be reached" in said["notes"][-1]


def test_a_bundle_of_one_class_has_nothing_to_explain(predictor, cells):
    one = Predictor("blood")
    one.classes = one.classes[:1]
    with pytest.raises(InputError, match="one class only"): attribute(one, cells[:1])


# Labels and terms ---------------------------------------------------------------------------------------------------------------


def test_terms_wait_for_a_confirmation(cli, baron_cells, tmp_path):
    "A label that no name places gets candidates, which count once their status says so: in the bundle that is tuned with them."
    cells = baron_cells.copy()
    cells.obs["kind"] = cells.obs.cell_type.astype(str).replace({"delta": "somato makers"})
    cells.obs["tissue"] = "pancreas"
    cells.write_h5ad(tmp_path / "cells.h5ad")
    rc, out, err = call(cli, "terms", tmp_path / "cells.h5ad", "--label", "kind", "--out", tmp_path / "map.csv", "--engine", "words")
    assert rc == 0 and "5 of 6 labels have a term" in out, err
    t = pd.read_csv(tmp_path / "map.csv")
    assert (t[t.label != "somato makers"].status == "confirmed").all() and (t[t.label == "somato makers"].status == "suggested").all()
    tune = ["tune", tmp_path / "cells.h5ad", "--label", "kind", "--epochs", "1", "--no-baselines", "--terms", tmp_path / "map.csv"]
    rc, out, err = call(cli, *tune, "--out", tmp_path / "a")
    assert rc == 0 and "not used until their status is confirmed: somato makers" in err
    t.loc[t[t.label == "somato makers"].index[0], ["id", "status"]] = "CL:0000173", "confirmed"
    t.to_csv(tmp_path / "map.csv", index=False)
    rc, out, err = call(cli, *tune, "--out", tmp_path / "b")
    terms = [json.loads((tmp_path / b / "manifest.json").read_text())["labels"] for b in "ab"]
    assert rc == 0 and terms[0]["somato makers"] is None and terms[1]["somato makers"] == "CL:0000173" and terms[0]["beta"] == terms[1]["beta"] == "CL:0000169"


def test_fetch_ontology_refuses(cli, tmp_path):
    for args, words in ((["cheese"], "is no ontology"), (["go", "--sha256", "ab"], "is 2 files"), (["cl", "--sha256", "ab"], "64 hexadecimal digits")):
        rc, out, err = call(cli, "fetch", "ontology", *args, "--out", tmp_path / "o")
        assert rc == 2 and words in err and err.count("\n") == 1
