"""The service as it is started: `scimlora serve BUNDLE --port N`, asked over a real socket."""
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import h5py
import httpx
import numpy as np
import pandas as pd
import pytest

from scimlora.core import read_json

FIELDS = {"cell_type", "confidence", "unassigned", "predictions", "genes_used", "genes_unknown", "warnings"}
BETA = {"INS": 900, "IAPP": 50, "PCSK1": 3, "G6PC2": 5}


def start(command, bundle, log):
    "Start the service on a free port; returns the process and a client."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen([command, "serve", str(bundle), "--port", str(port)], stdout=log.open("w"), stderr=subprocess.STDOUT)
    client, deadline = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30), time.monotonic() + 60
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        try:
            if client.get("/healthz").status_code == 200: return process, client
        except httpx.TransportError: time.sleep(0.05)


def stop(process):
    if process.poll() is None: process.kill()
    process.wait()


@pytest.fixture(scope="module")
def server(command, bundle_dir, tmp_path_factory):
    "A running service and its log."
    log = tmp_path_factory.mktemp("serve") / "log"
    process, client = start(command, bundle_dir, log)
    yield client, log
    stop(process)


@pytest.fixture(scope="module")
def client(server): return server[0]


@pytest.fixture
def own(command, bundle_dir, tmp_path):
    "A service of the test's own, which it may end."
    process, client = start(command, bundle_dir, tmp_path / "log")
    yield process, client
    stop(process)


@pytest.fixture(scope="module")
def table(command, bundle_dir, cells_file, tmp_path_factory):
    "What `scimlora annotate` says of the 120 cells."
    out = tmp_path_factory.mktemp("annotated") / "out.csv"
    subprocess.run([command, "annotate", bundle_dir, cells_file, "--out", out], check=True, capture_output=True)
    return pd.read_csv(out, keep_default_na=False)


def as_dicts(cells):
    "Each cell's expressed genes and their counts, as a client would send them."
    X, genes = cells.X.tocsr(), cells.var_names.to_numpy(str)
    return [dict(zip(genes[X.indices[a:b]].tolist(), X.data[a:b].astype(int).tolist())) for a, b in zip(X.indptr[:-1], X.indptr[1:])]


# Routes that tell about the service -----------------------------------------------------------------------------------


def test_health_and_readiness(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz")
    assert ready.status_code == 200 and ready.json()["status"] == "ready" and ready.json()["classes"] == 6


def test_classes_in_head_order(client, bundle_dir):
    assert client.get("/classes").json()["classes"] == (bundle_dir / "label_classes.txt").read_text().split()


def test_model_is_the_manifest(client, bundle_dir):
    manifest, model = read_json(bundle_dir / "manifest.json"), client.get("/model").json()
    assert {k: model[k] for k in manifest} == manifest
    assert model["calibration"] == read_json(bundle_dir / "calibration.json")


def test_documentation(client):
    api = client.get("/openapi.json").json()
    assert {"/healthz", "/readyz", "/classes", "/model", "/predict", "/predict_batch", "/annotate"} <= api["paths"].keys()
    assert "requestBody" in api["paths"]["/predict"]["post"]
    assert client.get("/docs").status_code == 200


# Predictions ----------------------------------------------------------------------------------------------------------


def test_predict_answers_as_designed(client):
    r = client.post("/predict", json={"expression": {**BETA, "NOSUCHGENE": 4}})
    assert r.status_code == 200
    a = r.json()
    assert FIELDS <= a.keys()
    assert a["cell_type"] == "beta" and a["genes_used"] == 4 and a["genes_unknown"] == 1
    assert isinstance(a["unassigned"], bool) and 0 <= a["confidence"] <= 1
    assert a["predictions"][0] == {"cell_type": a["cell_type"], "confidence": a["confidence"]}
    confidences = [p["confidence"] for p in a["predictions"]]
    assert confidences == sorted(confidences, reverse=True) and sum(confidences) <= 1 + 1e-9
    assert any("genes" in w for w in a["warnings"]), "four genes are few, and the answer says so"


def test_the_readme_example(client):
    r = client.post("/predict", json={"expression": {"CD19": 8.5, "MS4A1": 9.2, "CD79A": 7.8, "CD79B": 7.5}})
    assert r.status_code == 200 and FIELDS <= r.json().keys()


def test_http_and_command_line_agree_on_real_cells(client, other_cells, table):
    "Twelve cells with all genes of their file, zeros too, in one batch and one by one."
    rows = list(range(0, 120, 10))
    cells = [{g: int(v) for g, v in zip(other_cells.var_names, x)} for x in other_cells.X[rows].toarray()]
    answers = client.post("/predict_batch", json={"cells": [{"expression": c} for c in cells], "units": "counts"}).json()
    want = table.iloc[rows]
    assert [a["cell_type"] for a in answers] == list(want.cell_type)
    assert np.abs(np.array([a["confidence"] for a in answers]) - want.confidence).max() <= 5.1e-5
    assert [a["unassigned"] for a in answers] == list(want.unassigned)
    assert [a["reason"] for a in answers] == list(want.reason)
    for i in (0, 11):
        alone = client.post("/predict", json={"expression": cells[i]}).json()
        assert {k: alone[k] for k in ("cell_type", "unassigned", "reason", "genes_used", "genes_unknown")}.items() <= answers[i].items()
        assert alone["confidence"] == pytest.approx(answers[i]["confidence"], abs=1e-6)


def test_without_the_zeros_a_few_names_lose_their_neighbours(client, other_cells, table):
    "What a disputed old name means, the names beside it tell; a handful of genes of 14,000 may differ, the label does not."
    answers = client.post("/predict_batch", json={"cells": [{"expression": c} for c in as_dicts(other_cells)], "units": "counts"}).json()
    assert [a["cell_type"] for a in answers] == list(table.cell_type)
    difference = np.abs(np.array([a["confidence"] for a in answers]) - table.confidence)
    assert np.median(difference) < 1e-3 and difference.max() < 0.1


def test_units_do_not_matter(client, other_cells):
    "Counts, CPM and log1p CP10K of one cell."
    counts = as_dicts(other_cells)[7]
    total = sum(counts.values())
    forms = {"counts": counts, "cpm": {g: v * 1e6 / total for g, v in counts.items()}, "log1p_cp10k": {g: float(np.log1p(v * 1e4 / total)) for g, v in counts.items()}}
    answers = [client.post("/predict", json={"expression": e, "units": u}) for u, e in forms.items()]
    assert [a.status_code for a in answers] == [200] * 3, [a.text for a in answers]
    confidences = [a.json()["confidence"] for a in answers]
    assert max(confidences) - min(confidences) < 1e-5


def test_many_at_once(client, other_cells, table):
    cells = as_dicts(other_cells)[:48]
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda c: client.post("/predict", json={"expression": c}).json()["cell_type"], cells))
    assert said == list(table.cell_type[:48])


def test_annotate_an_uploaded_file(client, cells_file, table):
    r = client.post("/annotate", files={"file": ("cells.h5ad", cells_file.read_bytes())})
    assert r.status_code == 200 and r.headers["content-type"].startswith("text/csv")
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(r.text), keep_default_na=False), table)
    r = client.post("/annotate", params={"format": "json"}, files={"file": ("cells.h5ad", cells_file.read_bytes())})
    assert r.status_code == 200
    pd.testing.assert_frame_equal(pd.DataFrame(r.json()["cells"]), table)


@pytest.mark.parametrize("format", ["csv", "json"])
def test_annotate_says_what_it_did_to_the_file(client, other_cells, tmp_path, format):
    "Names beyond ASCII among them, which no HTTP header can hold as they are."
    cells = other_cells[:10].copy()
    cells.obs_names = [f"β-Zelle 细胞 {i}" for i in range(10)]
    cells.X = (cells.X.multiply(1e4 / cells.X.sum(1))).tocsr().log1p().astype(np.float32)
    cells.write_h5ad(tmp_path / "ü.h5ad")
    r = client.post("/annotate", params={"format": format}, files={"file": ("ü.h5ad", (tmp_path / "ü.h5ad").read_bytes())})
    assert r.status_code == 200
    notes = r.json()["notes"] if format == "json" else json.loads(r.headers["x-scimlora-notes"])
    assert any("logarithm was undone" in n for n in notes)
    rows = pd.DataFrame(r.json()["cells"]) if format == "json" else pd.read_csv(io.StringIO(r.text))
    assert list(rows.cell_id) == list(cells.obs_names)


# Bad requests ---------------------------------------------------------------------------------------------------------


def refused(r, *words, status=None):
    "A 4xx answer in JSON whose detail holds the words, and nothing of the machine."
    assert 400 <= r.status_code < 500, (r.status_code, r.text[:300])
    if status: assert r.status_code == status, r.text[:300]
    detail = json.dumps(r.json()["detail"], ensure_ascii=False)
    assert len(detail) < 2000
    assert not re.search(r"Traceback|site-packages|\.py\b|/tmp/|/work|/home/|/root|/usr|/proc", r.text), r.text
    for w in words: assert re.search(w, detail, re.I), f"{w!r} is not in: {detail}"


def predict_body(value): return f'{{"expression": {{"INS": {value}}}}}'.encode()


BODIES = {
    "NaN": (predict_body("NaN"), ["INS"]), "Infinity": (predict_body("Infinity"), ["INS"]), "-Infinity": (predict_body("-Infinity"), ["INS"]),
    "1e999": (predict_body("1e999"), ["INS"]), "true": (predict_body("true"), ["INS"]), "null": (predict_body("null"), ["INS"]),
    "text": (predict_body('"8.5"'), ["INS"]), "list": (predict_body("[1]"), ["INS"]), "nested": (predict_body('{"INS": 1}'), ["INS"]),
    "negative": (predict_body("-1"), ["INS"]), "an integer of 400 digits": (predict_body("9" * 400), ["INS"]),
    "an integer of 9,000 digits": (predict_body("9" * 9000), []),
    "two values of 1e308": (b'{"expression": {"INS": 1e308, "GCG": 1e308}}', ["INS|GCG|value|large"]),
    "log1p of 1e308": (b'{"expression": {"INS": 1e308}, "units": "log1p_cp10k"}', ["log1p"]),
    "duplicate gene": (b'{"expression": {"INS": 1, "INS": 2}}', ["INS", "twice"]),
    "duplicate key": (b'{"expression": {"INS": 1}, "expression": {"GCG": 2}}', ["expression", "twice"]),
    "lone surrogate": (b'{"expression": {"\\ud800": 1}}', []),
    "lone surrogate twice": (b'{"expression": {"\\ud800": 1, "\\ud800": 2}}', ["twice"]),
    "lone surrogate as unit": (b'{"expression": {"INS": 1}, "units": "\\udfff"}', ["units"]),
    "lone surrogate as field": (b'{"expression": {"INS": 1}, "\\udfff": 1}', []),
    "no gene": (b'{"expression": {}}', ["expression"]), "unknown genes only": (b'{"expression": {"NOSUCH1": 1, "NOSUCH2": 2}}', ["NOSUCH1"]),
    "spike-ins only": (b'{"expression": {"ERCC-00002": 1}}', ["ERCC-00002"]), "zeros only": (b'{"expression": {"INS": 0}}', None),
    "an empty name": (b'{"expression": {"": 1}}', []), "a name of a megabyte": (b'{"expression": {"' + b"A" * 10**6 + b'": 1}}', []),
    "no expression": (b'{"genes": {"INS": 1}}', ["expression"]), "unknown unit": (b'{"expression": {"INS": 1}, "units": "tpm"}', ["units"]),
    "unknown field": (b'{"expression": {"INS": 1}, "color": 1}', ["color"]),
    "expression is a list": (b'{"expression": ["INS"]}', ["expression"]), "expression is null": (b'{"expression": null}', ["expression"]),
    "empty object": (b"{}", ["expression"]), "empty list": (b"[]", []), "a number": (b"7", []), "null alone": (b"null", []), "text alone": (b'"INS"', []),
    "empty body": (b"", ["JSON"]), "blank": (b"   ", ["JSON"]), "no JSON": (b"INS=1", ["JSON"]), "cut short": (b'{"expression": {"INS"', ["JSON"]),
    "two documents": (predict_body(1) * 2, ["JSON"]), "invalid UTF-8": (b'{"expression": {"\xff\xfe": 1}}', ["JSON"]),
    "UTF-16": ('{"expression": {"INS": -1}}'.encode("utf-16"), []), "zero bytes": (b"\0" * 100, ["JSON"]),
    "deep lists": (b"[" * 100_000, ["JSON"]), "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, []),
    "deep value": (b'{"expression": {"INS": ' + b"[" * 900 + b"]" * 900 + b"}}", ["INS"]),
}


@pytest.mark.parametrize("case", BODIES)
def test_bad_bodies(client, case):
    body, words = BODIES[case]
    r = client.post("/predict", content=body, headers={"content-type": "application/json"})
    if words is None:  # no mistake: a cell in which nothing was counted
        assert r.status_code == 200 and r.json()["unassigned"] is True and "no counts" in r.json()["reason"]
    else: refused(r, *words)
    assert client.get("/healthz").status_code == 200


BATCHES = {
    "no cells": (b'{"cells": []}', ["cells"]), "a cell without genes": (b'{"cells": [{"expression": {"INS": 1}}, {"expression": {}}]}', [r"cells\.1"]),
    "a bad value": (b'{"cells": [{"expression": {"INS": 1}}, {"expression": {"INS": NaN}}]}', [r"cells\.1", "INS"]),
    "an unknown cell": (b'{"cells": [{"expression": {"INS": 1}}, {"expression": {"NOSUCH": 1}}]}', ["cell 1", "NOSUCH"]),
    "a list of dictionaries": (b'[{"INS": 1}]', []), "cells is an object": (b'{"cells": {"expression": {"INS": 1}}}', ["cells"]),
    "10,001 cells": (b'{"cells": [' + b",".join([b'{"expression":{"INS":1}}'] * 10_001) + b"]}", ["cells"]),
    "duplicates in one cell": (b'{"cells": [{"expression": {"INS": 1, "INS": 1}}]}', ["INS", "twice"]),
}


@pytest.mark.parametrize("case", BATCHES)
def test_bad_batches(client, case):
    body, words = BATCHES[case]
    refused(client.post("/predict_batch", content=body, headers={"content-type": "application/json"}), *words)


@pytest.mark.parametrize("method, path", [("GET", "/predict"), ("PUT", "/predict"), ("DELETE", "/predict_batch"), ("GET", "/annotate"), ("POST", "/healthz"),
                                          ("POST", "/classes")])
def test_wrong_methods(client, method, path): refused(client.request(method, path), status=405)


@pytest.mark.parametrize("path", ["/", "/nothing", "/predict/x", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/model/../x"])
def test_wrong_paths(client, path): refused(client.get(path), status=404)


@pytest.mark.parametrize("kind, body", [("application/xml", b"<INS>1</INS>"), ("application/x-www-form-urlencoded", b"INS=1"),
                                        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="INS"\r\n\r\n1\r\n--x--\r\n'),
                                        ("application/octet-stream", bytes(range(256)))])
def test_wrong_content(client, kind, body): refused(client.post("/predict", content=body, headers={"content-type": kind}))


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "in chunks"])
@pytest.mark.parametrize("path", ["/predict", "/predict_batch"])
def test_a_body_over_the_limit(client, path, chunked):
    "Nine megabytes of blanks; the limit is eight."
    piece = b" " * (1 << 20)
    r = client.post(path, content=(piece for _ in range(9)) if chunked else piece * 9, headers={"content-type": "application/json"})
    refused(r, "larger", status=413)
    assert client.get("/healthz").status_code == 200


def test_an_upload_over_the_limit(classifier, cells_file):
    "In this process with a small limit, as the real one is half a gigabyte."
    from fastapi.testclient import TestClient

    from scimlora.serve import create_app

    small = TestClient(create_app(classifier.predictor, max_file=10_000), raise_server_exceptions=False)
    refused(small.post("/annotate", files={"file": ("cells.h5ad", cells_file.read_bytes())}), "larger", status=413)


def h5ad_bytes(cells, tmp_path):
    cells.write_h5ad(tmp_path / "x.h5ad")
    return (tmp_path / "x.h5ad").read_bytes()


def with_nan(a):
    a.X = a.X.toarray()
    a.X[2, 3] = np.nan
    return a


def strange_genes(a):
    a.var_names = [f"AT1G{i:05d}" for i in range(a.n_vars)]
    return a


UPLOADS = {
    "empty": (lambda a, t: b"", ["empty"]), "text": (lambda a, t: b"INS,GCG\n1,2\n", ["h5ad"]), "image": (lambda a, t: b"\x89PNG\r\n\x1a\n" + b"\0" * 50, ["h5ad"]),
    "cut short": (lambda a, t: h5ad_bytes(a, t)[:50_000], ["cut short|cannot read"]), "NaN": (lambda a, t: h5ad_bytes(with_nan(a), t), ["NaN"]),
    "no shared genes": (lambda a, t: h5ad_bytes(strange_genes(a), t), ["no gene shared"]), "no cells": (lambda a, t: h5ad_bytes(a[:0].copy(), t), ["no cells"]),
}


@pytest.mark.parametrize("case", UPLOADS)
@pytest.mark.parametrize("name", ["cells.h5ad", "../../../etc/cron.d/x.h5ad"])
def test_bad_uploads(client, other_cells, tmp_path, case, name):
    make, words = UPLOADS[case]
    r = client.post("/annotate", files={"file": (name, make(other_cells[:10].copy(), tmp_path))})
    refused(r, *words)
    assert "cron" not in r.text


@pytest.mark.parametrize("args, words", [(dict(), ["file"]), (dict(json={"INS": 1}), ["file"]), (dict(files={"cells": b"x"}), ["file"]),
                                         (dict(data={"file": "a text field"}), ["file"]), (dict(files={"file": b"x"}, params={"format": "xml"}), ["format"]),
                                         (dict(files={"file": b"x"}, params={"units": "tpm"}), ["units"])],
                         ids=["nothing", "JSON", "another field", "no upload", "unknown format", "unknown unit"])
def test_bad_calls_of_annotate(client, args, words): refused(client.post("/annotate", **args), *words)


def test_a_file_that_ends_a_process_does_not_end_the_service(own, cells_file, tmp_path):
    "A sparse matrix whose indices point outside of it."
    process, client = own
    shutil.copy(cells_file, tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as f: f["X/indices"][7] = -5
    try: refused(client.post("/annotate", files={"file": ("cells.h5ad", (tmp_path / "cells.h5ad").read_bytes())}))
    except httpx.TransportError: pass
    assert process.poll() is None, f"the service ended with {process.poll()}"
    assert client.get("/healthz").status_code == 200


# The end --------------------------------------------------------------------------------------------------------------


def test_sigterm_ends_it_within_five_seconds(own):
    process, client = own
    assert client.post("/predict", json={"expression": BETA}).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) in (0, -signal.SIGTERM)


def test_a_port_in_use_is_said_in_one_line(server, cli_process, bundle_dir):
    port = server[0].base_url.port
    ended = cli_process("serve", bundle_dir, "--port", port)
    assert ended.code in (1, 2)
    assert "Traceback" not in ended.err and str(port) in ended.err.splitlines()[-1] and "in use" in ended.err.splitlines()[-1]


@pytest.mark.parametrize("port", ["70000", "-1"])
def test_a_port_that_is_none(port, cli, bundle_dir):
    ended = cli("serve", bundle_dir, "--port", port)
    assert ended.code == 2 and "port" in ended.err and "Traceback" not in ended.err and ended.err.count("\n") == 1


def test_the_log_holds_no_traceback(server):
    "Last in the file, after all that was thrown at the service."
    assert "Traceback" not in server[1].read_text()
