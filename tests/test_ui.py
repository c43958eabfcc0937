"""The page, by Streamlit's own test driver: every tab, and a plain sentence for every failure."""
import http.server
import io
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
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

pytest.importorskip("streamlit", reason="the page needs streamlit: pip install 'scimlora[ui]'")
from streamlit.testing.v1 import AppTest

from scimlora import Predictor
from scimlora.core import read_json, write_json

UI = Path(__file__).resolve().parent.parent / "ui"
SETTINGS = ("API_URL", "API_KEY", "API_TIMEOUT", "SCIMLORA_BUNDLE")


@pytest.fixture
def page(monkeypatch, tmp_path):
    "Open the page with the given settings, in an empty folder."
    for name in SETTINGS: monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def opened(secrets=None, **settings):
        for name, value in settings.items(): monkeypatch.setenv(name, str(value))
        at = AppTest.from_file(str(UI / "src" / "streamlit_app.py"), default_timeout=90)
        for name, value in (secrets or {}).items(): at.secrets[name] = value
        return at.run()

    return opened


@pytest.fixture
def local(page, bundle_dir):
    "The page with the test bundle in its own process."
    return page(SCIMLORA_BUNDLE=bundle_dir)


@pytest.fixture(scope="module")
def service(bundle_dir):
    "The real service on a free port; takes limits, returns its address and a function that stops it."
    import uvicorn

    from scimlora.serve import create_app

    running = []

    def start(**limits):
        server = uvicorn.Server(uvicorn.Config(create_app(bundle_dir, **limits), port=0, log_level="error"))
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
    "A server that answers with one status and body, after a pause, and cuts off files with another; `seen` keeps the headers."
    servers = []

    def start(status, body="{}", pause=0.0, to_files=None):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.seen.append(dict(self.headers))
                time.sleep(pause)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

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


@pytest.fixture(scope="module")
def beta_cell(other_cells):
    "A whole beta cell as a person would paste it."
    cell = other_cells[(other_cells.obs.cell_type == "beta").to_numpy()][0]
    return "\n".join(f"{g} {v:g}" for g, v in zip(cell.var_names, cell.X.toarray()[0]) if v)


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

def test_without_a_model_it_says_how_to_make_one(page):
    at = page()
    assert "scimlora demo" in at.info[0].value and not at.tabs and not errors(at)


def test_the_demo_bundle_is_found(page, bundle_dir, tmp_path):
    shutil.copytree(bundle_dir, tmp_path / "runs" / "demo" / "bundle")
    at = page()
    assert [t.label for t in at.tabs] == ["Type genes", "Annotate a file", "About the model"] and not errors(at)


@pytest.mark.parametrize("damage, word", [
    (lambda d: shutil.rmtree(d), "no bundle"),
    (lambda d: (d / "head.safetensors").unlink(), "lacks head.safetensors"),
    (lambda d: (d / "head.safetensors").write_bytes(b"short"), "damaged or cut short"),
    (lambda d: write_json(d / "manifest.json", read_json(d / "manifest.json") | {"base": {"name": "mini", "sha256": {"encoder.ckpt": "other"}}}),
     "is another")])
def test_a_bundle_that_cannot_be_opened(page, bundle_dir, tmp_path, damage, word):
    shutil.copytree(bundle_dir, tmp_path / "bundle")
    damage(tmp_path / "bundle")
    at = page(SCIMLORA_BUNDLE="bundle")
    assert word in errors(at)[0] and errors(at)[0].startswith("The model cannot be opened")


# Type genes ---------------------------------------------------------------------------------------------------------

def test_a_cell_becomes_a_label_that_stays(local, beta_cell):
    at = ask(local, beta_cell)
    assert at.success[0].value.startswith("**beta**") and "genes used" in said(at) and not errors(at)
    at.run()
    assert at.success[0].value.startswith("**beta**")
    at.text_area(key="genes_text").set_value("GCG 6.5").run()
    assert "as they were when you last asked" in said(at) and at.success[0].value.startswith("**beta**")


@pytest.mark.parametrize("text", ["GCG TTR ARX IRX2 LOXL4 TM4SF4 CRYBA2", "GCG\nTTR\nARX\nIRX2\nLOXL4\nTM4SF4\nCRYBA2",
                                  "gene,value\nGCG,6.7\nTTR,5.7\nARX,1.1\nIRX2,2.2\nLOXL4,2.5\nTM4SF4,3.2", "GCG\t800\nTTR\t300\nARX\t2\nIRX2\t8"])
def test_genes_as_people_paste_them(local, text):
    at = ask(local, text)
    assert at.session_state["typed"][0]["cell_type"] == "alpha" and not errors(at)


def test_a_picked_gene_joins_the_table(local):
    at = local
    at.text_area(key="genes_text").set_value("INS 7.4").run()
    at.multiselect(key="picked").select("IAPP").run()
    assert at.text_area(key="genes_text").value == "INS 7.4\nIAPP" and at.multiselect(key="picked").value == []


@pytest.mark.parametrize("name", ["beta", "alpha", "delta", "acinar", "ductal"])
def test_an_example_has_its_own_label_first(local, name):
    at = local
    at.pills(key="preset").select(name).run()
    assert len(at.text_area(key="genes_text").value.splitlines()) >= 10
    press(at, "What cell is this?")
    assert at.session_state["typed"][0]["cell_type"] == name and "only 1" in said(at).lower() and not errors(at)


def test_a_stranger_is_unassigned_with_a_reason(local):
    at = local
    at.pills(key="preset").select("endothelial (not taught)").run()
    press(at, "What cell is this?")
    assert "**Unassigned**: unlike every class" in at.warning[0].value and not at.success and not errors(at)


@pytest.mark.parametrize("text, word", [
    ("", "There are no genes yet"), ("INS 9,5 x", "Line 1"), ("INS 7\nGCG 8 9", "Line 2"), ("INS 7\nINS 8", "INS was there before"),
    ("NOPE1 3\nNOPE2 4", "None of its genes is known"), ("INS -2", "negative"), ("INS nan", "finite"), ("INS 1e999", "finite")])
def test_a_table_that_cannot_be_read(local, text, word):
    at = ask(local, text)
    assert len(errors(at)) == 1 and word in errors(at)[0] and not at.success


def test_every_unit_of_the_service_can_be_chosen(local):
    from scimlora.serve import Units

    choice = local.selectbox(key="typed_units")
    assert len(choice.options) == len(get_args(Units))
    for unit in get_args(Units): assert local.selectbox(key="typed_units").set_value(unit).run() and not errors(local)


def test_what_nobody_foresaw_shows_no_traceback(local, monkeypatch):
    monkeypatch.setattr("page.backend.Local.ask", lambda *a: 1 / 0)
    at = ask(local, "INS 7")
    assert "did not foresee" in errors(at)[0] and "zero" not in said(at)


# Annotate a file ----------------------------------------------------------------------------------------------------

def test_a_file_is_examined_and_annotated(local, cells_file, bundle_dir):
    at = upload(local, cells_file.read_bytes())
    assert {m.label: m.value for m in at.metric}["Cells"] == "120" and "cells.h5ad (h5ad): 120 cells" in at.expander[0].code[0].value
    assert "result" not in at.session_state["file"]
    press(at, "Annotate the cells")
    result, want = at.session_state["file"]["result"], Predictor(bundle_dir).predict(ad.read_h5ad(cells_file))
    assert result.table.cell_type.tolist() == want.label.tolist() and not errors(at)
    assert at.main.dataframe[0].value.cell_id.tolist() == result.table.cell_id.tolist()
    back = ad.read_h5ad(io.BytesIO(result.h5ad))
    assert (back.obs.scimlora_label.astype(str) == want.label).all() and back.obsm["X_scimlora"].shape == (120, 128) and "scimlora" in back.uns
    assert [b.label for b in at.download_button] == ["Table (csv)", "Annotated file (h5ad)"]
    at.run()
    assert at.session_state["file"]["result"] is result and "What the model says" in [h.value for h in at.subheader]


def test_another_file_replaces_the_result(local, cells_file, other_cells, tmp_path):
    at = press(upload(local, cells_file.read_bytes()), "Annotate the cells")
    upload(at, as_bytes(other_cells[:10].copy(), tmp_path), "ten.h5ad")
    assert "result" not in at.session_state["file"] and {m.label: m.value for m in at.metric}["Cells"] == "10"


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
def test_a_broken_file(local, other_cells, tmp_path, name):
    data, word = bad_files(other_cells[:20].copy(), tmp_path)[name]
    at = upload(local, data)
    assert len(errors(at)) == 1 and word in errors(at)[0]
    assert "Annotate the cells" not in [b.label for b in at.button]


# About the model ----------------------------------------------------------------------------------------------------

def test_about_a_model_without_numbers(local):
    assert "no numbers on held-out cells" in said(local) and "Not for clinical use" in said(local)
    assert set(local.dataframe[0].value.type) == {"acinar", "alpha", "beta", "delta", "ductal", "gamma"}


def test_about_shows_the_manifests_numbers(page, classifier, other_cells, bundle_dir, tmp_path):
    shutil.copytree(bundle_dir, tmp_path / "bundle")
    metrics = classifier.evaluate(other_cells)
    manifest = read_json(tmp_path / "bundle" / "manifest.json")
    write_json(tmp_path / "bundle" / "manifest.json", manifest | {"metrics": metrics, "metrics_on": "other cells"})
    at = page(SCIMLORA_BUNDLE="bundle")
    shown = {m.label: m.value for m in at.metric}
    assert shown["Macro-F1"] == f"{metrics['macro_f1']:.1%}" and "120 cells of other cells" in said(at) and not errors(at)


# With a service -----------------------------------------------------------------------------------------------------

def test_the_service_says_what_the_bundle_says(page, service, bundle_dir, cells_file):
    url, _ = service()
    at = ask(page(API_URL=url), "INS 7.4\nIAPP 6.2\nMAFA 1.3")
    press(upload(at, cells_file.read_bytes()), "Annotate the cells")
    want = Predictor(bundle_dir).predict(ad.read_h5ad(cells_file))
    assert at.session_state["file"]["result"].table.cell_type.tolist() == want.label.tolist() and not errors(at)
    assert [b.label for b in at.download_button] == ["Table (csv)"]
    mine = ask(page(API_URL="", SCIMLORA_BUNDLE=bundle_dir), "INS 7.4\nIAPP 6.2\nMAFA 1.3")
    there, here = at.session_state["typed"][0], mine.session_state["typed"][0]
    assert there["cell_type"] == here["cell_type"] == "beta" and abs(there["confidence"] - here["confidence"]) < 1e-6


def test_what_the_service_refuses_is_said(page, service, other_cells, tmp_path):
    at = page(API_URL=service()[0])
    assert "None of its genes is known" in errors(ask(at, "NOPE1 3"))[0]
    at = page(API_URL=service()[0])
    data, word = bad_files(other_cells[:20].copy(), tmp_path)["scaled"]
    assert word in errors(press(upload(at, data), "Annotate the cells"))[0]


def test_a_file_that_the_service_finds_too_large(page, stand_in, bundle_dir, cells_file):
    url, _ = stand_in(200, (bundle_dir / "manifest.json").read_text(encoding="utf-8"), to_files=413)
    at = upload(page(API_URL=url), cells_file.read_bytes())
    assert "larger than the service accepts" in errors(press(at, "Annotate the cells"))[0]


def test_a_service_that_goes_away_leaves_the_answer(page, service, beta_cell):
    url, stop = service()
    at = ask(page(API_URL=url), beta_cell)
    stop()
    at.run()
    assert at.success and not errors(at)
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


def test_settings_from_the_environment_come_before_secrets(page, stand_in):
    url, seen = stand_in(401)
    page(secrets=dict(API_URL=url, API_KEY="from the file"))
    page(secrets=dict(API_URL="http://", API_KEY="from the file"), API_URL=url, API_KEY="from outside")
    assert [s["X-API-Key"] for s in seen] == ["from the file", "from outside"]


# The folder ---------------------------------------------------------------------------------------------------------

def test_the_page_needs_no_training_packages(bundle_dir):
    code = (f"import sys; sys.path.insert(0, {str(UI / 'src')!r})\n"
            "from page.backend import Local; import page.charts, page.genes\n"
            f"print(Local({str(bundle_dir)!r}).ask({{'INS': 3.5}}, 'auto')['cell_type'])\n"
            "assert not {'sklearn', 'peft', 'transformers', 'scanpy', 'matplotlib', 'scimlora.evaluation'} & set(sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "beta"


def test_the_examples_are_genes_of_the_base(bundle_dir):
    table, known = pd.read_csv(UI / "src" / "page" / "presets.tsv", sep="\t"), set(Predictor(bundle_dir).genes)
    share = table.groupby("cell_type").gene.apply(lambda g: g.isin(known).mean())
    assert share.min() > .8 and table.value.between(0, 10).all() and not table.duplicated(["cell_type", "gene"]).any()


def test_the_space_keeps_its_contract():
    front = dict(line.split(": ", 1) for line in (UI / "README.md").read_text(encoding="utf-8").split("---")[1].strip().splitlines())
    assert front["sdk"] == "docker" and front["app_port"] == "8501" and len(front["short_description"]) <= 60
    docker = (UI / "Dockerfile").read_text(encoding="utf-8")
    assert "python:3.11-slim" in docker and "--uid 1000" in docker and "USER user" in docker and "HEALTHCHECK" in docker
    assert "src/streamlit_app.py" in docker and "--server.port=8501" in docker and "--server.address=0.0.0.0" in docker
    config = (UI / ".streamlit" / "config.toml").read_text(encoding="utf-8")
    assert "enableXsrfProtection = false" in config and 'showErrorDetails = "none"' in config
    # Streamlit looks for settings beside the script too: so they hold from whichever folder it is started.
    assert (UI / "src" / ".streamlit").resolve() == (UI / ".streamlit").resolve()
    example = (UI / ".streamlit" / "secrets.toml.example").read_text(encoding="utf-8")
    assert all(name in example for name in SETTINGS)
