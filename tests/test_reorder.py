"Columns in the model's order: the compiled loop gives what SciPy gives, to the bit, and cells come out the same whatever way they take."
import os
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scimlora import data
from scimlora.core import InputError
from scimlora.data import Alignment, align_cells, log1p_cp10k

reorder = pytest.importorskip("scimlora.reorder", exc_type=ImportError)
TYPES = (np.float32, np.float64, np.int8, np.uint16, np.int32, np.int64, bool)


def counts(n=300, n_columns=700, dtype=np.float32, seed=0, index=np.int32):
    "Rows of every length, the first and the last empty, with zeros that are stored."
    rng = np.random.default_rng(seed)
    X = np.where(rng.random((n, n_columns)) < rng.random((n, 1)) ** 3, rng.integers(1, 90, (n, n_columns)), 0)
    X[[0, n - 1]] = 0
    X = sp.csr_matrix(X.astype(dtype))
    if X.dtype.kind == "f": X.data /= 7   # sums of such are rounded
    X.data[::5] = 0
    return sp.csr_matrix((X.data, X.indices.astype(index), X.indptr.astype(index)), X.shape)


def places(n_columns, n, seed=1):
    "A place for each column: some share one, some have none, some places are nobody's."
    return np.random.default_rng(seed).integers(0, n + 1, n_columns)


def shuffled(X, seed=2):
    "The same with each row's columns in no order."
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(np.arange(a, b)) for a, b in zip(X.indptr[:-1], X.indptr[1:])]).astype(int)
    return sp.csr_matrix((X.data[order], X.indices[order], X.indptr), X.shape)


def repeated(X):
    "Every value three times, in parts that are no whole share."
    return sp.csr_matrix((np.repeat(X.data, 3) * np.tile([1, 2, 3], X.nnz).astype(X.dtype), np.repeat(X.indices, 3), X.indptr * 3), X.shape)


def same(a, b): return a.shape == b.shape and all(np.array_equal(x := getattr(a, k), y := getattr(b, k)) and x.dtype == y.dtype for k in ("data", "indices", "indptr"))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 200, 1000])
@pytest.mark.parametrize("change", [lambda X: X, shuffled, repeated, lambda X: shuffled(repeated(X))], ids=["as it is", "unsorted", "repeated", "both"])
def test_both_ways_give_the_same_matrix(dtype, n, change):
    X, to = change(counts(dtype=dtype)), places(700, n)
    kept = X.copy()
    a, b = data._move(X, to, n, data._LARGE), data._by_scipy(X.astype(np.result_type(dtype, np.float32)), to, n)
    assert same(a, b) and same(X, kept)
    assert a.has_sorted_indices and a.has_canonical_format and (a.data != 0).all() and a.dtype in (np.float32, np.float64)


def test_it_is_the_sum_over_columns():
    X, to = counts(), places(700, 200)
    want = np.zeros((300, 201))
    for j in range(700): want[:, to[j]] += X[:, j].toarray().ravel()
    assert np.abs(data._move(X, to, 200, data._LARGE) - want[:, :200]).max() < 1e-4


@pytest.mark.parametrize("X", [sp.csr_matrix((4, 700), dtype=np.float32), counts()[:0], counts(index=np.int64), counts(dtype=np.longdouble)], ids=["empty cells", "no cells", "wide indices", "wide values"])
def test_odd_matrices(X):
    to = places(700, 50)
    assert same(data._move(X, to, 50, data._LARGE), data._by_scipy(X.astype(np.result_type(X.dtype, np.float32)), to, 50))
    nothing = np.full(700, 50)
    assert data._move(X, nothing, 50, data._LARGE).nnz == 0 and data._by_scipy(X.astype(np.float32), nothing, 50).nnz == 0


def test_few_values_load_nothing(monkeypatch):
    monkeypatch.delitem(sys.modules, "numba")
    monkeypatch.setattr(data, "_compiled", lambda: 1 / 0)
    X, to = counts(), places(700, 200)
    assert same(data._move(X, to, 200, X.nnz), data._by_scipy(X, to, 200))
    with pytest.raises(ZeroDivisionError): data._move(X, to, 200, data._LARGE)


def test_without_numba_columns_move_all_the_same(monkeypatch):
    monkeypatch.setattr(data, "_compiled", lambda: None)
    X, to = counts(), places(700, 200)
    assert same(data._move(X, to, 200, data._LARGE), data._by_scipy(X, to, 200))


@pytest.mark.parametrize("way", ["by SciPy", "compiled"])
def test_values_too_large_are_refused_either_way(way, monkeypatch):
    if way == "by SciPy": monkeypatch.setattr(data, "_compiled", lambda: None)
    huge = ad.AnnData(sp.csr_matrix(np.full((3, 2), 3e38, np.float32)), var=pd.DataFrame(index=["CD19", "CD19"]))
    with pytest.raises(InputError, match="more than a number can hold"): align_cells(huge, ["CD19"])


@pytest.mark.parametrize("per", [1, 50, 10**6])
def test_blocks_change_no_logarithm(per, monkeypatch):
    X = counts()
    want = log1p_cp10k(X)
    monkeypatch.setattr(data, "_BLOCK", per)
    assert same(log1p_cp10k(X), want)
    totals = np.asarray(X.sum(1)).ravel()
    assert np.abs(want - np.log1p(X.toarray() * (1e4 / np.where(totals > 0, totals, 1))[:, None])).max() < 1e-5


def test_empty_cells_are_counted_in_many_threads():
    from concurrent.futures import ThreadPoolExecutor

    X = counts(2000, 3, np.int32, seed=4)
    a = Alignment(ad.AnnData(X, var=pd.DataFrame(index=["CD19", "CD74", "INS"])), ["INS", "CD19"])
    with ThreadPoolExecutor(8) as pool: parts = list(pool.map(a.linear, [slice(i, i + 1) for i in range(2000)]))
    assert a.empty == sum(p.nnz == 0 for p in parts) == (X[:, [0, 2]].sum(1) == 0).sum() > 100


LOADS = """
import sys
import numpy as np, scipy.sparse as sp
from scimlora.reorder import _known, move_columns

x = sp.csr_matrix(np.arange(12, dtype=np.float32).reshape(3, 4))
print(move_columns(x, np.array([2, 0, 3, 1]), 3).toarray().tolist())
print(_known() and "numba.np.linalg" in sys.modules)

from numba import njit

print(njit(lambda a: np.linalg.norm(a) + np.array([1.0, 2.0]).sum())(np.array([3.0, 4.0])))
print(move_columns(x, np.array([0, 1, 2, 3]), 3).toarray().tolist())
"""


@pytest.mark.skipif(not reorder._known(), reason="this numba reads its cache in another way")
def test_what_is_on_the_disk_is_read_without_the_compiler(tmp_path):
    def run():
        out = subprocess.run([sys.executable, "-c", LOADS], env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, timeout=300)
        assert out.returncode == 0, out.stderr
        return out.stdout.split("\n")

    made, read = run(), run()
    assert list(tmp_path.rglob("*.nbc"))
    assert (made.pop(1), read.pop(1)) == ("True", "False")
    # what is compiled after it comes out as ever, and so does what was read
    assert made == read == ["[[1.0, 3.0, 0.0], [5.0, 7.0, 4.0], [9.0, 11.0, 8.0]]", "8.0", "[[0.0, 1.0, 2.0], [4.0, 5.0, 6.0], [8.0, 9.0, 10.0]]", ""]


def test_without_a_folder_for_the_cache_loops_are_compiled(monkeypatch):
    monkeypatch.setattr(type(reorder._njit(lambda x: x)), "enable_caching", lambda self: (_ for _ in ()).throw(RuntimeError("no locator available")))
    assert reorder._njit(lambda x: x + 1)(1) == 2


def test_another_way_of_reading_is_left_to_numba(monkeypatch):
    monkeypatch.setattr(reorder, "_known", lambda: False)
    assert type(reorder._njit(places)._cache) is reorder.FunctionCache
    monkeypatch.undo()
    monkeypatch.setattr(reorder.FunctionCache, "load_overload", lambda self, sig, target_context: None)
    assert not reorder._known()
