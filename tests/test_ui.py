"""The page, by Streamlit's own test driver: every tab, and a plain sentence for every failure."""
import http.server
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import get_args

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import yaml

pytest.importorskip("streamlit", reason="the page needs streamlit: pip install 'scimlora[ui]'")
from streamlit.testing.v1 import AppTest

from scimlora import Predictor
from scimlora.base import BASES
from scimlora.core import read_json, write_json
from scimlora.page import preset_text, presets

UI = Path(__file__).resolve().parent.parent / "ui"
SETTINGS = ("API_URL", "API_KEY", "API_TIMEOUT", "SCIMLORA_BUNDLE")


@pytest.fixture
def page(monkeypatch, tmp_path):
    "Open the page with the given settings, in an empty folder."
    for name in SETTINGS: monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def opened(secrets=None, link=None, **settings):
        for name, value in settings.items(): monkeypatch.setenv(name, str(value))
        at = AppTest.from_file(str(UI / "src" / "streamlit_app.py"), default_timeout=90)
        for name, value in (secrets or {}).items(): at.secrets[name] = value
        for name, value in (link or {}).items(): at.query_params[name] = value
        return at.run()

    return opened


@pytest.fixture
def blood(page):
    "The page as it starts with nothing configured."
    return page(link=dict(layout="PCA"))  # UMAP takes seconds to start, and one test is enough for it


@pytest.fixture
def pancreas(page):
    "The page with a model that knows pancreas: the embedded base with its own labels."
    return page(SCIMLORA_BUNDLE="mini", link=dict(layout="PCA"))


@pytest.fixture(scope="module")
def service():
    "The real service on a free port; takes limits, returns its address and a function that stops it."
    import uvicorn

    from scimlora.serve import create_app

    running = []

    def start(**limits):
        server = uvicorn.Server(uvicorn.Config(create_app("mini", **limits), port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started: time.sleep(.05)
        running.append((server, thread))
        port = server.servers[0].sockets[0].getsockname()[1]

        def stop():
            server.should_exit = True
            thread.join(20)

        return f"http://127.0.0.1:{port}", stop

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(20)


@pytest.fixture
def stand_in():
    "A server that answers with one status and body, or one for each route, after a pause, and cuts off files with another; `seen` keeps the headers."
    servers = []

    def start(status, body="{}", pause=0.0, to_files=None):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.seen.append(dict(self.headers))
                time.sleep(pause)
                self.send_response(status)
                self.end_headers()
                self.wfile.write((body if isinstance(body, str) else body[self.path]).encode())

            def do_POST(self):
                self.send_response(to_files)  # without reading the file, as a service does that counts what arrives
                self.end_headers()

            def log_message(self, *args): pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.seen = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", server.seen

    yield start
    for s in servers: s.shutdown()


def press(at, label):
    next(b for b in at.button if b.label == label).click()
    return at.run()


def ask(at, text):
    at.text_area(key="genes_text").set_value(text)
    return press(at, "What cell is this?")


EXAMPLES = presets(Predictor("blood").classes)
B_CELL = preset_text(EXAMPLES["B cell"])


def upload(at, data, name="cells.h5ad"):
    at.file_uploader[0].upload(name, data, "application/octet-stream")
    return at.run()


def as_bytes(adata, tmp_path):
    adata.write_h5ad(tmp_path / "made.h5ad")
    return (tmp_path / "made.h5ad").read_bytes()


def said(at):
    "Everything that the page shows in words."
    kinds = (at.error, at.warning, at.info, at.success, at.caption, at.markdown)
    return "\n".join(e.value for kind in kinds for e in kind)


def errors(at):
    "The errors that the page shows. None may look like a program's."
    assert not at.exception, at.exception
    texts = [e.value for e in at.error]
    assert not any(re.search(r"Traceback|\wError\b|/tmp|upload\.h5ad", t) for t in texts), texts
    return texts


# Which model --------------------------------------------------------------------------------------------------------

PAGES = ["Type genes", "Annotate a file", "Ask in words", "How good is it", "About the model"]


def test_it_starts_with_nothing_configured(blood):
    assert [t.label for t in blood.tabs] == PAGES and "Blood and immune cells" in said(blood) and not errors(blood)


@pytest.mark.parametrize("damage, word", [
    (lambda d: shutil.rmtree(d), "no bundle"),
    (lambda d: (d / "head.safetensors").unlink(), "lacks head.safetensors"),
    (lambda d: (d / "head.safetensors").write_bytes(b"short"), "damaged or cut short"),
    (lambda d: write_json(d / "manifest.json", read_json(d / "manifest.json") | {"base": {"name": "mini", "sha256": {"encoder.ckpt": "other"}}}),
     "is another")])
def test_a_bundle_that_cannot_be_opened(page, tmp_path, damage, word):
    shutil.copytree(BASES / "blood", tmp_path / "bundle")
    damage(tmp_path / "bundle")
    at = page(SCIMLORA_BUNDLE="bundle")
    assert word in errors(at)[0] and errors(at)[0].startswith("The model cannot be opened")


# Type genes ---------------------------------------------------------------------------------------------------------

def test_genes_become_a_label_that_stays(blood):
    at = ask(blood, B_CELL)
    assert at.success[0].value.startswith("**B cell**") and "genes used" in said(at) and not errors(at)
    at.run()
    assert at.success[0].value.startswith("**B cell**")
    at.text_area(key="genes_text").set_value("PPBP 6.5").run()
    assert "as they were when you last asked" in said(at) and at.success[0].value.startswith("**B cell**")


@pytest.mark.parametrize("text", ["PPBP PF4 GP9 ITGA2B TUBB1", "gene,value\nPPBP,6\nPF4,5\nGP9,3\nTUBB1,4", "PPBP\t800\nPF4\t300\nGP9\t20\nTUBB1\t80"])
def test_genes_as_people_paste_them(blood, text):
    at = ask(blood, text)
    assert at.session_state["typed"][0]["cell_type"] == "platelet" and not errors(at)


def test_a_picked_gene_joins_the_table(blood):
    at = blood
    at.text_area(key="genes_text").set_value("CD19 1.4").run()
    at.multiselect(key="picked").select("MS4A1").run()
    assert at.text_area(key="genes_text").value == "CD19 1.4\nMS4A1" and at.multiselect(key="picked").value == []


def test_examples_have_their_own_label_first(blood):
    at = blood
    assert at.pills(key="example").options == list(EXAMPLES) and len(EXAMPLES) > 5
    for name in ("NK cell", "CD14 monocyte"):
        at.pills(key="example").select(name).run()
        press(at, "What cell is this?")
        assert at.session_state["typed"][0]["cell_type"] == name and "only 1" in said(at).lower() and not errors(at)


def test_a_stranger_is_unassigned_with_a_reason(blood):
    at = blood
    at.pills(key="example").select("beta (not taught)").run()
    press(at, "What cell is this?")
    assert "**Unassigned**: confidence below" in at.warning[0].value and not at.success and not errors(at)


def test_a_table_that_cannot_be_read(blood):
    for text, word in [("", "There are no genes yet"), ("CD19 9,5 x", "Line 1"), ("CD19 7\nNKG7 8 9", "Line 2"), ("CD19 7\nCD19 8", "CD19 was there before"),
                       ("NOPE1 3\nNOPE2 4", "None of its genes is known"), ("CD19 -2", "negative"), ("CD19 nan", "finite"), ("CD19 1e999", "finite")]:
        at = ask(blood, text)
        assert len(errors(at)) == 1 and word in errors(at)[0] and not at.success


def test_every_unit_of_the_service_can_be_chosen(blood):
    from scimlora.serve import Units

    choice = blood.selectbox(key="typed_units")
    assert len(choice.options) == len(get_args(Units))
    for unit in get_args(Units): assert blood.selectbox(key="typed_units").set_value(unit).run() and not errors(blood)


def test_what_nobody_foresaw_shows_no_traceback(blood, monkeypatch):
    monkeypatch.setattr("scimlora.backends.Local.ask", lambda *a: 1 / 0)
    at = ask(blood, "CD19 7")
    assert "did not foresee" in errors(at)[0] and "zero" not in said(at)


# Links --------------------------------------------------------------------------------------------------------------

def test_a_link_opens_a_page_an_example_or_an_answer(page):
    for name in PAGES: assert page(link=dict(page=name)).session_state["page"] == name
    at = page(link=dict(example="NK cell"))
    assert at.success[0].value.startswith("**NK cell**") and at.text_area(key="genes_text").value == preset_text(EXAMPLES["NK cell"])
    at = page(link=dict(genes="CD19:2.4,MS4A1:3,CD79A"))
    assert at.success[0].value.startswith("**B cell**") and at.text_area(key="genes_text").value == "CD19 2.4\nMS4A1 3\nCD79A"


def test_an_answer_leaves_its_link(blood, page):
    at = ask(blood, B_CELL)
    again = page(link=dict(at.query_params))
    assert "now a link" in said(at) and again.session_state["typed"][0] == at.session_state["typed"][0]
    ask(at, "\n".join(f"{g} 1" for g in Predictor("blood").genes[:200]))
    assert "genes" not in at.query_params and not errors(at)


def test_links_that_lead_nowhere(page):
    at = page(link=dict(page="nonsense", example="<b>", genes="NOPE1:3"))
    assert [t.label for t in at.tabs] == PAGES and len(errors(at)) == 1


def test_why(blood):
    "Sentences with sources and bars of genes, which go when something else is asked."
    at = press(ask(blood, B_CELL), "Why?")
    assert not errors(at) and "called B cell" in said(at) and at.expander[-1].label.startswith("Sources (") and r"\[F1\]" in said(at)
    assert at.session_state["why"]["label"] == "B cell"
    at = ask(at, "PPBP 6.5\nPF4 5")
    assert "why" not in at.session_state and not errors(at)


@pytest.mark.parametrize("question, words", [("Which cells express MS4A1?", "B cell expresses MS4A1 most"), ("insulin secretion", "GO:0030073"), ("<b>x</b> $y$ qqqq", "nearest")])
def test_a_question_in_words(blood, question, words):
    blood.text_input(key="question").set_value(question)
    at = press(blood, "Ask")
    assert words in said(at) and not errors(at)


def test_no_question_is_told_so(blood): assert "question is empty" in errors(press(blood, "Ask"))[0]


# Annotate a file ----------------------------------------------------------------------------------------------------

def test_a_file_is_examined_and_annotated(pancreas, cells_file):
    at = upload(pancreas, cells_file.read_bytes())
    assert {m.label: m.value for m in at.metric}["Cells"] == "120" and "cells.h5ad (h5ad): 120 cells" in at.expander[0].code[0].value
    assert "result" not in at.session_state["file"]
    press(at, "Annotate the cells")
    result, want = at.session_state["file"]["result"], Predictor("mini").predict(ad.read_h5ad(cells_file))
    t = result.seen.table
    assert t.cell_type.tolist() == want.label.tolist() and not errors(at)
    clusters, cells = (next(d.value for d in at.main.dataframe if list(d.value)[0] == c) for c in ("cluster", "cell_id"))
    assert cells.cell_id.tolist() == t.cell_id.tolist() and clusters.cells.sum() == 120
    back = ad.read_h5ad(io.BytesIO(result.h5ad))
    assert (back.obs.scimlora_label.astype(str) == want.label).all() and back.obsm["X_scimlora"].shape == (120, 128) and "scimlora" in back.uns
    assert back.obs.scimlora_majority.astype(str).tolist() == t.majority.tolist() and (t.majority == "pancreatic " + ad.read_h5ad(cells_file).obs.cell_type.astype(str).to_numpy()).mean() > .8
    assert [b.label for b in at.download_button] == ["Table (csv)", "Annotated file (h5ad)"]
    at.run()
    assert at.session_state["file"]["result"] is result and "What the model says" in [h.value for h in at.subheader]


def test_a_map_is_laid_out_once_and_coloured_anew(page, cells_file):
    at = press(upload(page(SCIMLORA_BUNDLE="mini"), cells_file.read_bytes()), "Annotate the cells")
    umap = at.session_state["file"]["xy"]["UMAP"]
    for by in ("majority", "confidence", "cell_type"): at.selectbox(key="coloured").set_value(by).run()
    at.segmented_control(key="layout").set_value("PCA").run()
    xy = at.session_state["file"]["xy"]
    assert xy["UMAP"] is umap and xy["PCA"].shape == (120, 2) and not errors(at)


def test_the_files_own_clusters_may_vote(pancreas, cells_file):
    at = press(upload(pancreas, cells_file.read_bytes()), "Annotate the cells")
    found = at.session_state["file"]["result"].seen
    at.selectbox(key="clusters").set_value("cell_type").run()
    clusters = next(d.value for d in at.main.dataframe if list(d.value)[0] == "cluster")
    assert sorted(clusters.cluster) == sorted(set(ad.read_h5ad(cells_file).obs.cell_type)) and not errors(at)
    result = at.session_state["file"]["grouped"]["cell_type"]
    back = ad.read_h5ad(io.BytesIO(result.h5ad)).obs
    assert (back.scimlora_cluster == back.cell_type).all() and back.scimlora_majority.tolist() == result.seen.table.majority.tolist()
    at.selectbox(key="clusters").set_value(None).run()
    assert sorted(next(d.value for d in at.main.dataframe if list(d.value)[0] == "cluster").cluster) == sorted(set(found.table.cluster))


def test_another_file_replaces_the_result(pancreas, cells_file, other_cells, tmp_path):
    at = press(upload(pancreas, cells_file.read_bytes()), "Annotate the cells")
    upload(at, as_bytes(other_cells[:10].copy(), tmp_path), "ten.h5ad")
    assert "result" not in at.session_state["file"] and {m.label: m.value for m in at.metric}["Cells"] == "10"
    press(at, "Annotate the cells")
    assert len(at.session_state["file"]["result"].seen.table) == 10 and not errors(at)


def test_other_formats(pancreas, other_cells, tmp_path):
    some = other_cells[::6].copy()
    some.to_df().to_csv(tmp_path / "cells.csv.gz")
    with h5py.File(tmp_path / "cells.h5", "w") as f:
        X = sp.csr_matrix(some.X)
        for k, v in dict(data=X.data, indices=X.indices, indptr=X.indptr, shape=X.shape[::-1], barcodes=some.obs_names.to_numpy("S")).items(): f[f"matrix/{k}"] = v
        for k, v in dict(id=some.var_names, name=some.var_names, feature_type=["Gene Expression"] * some.n_vars).items(): f[f"matrix/features/{k}"] = np.array(v, "S")
    said_of = []
    for name in ("cells.csv.gz", "cells.h5"):
        at = press(upload(pancreas, (tmp_path / name).read_bytes(), name), "Annotate the cells")
        said_of.append(at.session_state["file"]["result"].seen.table.cell_type.tolist())
        assert not errors(at) and at.session_state["file"]["findings"]["file"] == name
    assert said_of[0] == said_of[1] and len(said_of[0]) == 20


def test_strangers_are_counted_with_their_reasons(blood, cells_file):
    at = press(upload(blood, cells_file.read_bytes()), "Annotate the cells")
    t = at.session_state["file"]["result"].seen.table
    assert t.unassigned.mean() > .9 and f"- {(t.reason == t.reason.mode()[0]).sum()} cells: {t.reason.mode()[0]}" in said(at) and not errors(at)


def bad_files(cells, tmp_path):
    "Name → bytes and a word of the sentence that answers them."
    good = as_bytes(cells, tmp_path)
    scaled, nan, other, none = (cells.copy() for _ in range(4))
    scaled.X = sp.csr_matrix(scaled.X.toarray() - 1)
    nan.X.data[:5] = np.nan
    other.var_names = [f"peak-{i}" for i in range(other.n_vars)]
    return {"empty": (b"", "is empty"), "text": (b"gene,value\nINS,3\n", "is no h5ad"), "cut": (good[:len(good) // 2], "damaged or cut short"),
            "scaled": (as_bytes(scaled, tmp_path), "negative values"), "nan": (as_bytes(nan, tmp_path), "NaN"),
            "no genes": (as_bytes(other, tmp_path), "no gene shared"), "no cells": (as_bytes(none[:0].copy(), tmp_path), "no cells")}


@pytest.mark.parametrize("name", ["empty", "text", "cut", "scaled", "nan", "no genes", "no cells"])
def test_a_broken_file(blood, other_cells, tmp_path, name):
    data, word = bad_files(other_cells[:20].copy(), tmp_path)[name]
    at = upload(blood, data)
    assert len(errors(at)) == 1 and word in errors(at)[0]
    assert "Annotate the cells" not in [b.label for b in at.button]


# How good is it, and about the model --------------------------------------------------------------------------------

def test_a_model_without_numbers(pancreas):
    assert "no numbers on held-out cells" in said(pancreas) and "Not for clinical use" in said(pancreas) and "nothing was fine-tuned" in said(pancreas)
    assert set(pancreas.dataframe[0].value.type) == set(Predictor("mini").classes)


def test_the_embedded_bundle_shows_all_of_its_evaluation(blood):
    heads = [h.value for h in blood.subheader]
    assert {"Base against LoRA, and simpler methods", "What is taken for what", "Each type", "Whether its confidence can be believed", "What it forgot of other tissues"} <= set(heads)
    assert "Not in this bundle" not in said(blood)


# With a service -----------------------------------------------------------------------------------------------------

def test_the_service_says_what_the_bundle_says(page, service, cells_file):
    text, seen = "INS 7.4\nIAPP 6.2\nMAFA 1.3", []
    for settings in (dict(API_URL=service()[0]), dict(API_URL="", SCIMLORA_BUNDLE="mini")):
        at = ask(page(link=dict(layout="PCA"), **settings), text)
        press(upload(at, cells_file.read_bytes()), "Annotate the cells")
        seen.append((at.session_state["typed"][0], at.session_state["file"]["findings"], at.session_state["file"]["result"].seen.table, at.multiselect(key="picked").options))
        assert [b.label for b in at.download_button] == ["Table (csv)", "Annotated file (h5ad)"] and not errors(at)
    there, here = seen
    assert there[0] == here[0] and there[1] == here[1] and there[2].equals(here[2]) and there[3] == here[3]


def test_the_service_explains_as_the_bundle_does(page, service):
    a, b = (press(ask(page(**where), "GCG 9\nTTR 7\nCHGA 5"), "Why?") for where in (dict(API_URL=service(log=False)[0]), dict(SCIMLORA_BUNDLE="mini")))
    assert a.session_state["why"]["sentences"] == b.session_state["why"]["sentences"] and not errors(a)
    a.text_input(key="question").set_value("Which cells make glucagon?")
    assert "glucagon" in said(press(a, "Ask")) and not errors(a)


def test_what_the_service_refuses_is_said(page, service, other_cells, tmp_path):
    at = page(API_URL=service()[0])
    assert "None of its genes is known" in errors(ask(at, "NOPE1 3"))[0]
    at = page(API_URL=service()[0])
    for name in ("scaled", "text"):
        data, word = bad_files(other_cells[:20].copy(), tmp_path)[name]
        assert word in errors(upload(at, data))[0] and "Annotate the cells" not in [b.label for b in at.button]


def test_a_file_that_the_service_finds_too_large(page, stand_in, cells_file):
    answers = {"/model": (BASES / "blood" / "manifest.json").read_text(encoding="utf-8"), "/genes": '{"genes": ["INS"]}', "/healthz": "{}"}
    url, _ = stand_in(200, answers, to_files=413)
    assert "larger than the service accepts" in errors(upload(page(API_URL=url), cells_file.read_bytes()))[0]


def test_a_service_that_goes_away_leaves_the_answer(page, service, cells_file):
    url, stop = service()
    at = press(upload(ask(page(API_URL=url, link=dict(layout="PCA")), "INS 7.4\nIAPP 6.2\nMAFA 1.3"), cells_file.read_bytes()), "Annotate the cells")
    stop()
    at.run()
    assert at.success and "Every cell" in [h.value for h in at.subheader] and not errors(at)
    ask(at, "GCG 7")
    assert "cannot be reached" in errors(at)[0]


def test_a_service_that_is_down(page):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    assert "cannot be reached" in errors(page(API_URL=f"http://127.0.0.1:{port}"))[0]


@pytest.mark.parametrize("status, body, word", [
    (401, "{}", "does not accept the key"), (403, "{}", "does not accept the key"), (404, "", "not scimlora's service"),
    (200, "<html>", "not scimlora's service"), (200, "[]", "not scimlora's service"), (413, "", "larger than the service accepts"),
    (429, "", "asked too often"), (503, "", "busy"), (500, "boom", "failed (error 500)"), (422, '{"detail": ["a: b", "c"]}', "A: b; c.")])
def test_answers_of_a_service_in_trouble(page, stand_in, status, body, word):
    url, seen = stand_in(status, body)
    at = page(API_URL=url, API_KEY="hush")
    assert len(errors(at)) == 1 and word in errors(at)[0] and "hush" not in said(at)
    assert seen[0]["X-API-Key"] == "hush"


def test_a_slow_service(page, stand_in):
    at = page(API_URL=stand_in(200, pause=3)[0], API_TIMEOUT="0.5")
    assert "did not answer within" in errors(at)[0]


@pytest.mark.parametrize("url", ["example", "ftp://example.org", "http://"])
def test_an_address_that_is_none(page, url): assert "no web address" in errors(page(API_URL=url))[0]


def test_a_timeout_that_is_none(page): assert "no number of seconds" in errors(page(API_URL="http://127.0.0.1:9", API_TIMEOUT="soon"))[0]


def test_settings_from_the_environment_come_before_secrets(page, stand_in):
    url, seen = stand_in(401)
    page(secrets=dict(API_URL=url, API_KEY="from the file"))
    page(secrets=dict(API_URL="http://", API_KEY="from the file"), API_URL=url, API_KEY="from outside")
    assert [s["X-API-Key"] for s in seen] == ["from the file", "from outside"]


# The folder ---------------------------------------------------------------------------------------------------------

def test_the_page_starts_without_training_packages():
    code = (f"import sys; sys.path.insert(0, {str(UI / 'src')!r})\n"
            "from scimlora.backends import Local; import page.charts\n"
            "print(Local('blood').ask({'CD19': 1.5, 'MS4A1': 2.5})['cell_type'])\n"
            "assert not {'torch', 'sklearn', 'peft', 'transformers', 'scanpy', 'matplotlib', 'scimlora.evaluation'} & set(sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "B cell"


def test_the_examples_are_genes_of_the_base():
    table, known = pd.read_csv(BASES / "presets.tsv", sep="\t"), set(Predictor("blood").genes)
    share = table.groupby("cell_type").gene.apply(lambda g: g.isin(known).mean())
    assert share.min() > .8 and table.value.between(0, 10).all() and not table.duplicated(["cell_type", "gene"]).any()


# What the Hub documents of a Space's front matter (huggingface.co/docs/hub/spaces-config-reference).
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
KEYS = {"title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file", "app_port", "base_path", "fullWidth", "header", "short_description", "models", "datasets",
        "tags", "thumbnail", "pinned", "hf_oauth", "disable_embedding", "startup_duration_timeout", "custom_headers", "preload_from_hub", "suggested_hardware", "suggested_storage", "license"}


def test_the_front_matter_keeps_the_spaces_contract():
    front = yaml.safe_load((UI / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert front["sdk"] == "docker" and front["app_port"] == 8501 and front.keys() <= KEYS
    assert {front["colorFrom"], front["colorTo"]} <= COLOURS and len(front["short_description"]) <= 60 and front["pinned"] is False and 1 <= len(front["emoji"]) <= 2


def test_the_dockerfile_keeps_the_spaces_contract():
    lines = [line.split(None, 1) for line in (UI / "Dockerfile").read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
    said = [(k, v) for k, v in lines if k.isupper()]
    names = [k for k, _ in said]
    assert names[0] == "FROM" and dict(said)["USER"] == "user" and any("--uid 1000" in v for k, v in said if k == "RUN")
    # What user 1000 is to read and write is copied for it, after it has become the user.
    assert all(v.startswith("--chown=user ") for k, v in said if k in ("COPY", "ADD")) and names.index("USER") < names.index("COPY")
    assert dict(said)["EXPOSE"] == "8501" and json.loads(dict(said)["CMD"])[:3] == ["streamlit", "run", "src/streamlit_app.py"]
    assert "--server.port=8501" in dict(said)["CMD"] and "--server.address=0.0.0.0" in dict(said)["CMD"] and "HEALTHCHECK" in names
    for k, v in said:
        if k == "COPY" and v.split()[1] != ".": assert (UI / v.split()[1]).exists()


def test_what_the_space_installs_is_what_the_page_imports():
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in (UI / "requirements.txt").read_text(encoding="utf-8").splitlines() if line]
    assert [(r.name, r.extras) for r in wanted] == [("scimlora", {"ui"})] and wanted[0].url.startswith("https://github.com/scimlora/scimlora/")
    extra = dict(line.split(" = ", 1) for line in (UI.parent / "settings.ini").read_text(encoding="utf-8").splitlines() if " = " in line)["extras_ui"]
    assert {Requirement(r).name for r in extra.split()} == {"streamlit", "requests", "scanpy", "igraph"}


def test_settings_of_the_space():
    config = (UI / ".streamlit" / "config.toml").read_text(encoding="utf-8")
    assert "enableXsrfProtection = false" in config and 'showErrorDetails = "none"' in config
    # Streamlit looks for settings beside the script too: so they hold from whichever folder it is started.
    assert (UI / "src" / ".streamlit").resolve() == (UI / ".streamlit").resolve()
    example = (UI / ".streamlit" / "secrets.toml.example").read_text(encoding="utf-8")
    assert all(name in example for name in SETTINGS)


# The scripts --------------------------------------------------------------------------------------------------------

def scripted(tmp_path, name, *args, **env):
    "Run a script with stand-ins for the commands, which write down how they were called."
    stand_in = "#!/usr/bin/env bash\necho \"$(basename $0) $* API_URL=${API_URL:-} API_KEY=${API_KEY:-} KEY=${SCIMLORA_API_KEY:-}\" >> %s\n" % (tmp_path / "calls")
    key = "if [ $1 = key ]; then echo SCIMLORA_API_KEY=made; echo colab abc; exit; fi\nif [ $1 = serve ] && [ $# = 4 ]; then exec sleep 30; fi\n"
    (tmp_path / "bin").mkdir()
    for command in ("scimlora", "streamlit", "curl"):
        # A service that has not begun to run is not ready.
        (tmp_path / "bin" / command).write_text(stand_in + {"scimlora": key, "curl": f"grep -q '^scimlora serve' {tmp_path / 'calls'}\n"}.get(command, ""))
        (tmp_path / "bin" / command).chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **env}
    done = subprocess.run(["bash", UI.parent / "scripts" / name, *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    return (tmp_path / "calls").read_text()


def test_start_runs_the_service_and_the_page_that_asks_it(tmp_path):
    calls = scripted(tmp_path, "start.sh", "runs/mine/bundle", SCIMLORA_PORT="8123", SCIMLORA_API_KEY="k")
    assert "scimlora serve runs/mine/bundle --port 8123" in calls and f"streamlit run {UI / 'src' / 'streamlit_app.py'} API_URL=http://127.0.0.1:8123 API_KEY=k" in calls


def test_colab_api_opens_no_tunnel_without_a_key(tmp_path): assert "scimlora serve blood --public API_URL= API_KEY= KEY=made" in scripted(tmp_path, "colab_api.sh")


def test_deploy_calls_the_command(tmp_path): assert f"scimlora space deploy me/page --dry-run --folder {UI}" in scripted(tmp_path, "deploy_huggingface.sh", "me/page", "--dry-run")
