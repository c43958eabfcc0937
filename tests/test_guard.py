"""Files that strangers send: each attack by hand, a hundred and fifty at random, and the process that opens them.

`benchmarks/fuzz_files.py` holds the random attacks and throws thousands. Here every file is a real one (Baron et al.'s
cells) with one thing changed, a secret lies beside it, and the answer is one line or the right cells.
"""
import gzip
import os
import re
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scimlora import guard
from scimlora.core import InputError, ScimloraError
from scimlora.files import read_cells
from scimlora.guard import Refused, Worker, check_file, check_hdf5, check_text, open_untrusted, run_limited

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import fuzz_files

linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel holds these limits on Linux")


@pytest.fixture(scope="module")
def worker():
    "One process for all files of this module."
    w = Worker()
    yield w
    w.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The folder of the whole files, by name: full.h5ad, gzip.h5ad, csc.h5ad, dense.h5ad, plain.h5ad, 10x.h5, cells.csv, cells.csv.gz."
    folder = tmp_path_factory.mktemp("whole")
    fuzz_files.seeds(folder)
    return folder


@pytest.fixture
def canary(tmp_path):
    "A secret beside the uploads."
    return fuzz_files.Canary(tmp_path)


@pytest.fixture
def refused(worker, canary):
    "Assert that a file is refused in one line with these words, and that its secret neighbour was not read."

    def check(path, *words, kind=None):
        got, said = fuzz_files.outcome(path, canary, worker)
        assert got != "opened" and (kind is None or got in kind), (got, said)
        assert said.startswith(path.name)
        for w in words: assert re.search(w, said, re.I), f"{w!r} is not in: {said}"

    return check


@pytest.fixture
def changed(whole, tmp_path):
    "Make a copy of a whole file and change it."

    def make(change, name="full.h5ad"):
        shutil.copy(whole / name, path := tmp_path / f"upload{Path(name).suffix}")
        with h5py.File(path, "r+") as f: change(f)
        return path

    return make


def replace(f, path, make):
    "Put something else in the place of a dataset and keep its attributes."
    attributes = dict(f[path].attrs)
    del f[path]
    made = make(path)
    for k, v in attributes.items(): made.attrs[k] = v


# Whole files open ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full.h5ad", "gzip.h5ad", "csc.h5ad", "dense.h5ad", "plain.h5ad", "10x.h5", "cells.csv", "cells.csv.gz"])
def test_whole_files_open_to_the_same_cells(name, whole, worker):
    check_file(whole / name)
    mine, theirs = read_cells(whole / name), open_untrusted(whole / name, read_cells, worker=worker)
    assert type(mine.X) is type(theirs.X) and mine.X.dtype == theirs.X.dtype
    assert np.array_equal(*(a.X.toarray() if sp.issparse(a.X) else a.X for a in (mine, theirs)))
    for table in ("obs", "var"):
        a, b = getattr(mine, table), getattr(theirs, table)
        assert list(a.index) == list(b.index) and list(a.columns) == list(b.columns)
        for column in a: assert a[column].astype(str).tolist() == b[column].astype(str).tolist()


def test_raw_and_counts_come_along_and_the_rest_stays(whole, worker):
    mine, theirs = ad.read_h5ad(whole / "full.h5ad"), open_untrusted(whole / "full.h5ad", worker=worker)
    assert (theirs.raw.X != mine.raw.X).nnz == 0 and list(theirs.raw.var_names) == list(mine.raw.var_names)
    assert (theirs.layers["counts"] != mine.layers["counts"]).nnz == 0
    assert not theirs.uns and not theirs.obsm and not theirs.obsp


def test_columns_keep_their_kind_and_their_gaps(tmp_path, worker):
    a = fuzz_files.cells(6, 20)
    a.obs = pd.DataFrame({"name": ["a", None, "c", "d", "e", "ü\n"], "kind": pd.Categorical(["x", None, "y", "x", "x", "y"]),
                          "n": pd.array([1, None, 3, 4, 5, 6], "Int64"), "ok": pd.array([True, None, False] * 2, "boolean"),
                          "share": [0.5, np.nan, 1, 2, 3, 4]}, index=list("ABCDEF"))
    a.write_h5ad(tmp_path / "cells.h5ad")
    obs = open_untrusted(tmp_path / "cells.h5ad", worker=worker).obs
    assert obs.isna().sum().tolist() == [1, 1, 1, 2, 1]
    assert obs.kind.tolist()[2:] == ["y", "x", "x", "y"] and obs["name"].iloc[5] == "ü\n"
    assert obs.n.tolist()[2:] == [3, 4, 5, 6] and obs.share.tolist()[2:] == [1, 2, 3, 4]


def test_files_of_anndata_before_0_7_open(whole, tmp_path):
    "Tables as records; categories behind an object reference, the only place where one is let in."
    a = fuzz_files.cells(6, 20)
    with h5py.File(tmp_path / "old.h5ad", "w") as f:
        f["X"] = a.X.toarray()
        f["obs"] = np.array([(f"c{i}".encode(), i) for i in range(6)], [("index", "S4"), ("n", "i4")])
        f["var"] = np.array([(g.encode(),) for g in a.var_names], [("index", "S20")])
    check_hdf5(tmp_path / "old.h5ad", deep=True)
    shutil.copy(whole / "full.h5ad", tmp_path / "newer.h5ad")
    with h5py.File(tmp_path / "newer.h5ad", "r+") as f:
        f["obs/__categories/donor"] = f["obs/donor/categories"][:]
        codes = f["obs/donor/codes"][:]
        del f["obs/donor"]
        f["obs/donor"] = codes
        f["obs/donor"].attrs["categories"] = f["obs/__categories/donor"].ref
    check_hdf5(tmp_path / "newer.h5ad", deep=True)


def test_shared_files_pass(shared):
    "Real files from many hands."
    from scimlora.examples import shared_dir

    shared("pbmc_3k_10x")
    for path in shared_dir().glob("*.h5ad"): check_hdf5(path, deep=True)


# Files that read other files -----------------------------------------------------------------------------------------

LEAKS = {
    "an external link": lambda f, c: f["obs"].__setitem__("more", h5py.ExternalLink(str(c.h5), "/text")),
    "an external link in a matrix's place": lambda f, c: (f.__delitem__("X"), f.__setitem__("X", h5py.ExternalLink(str(c.h5), "/numbers"))),
    "an external link beside the upload": lambda f, c: f["uns"].__setitem__("more", h5py.ExternalLink("secret.h5", "/text")),
    "external storage": lambda f, c: replace(f, "X/data", lambda p: f.create_dataset(p, f["X/indices"].shape, "f4", external=[(str(c.text), 0, h5py.h5f.UNLIMITED)])),
    "external storage as names": lambda f, c: replace(f, "obs/_index", lambda p: f.create_dataset(p, (50,), "S32", external=[(str(c.text), 0, 1600)])),
    "external storage of the host": lambda f, c: f.create_dataset("uns/more", (8,), "u1", external=[("/etc/hostname", 0, 8)]),
    "a virtual dataset": lambda f, c: replace(f, "X/data", lambda p: virtual(f, p, c, len(f["X/indices"]), "numbers", "f4")),
    "a virtual dataset as names": lambda f, c: replace(f, "obs/_index", lambda p: virtual(f, p, c, 50, "text", "S32")),
}


def virtual(f, path, canary, n, key, dtype):
    layout = h5py.VirtualLayout((n,), dtype)
    layout[:] = h5py.VirtualSource(str(canary.h5), key, shape=(100_000,))[:n]
    return f.create_virtual_dataset(path, layout)


@pytest.mark.parametrize("attack", LEAKS)
def test_no_file_of_the_server_is_read(attack, changed, canary, refused):
    path = changed(lambda f: LEAKS[attack](f, canary))
    refused(path, "another file|other file|virtual", kind=["refused"])
    with pytest.raises(InputError, match="put the data themselves in its place"): check_hdf5(path)


@pytest.mark.parametrize("attack", ["external storage", "a virtual dataset"])
def test_without_the_guard_it_would_have_been(attack, changed, canary):
    "The attacks are real: anndata alone reads the secret."
    a = ad.read_h5ad(changed(lambda f: LEAKS[attack](f, canary)))
    assert canary.token in fuzz_files.content(a)


# Files that lie about themselves -------------------------------------------------------------------------------------


def ladder(f):
    g = f.create_group("uns/ladder")
    for _ in range(30):
        below = g.create_group("a")
        g["b"], g = below, below


def user_filter(f):
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_chunk((8,))
    made.set_filter(300, h5py.h5z.FLAG_OPTIONAL, ())
    h5py.h5d.create(f.id, b"uns/more", h5py.h5t.NATIVE_INT32, h5py.h5s.create_simple((8,)), made)


def big(f, path, shape, **kw): return f.create_dataset(path, shape, "f4", compression="gzip", **{"chunks": tuple(min(n, 1000) for n in shape)} | kw)


LIES = {
    "a soft link to itself": (lambda f: f["uns"].__setitem__("more", h5py.SoftLink("/uns/more")), "soft link"),
    "soft links in a circle": (lambda f: (f["uns"].__setitem__("a", h5py.SoftLink("/uns/b")), f["uns"].__setitem__("b", h5py.SoftLink("/uns/a"))), "soft link"),
    "a soft link to the matrix": (lambda f: f["layers"].__setitem__("more", h5py.SoftLink("/X")), "soft link"),
    "a group in itself": (lambda f: f["uns"].__setitem__("more", f["uns"]), "holds itself"),
    "the file in itself": (lambda f: f["uns"].__setitem__("more", f["/"]), "holds itself"),
    "2 ** 30 paths": (ladder, "same group"),
    "500 groups deep": (lambda f: f.create_group("uns/" + "/".join("d" * 500)), "deep"),
    "25,000 groups": (lambda f: [f.create_group(f"uns/{i}") for i in range(25_000)], "more than 20,000"),
    "2,000 attributes": (lambda f: [f["X"].attrs.__setitem__(f"a{i}", i) for i in range(2000)], "2,00. attributes"),
    "a name of 5,000 letters": (lambda f: f["uns"].__setitem__("n" * 5000, 1), r"n{77}\.\.\.: is no usable name"),
    "a layer of 37 GB": (lambda f: big(f, "layers/counts2", (10**5, 10**5)), "37.3 GB"),
    "a chunk of 3 GB": (lambda f: big(f, "uns/more", (10**9,), chunks=(8 * 10**8,)), "GB"),
    "more bytes than a number holds": (lambda f: big(f, "uns/more", (2**40, 2**40)), "GB"),
    "an object reference": (lambda f: f["uns"].create_dataset("more", data=f["X"].ref, dtype=h5py.ref_dtype), "neither numbers nor text"),
    "a region reference": (lambda f: f["uns"].create_dataset("more", data=f["X/data"].regionref[:3], dtype=h5py.regionref_dtype), "neither numbers nor text"),
    "a reference as attribute": (lambda f: f["X"].attrs.__setitem__("more", f["obs"].ref), "neither numbers nor text"),
    "opaque bytes": (lambda f: f["uns"].__setitem__("more", np.zeros(3, "V9")), "neither numbers nor text"),
    "lists of numbers": (lambda f: f["uns"].create_dataset("more", (3,), h5py.vlen_dtype("f8")), "neither numbers nor text"),
    "a filter of one's own": (user_filter, "unknown filter 300"),
    "indptr that falls": (lambda f: f["X/indptr"].__setitem__(3, 10**6), "X.*indptr"),
    "indptr that starts late": (lambda f: f["X/indptr"].__setitem__(0, 1), "X.*indptr"),
    "indptr below zero": (lambda f: f["raw/X/indptr"].__setitem__(1, -5), "raw/X.*indptr"),
    "indptr beyond the values": (lambda f: f["layers/counts/indptr"].__setitem__(50, 10**6), "counts.*indptr ends at 1,000,000"),
    "indices beyond the genes": (lambda f: f["X/indices"].__setitem__(7, 10**6), "X.*point outside"),
    "indices below zero": (lambda f: f["layers/counts/indices"].__setitem__(7, -1), "counts.*point outside"),
    "indices of a graph": (lambda f: f["obsp/connectivities/indices"].__setitem__(7, 2**31 - 1), "obsp.*point outside"),
    "indices as floats": (lambda f: replace(f, "X/indices", lambda p: f.create_dataset(p, f["X/data"].shape, "f4")), "indices: holds float32"),
    "fewer indices than values": (lambda f: replace(f, "X/indices", lambda p: f.create_dataset(p, (9,), "i4")), "values but 9 indices"),
    "another shape": (lambda f: f["X"].attrs.__setitem__("shape", (2**40, 1500)), "indptr has 51 entries for 1,099,511,627,776"),
    "a negative shape": (lambda f: f["X"].attrs.__setitem__("shape", (-50, 1500)), "no valid shape"),
    "CSR that says CSC": (lambda f: f["X"].attrs.__setitem__("encoding-type", "csc_matrix"), "indptr has 51 entries for 1,500"),
    "a dense matrix of another shape": (lambda f: (f.__delitem__("X"), f.__setitem__("X", np.zeros((50, 3), "f4"))), r"/X: has shape \(50, 3\)"),
    "a matrix of words": (lambda f: (f.__delitem__("X"), f.__setitem__("X", np.full((50, 1500), b"x"))), "not numbers"),
    "codes without a category": (lambda f: f["obs/cell_type/codes"].__setitem__(3, 99), "cell_type.*categories"),
    "a column too short": (lambda f: replace(f, "obs/n_counts", lambda p: f.create_dataset(p, (49,), "f4")), "n_counts: has 49 values for 50 rows"),
    "genes too many": (lambda f: replace(f, "var/_index", lambda p: f.create_dataset(p, (1501,), "S9")), "var.*1,501"),
    "no index": (lambda f: f["obs"].attrs.__setitem__("_index", "../X/data"), "obs: has no index"),
    "a PCA of other cells": (lambda f: (f.__delitem__("obsm/X_pca"), f["obsm"].__setitem__("X_pca", np.zeros((49, 5)))), "X_pca: has shape"),
}


@pytest.mark.parametrize("attack", LIES)
def test_structure_that_lies(attack, changed, refused):
    change, words = LIES[attack]
    path = changed(change)
    refused(path, words, kind=["refused"])
    with pytest.raises(InputError) as e: check_hdf5(path, deep=True)
    assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)


TENX = {
    "indptr that falls": (lambda f: f["matrix/indptr"].__setitem__(3, 10**6), "indptr"),
    "indices beyond the genes": (lambda f: f["matrix/indices"].__setitem__(3, 1500), "point outside the 1,500"),
    "barcodes missing": (lambda f: replace(f, "matrix/barcodes", lambda p: f.create_dataset(p, (3,), "S9")), "barcodes: has another length"),
    "features missing": (lambda f: replace(f, "matrix/features/id", lambda p: f.create_dataset(p, (3,), "S9")), "id: has another length"),
    "a huge shape": (lambda f: f["matrix/shape"].__setitem__(1, 2**31 - 1), "holds 2,147,483,647 cells"),
    "a shape of three": (lambda f: replace(f, "matrix/shape", lambda p: f.create_dataset(p, (3,), "i4")), "is no shape"),
}


@pytest.mark.parametrize("attack", TENX)
def test_10x_files_that_lie(attack, changed, refused):
    refused(changed(TENX[attack][0], "10x.h5"), TENX[attack][1], kind=["refused"])


def test_indices_of_a_trusted_file_are_left_alone_unless_asked(changed):
    path = changed(lambda f: f["X/indices"].__setitem__(7, 10**6))
    check_hdf5(path)
    with pytest.raises(InputError): check_hdf5(path, deep=True)


def test_limits_are_the_callers(whole, worker):
    for limit, words in ((dict(max_cells=49), "50 cells"), (dict(max_genes=1499), "1,500 genes"), (dict(max_bytes=10**5), "declares")):
        with pytest.raises(InputError, match=words): check_hdf5(whole / "full.h5ad", **limit)
        with pytest.raises(Refused, match=words): open_untrusted(whole / "full.h5ad", worker=worker, **limit)


def one_text_many_times(path, n=20_000, letters=1 << 20):
    "n texts that all are the same million letters on disk: 1 MB that unpacks to 20 GB. h5py writes no such file, so bytes are moved."
    with h5py.File(path, "r+") as f:
        d = f.create_dataset("uns/bomb", (n,), h5py.string_dtype())
        d[:] = "-"
        d[0] = "A" * letters
        start = d.id.get_offset()
    b = np.fromfile(path, "u1")
    b[start:start + 16 * n] = np.tile(b[start:start + 16], n)
    b.tofile(path)


@linux
def test_a_text_that_is_counted_many_times_meets_the_memory_limit(changed, worker):
    "No declared size tells of it."
    path = changed(lambda f: None)
    one_text_many_times(path)
    check_hdf5(path)
    with pytest.raises(Refused): open_untrusted(path, memory=1 << 30, worker=worker)


# Text and other things -----------------------------------------------------------------------------------------------


def packed(path, piece, n):
    with gzip.open(path, "wb", compresslevel=1) as f:
        for _ in range(n): f.write(piece * ((1 << 20) // len(piece)))
    return path


BOMBS = {"one long line": (b"0,", 20, "columns"), "short lines": (b"0\n", 20, "lines"), "zeros": (b"\0", 2, "neither HDF5 nor text")}


@pytest.mark.parametrize("bomb", BOMBS)
def test_packed_text_that_grows(bomb, tmp_path, refused):
    piece, n, words = BOMBS[bomb]
    refused(packed(tmp_path / "upload.csv.gz", piece, n), words, kind=["refused"])


OTHERS = {"nothing": b"", "a zip": b"PK\3\4\0\0", "a pickle": b"\x80\x04\x95\0\0", "half a gzip": gzip.compress(b"a,b\n" * 99)[:30], "gzip's beginning": b"\x1f\x8b",
          "HDF5's beginning": b"\x89HDF\r\n\x1a\n", "HDF5's beginning and noise": b"\x89HDF\r\n\x1a\n" + bytes(range(256)) * 9}


@pytest.mark.parametrize("name", ["upload.h5ad", "upload.csv", "upload.csv.gz"])
@pytest.mark.parametrize("thing", OTHERS)
def test_files_that_are_something_else(thing, name, tmp_path, refused):
    (tmp_path / name).write_bytes(OTHERS[thing])
    refused(tmp_path / name)


def test_text_is_counted_in_little_memory(tmp_path):
    import tracemalloc

    path = packed(tmp_path / "cells.csv.gz", b"1,2,3\n", 200)
    tracemalloc.start()
    with pytest.raises(InputError, match="more than 0.10 GB"): check_text(path, max_bytes=100 << 20, max_lines=10**9)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


# The process ---------------------------------------------------------------------------------------------------------


def test_a_child_inherits_no_secret(worker, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in str(run_limited("os:environ.copy", worker=Worker()))
    assert "HF_TOKEN" not in run_limited("os:environ.copy", worker=worker)


def test_its_folder_is_private_and_goes_away(worker):
    folder = Path(run_limited("os:getcwd", worker=worker))
    assert folder.name.startswith("scimlora-") and not folder.exists()
    assert not list(Path(tempfile.gettempdir()).glob(f"{folder.name}*"))
    if os.name == "posix": assert run_limited("os:umask", 0, worker=worker) == 0o077


ENDS = {"hangs": ("time:sleep", [60], "time", "longer than 0.5 s"), "aborts": ("os:abort", [], "crash", "SIGABRT"),
        "reads address 0": ("ctypes:string_at", [0], "crash", "SIGSEGV"), "raises": ("json:loads", ["{"], "error", "Expecting property name"),
        "exits": ("sys:exit", [3], "error", "cannot be read"), "leaves": ("os:_exit", [0], "crash", "no answer"),
        "answers what is no JSON": ("builtins:object", [], "error", "not JSON")}


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("case", ENDS)
def test_every_end_is_one_line_and_the_worker_goes_on(case, worker):
    function, args, kind, words = ENDS[case]
    with pytest.raises(Refused, match=words) as e: run_limited(function, *args, seconds=0.5, worker=worker)
    assert e.value.kind == kind and "\n" not in str(e.value)
    assert run_limited("math:hypot", 3, 4, worker=worker) == 5


@linux
def test_memory_processor_and_files_are_limited(worker):
    with pytest.raises(Refused, match="more than 1.0 GB") as e: run_limited("numpy:ones", 10**9, memory=1 << 30, worker=worker)
    assert e.value.kind == "memory"
    with pytest.raises(Refused) as e: run_limited("builtins:sum", [[1]] * 3, worker=worker)
    assert e.value.kind == "error"
    with pytest.raises(Refused): run_limited("builtins:pow", 7, 10**9, seconds=1, worker=worker)


def test_a_missing_file_is_said_to_be_missing(tmp_path, worker):
    with pytest.raises(Refused, match="none.h5ad: no such file"): open_untrusted(tmp_path / "none.h5ad", worker=worker)


def test_an_input_error_passes_through_with_its_text(worker, tmp_path):
    with pytest.raises(Refused, match="no such file") as e: run_limited(read_cells, tmp_path / "none.h5ad", worker=worker)
    assert e.value.kind == "refused" and isinstance(e.value, InputError)


def test_a_killed_worker_starts_again():
    w = Worker()
    assert run_limited("math:hypot", 3, 4, worker=w) == 5
    w.process.kill()
    with pytest.raises(Refused): run_limited("math:hypot", 3, 4, worker=w)
    assert run_limited("math:hypot", 3, 4, worker=w) == 5
    w.close()


@pytest.fixture
def elsewhere(monkeypatch):
    "A worker as on macOS, where a process does one job and ends; and as on Windows, which has no limits either."

    def make(change="pass"):
        monkeypatch.setattr(guard, "_FORKS", False)
        monkeypatch.setattr(guard, "_START", f"from scimlora import guard; guard._FORKS = False; {change}; guard._work()")
        monkeypatch.setattr(guard, "_START_SECONDS", 12)
        return Worker()

    return make


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_where_nothing_forks_a_process_does_one_job(elsewhere, whole):
    w = elsewhere()
    assert open_untrusted(whole / "gzip.h5ad", worker=w).n_obs == 50 and w.process is None
    for function, args, kind in (("os:abort", [], "crash"), ("time:sleep", [60], "time"), ("json:loads", ["{"], "error")):
        with pytest.raises(Refused) as e: run_limited(function, *args, seconds=1, worker=w)
        assert e.value.kind == kind


def test_where_there_are_no_limits_the_parent_has_a_clock(elsewhere, monkeypatch):
    w = elsewhere("guard.resource = None")
    assert run_limited("math:hypot", 3, 4, worker=w) == 5
    monkeypatch.setattr(guard, "_START_SECONDS", 2)
    with pytest.raises(Refused, match="longer than 0.1 s") as e: run_limited("time:sleep", 60, seconds=0.1, worker=w)
    assert e.value.kind == "time"


def test_mistakes_of_the_caller_are_no_input_errors(monkeypatch):
    def here(): pass
    here.__module__ = "__main__"
    with pytest.raises(TypeError, match="function of a module"): run_limited(here)
    monkeypatch.setattr(guard, "_START", "raise SystemExit(7)")
    with pytest.raises(ScimloraError, match="code 7") as e: run_limited("math:hypot", 3, 4, worker=Worker())
    assert not isinstance(e.value, InputError)
    with pytest.raises(ScimloraError, match="code 7") as e: open_untrusted("cells.h5ad", worker=Worker())
    assert not isinstance(e.value, InputError)


def test_many_at_a_time_share_two_processes(whole):
    found, threads = [], []
    for _ in range(6):
        t = threading.Thread(target=lambda: found.append(open_untrusted(whole / "gzip.h5ad").n_obs))
        threads.append(t)
        t.start()
    for t in threads: t.join()
    assert found == [50] * 6


# What comes back -----------------------------------------------------------------------------------------------------


def rewrite(name, change): return lambda d: np.save(d / f"{name}.npy", change(np.load(d / f"{name}.npy")))
def header(d): (d / "X.data.npy").write_bytes(b"\x93NUMPY\x01\0v\0" + f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**13},), }}".ljust(117).encode() + b"\n")
def pickled(d): np.save(d / "X.data.npy", np.array([Path], dtype=object), allow_pickle=True)


TAKEN_OVER = {"indices outside": rewrite("X.indices", lambda v: v + 10**6), "indptr that falls": rewrite("X.indptr", lambda v: v[::-1].copy()), "a pickle": pickled,
              "40 TB in a header": header, "codes outside": rewrite("obs.0", lambda v: v + 99), "fewer values": rewrite("X.data", lambda v: v[:9]),
              "no table": lambda d: (d / "obs.json").unlink(), "a table of something": lambda d: (d / "obs.json").write_text("[[[]]]")}


@pytest.mark.parametrize("case", TAKEN_OVER)
def test_a_child_that_was_taken_over_is_not_believed(case, whole, monkeypatch, worker):
    "Its arrays are tampered with on their way to the parent."
    def tampered(function, path, folder, *args, **kw):
        kept = run_limited(function, path, folder, *args, **kw)
        TAKEN_OVER[case](Path(folder))
        return kept
    monkeypatch.setattr(guard, "run_limited", tampered)
    with pytest.raises(Refused, match="makes no sense"): open_untrusted(whole / "gzip.h5ad", worker=worker)


# A hundred and fifty at random ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_damage(tmp_path):
    "No crash of this process, nothing over the time limit, no secret (`fuzz_files.outcome` asserts it), and not all refused."
    rows = list(fuzz_files.fuzz(150, 1, tmp_path, with_control=False))
    kinds = {r["outcome"] for r in rows}
    assert len(rows) == 150 and {"opened", "refused"} <= kinds <= set(fuzz_files.KINDS)
    assert max(r["seconds"] for r in rows) < 10
    assert {r["attack"] for r in rows} == {a.__name__ for a in fuzz_files.BYTES + fuzz_files.STRUCTURE + fuzz_files.TEXT}
