"Cells through folded layers: whatever way is taken, the numbers are those of the dense product."
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from scimlora import kernels
from scimlora.base import load_base, load_head
from scimlora.core import _libraries, InputError, one_blas_thread
from scimlora.data import align_cells
from scimlora.examples import baron
from scimlora.kernels import in_threads, Layer, run_layers

SAME = 1e-5
SHAPES = [(1, 40, (8,)), (7, 300, (16, 4)), (500, 700, (300, 20, 8)), (1030, 1100, (520, 16)), (1, 40, (32,)), (300, 700, (96, 32)), (1030, 1100, (1088, 64, 32))]


def random_layers(n_genes, widths, seed=0, vector_slope=False):
    rng = np.random.default_rng(seed)
    f = lambda *s: rng.standard_normal(s).astype(np.float32)
    ins = (n_genes, *widths[:-1])
    slope = lambda i, n: np.empty(0, np.float32) if i == len(widths) - 1 else np.abs(f(n if vector_slope else 1)) / 2
    return [Layer(f(a, b) / np.float32(a**0.5), f(b), slope(i, b)) for i, (a, b) in enumerate(zip(ins, widths))]


def random_cells(n, n_genes, seed=0):
    "Genes as unevenly expressed as real ones: a few in most cells, most in few, some in none."
    rng = np.random.default_rng(seed)
    share = rng.permutation(np.linspace(1, 0, n_genes) ** 6)
    X = np.where(rng.random((n, n_genes)) < share, rng.exponential(2, (n, n_genes)), 0).astype(np.float32)
    return sp.csr_matrix(X)


def dense(layers, X):
    "The same layers written down with torch's dense products in double precision."
    h = torch.from_numpy(np.asarray(X.todense(), np.float64))
    for layer in layers:
        h = h @ torch.from_numpy(layer.weight).double() + torch.from_numpy(layer.bias).double()
        if layer.slope.size: h = torch.nn.functional.prelu(h, torch.from_numpy(layer.slope).double())
    return torch.nn.functional.normalize(h, dim=1).numpy()


def far(a, b): return np.abs(np.asarray(a, np.float64) - b).max()


def in_pairs(monkeypatch):
    "As on a processor whose adders stand beside what multiplies."
    from scimlora import tiles
    find = tiles.find_parts
    monkeypatch.setattr(kernels, "_tiles", lambda: tiles)
    monkeypatch.setattr(kernels, "_parts_of", lambda precision, alike=False: find(precision) if precision == "bfloat16" else tiles.PAIRS if alike else 0)


@pytest.fixture(params=["plain", "compiled", "tiles", "pairs"])
def way(request, monkeypatch):
    "All ways for matrices of any size: without numba, with it, and with products in tiles, also in pairs."
    if request.param == "plain": monkeypatch.setattr(kernels, "_compiled", lambda: None)
    else:
        pytest.importorskip("numba")
        monkeypatch.setattr(kernels, "_LARGE", 0)
    if request.param == "compiled": monkeypatch.setattr(kernels, "_tiles", lambda: None)
    if request.param == "tiles" and kernels._tiles() is None: pytest.skip("no products in tiles")
    if request.param == "pairs": in_pairs(monkeypatch)
    return request.param


@pytest.fixture(scope="module")
def real():
    mini = load_base("mini")
    return mini, align_cells(baron(), mini.genes).X


@pytest.mark.parametrize("n, n_genes, widths", SHAPES)
@pytest.mark.parametrize("vector_slope", [False, True])
def test_random_shapes(way, n, n_genes, widths, vector_slope):
    layers, X = random_layers(n_genes, widths, vector_slope=vector_slope), random_cells(n, n_genes)
    assert far(run_layers(layers, X), dense(layers, X)) < SAME


def test_real_cells_equal_the_module(way, real):
    mini, X = real
    with torch.no_grad(): want = mini.encoder(torch.from_numpy(X.toarray())).numpy()
    assert far(run_layers(mini.layers, X), want) < SAME


def test_one_cell_is_the_cell_among_others(way, real):
    mini, X = real
    whole = run_layers(mini.layers, X)
    for i in (0, 1000, X.shape[0] - 1): assert far(run_layers(mini.layers, X[i]), whole[i]) < SAME


def test_empty_rows_and_no_rows(way):
    layers, X = random_layers(300, (64, 8)), random_cells(40, 300).tolil()
    X[[0, 17, 39]] = 0
    X = X.tocsr()
    assert far(run_layers(layers, X), dense(layers, X)) < SAME
    nothing = sp.csr_matrix((5, 300), dtype=np.float32)
    assert far(run_layers(layers, nothing), dense(layers, nothing)) < SAME
    assert run_layers(layers, X[:0]).shape == (0, 8)


def test_unsorted_and_repeated_indices(way):
    layers, X = random_layers(300, (64, 8)), random_cells(400, 300)
    want, rng = dense(layers, X), np.random.default_rng(0)
    order = np.concatenate([rng.permutation(np.arange(a, b)) for a, b in zip(X.indptr[:-1], X.indptr[1:])])
    unsorted = sp.csr_matrix((X.data[order], X.indices[order], X.indptr), X.shape)
    assert not unsorted.has_sorted_indices and far(run_layers(layers, unsorted), want) < SAME
    halves = sp.csr_matrix((np.repeat(X.data[order] / 2, 2), np.repeat(X.indices[order], 2), X.indptr * 2), X.shape)
    before = halves.data.copy()
    assert far(run_layers(layers, halves), want) < SAME
    assert halves.nnz == 2 * X.nnz and np.array_equal(halves.data, before)   # the caller's matrix is left as it was


def test_other_types_and_strided_arrays(way):
    layers, X = random_layers(300, (64, 8)), random_cells(400, 300)
    want = dense(layers, X)
    assert far(run_layers(layers, X.astype(np.float64)), want) < SAME and far(run_layers(layers, X.tocsc()), want) < SAME
    wide = sp.csr_matrix((X.data, X.indices.astype(np.int64), X.indptr.astype(np.int64)), X.shape)
    assert far(run_layers(layers, wide), want) < SAME
    strided = [Layer(np.asfortranarray(layer.weight), layer.bias, layer.slope) for layer in layers]
    assert far(run_layers(strided, X), want) < SAME
    for few in (X[:1], X[:3], wide[:2], X.astype(np.float64)[:1]): assert max(far(run_layers(a, few), want[:few.shape[0]]) for a in (layers, strided)) < SAME  # by torch


@pytest.mark.parametrize("precision", [*kernels.PRECISIONS, "pairs"])
def test_a_cell_in_tiles_is_the_same_whoever_its_neighbours_are(real, precision, monkeypatch):
    if precision == "pairs":
        in_pairs(monkeypatch)
        precision = "float32"
    if kernels._parts_of(precision) is None: pytest.skip("no such products in tiles")
    mini, X = real
    first = mini.layers[0]
    genes = np.argsort(-X.getnnz(0))[:1100]
    start = lambda n: np.tile(first.bias, (n, 1))
    whole = kernels._add_in_tiles(start(X.shape[0]), X, first, genes, precision)
    assert far(whole, X[:, genes].astype(np.float64) @ first.weight[genes] + first.bias) < (1e-4 if precision == "float32" else 0.2)

    def points(h):
        "By one encoder, and by two."
        z = np.empty((3, len(h), mini.latent), np.float32)
        kernels._finish_in_tiles(mini.layers, h, None, precision, z[:1])
        kernels._finish_in_tiles(mini.layers, h, None, precision, z[1:])
        return z

    after = points(whole)
    assert np.abs(after - after[0]).max() < SAME
    for rows in (slice(0, 1), slice(3, 40), slice(100, 700)):
        part = X[rows]
        h = kernels._add_in_tiles(start(part.shape[0]), part, first, genes, precision)
        assert np.array_equal(h, whole[rows])
        assert np.array_equal(points(h), after[:, rows])


@pytest.mark.parametrize("larger", [1e-4, 1.0, 1e4])
def test_weights_of_any_size_in_pairs(real, larger, monkeypatch):
    # Sums of values and weights would lose what is small beside the other, were the weights not made as large as what they meet.
    mini, X = real
    in_pairs(monkeypatch)
    layers = [replace(layer, weight=layer.weight * np.float32(k), bias=layer.bias * np.float32(k * before)) for layer, k, before in zip(mini.layers, (larger, 1 / larger, larger), (1, larger, 1))]
    h, genes = np.tile(layers[0].bias, (X.shape[0], 1)), np.argsort(-X.getnnz(0))[:3000]
    kernels._add_in_tiles(h, X, layers[0], genes, "float32")
    assert far(h / np.float32(larger), X[:, genes].astype(np.float64) @ mini.layers[0].weight[genes] + mini.layers[0].bias) < 1e-4
    z, want = np.empty((2, len(h), mini.latent), np.float32), h.astype(np.float64)
    kernels._finish_in_tiles(layers, h, None, "float32", z)
    for before, layer in zip(layers, layers[1:]): want = np.where(want < 0, want * before.slope, want) @ layer.weight + layer.bias
    assert max(far(one, want / np.linalg.norm(want, axis=1, keepdims=True)) for one in z) < SAME


def test_threads_and_batches(way, real):
    mini, X = real
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run_layers(mini.layers, X)
        torch.set_num_threads(2)
        assert np.array_equal(run_layers(mini.layers, X), one)
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)
    assert far(run_layers(mini.layers, X, batch=100), one) < SAME


def test_a_failure_in_a_part_is_raised_and_threads_are_given_back(real, monkeypatch):
    mini, X = real
    before = torch.get_num_threads()
    monkeypatch.setattr(kernels, "_rest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError): run_layers(mini.layers, X)
    assert torch.get_num_threads() == before


def test_reduced_precision_keeps_the_labels(way, real):
    mini, X = real
    full, half = run_layers(mini.layers, X), run_layers(mini.layers, X, precision="bfloat16")
    assert 0 < far(full, half) < 2e-2
    weight, bias = load_head(mini.path)
    label = lambda z: (z * z.shape[1]**0.5 @ weight.T + bias).argmax(1)
    assert (label(full) == label(half)).mean() >= 0.999
    with pytest.raises(InputError, match="precision 'int3'"): run_layers(mini.layers, X, precision="int3")


@pytest.mark.parametrize("precision", kernels.PRECISIONS)
def test_the_way_over_a_device(real, precision):
    # The same code as for CUDA, with the processor as the device: what travels, becomes dense and comes back.
    mini, X = real
    got = kernels._on_device(mini.layers, X, "cpu", precision, 500)
    assert far(got, run_layers(mini.layers, X)) < (SAME if precision == "float32" else 2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda(real):
    mini, X = real
    assert far(run_layers(mini.layers, X, device="cuda"), run_layers(mini.layers, X)) < 1e-4


def test_devices():
    for name in ("cpu", torch.device("cpu")): assert kernels.find_device(name) == "cpu"
    assert kernels.find_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", torch.device("cuda:99"), "tpu", "meta", "cuda:", "cpus", ""):
        with pytest.raises(InputError, match=f"device '{name}'"): kernels.find_device(name)


def test_a_device_that_torch_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda", "cuda:1"): assert kernels.find_device(name) == kernels.find_device(torch.device(name)) == name
    with pytest.raises(InputError, match="'cuda:2': there is none here"): kernels.find_device("cuda:2")
    for driver, found in ((True, "cuda"), (False, "cpu")):   # without a driver torch is not asked
        monkeypatch.setattr(kernels, "_driver", lambda: driver)
        assert kernels.find_device("auto") == found


def test_without_numba_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    kernels._compiled.cache_clear()
    try: assert kernels._compiled() is None
    finally: kernels._compiled.cache_clear()


def test_threads_give_results_in_order_and_end():
    threads, before, started = torch.get_num_threads(), threading.active_count(), []

    def work(i):
        started.append(i)
        if i == 70: raise InputError("the 70th one is broken")
        return i, torch.get_num_threads(), kernels.threads()

    try:
        torch.set_num_threads(3)
        found = list(in_threads(work, range(60)))
        assert [i for i, *_ in found] == list(range(60)) and {n for _, *n in found for n in n} == {1} and torch.get_num_threads() == kernels.threads() == 3
        assert [n for _, *n in in_threads(work, range(5), most=1)] == [[3, 3]] * 5   # one alone has torch's threads
        started.clear()
        for i, *_ in in_threads(work, range(60)):
            if i == 10: break
        assert len(started) <= 15 and threading.active_count() <= before
        with pytest.raises(InputError, match="70th"): list(in_threads(work, range(100)))
        with ThreadPoolExecutor(1) as later: assert later.submit(torch.get_num_threads).result() == 3
    finally: torch.set_num_threads(threads)


def blas_threads(): return max((library["num_threads"] for library in _libraries().info() if library["user_api"] == "blas"), default=1)


def test_the_matrix_librarys_threads_are_given_back(real):
    mini, X = real
    before, together = torch.get_num_threads(), threading.Barrier(2)
    with _libraries().limit(limits=2, user_api="blas"):
        if blas_threads() == 1: pytest.skip("one thread is all that the library takes")
        try:
            torch.set_num_threads(2)
            assert {n for n in in_threads(lambda _: blas_threads(), range(5))} == {1} and blas_threads() == 2
            with one_blas_thread():                                      # as annotate and the service do
                run_layers(mini.layers, X)
                assert blas_threads() == 1
            for left_first in (False, True):                             # two at a time, either of them done first
                first, second = in_threads(lambda _: blas_threads(), range(9)), in_threads(lambda _: blas_threads(), range(9))
                assert next(first) == next(second) == 1
                for one in (first, second) if left_first else (second, first):
                    assert blas_threads() == 1
                    one.close()
                assert blas_threads() == 2
            with ThreadPoolExecutor(2) as pool: list(pool.map(lambda _: (together.wait(), [run_layers(mini.layers, X[:300]) for _ in range(3)]), range(2)))
            assert blas_threads() == 2
        finally: torch.set_num_threads(before)


ALONE = """
import os, sys
import numpy as np, scipy.sparse as sp
from scimlora import kernels
from scimlora.kernels import Layer, find_device, in_threads, run_both, run_first, run_layers, threads

assert threads() == 2, threads()
os.environ["OMP_NUM_THREADS"] = "3,2"
assert threads() == 3
assert set(in_threads(lambda _: threads(), range(5))) == {1} and threads() == 3
os.environ["OMP_NUM_THREADS"] = "many"
assert threads() == (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
assert find_device("cpu") == "cpu" and (kernels._driver() or find_device("auto") == "cpu")

os.environ["OMP_NUM_THREADS"] = "2"
rng = np.random.default_rng(0)
shapes = (900, 64), (64, 64), (64, 32)
layers = [Layer(rng.standard_normal(s, np.float32) / np.float32(s[0] ** 0.5), rng.standard_normal(s[1], np.float32), np.full(int(i < 2), 0.25, np.float32)) for i, s in enumerate(shapes)]
beside = [Layer(l.weight, l.bias, l.slope, rng.standard_normal((l.weight.shape[0], 2), np.float32), rng.standard_normal((2, l.bias.size), np.float32)) for l in layers]
X = sp.random(700, 900, 0.1, "csr", np.float32, rng)

def dense(layers):
    h = X.toarray().astype(np.float64)
    for l in layers:
        h = h @ (l.weight if l.left is None else l.weight + l.left.astype(np.float64) @ l.right) + l.bias
        if l.slope.size: h = np.where(h < 0, h * l.slope, h)
    return h / np.linalg.norm(h, axis=1, keepdims=True)

def check(precision="float32", same=1e-5):
    for few in (700, 3, 2, 1):
        want = [dense(l)[:few] for l in (layers, beside)]
        assert np.abs(run_layers(layers, X[:few], precision=precision) - want[0]).max() < same
        for got, w in zip(run_both(layers, beside, X[:few], precision=precision), want): assert np.abs(got - w).max() < same
    assert np.abs(run_first(layers[0], X) - (X @ layers[0].weight + layers[0].bias)).max() < 1e-4

find, tiles, compiled = kernels._compiled, kernels._tiles, kernels._compiled() is not None
kernels._compiled = lambda: None
check()
if compiled:
    kernels._compiled, kernels._LARGE = find, 0
    if tiles() is not None: check()
    if kernels._parts_of("bfloat16") is not None: check("bfloat16", 2e-2)
    kernels._tiles = lambda: None
    check()
assert "torch" not in sys.modules
check("bfloat16", 2e-2)   # without tiles it is torch that knows these numbers
assert "torch" in sys.modules
"""


def test_a_process_that_only_embeds_loads_no_torch():
    p = subprocess.run([sys.executable, "-c", ALONE], env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-2000:]


@pytest.mark.parametrize("slope", [[0.25], [1.5], [-0.5], [1.0], [0.5, 2.0, -1.0, 0.0]])
def test_slopes_of_all_kinds(slope):
    h, slope = np.random.default_rng(0).standard_normal((70, 4), np.float32), np.array(slope, np.float32)
    want = torch.nn.functional.prelu(torch.from_numpy(h), torch.from_numpy(slope)).numpy()
    assert np.array_equal(kernels._bend(h.copy(), slope), want)


def test_arrays_that_may_not_be_written_to(way):
    layers, X = random_layers(300, (64, 32)), random_cells(400, 300)
    want = {p: run_layers(layers, X, precision=p) for p in kernels.PRECISIONS}
    for layer in layers: layer.weight.flags.writeable = layer.bias.flags.writeable = False
    X.data.flags.writeable = X.indices.flags.writeable = X.indptr.flags.writeable = False
    for p in kernels.PRECISIONS: assert np.array_equal(run_layers(layers, X, precision=p), want[p])


def test_what_comes_in_all_says_which_way_is_taken(real, monkeypatch):
    mini, X = real
    part, share = X[:len(mini.genes) // 100], 0.01
    monkeypatch.setattr(kernels, "_LARGE", part.nnz * 256 / share)
    assert not kernels.loops_embed(mini.layers, part) and kernels.loops_embed(mini.layers, part, share) == (kernels._compiled() is not None)
    for z in (run_layers(mini.layers, part, share=share), *kernels.run_both(mini.layers, mini.layers, part, share=share)): assert far(z, run_layers(mini.layers, part)) < SAME


def test_chunks_give_the_same_numbers_in_any_number_of_threads(real, monkeypatch):
    mini, X = real
    monkeypatch.setattr(kernels, "_LARGE", 0)
    chunks, threads, seen = [slice(0, 700), slice(700, 1000)], torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            seen.append(np.vstack(list(in_threads(lambda rows: run_layers(mini.layers, X[rows]), chunks))))
    finally: torch.set_num_threads(threads)
    assert all(np.array_equal(z, seen[0]) for z in seen) and far(seen[0], run_layers(mini.layers, X[:1000])) < SAME


def test_parts_are_one_where_others_work_beside():
    assert list(kernels._parts(1000, 3072)) == [0, 500, 1000] and list(kernels._parts(200, 3072)) == [0, 200]
    with kernels.unshared():
        assert kernels.threads() == 1 and list(kernels._parts(1000, 3072)) == [0, 1000] and len(kernels._parts(7000, 3072)) == 4
        with kernels.unshared(): pass
        assert kernels.threads() == 1
    assert kernels.threads() == torch.get_num_threads()
