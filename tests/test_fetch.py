"""Fetching over lines that break, from servers that lie, and from archives that mean harm; all on 127.0.0.1."""
import gzip
import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from scimlora import InputError, ScimloraError, examples, fetch
from scimlora.base import BASES, Base, load_base
from scimlora.encoder import Encoder
from scimlora.core import read_json, sha256
from scimlora.data import align_cells
from scimlora.fetch_ontology import fetch_ontology

MEMBERS = ("encoder.ckpt", "gene_order.tsv", "layer_sizes.json", "label_ints.csv")
KNN = ("annotation/labelled_kNN.bin", "annotation/reference_labels.tsv")
RECORD = "/records/10685499/files/model_v1.1.tar.gz"


# A server with faults ---------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Serve `site.files`; each request takes the next of `site.faults[path]`:

    `break=n` hang up after n bytes · `status=503` · `no_range` answer 200 to a Range · `longer=n` announce n bytes more ·
    `no_length` announce none · `stall=n` fall silent after n bytes
    """

    def do_GET(self):
        site = self.server
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        site.asked.append((self.path, start))
        faults = site.faults.get(self.path)
        fault = faults.pop(0) if faults else {}
        if "status" in fault: return self.refuse(fault)
        if self.path not in site.files: return self.send_error(404)
        body = site.files[self.path]
        if "no_range" in fault: start = 0
        if start and start >= len(body): return self.send_error(416)
        self.send_response(206 if start else 200)
        total = len(body) + fault.get("longer", 0)
        if start: self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if "no_length" not in fault: self.send_header("Content-Length", total - start)
        if site.tags: self.send_header("ETag", f'"{hashlib.md5(body).hexdigest()}"')
        self.end_headers()
        end = start + fault.get("break", fault.get("stall", len(body)))
        for a in range(start, min(end, len(body)), 1 << 20): self.wfile.write(body[a:min(a + (1 << 20), end)])
        if "stall" in fault: site.stalled.set(); time.sleep(30)

    def refuse(self, fault):
        self.send_response(fault["status"])
        if "retry" in fault: self.send_header("Retry-After", fault["retry"])
        self.send_header("Content-Length", 0)
        self.end_headers()

    def log_message(self, *args): pass


class Site(ThreadingHTTPServer):
    "Files by path, faults by path, and what was asked for as (path, first byte)."
    daemon_threads, block_on_close = True, False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.asked, self.tags, self.stalled = {}, {}, [], True, threading.Event()

    def handle_error(self, *args): pass

    @property
    def url(self): return f"http://127.0.0.1:{self.server_port}"

    def starts(self, path): return [start for p, start in self.asked if p == path]

    def publish(self, body, md5=None):
        "Put an archive where Zenodo would have it, with its record; returns its address."
        self.files[RECORD] = body
        file = dict(key="model_v1.1.tar.gz", size=len(body), checksum=f"md5:{md5 or hashlib.md5(body).hexdigest()}")
        self.files["/api/records/10685499"] = json.dumps(dict(id=10685499, files=[file])).encode()
        return self.url + RECORD


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(fetch, "WAIT", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Site()
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# A base in the real layout ----------------------------------------------------------------------------------------------


def write_base(folder, n_genes, hidden, latent, weights=None):
    "A SCimilarity directory with a kNN index of three cells (its header and as many bytes as that announces)."
    torch.manual_seed(0)
    encoder = Encoder(n_genes, hidden, latent)
    if weights is not None:
        with torch.no_grad(): encoder.network[0][1].weight.copy_(weights)
    Base(encoder, [f"GENE{i}" for i in range(n_genes)], {0: "alpha", 1: "beta"}).save(folder)
    (folder / "annotation").mkdir()
    row = 4 * latent + 136
    (folder / KNN[0]).write_bytes(struct.pack("<6Q", 0, 3, 3, row, 4 * latent + 128, 128).ljust(96 + 3 * row, b"\0"))
    (folder / KNN[1]).write_text("alpha\tstudy1\nbeta\tstudy1\nbeta\tstudy2\n", encoding="utf-8")
    return folder


def pack(folder, order=None, extra=(), ballast=0, level=1):
    "A tar.gz of a folder under `model_v1.1/`, `extra` members before it (empty, whatever they claim), a search index behind it."
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=level) as gz, tarfile.open(fileobj=gz, mode="w") as tar:
        for m in extra: gz.write(m.tobuf(tarfile.GNU_FORMAT))
        for name in order or (*MEMBERS, *KNN): tar.add(folder / name, f"model_v1.1/{name}")
        if ballast:
            m = tarfile.TarInfo("model_v1.1/cellsearch/cells.bin")
            m.size = ballast
            tar.addfile(m, io.BytesIO(np.random.default_rng(0).bytes(ballast)))
    return out.getvalue()


@pytest.fixture(scope="module")
def small(tmp_path_factory): return write_base(tmp_path_factory.mktemp("small") / "base", 3000, (64, 64, 64), 16)


@pytest.fixture(scope="module")
def archive(small): return pack(small, ballast=2_000_000)


def shas(folder, names=MEMBERS): return {n: sha256(folder / n) for n in names}


def test_the_real_shape_over_a_line_that_breaks(site, tmp_path):
    # One row of random weights, repeated: 125 MB on disk that gzip packs in a second.
    row = torch.randn(28231, generator=torch.Generator().manual_seed(1)) / 168
    whole = write_base(tmp_path / "v1.1", 28231, (1024, 1024, 1024), 128, (row * 2).round(decimals=2).expand(1024, -1))
    site.faults[RECORD] = [{"break": 300_000}, {"status": 503}, {"break": 2_000_000}]
    got = fetch.fetch_base("scimilarity-v1.1", tmp_path / "fetched", site.publish(pack(whole)), retention=True)
    e = fetch.describe_base(tmp_path / "fetched")
    assert got["reconnects"] == 3 and got["checksum"].startswith("MD5 of the whole archive")
    assert e["dimensions"] == [28231, 1024, 1024, 1024, 128] and e["parameters"] == 31_146_115 and e["ok"]
    assert {n: m["sha256"] for n, m in got["members"].items()} == shas(whole, MEMBERS + KNN)


def test_it_goes_on_where_the_line_broke(site, archive, small, tmp_path):
    site.faults[RECORD] = [{"break": n} for n in (1000, 1, 150_000, 70_000, 3)]
    got = fetch.fetch_base("scimilarity-v1.1", tmp_path / "b", site.publish(archive), whole=True)
    assert site.starts(RECORD) == [0, 1000, 1001, 151_001, 221_001, 221_004]
    assert shas(tmp_path / "b") == shas(small) and got["read"] == len(archive)
    assert not [f for f in (tmp_path / "b").rglob("*") if "tmp" in f.name]


def test_it_stops_early(site, small, tmp_path):
    body = pack(small, ballast=20_000_000)
    got = fetch.fetch_base("scimilarity-v1.1", tmp_path / "b", site.publish(body))
    assert got["read"] < len(body) - 15_000_000 and set(got["members"]) == set(MEMBERS)
    assert "not read to its end" in got["checksum"] and not (tmp_path / "b" / "annotation").exists()


def test_retention_can_be_added_later(site, archive, tmp_path):
    url = site.publish(archive)
    fetch.fetch_base("scimilarity-v1.1", tmp_path / "b", url)
    before = (tmp_path / "b" / "encoder.ckpt").stat().st_mtime_ns
    got = fetch.fetch_base("scimilarity-v1.1", tmp_path / "b", url, retention=True)
    assert set(got["members"]) == {*MEMBERS, *KNN} and (tmp_path / "b" / "encoder.ckpt").stat().st_mtime_ns == before
    assert any("kept from an earlier call" in n for n in got["notes"])
    assert fetch.fetch_base("scimilarity-v1.1", tmp_path / "b", url, retention=True)["read"] == 0


def test_a_server_that_ignores_range(site, archive, small, tmp_path):
    site.faults[RECORD] = [{"break": 100_000}, {"no_range": 1}]
    got = fetch.fetch_base("scimilarity-v1.1", tmp_path / "b", site.publish(archive))
    assert shas(tmp_path / "b") == shas(small)
    assert any("cannot go on in the middle" in n for n in got["notes"])


def test_a_busy_server_is_waited_for(site, archive, monkeypatch, tmp_path):
    waits = []
    monkeypatch.setattr(fetch.time, "sleep", waits.append)
    monkeypatch.setattr(fetch, "WAIT", 1.0)
    site.faults[RECORD] = [{"status": 502}, {"status": 503}, {"status": 429, "retry": 7}, {"status": 500}]
    fetch.fetch_base("scimilarity-v1.1", tmp_path / "b", site.publish(archive))
    assert waits == [1.0, 2.0, 7, 8.0]


def test_a_server_that_falls_silent(site, archive, small, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.3)
    site.faults[RECORD] = [{"stall": 100_000}]
    got = fetch.fetch_base("scimilarity-v1.1", tmp_path / "b", site.publish(archive))
    assert shas(tmp_path / "b") == shas(small) and got["reconnects"] == 1 and len(site.starts(RECORD)) == 2


def test_a_server_that_gives_no_length(site, archive, small, tmp_path):
    site.faults[RECORD] = [{"no_length": 1}]
    fetch.fetch_base("scimilarity-v1.1", tmp_path / "b", site.publish(archive), whole=True)
    assert shas(tmp_path / "b") == shas(small)


@pytest.mark.parametrize("fault, says", [
    ({"longer": 5000}, "the server announces 5,000 bytes more"), ({"status": 403}, "answers 403"), ({"status": 404}, "answers 404"),
    ({"longer": 5000, "no_record": 1}, "lied about its length"), ({"html": 1}, "no tar.gz"), ({"cut": 1}, "cut short"),
    ({"down": 1}, "answers 503"), ({"record": 1}, "published"), ({"flip": 1}, "")])
def test_trouble_that_stays_ends_in_one_line(site, archive, tmp_path, cli, fault, says):
    body = archive
    if "html" in fault: body = b"<!doctype html><p>Zenodo is down for maintenance"
    if "cut" in fault: body = archive[:100_000]
    if "flip" in fault: body = archive[:90_000] + bytes(500) + archive[90_500:]
    url = site.publish(body, "0" * 32 if "record" in fault else None)
    if "no_record" in fault: del site.files["/api/records/10685499"]
    site.faults[RECORD] = [{"status": 503}] * 9 if "down" in fault else [{k: v for k, v in fault.items() if k in ("longer", "status")}]
    e = cli("fetch", "base", "scimilarity-v1.1", "--out", tmp_path / "b", "--url", url, "--whole")
    if says == "the server announces 5,000 bytes more": says = f"announces {len(archive) + 5000:,} bytes, the record {len(archive):,}"
    assert e.code == 1 and len(e.err.splitlines()) == 1 and says in e.err and "Traceback" not in e.err
    if "record" in fault: assert not (tmp_path / "b" / "encoder.ckpt").exists()


def test_a_file_that_changes_on_the_way_is_not_mixed(site, archive, small, tmp_path):
    url, longer = site.publish(archive), pack(small, ballast=2_100_000)
    site.faults[RECORD] = [{"break": 200_000}]
    stream = fetch.HttpStream(url)
    assert len(stream.read(1000))
    site.files[RECORD] = longer
    with pytest.raises(fetch.Changed, match="changed at its source"):
        while stream.read(1 << 20): pass


def test_a_new_version_replaces_the_old_one_whole(site, archive, small, tmp_path):
    url = site.publish(archive)
    fetch.fetch_base("scimilarity-v1.1", tmp_path / "b", url)
    other = write_base(tmp_path / "other", 3000, (32, 32, 32), 16)
    site.publish(pack(other))
    got = fetch.fetch_base("scimilarity-v1.1", tmp_path / "b", url, whole=True)
    assert shas(tmp_path / "b") == shas(other) and any("changed at its source" in n for n in got["notes"])


def test_a_killed_process_leaves_whole_members_only(site, small, tmp_path, command):
    body = pack(small, order=("gene_order.tsv", "layer_sizes.json", "encoder.ckpt", "label_ints.csv", *KNN), level=0)
    url, out = site.publish(body), tmp_path / "b"
    site.faults[RECORD] = [{"stall": 700_000}]  # in the middle of the encoder
    p = subprocess.Popen([command, "fetch", "base", "scimilarity-v1.1", "--out", out, "--url", url], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert site.stalled.wait(60)
    deadline = time.time() + 20
    while time.time() < deadline and len(read_json(out / "fetch.json")["members"] if (out / "fetch.json").exists() else {}) < 2: time.sleep(0.05)
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    assert set(read_json(out / "fetch.json")["members"]) == {"gene_order.tsv", "layer_sizes.json"} and not (out / "encoder.ckpt").exists()
    before = (out / "gene_order.tsv").stat().st_mtime_ns
    got = fetch.fetch_base("scimilarity-v1.1", out, url)
    assert shas(out) == shas(small) and (out / "gene_order.tsv").stat().st_mtime_ns == before
    assert any("gene_order.tsv, layer_sizes.json; the stream itself had to start over" in n for n in got["notes"])


def bad_member(name, size=0, kind=tarfile.REGTYPE, link=""):
    m = tarfile.TarInfo(name)
    m.size, m.type, m.linkname = size, kind, link
    return m


@pytest.mark.parametrize("member, says", [
    (bad_member("model_v1.1/../../escaped"), "climbs out"), (bad_member("/tmp/escaped"), "climbs out"),
    (bad_member("../encoder.ckpt"), "climbs out"), (bad_member("model_v1.1\\..\\x"), "climbs out"), (bad_member("C:/x"), "climbs out"),
    (bad_member("model_v1.1/encoder.ckpt", kind=tarfile.SYMTYPE, link="/etc/passwd"), "link or a device"),
    (bad_member("model_v1.1/encoder.ckpt", kind=tarfile.LNKTYPE, link="../x"), "link or a device"),
    (bad_member("model_v1.1/gene_order.tsv", kind=tarfile.CHRTYPE), "link or a device"),
    (bad_member("model_v1.1/gene_order.tsv", kind=tarfile.FIFOTYPE), "link or a device"),
    (bad_member("model_v1.1/encoder.ckpt", 50 * 10**12), "cannot hold"), (bad_member("model_v1.1/layer_sizes.json", 10**8), "absurd")])
def test_a_hostile_archive_is_refused(site, small, tmp_path, member, says):
    out = tmp_path / "deep" / "b"
    with pytest.raises(ScimloraError, match=says): fetch.fetch_base("x", out, site.publish(pack(small, extra=[member])))
    assert sorted(f.name for f in tmp_path.rglob("*") if f.is_file()) == ["fetch.json"]


def test_a_giant_header_does_not_fill_the_memory(site, tmp_path):
    body = gzip.compress(bad_member("x", 1 << 31, tarfile.XHDTYPE).tobuf() + bytes(1 << 20))
    with pytest.raises(ScimloraError, match="a header of"): fetch.fetch_base("x", tmp_path / "b", site.publish(body))


def test_links_beside_the_wanted_files_are_counted_and_passed_over(site, small, tmp_path):
    link = bad_member("model_v1.1/latest", kind=tarfile.SYMTYPE, link="/etc")
    got = fetch.fetch_base("x", tmp_path / "b", site.publish(pack(small, extra=[link])))
    assert any("1 links or devices" in n for n in got["notes"]) and not (tmp_path / "b" / "latest").is_symlink()


def test_an_archive_without_an_encoder_says_so(site, small, tmp_path):
    with pytest.raises(ScimloraError, match="holds no encoder.ckpt; is it a SCimilarity model"):
        fetch.fetch_base("x", tmp_path / "b", site.publish(pack(small, MEMBERS[1:])))


def test_what_does_not_fit_is_no_base(site, small, tmp_path):
    other = write_base(tmp_path / "other", 2999, (8,), 4)
    (other / "gene_order.tsv").write_bytes((small / "gene_order.tsv").read_bytes())
    with pytest.raises(ScimloraError, match="no usable base.*3,000 genes, the encoder reads 2,999"):
        fetch.fetch_base("x", tmp_path / "b", site.publish(pack(other)))


class Evil:
    def __reduce__(self): return os.system, ("touch /tmp/scimlora_was_here",)


def test_code_in_a_checkpoint_does_not_run(site, small, tmp_path):
    other = write_base(tmp_path / "other", 3000, (8,), 4)
    torch.save({"state_dict": Evil()}, other / "encoder.ckpt")
    with pytest.raises(ScimloraError, match="no checkpoint of plain tensors"): fetch.fetch_base("x", tmp_path / "b", site.publish(pack(other)))
    assert not Path("/tmp/scimlora_was_here").exists()


@pytest.mark.parametrize("args, says", [
    (("scimilarity", "--out", "b"), "no base 'scimilarity' to fetch; known: scimilarity-v1.1"), (("mini", "--out", "b"), "comes with the package"),
    (("scimilarity-v1.1", "--out", "file"), "is a file"), (("scimilarity-v1.1", "--out", "foreign"), "did not fetch"),
    (("x", "--out", "b", "--url", "file:///etc/passwd"), "no http or https"), (("x", "--out", "b", "--url", "http://a b"), "no valid address"),
    (("scimilarity-v1.1",), "--out")])
def test_a_wrong_call_is_told_in_one_line(tmp_path, monkeypatch, cli, args, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "encoder.ckpt").write_text("mine")
    e = cli("fetch", "base", *args)
    assert e.code == 2 and len(e.err.splitlines()) == 1 and says in e.err and not (tmp_path / "b").exists()


# scimlora base ----------------------------------------------------------------------------------------------------------


def test_base_describes_mini(cli):
    e = json.loads(cli("base", "mini", "--json").out)
    mini = load_base("mini")
    assert e["ok"] and e["genes"] == len(mini.genes) and e["labels"] == len(mini.labels)
    assert e["knn"]["cells"] == len((BASES / "mini" / KNN[1]).read_text().splitlines())
    assert e["files"]["encoder.ckpt"]["sha256"] == mini.sha256["encoder.ckpt"]
    assert "verdict   whole" in cli("base", "mini").out


@pytest.mark.parametrize("damage, says", [("knn", "cut short"), ("labels", "4 lines, the kNN index 3 cells"), ("sizes", "another shape"), ("no labels", "is missing")])
def test_base_finds_what_does_not_fit(small, tmp_path, cli, damage, says):
    b = write_base(tmp_path / "b", 300, (8,), 16)
    if damage == "knn": (b / KNN[0]).write_bytes((b / KNN[0]).read_bytes()[:300])
    if damage == "labels": (b / KNN[1]).write_text("a\nb\nc\nd\n")
    if damage == "no labels": (b / KNN[1]).unlink()
    if damage == "sizes": (b / "layer_sizes.json").write_text('{"network.0.1.weight": [8, 299]}')
    e = cli("base", b)
    assert e.code == 2 and says in e.out and "not whole" in e.out


# CELLxGENE --------------------------------------------------------------------------------------------------------------


def cells_of_the_brain():
    "Darmanis' brain cells with counts and ten donors; without the shared folder Baron's, whose libraries play the donors."
    try: a = examples.shared("brain_darmanis2015")
    except InputError:
        a = examples.baron()
        # As few cells as Darmanis', and the libraries mixed, as his donors are in the order of the names.
        a = a[np.random.default_rng(0).permutation(a.n_obs)[:331]].copy()
        a.obs_names = [f"cell{i:03d}" for i in range(a.n_obs)]
        a.obs["donor"] = a.obs.library
    a = a[:, ~a.var_names.isin(["no_feature", "alignment_not_unique", "ambiguous"])].copy()
    return a[np.argsort(a.obs_names)].copy()


def as_cellxgene(a):
    "The layout of CELLxGENE's schema: Ensembl ids in the index, symbols in `feature_name`, ontology ids, raw counts in X."
    kind = a.obs.cell_type.astype(str).to_numpy()
    obs = pd.DataFrame(dict(donor_id=a.obs.donor.astype(str).to_numpy(), cell_type=kind, supercluster_term=[k.title() for k in kind]), index=a.obs_names)
    obs["cell_type_ontology_term_id"] = [f"CL:{int(hashlib.md5(k.encode()).hexdigest()[:6], 16):07d}"[:10] for k in kind]
    obs["dissection"] = "Cerebral cortex (Cx) - A1C"
    obs["is_primary_data"] = True
    obs = obs.astype({c: "category" for c in obs if c != "is_primary_data"})
    var = pd.DataFrame(dict(feature_name=pd.Categorical(a.var_names), feature_biotype="gene"), index=[f"ENSG{i:011d}" for i in range(a.n_vars)])
    return ad.AnnData(sp.csr_matrix(a.X, dtype=np.float32), obs=obs, var=var)


@pytest.fixture(scope="module")
def brain(): return as_cellxgene(cells_of_the_brain())


@pytest.fixture
def atlas(site, brain, tmp_path):
    "A stand-in of the curation API with a collection; `atlas(sets)` publishes {title: AnnData} and returns the listing."
    def publish(sets, name="Human Brain Cell Atlas v1.0", key=fetch.COLLECTIONS["siletti"], **changes):
        listing = []
        for i, (title, a) in enumerate(sets.items()):
            a.write_h5ad(tmp_path / "up.h5ad")
            body = site.files[f"/{i}.h5ad"] = (tmp_path / "up.h5ad").read_bytes()
            term = lambda label: [dict(label=label, ontology_term_id="X:1")]
            listing.append(dict(dataset_id=f"set-{i}", dataset_version_id=f"version-{i}", title=title, cell_count=a.n_obs, tissue=term("brain"), assay=term("10x 3' v3"),
                                disease=term("normal"), organism=term("Homo sapiens"), donor_id=sorted(set(a.obs.get("donor_id", []))), schema_version="5.2.0",
                                assets=[dict(filetype="RDS", filesize=1, url=f"{site.url}/{i}.rds"), dict(filetype="H5AD", filesize=len(body), url=f"{site.url}/{i}.h5ad")]) | changes)
        site.files[f"/collections/{key}"] = json.dumps(dict(collection_id=key, name=name, doi="10.1126/science.add7046", datasets=listing)).encode()
        return listing
    return publish


def test_list_and_choose(site, brain, atlas, cli, monkeypatch):
    atlas({"Dissection: A1C": brain[:200].copy(), "Supercluster: Neurons": brain[100:].copy()})
    monkeypatch.setenv("SCIMLORA_CELLXGENE_API", site.url)
    said = cli("fetch", "data", "siletti", "--list").out
    assert "2 data sets" in said and "200 cells" in said and "Dissection: A1C" in said and fetch.COLLECTIONS["siletti"] in said
    listed = json.loads(cli("fetch", "data", "siletti", "--list", "--json").out)
    assert listed["doi"] == "10.1126/science.add7046" and [x["cells"] for x in listed["datasets"]] == [200, brain.n_obs - 100]


def test_siletti_over_a_line_that_breaks(site, brain, atlas, tmp_path, cli):
    atlas({"Dissection: A1C": brain})
    site.faults["/0.h5ad"] = [{"break": 200_000}, {"status": 503}, {"break": 900_000}]
    e = cli("fetch", "data", "siletti", "--choose", "a1c", "--out", tmp_path / "o", "--max-per-class", 30, "--api", site.url)
    assert e.code == 0, e.err
    info = read_json(tmp_path / "o" / "prepare.json")
    sides = {s: ad.read_h5ad(tmp_path / "o" / f"{s}.h5ad") for s in ("train", "val", "test")}
    donors = {s: set(a.obs.donor_id) for s, a in sides.items()}
    assert donors == {s: set(v) for s, v in info["split"]["groups"].items()} and not donors["train"] & donors["test"] and not donors["train"] & donors["val"]
    assert any("held out" in n for n in info["split"]["notes"]) and info["leaks"]["donors"] == []
    all_cells = ad.concat(sides.values())
    assert all_cells.obs.supercluster_term.value_counts().max() <= 30 and info["label"] == "supercluster_term"
    assert {"dissection", "cell_type", "cell_type_ontology_term_id", "data_set"} <= set(all_cells.obs)
    theirs = brain[all_cells.obs_names]
    assert abs(all_cells.X - theirs.X).nnz == 0 and (all_cells.obs.donor_id.astype(str) == theirs.obs.donor_id.astype(str)).all()
    gone = info["left_out"]
    assert all_cells.n_obs + gone["over_the_cap"] + sum(gone["small_classes"].values()) + gone["unlabelled_cells"] == brain.n_obs
    assert f"{gone['over_the_cap']:,} cells left out: over the cap" in e.err and (tmp_path / "o" / "download" / "version-0.h5ad").exists()


def test_what_was_fetched_goes_straight_into_the_model(site, brain, atlas, tmp_path):
    atlas({"Dissection: A1C": brain})
    fetch.fetch_data("siletti", tmp_path, api=site.url, max_per_class=10)
    fetched, genes = ad.read_h5ad(tmp_path / "train.h5ad"), load_base("mini").genes
    by_symbol = cells_of_the_brain()[fetched.obs_names]
    assert (align_cells(fetched, genes).X != align_cells(by_symbol, genes).X).nnz == 0


def test_another_collection_by_its_id(site, brain, atlas, tmp_path):
    key = "01234567-89ab-cdef-0123-456789abcdef"
    atlas({"Only one": brain}, key=key)
    info = fetch.fetch_data(key.upper(), tmp_path, api=site.url, max_per_class=None)
    assert info["label"] == "cell_type" and info["left_out"]["over_the_cap"] == 0 and info["source"]["id"] == key


def test_cells_in_two_data_sets_count_once_and_order_does_not_matter(site, brain, atlas, tmp_path):
    atlas({"Dissection: A": brain[:250].copy(), "Supercluster: B": brain[150:].copy()})
    one = fetch.fetch_data("siletti", tmp_path / "1", ["all"], max_per_class=15, api=site.url)
    names = {s: sorted(ad.read_h5ad(tmp_path / "1" / f"{s}.h5ad").obs_names) for s in ("train", "val", "test")}
    atlas({"Supercluster: B": brain[:250].copy(), "Dissection: A": brain[150:].copy()})
    fetch.fetch_data("siletti", tmp_path / "2", ["all"], max_per_class=15, api=site.url)
    assert names == {s: sorted(ad.read_h5ad(tmp_path / "2" / f"{s}.h5ad").obs_names) for s in names}
    assert one["left_out"]["in_several_data_sets"] == 100
    other = fetch.fetch_data("siletti", tmp_path / "3", ["all"], max_per_class=15, api=site.url, seed=1)
    assert sorted(ad.read_h5ad(tmp_path / "3" / "train.h5ad").obs_names) != names["train"] and other["seed"] == 1


@pytest.mark.parametrize("layout", ["raw", "csc", "dense", "raw without symbols"])
def test_counts_are_found_in_every_layout(site, brain, atlas, tmp_path, layout):
    a = brain.copy()
    if layout.startswith("raw"):
        a.raw = ad.AnnData(a.X, var=a.var if layout == "raw" else a.var[[]])
        a = a[:, 5:].copy()
        a.X = sp.csr_matrix(np.log1p(a.X / 7))
    if layout == "csc": a.X = sp.csc_matrix(a.X)
    if layout == "dense": a.X = a.X.toarray()
    a.write_h5ad(tmp_path / "a.h5ad")
    got, info = fetch.sample_cells(tmp_path / "a.h5ad", "cell_type", cap=7)
    assert info["values_kind"] == "counts" and info["values_from"] == ("raw.X" if "raw" in layout else "X")
    assert abs(got.X - brain[got.obs_names].X).nnz == 0 and got.obs.cell_type.value_counts().max() == 7
    shown = 5 if layout == "raw without symbols" else 0  # genes that only raw has keep their id
    assert list(got.var.feature_name[shown:]) == list(brain.var.feature_name[shown:])


def test_a_download_goes_on_after_a_kill(site, brain, atlas, tmp_path, command):
    body_size = atlas({"Dissection: A1C": brain})[0]["assets"][1]["filesize"]
    site.faults["/0.h5ad"] = [{"stall": 2_500_000}]
    p = subprocess.Popen([command, "fetch", "data", "siletti", "--out", tmp_path / "o", "--api", site.url], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    part = tmp_path / "o" / "download" / "version-0.h5ad.part"
    deadline = time.time() + 60
    while time.time() < deadline and not (part.exists() and part.stat().st_size >= 2_000_000): time.sleep(0.05)
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    had = part.stat().st_size
    fetch.fetch_data("siletti", tmp_path / "o", api=site.url)
    assert site.starts("/0.h5ad") == [0, had] and 0 < had < body_size and not part.exists()


def test_a_part_of_an_older_version_is_not_used(site, brain, atlas, tmp_path):
    atlas({"A": brain})
    part = tmp_path / "cells.h5ad.part"
    part.write_bytes(site.files["/0.h5ad"][:1000])
    part.with_name(part.name + ".json").write_text(json.dumps(dict(url=f"{site.url}/0.h5ad", tag='"older"', total=len(site.files["/0.h5ad"]))))
    got = fetch.download(f"{site.url}/0.h5ad", tmp_path / "cells.h5ad")
    assert (tmp_path / "cells.h5ad").read_bytes() == site.files["/0.h5ad"] and any("started over" in n for n in got["notes"])


def ends(cli, site, tmp_path, *args):
    e = cli("fetch", "data", *args, "--out", tmp_path / "o", "--api", site.url)
    assert len(e.err.splitlines()) == 1 and "Traceback" not in e.err and not (tmp_path / "o" / "train.h5ad").exists(), e.err
    return e


@pytest.mark.parametrize("args, says", [
    (("brain",), "no data 'brain' to fetch; known: siletti"), (("00000000-0000-0000-0000-000000000000",), "knows no public collection"),
    (("siletti", "--choose", "cerebellum"), "no data set matches 'cerebellum'"), (("siletti",), "the collection has 2 data sets"),
    (("siletti", "--choose", "all", "--label", "cluster"), "no label column 'cluster'"),
    (("siletti", "--choose", "all", "--min-per-class", 9999), "no class of 'supercluster_term' has 9999 cells")])
def test_a_wrong_choice_is_told_in_one_line(site, brain, atlas, tmp_path, cli, args, says):
    atlas({"Dissection: A": brain[:150].copy(), "Dissection: B": brain[150:].copy()})
    e = ends(cli, site, tmp_path, *args)
    assert e.code == 2 and says in e.err


@pytest.mark.parametrize("answer, code, says", [
    (b"<html>", 1, "no JSON"), (b"[]", 1, "without a list of data sets"), (b'{"datasets": null}', 1, "without a list"), (None, 2, "no public collection")])
def test_an_odd_answer_of_the_api(site, tmp_path, cli, answer, code, says):
    if answer is not None: site.files[f"/collections/{fetch.COLLECTIONS['siletti']}"] = answer
    e = ends(cli, site, tmp_path, "siletti", "--choose", "all")
    assert e.code == code and says in e.err


@pytest.mark.parametrize("changes, says", [
    (dict(assets=[]), "has no h5ad file: Dissection: A"), (dict(assets=None), "has no h5ad"), (dict(organism=[dict(label="Mus musculus")]), "not human (Mus musculus)")])
def test_nothing_usable_in_the_collection(site, brain, atlas, tmp_path, cli, changes, says):
    atlas({"Dissection: A": brain}, **changes)
    e = ends(cli, site, tmp_path, "siletti")
    assert e.code == 2 and says in e.err


@pytest.mark.parametrize("trouble, says", [("size", "the catalogue says"), ("flip", "fetch again"), ("link", "link to another file"), ("gone", "answers 404"), ("indices", "damaged")])
def test_a_bad_file_is_told_in_one_line(site, brain, atlas, tmp_path, cli, trouble, says):
    atlas({"A": brain}, **(dict(assets=[dict(filetype="H5AD", filesize=7, url=f"{site.url}/0.h5ad")]) if trouble == "size" else {}))
    body = site.files["/0.h5ad"]
    if trouble == "flip": site.files["/0.h5ad"] = b"\0" * 4096 + body[4096:]
    if trouble == "gone": del site.files["/0.h5ad"]
    if trouble in ("link", "indices"):
        (tmp_path / "x.h5ad").write_bytes(body)
        with h5py.File(tmp_path / "x.h5ad", "a") as f:
            if trouble == "link": f["obs/secret"] = h5py.ExternalLink("/etc/passwd", "/")
            else: f["X/indices"][:50] = 10**6
        site.files["/0.h5ad"] = (tmp_path / "x.h5ad").read_bytes()
        listing = json.loads(site.files[f"/collections/{fetch.COLLECTIONS['siletti']}"])
        listing["datasets"][0]["assets"][1]["filesize"] = len(site.files["/0.h5ad"])
        site.files[f"/collections/{fetch.COLLECTIONS['siletti']}"] = json.dumps(listing).encode()
    e = ends(cli, site, tmp_path, "siletti")
    assert e.code == 1 and says in e.err


@pytest.mark.parametrize("donors, kind, says", [
    ("none", "cell", "no donor is named"), ("unknown", "cell", "no donor is named"), ("one", "cell", "only 1 group"),
    ("two", "donor", "two donors only"), ("some", "donor", "held out")])
def test_few_donors_are_split_as_well_as_they_can_be(site, brain, atlas, tmp_path, donors, kind, says):
    a = brain.copy()
    who = np.arange(a.n_obs) % 4
    a.obs["donor_id"] = {"none": "x", "unknown": "unknown", "one": "H18.30.001"}.get(donors) or (
        [f"H{i % 2}" for i in who] if donors == "two" else ["pooled" if i == 3 else f"H{i}" for i in who])
    if donors == "none": del a.obs["donor_id"]
    atlas({"A": a})
    info = fetch.fetch_data("siletti", tmp_path, api=site.url)
    assert info["split"]["kind"] == kind and any(says in n for n in info["split"]["notes"])
    assert info["left_out"]["without_donor"] == (pytest.approx(a.n_obs / 4, abs=4) if donors == "some" else 0)
    assert (tmp_path / "val.h5ad").exists() == (donors != "two")


def test_data_sets_with_other_genes_and_columns(site, brain, atlas, tmp_path):
    a, b = brain[:150, 10:].copy(), brain[150:].copy()
    del a.obs["dissection"]
    atlas({"A": a, "B": b})
    info = fetch.fetch_data("siletti", tmp_path, ["all"], api=site.url)
    assert any("10 genes are not in every data set" in n for n in info["notes"]) and info["genes"] == brain.n_vars
    train = ad.read_h5ad(tmp_path / "train.h5ad")
    assert train.obs.dissection.isna().any() and list(brain.var.feature_name[train.var_names]) == list(train.var.feature_name)


def test_without_keep_the_downloads_go(site, brain, atlas, tmp_path, cli):
    atlas({"A": brain})
    assert cli("fetch", "data", "siletti", "--out", tmp_path, "--api", site.url, "--no-keep").code == 0
    assert not list((tmp_path / "download").iterdir())


def test_many_cells_need_little_memory(tmp_path):
    # Only the table of cells grows with the file; 100,000 rows of 2,000 genes, 30 expressed each, capped at 5 a class.
    n, per = 100_000, 30
    rng = np.random.default_rng(0)
    X = sp.csr_matrix((np.ones(n * per, np.float32), np.sort(rng.integers(0, 2000, (n, per)), 1).ravel(), np.arange(0, n * per + 1, per)), shape=(n, 2000))
    X.sum_duplicates()
    obs = pd.DataFrame(dict(cell_type=pd.Categorical(rng.choice(["a", "b"], n)), donor_id=pd.Categorical(rng.choice(["x", "y", "z"], n))), index=np.arange(n).astype(str))
    ad.AnnData(X, obs=obs).write_h5ad(tmp_path / "big.h5ad")
    code = ("import resource, sys; from scimlora.fetch import sample_cells\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "a, _ = sample_cells(sys.argv[1], 'cell_type', cap=5)\n"
            "print(a.n_obs, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    said = subprocess.run([sys.executable, "-c", code, tmp_path / "big.h5ad"], capture_output=True, text=True, check=True).stdout.split()
    assert said[0] == "10" and int(said[1]) < 150_000  # kilobytes


# Ontologies -------------------------------------------------------------------------------------------------------------


def obo(n): return ("format-version: 1.2\ndata-version: today\n\n" + "".join(f"[Term]\nid: GO:{i:07d}\nname: term {i}\n" + (f"is_a: GO:{i // 2:07d}\n" if i > 1 else "") + "\n" for i in range(1, n))).encode()


def test_an_ontology_over_a_line_that_breaks(site, tmp_path):
    body = site.files["/go-basic.obo"] = obo(3000)
    site.faults["/go-basic.obo"] = [{"break": 10_000}, {"break": 1}, {"status": 503}]
    got = fetch_ontology("go-basic.obo", tmp_path, site.url + "/go-basic.obo")["go-basic.obo"]
    assert site.starts("/go-basic.obo") == [0, 10_000, 10_001, 10_001] and (tmp_path / "go-basic.obo").read_bytes() == body
    assert got["terms"] == 2999 and (tmp_path / "go-basic.obo.sha256").read_text() == f"{hashlib.sha256(body).hexdigest()}  go-basic.obo\n"
    fetch_ontology("go-basic.obo", tmp_path, site.url + "/go-basic.obo")
    assert len(site.starts("/go-basic.obo")) == 4  # the second call asked for nothing


def test_an_ontology_goes_on_in_the_next_call(site, monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "TRIES", 2)
    site.files["/cl.obo"] = obo(500)
    site.faults["/cl.obo"] = [{"break": 5000}, {"break": 0}, {"break": 0}]
    with pytest.raises(ScimloraError, match="run the same command again"): fetch_ontology("cl-basic.obo", tmp_path, site.url + "/cl.obo")
    assert not (tmp_path / "cl-basic.obo").exists()
    site.faults.clear()
    assert fetch_ontology("cl-basic.obo", tmp_path, site.url + "/cl.obo")["cl-basic.obo"]["resumed_at"] == 5000


@pytest.mark.parametrize("cut", [20, 500, 1003])
def test_an_ontology_that_ends_early_without_a_word(site, tmp_path, cut):
    site.files["/go.obo"] = obo(300)[:cut]
    with pytest.raises(ScimloraError, match="fetch the file again"): fetch_ontology("go-basic.obo", tmp_path, site.url + "/go.obo")
    assert not list(tmp_path.iterdir())


def test_an_altered_ontology_is_refused(site, tmp_path):
    url = site.url + "/go.obo"
    site.files["/go.obo"] = obo(300)
    fetch_ontology("go-basic.obo", tmp_path, url)
    (tmp_path / "go-basic.obo").write_bytes(obo(301))
    with pytest.raises(InputError, match="was altered since it was fetched"): fetch_ontology("go-basic.obo", tmp_path, url)
    (tmp_path / "go-basic.obo").unlink()
    site.files["/go.obo"] = obo(302)
    with pytest.raises(ScimloraError, match="not what was fetched from there before"): fetch_ontology("go-basic.obo", tmp_path, url)
    (tmp_path / "go-basic.obo.sha256").unlink()
    with pytest.raises(ScimloraError, match="not the SHA-256 you gave"): fetch_ontology("go-basic.obo", tmp_path, url, "0" * 64)
    assert fetch_ontology("go-basic.obo", tmp_path, url, hashlib.sha256(obo(302)).hexdigest().upper())["go-basic.obo"]["terms"] == 301
    for args, says in ((("mesh",), "is no ontology"), (("go", tmp_path, url), "2 files"), (("cl", tmp_path / "x", None, "12"), "no SHA-256")):
        with pytest.raises(InputError, match=says): fetch_ontology(*args[:1], *(args[1:] or (tmp_path,)))
    (tmp_path / "cl-basic.obo").write_text("mine")
    with pytest.raises(InputError, match="no fetch has put it there"): fetch_ontology("cl", tmp_path)
