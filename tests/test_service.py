"""The service under load, under attack, and at its end. All traffic stays on 127.0.0.1, bounded in count and time.

`SCIMLORA_LONG=1` runs the long forms: 60 s of 64 clients, thousands of generated requests.
"""
import asyncio
import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from loadgen import Load  # noqa: E402

LONG = os.environ.get("SCIMLORA_LONG") == "1"
KEY = "scim_a-key-of-this-test-and-no-other"
ONE = b'{"expression": {"INS": 900, "IAPP": 50, "PCSK1": 3, "G6PC2": 5}}'
SECRETS = re.compile(r"Traceback|site-packages|File \"|\.py\b|/tmp/|/work|/home/|/root|/usr|/proc|scim_a-key")


class Running:
    "A service that was started by its command."

    def __init__(self, command, bundle, log, *more, **env):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.log = log
        self.process = subprocess.Popen([command, "serve", str(bundle), "--port", str(self.port), *map(str, more)], stdout=subprocess.DEVNULL, stderr=log.open("w"),
                                        env=os.environ | {"OMP_NUM_THREADS": "1"} | env)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30, limits=httpx.Limits(max_keepalive_connections=0))
        deadline = time.monotonic() + 90
        while not self.healthy():
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

    def healthy(self):
        try: return self.client.get("/healthz", timeout=1).status_code == 200
        except httpx.TransportError: return False

    def lines(self): return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def load(self, **kw): return asyncio.run(Load(self.port, kw.pop("bodies", [ONE]), **kw).go())

    def children(self):
        "Process ids of its workers."
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True).stdout
        return [int(p) for p in listed.split()]

    def memory(self):
        "MB that it and its workers hold for themselves."
        own = lambda pid: sum(int(line.split()[1]) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if line.startswith(("Private_Dirty", "Private_Clean")))
        return sum(map(own, [self.process.pid, *self.children()])) / 1e3

    def stop(self):
        for pid in self.children():
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
        if self.process.poll() is None: self.process.kill()
        self.process.wait()
        self.client.close()


@pytest.fixture
def start(command, bundle_dir, tmp_path):
    "Start services that end with the test."
    running = []

    def go(*more, bundle=bundle_dir, **env):
        running.append(Running(command, bundle, tmp_path / f"log{len(running)}", *more, **env))
        return running[-1]

    yield go
    for r in running: r.stop()


@pytest.fixture(scope="module")
def service(command, bundle_dir, tmp_path_factory):
    "A service that tests share and leave as it is."
    r = Running(command, bundle_dir, tmp_path_factory.mktemp("service") / "log", "--also", "mini=mini", SCIMLORA_BODY_SECONDS="2", SCIMLORA_HEADER_SECONDS="2")
    yield r
    r.stop()


@pytest.fixture(scope="module")
def real(bundle_dir, command, tmp_path_factory):
    "1,000 real cells as request bodies, and what `scimlora annotate` says of them."
    from scimlora.examples import baron

    folder, cells = tmp_path_factory.mktemp("real"), baron()[:1000]
    # A cell with its zeros is 200 kB of JSON; the short form takes the 2,000 genes with most counts.
    cells = (cells if LONG else cells[:, np.sort(np.argsort(-np.asarray(cells.X.sum(0)).ravel())[:2000])]).copy()
    cells.write_h5ad(folder / "cells.h5ad")
    subprocess.run([command, "annotate", bundle_dir, folder / "cells.h5ad", "--out", folder / "out.csv"], check=True, capture_output=True)
    X, genes = cells.X.toarray().astype(int), cells.var_names.to_numpy(str)
    return [dict(zip(genes.tolist(), x.tolist())) for x in X], pd.read_csv(folder / "out.csv", keep_default_na=False)


def no_worse(answers, table):
    "Answers are those of the table, to its four digits."
    assert [a["cell_type"] for a in answers] == list(table.cell_type)
    assert np.abs(np.array([a["confidence"] for a in answers]) - table.confidence).max() <= 5.1e-5
    assert [a["reason"] for a in answers] == list(table.reason)


# Right ----------------------------------------------------------------------------------------------------------------


def test_a_thousand_real_cells_in_any_order_and_company(service, real):
    "With the zeros of their file, in batches of any size, backwards, and one by one among others."
    cells, table = real
    order = np.random.default_rng(0).permutation(1000)
    for part in np.split(order, [1, 8, 30]):
        for some in np.array_split(part, len(part) // 25 + 1):
            r = service.client.post("/predict_batch", json={"cells": [{"expression": cells[i]} for i in some], "units": "counts"})
            assert r.status_code == 200, r.text[:300]
            no_worse(r.json(), table.iloc[some])
    some = order[:64]
    bodies = [json.dumps({"expression": cells[i], "units": "counts"}).encode() for i in some]
    right = lambda i, body: json.loads(body)["cell_type"] == table.cell_type.iloc[some[i]] and abs(json.loads(body)["confidence"] - table.confidence.iloc[some[i]]) < 6e-5
    said = service.load(bodies=bodies, clients=16, seconds=3, check=right)
    assert said["wrong"] == 0 and set(said["statuses"]) == {200} and said["answers"] > 16


def test_models_are_chosen_by_request(service):
    assert service.client.get("/models").json()["models"] == ["pancreas", "mini"]
    ask = lambda **kw: service.client.post("/predict", json={"expression": {"CD19": 8.5, "MS4A1": 9.2, "CD79A": 7.8}, **kw})
    assert ask(model="mini").json()["cell_type"] == "B cell" and ask().json()["cell_type"] != "B cell"
    assert ask(model="nothing").status_code == 404 and ask(model="../pancreas").status_code == 404
    assert "B cell" in service.client.get("/classes", params={"model": "mini"}).json()["classes"]


def test_units_are_echoed_and_never_applied_twice(service):
    "log1p values that are sent as such are not logged again: the same cell in counts gets the same answer."
    counts = {"INS": 900, "IAPP": 50, "TTR": 50}
    logged = {g: float(np.log1p(v * 10)) for g, v in counts.items()}
    a, b = (service.client.post("/predict", json={"expression": e, "units": u}).json() for e, u in ((counts, "counts"), (logged, "log1p_cp10k")))
    assert (a["units"], b["units"]) == ("counts", "log1p_cp10k") and a["confidence"] == pytest.approx(b["confidence"], abs=1e-5)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_readmes_curl_lines(service):
    "As a reader types them, but for the port."
    lines = [line for line in (Path(__file__).parent.parent / "README.md").read_text().splitlines() if line.startswith("curl ") and "localhost:8000" in line]
    assert lines
    for line in lines:
        said = subprocess.run(line.replace("localhost:8000", f"127.0.0.1:{service.port}"), shell=True, capture_output=True, text=True, timeout=30)
        assert json.loads(said.stdout)["cell_type"], (line, said.stdout[:300])


# Unbreakable: bad input -----------------------------------------------------------------------------------------------


def bad_cases():
    "More than 300 bodies for /predict that are wrong."
    values = ["NaN", "-NaN", "Infinity", "-Infinity", "nan", "inf", "1e999", "-1e999", "-1", "-0.001", "-1e-300", "true", "false", "null", '"1"', '""', "[]", "[1]", "{}", '{"a":1}', "0x10",
              "1_000", "01", ".5", "5.", "+1", "1e", "--1", "1,5", "'1'", "undefined", "9" * 400, "9" * 5000, "-" + "9" * 400, "1e1000000000", "\\u0031", '"NaN"', "[[1]]", '{"value": 1}', "1 2"]
    names = ["INS", "CD19", "ENSG00000254647", "\\ud800", "", " ", "../etc/passwd", "INS\\u0000"]
    for v in values:
        for n in names: yield f"{n or 'empty'}={v[:20]}", f'{{"expression": {{"{n}": {v}}}}}'.encode()
    fields = ['"units": "tpm"', '"units": null', '"units": 1', '"units": ["counts"]', '"units": ""', '"k": 3', '"model": 1', '"model": {}', '"model": "' + "m" * 200 + '"', '"Units": "counts"']
    for f in fields: yield f, f'{{"expression": {{"INS": 1}}, {f}}}'.encode()
    for name, e in {"null": "null", "list": '["INS"]', "text": '"INS"', "number": "1", "empty": "{}", "unknown": '{"NOSUCH1": 1}', "spike-in": '{"ERCC-00002": 1}', "mouse": '{"mm10_Ins1": 1}',
                    "100 unknown": json.dumps({f"NOSUCH{i}": 1 for i in range(100)}), "twice": '{"INS": 1, "INS": 1}', "100,001 genes": json.dumps({f"G{i}": 1 for i in range(100_001)}),
                    "100,000 unknown": json.dumps({f"NOSUCH{i}": 1 for i in range(100_000)}), "two of 1e308": '{"INS": 1e308, "GCG": 1e308}', "log of 1e308": '{"INS": 1e308}'}.items():
        yield f"expression: {name}", f'{{"expression": {e}, "units": "{"log1p_cp10k" if name.startswith("log") else "auto"}"}}'.encode()
    for name, b in {"empty": b"", "blank": b" ", "brace": b"{", "brackets": b"[" * 100_000, "braces": b'{"a":' * 50_000, "quote": b'"', "zeros": b"\0" * 64, "utf-16": '{"a":1}'.encode("utf-16"),
                    "bom": b"\xef\xbb\xbf" + ONE[:-1], "latin-1": b'{"expression": {"\xe9": 1}}', "gzip": gzip.compress(ONE), "gzip bomb": gzip.compress(b" " * 10_000_000), "two": ONE + ONE,
                    "comma": ONE[:-1] + b",}", "comment": b"/* */" + ONE, "number": b"1", "text": b'"x"', "null": b"null", "list": b"[1]", "xml": b"<a/>", "proto": b'{"__proto__": {"a": 1}}',
                    "deep value": b'{"expression": {"INS": ' + b"[" * 5000 + b"]" * 5000 + b"}}", "random": bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8))}.items():
        yield f"body: {name}", b


def check_refused(r, what):
    assert 400 <= r.status_code < 500, (what, r.status_code, r.text[:300])
    assert not SECRETS.search(r.text) and len(r.text) < 3000, (what, r.text[:300])
    assert r.headers["content-type"] == "application/json" and r.json()["detail"], what


def test_three_hundred_bad_bodies(service):
    cases = list(bad_cases())
    assert len(cases) >= 300
    with httpx.Client(base_url=service.client.base_url, timeout=30) as c:
        for what, body in cases: check_refused(c.post("/predict", content=body, headers={"content-type": "application/json"}), what)
    assert service.healthy() and "error" not in " ".join(line["level"] for line in service.lines())


@pytest.mark.parametrize("raw", [
    b"GET / HTTP/9.9\r\n\r\n", b"\r\n\r\n\r\n", b"\0\0\0\0\r\n\r\n", b"GET\r\n\r\n", b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n\r\n", b"GET /predict HTTP/1.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(20_000)) + b"\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01", b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_broken_http(service, raw):
    "What is no HTTP gets a 4xx or an end, and nothing of the machine."
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as c:
        try:
            c.sendall(raw)
            said = c.recv(65536)
        except ConnectionError: said = b""
    assert not said or re.match(rb"HTTP/1\.[01] 4\d\d", said), said[:100]
    assert not SECRETS.search(said.decode("latin-1"))
    assert service.healthy()


def test_uploads_that_bite(service):
    "A table that grows a thousandfold, no table at all, and names that point elsewhere."
    bomb = gzip.compress(b"cell," + b",".join(b"G%d" % i for i in range(1000)) + b"\n" + b"c,0\n" * 1_000_000)
    for name, data in (("a.csv.gz", bomb), ("a.h5ad", gzip.compress(b"\0" * 10_000_000)), ("../../x.csv", b"\0" * 1000), ("a.loom", b"\x89HDF\r\n\x1a\n" + b"\0" * 5000), ("a.tsv", b"a\tb\n\"" * 1000)):
        check_refused(service.client.post("/annotate", files={"file": (name, data)}), name)
    for form in (b"", b"--x", b"--x\r\n\r\n--x--\r\n", b"--x\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\nabc\r\n--x--\r\n"):
        check_refused(service.client.post("/annotate", content=form, headers={"content-type": "multipart/form-data; boundary=x"}), form)


@pytest.mark.filterwarnings("ignore")
def test_schemathesis_finds_no_server_error_and_no_broken_promise(service):
    "Generated requests over all of the OpenAPI document: statuses, media types and schemas are those that are promised."
    found = subprocess.run([sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{service.port}/openapi.json", "--max-examples", "200" if LONG else "15", "--seed", "1",
                            "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance", "--workers", "1", "--no-color"],
                           capture_output=True, text=True, timeout=600, cwd=service.log.parent)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-1000:]


def test_the_examples_of_the_documentation_work(service):
    api = service.client.get("/openapi.json").json()
    for path in ("/predict", "/predict_batch"):
        example = api["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
        assert service.client.post(path, json=example).status_code == 200


# Unbreakable: slow, many, dying ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"POST /predict HTTP/1.1\r\nHost: x\r\nX-", b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", b""], ids=["head", "body", "nothing"])
def test_250_slow_connections(service, sent):
    "A health check answers in less than a second beside them, and all are closed in time: 2 s for a head, 2 s for a body."
    slow = [socket.create_connection(("127.0.0.1", service.port), timeout=10) for _ in range(250)]
    for c in slow: c.sendall(sent)
    start = time.monotonic()
    assert service.client.get("/healthz").status_code == 200 and time.monotonic() - start < 1
    for c in slow:
        c.settimeout(max(0.1, start + 8 - time.monotonic()))
        said = b""
        while piece := c.recv(4096): said += piece
        assert said.startswith(b"HTTP/1.1 408")
        c.close()


def test_64_clients_get_answers_and_memory_stays(start, command):
    "60 s in the long form. Warm first: what is allocated once is no leak."
    s = start()
    s.load(clients=64, seconds=20 if LONG else 3)
    before = s.memory()
    said = s.load(clients=64, seconds=60 if LONG else 4)
    assert set(said["statuses"]) <= {200, 503} and said["lost"] == 0 and said["statuses"][200] > 100
    assert s.memory() < 1.05 * before
    assert not [line for line in s.lines() if line["level"] == "error"]


def test_a_full_queue_says_come_again(start):
    "One cell may wait: of eight at once, some are told when to come again; none waits long or fails otherwise."
    s = start("--set", "queue=1", "--set", "batch=1")
    said = s.load(clients=8, seconds=1.5)
    assert set(said["statuses"]) == {200, 503} and said["max_ms"] < 2000
    big = json.dumps({"cells": [json.loads(ONE)] * 2000}).encode()
    with socket.create_connection(("127.0.0.1", s.port)) as c:
        c.sendall(b"POST /predict_batch HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(big) + big)
        time.sleep(0.3)
        r = s.client.post("/predict", content=ONE)
    assert r.status_code == 503 and int(r.headers["retry-after"]) >= 1 and "waiting" in r.json()["detail"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forks")
def test_a_worker_that_is_killed_under_load_is_back(start):
    "Within 3 s there are two again, nothing wrong was said meanwhile, and the metrics add up both."
    s = start("--workers", 2)
    want = json.loads(s.client.post("/predict", content=ONE).text)
    before = set(s.children())
    assert len(before) == 2

    async def go():
        right = lambda i, body: json.loads(body)["cell_type"] == want["cell_type"]
        load = asyncio.create_task(Load(s.port, [ONE], clients=16, seconds=5, check=right).go())
        await asyncio.sleep(1)
        os.kill(victim := min(before), signal.SIGKILL)
        killed = time.monotonic()
        while victim in s.children() or len(s.children()) < 2: await asyncio.sleep(0.02)
        seconds = time.monotonic() - killed
        return await load, seconds

    said, seconds = asyncio.run(go())
    assert seconds < 3
    replaced = [line for line in s.lines() if line.get("event")]
    assert len(replaced) == 1 and replaced[0]["code"] == -signal.SIGKILL and len(set(s.children()) - before) == 1
    assert said["wrong"] == 0 and set(said["statuses"]) <= {200, 503} and said["lost"] <= 16, "only what the dead worker held"
    assert sum(float(x.split()[-1]) for x in s.client.get("/metrics").text.splitlines() if x.startswith("scimlora_requests_total")) > said["answers"] / 2


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_under_load_loses_no_request(start, workers):
    "Every request that was sent on a connection is answered; afterwards connections are refused."
    s = start("--workers", workers)

    async def go():
        load = asyncio.create_task(Load(s.port, [ONE], clients=64, seconds=4).go())
        await asyncio.sleep(1.5)
        s.process.send_signal(signal.SIGTERM)
        return await load

    said = asyncio.run(go())
    assert s.process.wait(5) in (0, -signal.SIGTERM)
    assert said["lost"] == 0 and set(said["statuses"]) <= {200, 503} and said["refused"] > 0 and said["answers"] > 64


# Safe -----------------------------------------------------------------------------------------------------------------


def test_keys_rates_and_what_is_logged(start, cli, tmp_path):
    made = cli("key", "anna").out.splitlines()
    (tmp_path / "keys").write_text(made[1] + "\n")
    s = start(SCIMLORA_API_KEY=KEY, SCIMLORA_API_KEYS_FILE=str(tmp_path / "keys"), SCIMLORA_RATE="6")
    body, anna = {"expression": {"INS": 123456.75, "SECRETGENE": 987654.5}}, made[0].partition("=")[2]
    ask = lambda **headers: s.client.post("/predict", json=body, headers=headers)
    assert [ask().status_code, ask(**{"X-API-Key": "scim_wrong"}).status_code, ask(**{"X-API-Key": anna}).status_code, ask(Authorization=f"Bearer {KEY}").status_code] == [401, 401, 200, 200]
    assert s.client.get("/model").status_code == 401 and s.client.get("/metrics").status_code == 401 and s.client.get("/readyz").status_code == 200
    forged = [ask(**{"X-API-Key": f"scim_{i}", "X-Forwarded-For": f"10.0.0.{i}"}).status_code for i in range(12)]
    assert set(forged) == {401, 429} and forged[-1] == 429, "wrong keys are limited, whoever they say they are"
    assert ask(**{"X-API-Key": anna}).status_code == 200, "and right keys are not"
    limited = [ask(**{"X-API-Key": anna}) for _ in range(8)]
    assert limited[-1].status_code == 429 and int(limited[-1].headers["retry-after"]) >= 1
    assert ask(**{"X-API-Key": KEY, "X-Request-Id": "run-7"}).headers["x-request-id"] == "run-7"
    until = time.monotonic() + 10
    while "run-7" not in (text := s.log.read_text()) and time.monotonic() < until: time.sleep(0.01)  # a request is logged after its answer
    assert any(line["id"] == "run-7" and line["status"] == 200 and line["who"] == "key key" for line in s.lines())
    assert not re.search(r"123456|987654|SECRETGENE|INS|scim_", text)


def test_cors_is_off_until_it_is_asked_for(service, start):
    origin = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in service.client.options("/predict", headers=origin).headers
    s = start(SCIMLORA_CORS_ORIGINS="https://example.org")
    assert s.client.options("/predict", headers=origin).headers["access-control-allow-origin"] == "https://example.org"


@pytest.mark.parametrize("more, words", [(["--set", "port=x"], "port"), (["--set", "colour=red"], "colour"), (["--set", "queue"], "NAME=VALUE"), (["--also", "x=/nowhere"], "no bundle"),
                                         (["--set", f"api_key={KEY}"], "SCIMLORA_API_KEY"), (["--public"], "API key")])
def test_wrong_settings_are_one_line(cli, bundle_dir, more, words):
    ended = cli("serve", bundle_dir, "--port", 0, *more)
    assert ended.code == 2 and words in ended.err.splitlines()[-1] and "Traceback" not in ended.err and KEY not in ended.err.replace(" ".join(more), "")


def test_settings_are_listed_with_their_names_in_the_environment(cli, bundle_dir, monkeypatch):
    monkeypatch.setenv("SCIMLORA_API_KEY", KEY)
    monkeypatch.setenv("SCIMLORA_QUEUE", "77")
    listed = cli("serve", bundle_dir, "--settings")
    assert listed.code == 0 and re.search(r"SCIMLORA_QUEUE +77 ", listed.out) and KEY not in listed.out


def test_public_opens_and_closes_a_tunnel(start, tmp_path):
    "With a false ngrok on the path of modules."
    (tmp_path / "fake").mkdir()
    said = tmp_path / "said"
    (tmp_path / "fake/ngrok.py").write_text(
        f"from types import SimpleNamespace as N\ndef note(x): open({str(said)!r}, 'a').write(x + chr(10))\n"
        "def forward(to, authtoken): note(f'forward {to} {authtoken}'); return N(url=lambda: 'https://lab.ngrok.app')\ndef disconnect(url): note(f'disconnect {url}')\n")
    path = os.pathsep.join(filter(None, [str(tmp_path / "fake"), os.environ.get("PYTHONPATH")]))
    s = start("--public", SCIMLORA_API_KEY=KEY, NGROK_AUTHTOKEN="token", PYTHONPATH=path)
    assert s.client.post("/predict", content=ONE).status_code == 401 and s.client.post("/predict", content=ONE, headers={"X-API-Key": KEY}).status_code == 200
    s.process.send_signal(signal.SIGTERM)
    s.process.wait(10)
    assert said.read_text().splitlines() == [f"forward 127.0.0.1:{s.port} token", "disconnect https://lab.ngrok.app"]
    log = s.log.read_text()
    assert "https://lab.ngrok.app" in log and "curl https://lab.ngrok.app/predict" in log and KEY not in log


# Clouds ---------------------------------------------------------------------------------------------------------------


def test_vertex_and_sagemaker_in_their_container(tmp_path, bundle_dir):
    "The image's entry point with the variables that Vertex AI sets."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | dict(AIP_HTTP_PORT=str(port), AIP_HEALTH_ROUTE="/v1/health", AIP_PREDICT_ROUTE="/v1/ep:predict", SCIMLORA_BUNDLE=str(bundle_dir), SCIMLORA_HOST="127.0.0.1")
    entry = json.loads(re.search(r"^ENTRYPOINT (.+)$", (Path(__file__).parent.parent / "Dockerfile").read_text(), re.M)[1])
    process = subprocess.Popen([sys.executable, *entry[1:], "serve"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as c:
            deadline = time.monotonic() + 60
            while True:
                try:
                    if c.get("/v1/health").status_code == 200: break
                except httpx.TransportError: assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.1)
            one = json.loads(ONE)
            vertex = c.post("/v1/ep:predict", json={"instances": [one, one], "parameters": {"units": "counts"}})
            assert [p["cell_type"] for p in vertex.json()["predictions"]] == ["beta", "beta"]
            assert c.get("/ping").status_code == 200 and c.post("/invocations", json=one).json()["cell_type"] == "beta"
            check_refused(c.post("/v1/ep:predict", json={"instances": [{"expression": {"INS": -1}}]}), "vertex")
            check_refused(c.post("/invocations", content=b"INS"), "sagemaker")
    finally:
        process.kill()
        process.wait()


def test_lambda_with_amazons_own_runtime_client(bundle_dir, tmp_path):
    "Its client asks a small stand-in for the runtime API for events, calls the handler, and posts what it returns."
    pytest.importorskip("awslambdaric")
    pytest.importorskip("mangum")
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from queue import Empty, Queue
    from threading import Thread

    events, answers = Queue(), Queue()

    class Api(BaseHTTPRequestHandler):
        def do_GET(self):
            try: id, event = events.get(timeout=60)
            except Empty: return
            body = json.dumps(event).encode()
            self.send_response(200)
            for k, v in {"Lambda-Runtime-Aws-Request-Id": id, "Lambda-Runtime-Deadline-Ms": str(int(time.time() * 1000) + 60_000), "Lambda-Runtime-Invoked-Function-Arn": "arn:aws:lambda:x:1:function:scimlora",
                         "Content-Type": "application/json", "Content-Length": str(len(body))}.items(): self.send_header(k, v)
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            answers.put((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"null")))
            self.send_response(202)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_): pass

    api = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    Thread(target=api.serve_forever, daemon=True).start()
    env = os.environ | dict(AWS_LAMBDA_RUNTIME_API=f"127.0.0.1:{api.server_port}", SCIMLORA_BUNDLE=str(bundle_dir), SCIMLORA_LOG="0")
    process = subprocess.Popen([sys.executable, "-m", "awslambdaric", "scimlora.clouds.handler"], env=env, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for id, method, path, body in (("1", "POST", "/predict", ONE.decode()), ("2", "POST", "/predict", '{"expression": {"INS": NaN}}'), ("3", "GET", "/healthz", None)):
            http = dict(method=method, path=path, protocol="HTTP/1.1", sourceIp="127.0.0.1", userAgent="test")
            events.put((id, dict(version="2.0", routeKey="$default", rawPath=path, rawQueryString="", headers={"content-type": "application/json"}, body=body, isBase64Encoded=False,
                                 requestContext=dict(http=http, stage="$default", requestId=id))))
            where, said = answers.get(timeout=60)
            assert where == f"/2018-06-01/runtime/invocation/{id}/response", said
            assert said["statusCode"] == (422 if id == "2" else 200)
            if id == "1": assert json.loads(said["body"])["cell_type"] == "beta"
    finally:
        process.kill()
        process.wait()
        api.shutdown()
