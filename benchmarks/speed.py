"""Measure speed and memory side by side with SCimilarity, CellTypist and scikit-learn, and write RESULTS.md beside this script.

    python benchmarks/speed.py                 # or: make bench
    python benchmarks/speed.py --cells 1000000 # annotate up to a million cells

The base has SCimilarity v1.1's shape and random weights; the cells are real ones from the shared data, tiled. What is compared
runs in turns, so that a busy machine slows all alike; figures are medians of the rounds. CellTypist takes its turns in its own environment.
"""
import argparse
import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch

import speed_precisions
from large_files import write_h5ad
from speed_turns import child, in_turns, REST, tiled
from scimlora.base import Base, load_base, load_head
from scimlora.core import one_blas_thread, versions
from scimlora.encoder import Encoder
from scimlora.data import align_cells, find_counts, log1p_cp10k, obs_column
from scimlora.examples import shared
from scimlora.kernels import _add_dense, _add_in_tiles, _choice, _parts_of, _share, _TILES, _tiles, PRECISIONS, split_genes
from scimlora.loops import deal_rare, multiply_rare
from scimlora.strassen import fits

HERE = Path(__file__).parent
N_GENES, HIDDEN, LATENT = 28_231, (1024, 1024, 1024), 128
TEN_X, DEEP = "pbmc_3k_10x", "pancreas_baron_h1"
LABELLED = (DEEP, TEN_X, "pbmc_kang2018_ctrl", "pbmc_facs_zheng2017", "brain_darmanis2015")
BUFFERS = (500, 2_500, 10_000)  # cells; the last is upstream's default


def real_counts(name, least=0):
    "Counts of real cells with at least so many genes, at most N_GENES of them, their symbols and labels."
    a = shared(name)
    e = find_counts(a)
    X, labels, names = e.X.astype(np.float32), obs_column(a.obs, "cell_type"), np.asarray(e.var.index.astype(str))
    keep, rows = np.sort(np.argsort(-X.getnnz(0), kind="stable")[:N_GENES]), X.getnnz(1) >= least
    return X[rows][:, keep], names[keep], labels[rows], e.var.iloc[keep]


def base_for(names, folder):
    "A base of v1.1's shape with random weights that knows the genes named, in random order, and has a label head."
    from safetensors.numpy import save_file

    torch.manual_seed(0)
    encoder = Encoder(N_GENES, HIDDEN, LATENT).eval().requires_grad_(False)
    rng = np.random.default_rng(0)
    genes = [*names, *(f"NOGENE{i}" for i in range(N_GENES - len(names)))]
    base = Base(encoder, [genes[i] for i in rng.permutation(N_GENES)], {i: f"type {i}" for i in range(20)}).save(folder)
    save_file(dict(weight=rng.standard_normal((20, LATENT)).astype(np.float32), bias=np.zeros(20, np.float32)), str(folder / "label_head.safetensors"))
    return base


def aligned(X, names, genes, n):
    "log1p CP10K in the base's gene order, tiled to n cells."
    place = {g: i for i, g in enumerate(genes)}
    to = np.array([place[g] for g in names])
    return tiled(log1p_cp10k(sp.csr_matrix((X.data, to[X.indices], X.indptr), (X.shape[0], len(genes)))), n)


def embedding(base, upstream, kinds, rounds):
    "Rates of both packages in cells/s, with the largest difference, for each kind of cells."
    rows = []
    for kind, X in kinds.items():
        jobs = {f"SCimilarity, buffer {b:,}": (lambda b=b: upstream.get_embeddings(X, buffer_size=b)) for b in BUFFERS}
        jobs |= {f"scimlora, {p}": (lambda p=p: base.embed(X, precision=p)) for p in ("float32", "bfloat16")}
        rate = {k: X.shape[0] / s for k, s in in_turns(jobs, rounds).items()}
        best = max(v for k, v in rate.items() if k.startswith("SC"))
        want = upstream.get_embeddings(X)
        for k, v in rate.items():
            got = want if k.startswith("SC") else base.embed(X, precision=k.split(", ")[1])
            rows.append(dict(cells=kind, genes=f"{X.nnz / X.shape[0]:,.0f}", method=k, rate=f"{v:,.0f}", ratio=f"{v / best:.1f}", difference=f"{np.abs(got - want).max():.1e}"))
    return rows


def plain_loop(base, X, y, n_classes, config):
    "The plain way: peft's module, dense batches, torch's AdamW. Returns module and head."
    from scimlora.heads import Head
    from scimlora.lora import add_lora, set_train_mode

    torch.manual_seed(config.seed)
    model, head, rng = add_lora(base.encoder, config), Head(base.latent, n_classes), np.random.default_rng(config.seed)
    opt = torch.optim.AdamW([*(p for p in model.parameters() if p.requires_grad), *head.parameters()], lr=config.rate, weight_decay=config.weight_decay)
    set_train_mode(model)
    for _ in range(config.epochs):
        for rows in np.array_split(rng.permutation(len(y)), -(-len(y) // config.batch)):
            loss = torch.nn.functional.cross_entropy(head(model(torch.from_numpy(X[rows].toarray()))), torch.from_numpy(y[rows]))
            opt.zero_grad()
            loss.backward()
            opt.step()
    return model.eval(), head


def fine_tuning(base, X, labels, rounds, seeds=3):
    "Cells/s of the plain loop and of train_lora, and their macro-F1 on held-out cells: rows of the table."
    from sklearn.metrics import f1_score

    from scimlora.lora import TuneConfig, train_lora

    y = np.unique(labels.astype(str), return_inverse=True)[1]
    n = y.max() + 1
    config = TuneConfig(r=8, alpha=16, lr=1e-3, steps=0, head_init="random", keep_best=False)
    passes = lambda n, seed=0: replace(config, epochs=n, seed=seed)
    ours = lambda precision: lambda c, A, b: (lambda t: (t.model, t.head))(train_lora(base, A, b, n, replace(c, precision=precision)))
    ways = {"plain loop, peft on dense cells": lambda c, A, b: plain_loop(base, A, b, n, c)} | {f"scimlora, {p}": ours(p) for p in PRECISIONS}
    # The plain loop's second pass costs what the first did; what scimlora does once is part of the default's ten.
    length = dict(zip(ways, (1, config.epochs, config.epochs)))
    took = in_turns({k: (lambda k=k, f=f: f(passes(length[k]), X, y)) for k, f in ways.items()}, rounds)
    held = np.random.default_rng(0).random(len(y)) < 0.3
    scores = {}
    for name, f in ways.items():
        for seed in range(seeds):
            model, head = f(passes(3, seed), X[~held], y[~held])
            with torch.no_grad(): said = head(model(torch.from_numpy(X[held].toarray()))).argmax(1).numpy()
            scores.setdefault(name, []).append(100 * f1_score(y[held], said, average="macro", zero_division=0))
    rate = {k: length[k] * len(y) / s for k, s in took.items()}
    return [dict(way=k, rate=f"{v:,.0f}", ratio=f"{v / min(rate.values()):.1f}", f1=f"{np.mean(scores[k]):.1f} ± {np.std(scores[k]):.1f}") for k, v in rate.items()]


def agreement():
    "Real cells that get another label from mini at reduced precision: (different, all)."
    mini = load_base("mini")
    weight, bias = load_head(mini.path)
    different = cells = 0
    for name in LABELLED:
        X = align_cells(shared(name), mini.genes).X
        full, reduced = ((mini.embed(X, precision=p) @ weight.T * LATENT**0.5 + bias).argmax(1) for p in ("float32", "bfloat16"))
        different, cells = different + int((full != reduced).sum()), cells + len(full)
    return different, cells


def in_tiles(tiles, pool, threads, A, B, parts):
    "What makes a product in tiles, with the rows shared among threads."
    packed, ones, out, size = tiles.pack(B, parts=parts), np.ones(len(B), np.float32), np.zeros((len(A), B.shape[1] + 32), np.float32)[:, :B.shape[1]], 4 * tiles.panel(parts)  # each call costs some microseconds
    bounds = np.linspace(0, len(A), threads + 1).astype(int)

    def work(a, b, room):
        for i in range(a, b, size):
            rows = slice(i, min(i + size, b))
            tiles.bend(A[rows], ones, room)
            tiles.multiply(room, packed, out[rows], parts)

    rooms = [tiles.room(size, len(B), parts) for _ in range(threads)]
    return lambda: list(pool.map(work, bounds[:-1], bounds[1:], rooms))


def limits(threads):
    "The machine's own rates: torch's matrix products in float32 and in bfloat16, NumPy's in float32, those in tiles (GFLOP/s), and reading memory (GB/s)."
    A, B, big = torch.randn(4096, 1024), torch.randn(1024, 1024), torch.randn(1 << 26)
    A16, B16 = A.bfloat16(), B.bfloat16()
    jobs = dict(float32=lambda: A @ B, bfloat16=lambda: A16 @ B16, numpy=lambda: A.numpy() @ B.numpy(), read=lambda: big.sum())
    with ThreadPoolExecutor(threads) as pool:
        if (tiles := _tiles()) is not None:
            forms = {f"tiles, {p}": _parts_of(p) for p in PRECISIONS} | ({"pairs": tiles.PAIRS} if _parts_of("float32", alike=True) == tiles.PAIRS else {})
            jobs |= {k: in_tiles(tiles, pool, threads, A.numpy(), B.numpy(), parts) for k, parts in forms.items() if parts is not None}
        took = in_turns(jobs, 15)
    work = 2 * A.shape[0] * B.numel() / 1e9
    return dict(threads=threads, units=tiles is not None and tiles.ready(), read=big.nbytes / took.pop("read") / 1e9, **{k: work / v for k, v in took.items()})


def profile(layers, X, rounds, part=4096):
    "Microseconds a cell on one thread in each step of float32 embedding, with its GFLOP/s."
    X, first = X[:part], layers[0]
    way = _choice(X, layers)
    share, add = _share(way, "float32"), _add_in_tiles if way.name == "tiles" else _add_dense
    frequent, rare = split_genes(X, share, compiled=True)
    dealt, h = deal_rare(X, rare), np.random.default_rng(0).random((X.shape[0], HIDDEN[0]), np.float32)
    out, points = multiply_rare(first.weight, first.bias, rare, dealt), np.empty((X.shape[0], LATENT), np.float32)
    held = X.nnz - dealt[0][-1, -1]
    jobs = dict(split=lambda: split_genes(X, share, compiled=True), deal=lambda: deal_rare(X, rare), sparse=lambda: multiply_rare(first.weight, first.bias, rare, dealt),
                dense=lambda: add(out, X, first, frequent, "float32"), rest=lambda: way.finish(layers, h, None, "float32", [points]))
    with one_blas_thread(): took = {k: v / X.shape[0] * 1e6 for k, v in in_turns(jobs, rounds).items()}
    flop = dict(sparse=2 * (X.nnz - held) / X.shape[0] * HIDDEN[0], dense=2 * len(frequent) * HIDDEN[0], rest=2 * sum(x.weight.size for x in layers[1:]))
    share = {k: f"{v / sum(took.values()):.0%}" for k, v in took.items()}
    names = dict(split="count genes and split them", deal="sort the rare values by block", sparse=f"long tail, {(X.nnz - held) / X.shape[0]:,.0f} values, sparse",
                 dense=f"{len(frequent):,} frequent genes, laid out and multiplied", rest="layers after the first")
    return [dict(step=names[k], us=f"{v:.1f}", share=share[k], rate=f"{flop[k] / v / 1e3:,.0f}" if k in flop else "") for k, v in took.items()]


def both(layers, rounds, n=4096):
    "Microseconds a cell on one thread that the layers after the first take for two encoders with the same weights, in float32; GFLOP/s, were no product saved; and whether some are."
    h, points = np.random.default_rng(0).random((n, HIDDEN[0]), np.float32), np.empty((2, n, LATENT), np.float32)
    with one_blas_thread(): us = in_turns(dict(both=lambda: _TILES.finish(layers, h, None, "float32", points)), rounds)["both"] / n * 1e6
    return dict(us=us, rate=2 * 2 * sum(x.weight.size for x in layers[1:]) / us / 1e3, halved=fits(_parts_of("float32", alike=True), *HIDDEN, LATENT))


# What a user writes to embed a file of aligned cells with one package, in a process of its own: for its peak memory.
ALONE = {p: f"import sys, scipy.sparse as sp\n{use}\n" for p, use in dict(
    upstream="from scimilarity.cell_embedding import CellEmbedding\nCellEmbedding(sys.argv[1]).get_embeddings(sp.load_npz(sys.argv[2]))",
    scimlora="from scimlora.base import load_base\nload_base(sys.argv[1]).embed(sp.load_npz(sys.argv[2]))", nothing="import scimlora.base").items()}


def floor(machine):
    "Cells/s of fine-tuning in float32 if nothing were done but the products with frozen weights, forth and back, at the machine's rate."
    return max(machine[k] for k in ("float32", "numpy", "tiles, float32") if k in machine) * 1e9 / (2 * 2 * sum(a * b for a, b in zip(HIDDEN, (*HIDDEN[1:], LATENT))))


def weights(genes):
    "Megabytes of weights that one cell with so many genes needs."
    return 4 * (genes * HIDDEN[0] + sum(a * b for a, b in zip(HIDDEN, (*HIDDEN[1:], LATENT)))) / 1e6


def startup(rounds):
    "Median seconds of an import and of the help text."
    took = {}
    for what, args in (("import scimlora", ["-c", "import scimlora"]), ("scimlora --help", ["-m", "scimlora", "--help"]), ("python alone", ["-c", "pass"])):
        took[what] = float(np.median([child(*args)[0] for _ in range(rounds)]))
    return took


# What is left when a service does nothing: uvicorn reads the same body and answers at once.
BARE = """
import sys, uvicorn

async def app(scope, receive, send):
    if scope["type"] != "http": return
    while (await receive()).get("more_body"): pass
    await send(dict(type="http.response.start", status=200, headers=[(b"content-type", b"application/json"), (b"content-length", b"600")]))
    await send(dict(type="http.response.body", body=b" " * 600))

uvicorn.run(app, port=int(sys.argv[1]), log_level="critical", access_log=False)
"""


@contextlib.contextmanager
def answering(*command):
    "A service in a process of its own, which is given a port: the port, and the seconds until it was ready."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    start = time.perf_counter()
    p = subprocess.Popen([sys.executable, *map(str, command), str(port)], stderr=subprocess.DEVNULL)
    try:
        while True:
            try: ready = urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1).status == 200
            except OSError: ready = False
            if ready: break
            if p.poll() is not None: raise SystemExit("a service ended before it was ready")
            time.sleep(0.02)
        yield port, time.perf_counter() - start
    finally:
        p.terminate()
        p.wait()


_BEFORE = 20  # requests that are not counted


def asked(port, body, requests):
    "The milliseconds of requests, one after the other on one line."
    line, took = HTTPConnection("127.0.0.1", port), []
    for _ in range(_BEFORE + requests):
        t = time.perf_counter()
        line.request("POST", "/predict", body, {"Content-Type": "application/json"})
        answer = line.getresponse()
        if answer.read() and answer.status != 200: raise SystemExit(f"/predict answered {answer.status}")
        took.append((time.perf_counter() - t) * 1e3)
    return took[_BEFORE:]


def served(bundle, cell, rounds, requests=500):
    """Seconds until a service is ready, and the milliseconds of one cell through HTTP: median, 99th percentile, what the model takes of them, and what is
    taken where nothing is done. Medians of several services, in turns, and the least and most of their medians."""
    body, runs = json.dumps({"expression": cell, "units": "counts"}), []
    for _ in range(rounds):
        with answering("-m", "scimlora", "serve", bundle, "--base", Path(bundle).parent / "base", "--port") as (port, ready):
            took = asked(port, body, requests)
            numbers = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode().splitlines()
        model = next(float(x.split()[1]) for x in numbers if x.startswith("scimlora_batch_seconds_sum")) / (_BEFORE + requests) * 1e3
        with answering("-c", BARE) as (port, _): bare = float(np.median(asked(port, body, requests)))
        runs.append(dict(ready=ready, median=float(np.median(took)), most=float(np.percentile(took, 99)), model=model, bare=bare))
    medians = [r["median"] for r in runs]
    return {k: float(np.median([r[k] for r in runs])) for k in runs[0]} | dict(least=min(medians), greatest=max(medians))


def copied(source, to):
    "Seconds that the machine takes for a copy of a file until it is on the disk: what annotate cannot do without."
    start = time.perf_counter()
    shutil.copyfile(source, to)
    with open(to, "rb+") as f: os.fsync(f.fileno())
    return time.perf_counter() - start


def annotate_sizes(bundle, counts, labels, var, sizes, folder):
    "annotate from h5ad to h5ad at several sizes, medians of three in turns but for the largest: rows of the table."
    files, out, runs, rows, before = {n: folder / f"cells_{n}.h5ad" for n in sizes}, folder / "out.h5ad", {n: [] for n in sizes}, [], None
    for n, f in files.items(): write_h5ad(f, counts, var, labels, n)
    for n in [*sizes[:-1]] * 3 + [sizes[-1]]: runs[n].append(child("-m", "scimlora", "annotate", bundle, "--base", folder / "base", files[n], "--out", out))
    for n, f in files.items():
        seconds, memory = float(np.median([r[0] for r in runs[n]])), max(r[1] for r in runs[n])
        more = None if before is None else (seconds - before[1]) / (n - before[0]) * 1e6
        before = n, seconds
        rows.append(dict(cells=f"{n:,}", seconds=f"{seconds:.1f}", rate=f"{n / seconds:,.0f}", us="" if more is None else f"{more:.0f}", peak=f"{memory / 1e9:.2f}",
                         size=f"{f.stat().st_size / 1e9:.2f}", copy=f"{copied(f, out):.1f}"))
        print(rows[-1], flush=True)
        f.unlink()
    out.unlink()
    return rows


@contextlib.contextmanager
def celltypist(python, folder):
    "What makes CellTypist annotate peer.h5ad, by the name of its model: a process of its own, which waits between turns."
    with open(folder / "celltypist.log", "w+") as log, subprocess.Popen([python, HERE / "speed_celltypist.py", folder / "train.h5ad", folder / "peer.h5ad"],
                                                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as p:
        def heard():
            if line := p.stdout.readline(): return line
            log.seek(0)
            raise SystemExit(f"CellTypist failed: {log.read().strip()[-500:]}")

        def ask(name):
            print(name, file=p.stdin, flush=True)
            heard()

        yield {name: (lambda name=name: ask(name)) for name in json.loads(heard())}
        p.stdin.close()


def peers(bundle, counts, labels, var, n, folder, python, rounds):
    "The same cells in memory through scimlora, scikit-learn's logistic regression and CellTypist: rows of the table."
    import anndata as ad
    from sklearn.linear_model import LogisticRegression

    from scimlora.predict import Predictor, annotate

    cells, predictors = ad.AnnData(tiled(counts, n), var=var), {p: Predictor(bundle, folder / "base", p) for p in PRECISIONS}
    cells.obs_names = [f"cell{i}" for i in range(n)]
    cells.write_h5ad(folder / "peer.h5ad")
    train = ad.AnnData(counts, var=var)
    train.obs["cell_type"] = labels.astype(str)
    train.write_h5ad(folder / "train.h5ad")
    logistic = LogisticRegression(max_iter=100).fit(log1p_cp10k(counts), labels.astype(str))
    jobs = {f"scimlora, {p}": (lambda p=p: annotate(predictors[p], cells)) for p in PRECISIONS} | {"logistic regression on all genes (scikit-learn)": lambda: logistic.predict_proba(log1p_cp10k(cells.X))}
    if not python.exists(): took = in_turns(jobs, rounds)
    else:
        with celltypist(python, folder) as theirs: took = in_turns(jobs | theirs, rounds)
    return [dict(method=k, rate=f"{n / s:,.0f}", ratio=" and ".join(f"{s / took[f'scimlora, {p}']:.1f}" for p in PRECISIONS)) for k, s in took.items()]


def tuned(base, folder):
    "A bundle with adapter, gene path and calibration on the base of v1.1's shape."
    from scimlora import Classifier

    cells = shared(TEN_X)
    names = obs_column(cells.obs, "cell_type").astype(str)
    rows = np.concatenate([np.flatnonzero(names == t)[:20] for t in np.unique(names) if (names == t).sum() >= 20])
    return Classifier.tune(cells[np.sort(rows)].copy(), "cell_type", base=str(folder), epochs=1, steps=0).save(folder.parent / "bundle")


def table(rows, heads):
    names = list(rows[0])
    return ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1), *("| " + " | ".join(str(r[k]) for k in names) + " |" for r in rows), ""]


def cpu():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor() or platform.machine())
    flags = next((x.split() for x in lines if x.startswith("flags")), [])
    return f"{model}, {os.cpu_count()} cores" + "".join(f", {name}" for flag, name in (("avx512f", "AVX-512"), ("amx_bf16", "AMX")) if flag in flags)


def targets(r):
    "What was wanted, what came out: rows of a table."
    rate = lambda kind, method: next(float(x["ratio"]) for x in r["embed"] if x["cells"].startswith(kind) and x["method"].endswith(method))
    largest = max(float(x["difference"]) for x in r["embed"] if x["method"].endswith("float32"))
    memory, big, slopes = r["memory"]["scimlora"] / r["memory"]["upstream"], r["sizes"][-1], [float(x["us"]) for x in r["sizes"][2:]]
    beside = {x["method"]: dict(zip(PRECISIONS, map(float, x["ratio"].split(" and ")))) for x in r["beside"]}
    peer = beside.get("CellTypist, all genes", dict.fromkeys(PRECISIONS, float("nan")))
    trained = {p: float(next(x["ratio"] for x in r["training"] if x["way"].endswith(p))) for p in PRECISIONS}
    times = "{:.1f} times".format
    for what, wanted, got, reached in (
            ("embed, float32, 10x cells", "5 times SCimilarity", times(v := rate("10x", "float32")), v >= 5),
            ("embed, float32, deep cells", "3.5 times SCimilarity", times(v := rate("deep", "float32")), v >= 3.5),
            ("largest difference", "1e-5", f"{largest:.0e}", largest <= 1e-5),
            ("peak memory of embedding", "a quarter of SCimilarity's", f"{memory:.2f} of it; Python and the package alone are {r['memory']['nothing'] / r['memory']['upstream']:.2f}", memory <= 0.25),
            ("embed, bfloat16, 10x cells", "8 times SCimilarity", times(v := rate("10x", "bfloat16")), v >= 8),
            ("labels at bfloat16", "99.9 % equal", f"{1 - r['different'] / r['compared']:.3%}", r["different"] <= 0.001 * r["compared"]),
            *((f"fine-tune, {p}", "8 times the plain loop", times(v), v >= 8) for p, v in trained.items()),
            ("scimlora serve, ready", "4 s", f"{r['service']['ready']:.1f} s", r["service"]["ready"] <= 4),
            ("one cell through HTTP, median", "3 ms", f"{r['service']['median']:.1f} ms", r["service"]["median"] <= 3),
            ("one cell through HTTP, 99 %", "10 ms", f"{r['service']['most']:.1f} ms", r["service"]["most"] <= 10),
            (f"annotate, {big['cells']} cells", "4,000 cells/s", f"{big['rate']} cells/s", float(big["rate"].replace(",", "")) >= 4000),
            ("its memory", "2 GB", f"{big['peak']} GB", float(big["peak"]) <= 2),
            (f"a further cell from {r['sizes'][1]['cells']} on, least and most", "within 15 %", f"{min(slopes):.0f} and {max(slopes):.0f} µs", max(slopes) <= 1.15 * min(slopes)),
            *((f"annotate beside CellTypist, all genes, {p}", "10 times", times(v), v >= 10) for p, v in peer.items())):
        yield dict(what=what, wanted=wanted, got=got, reached="yes" if reached else "no")


def other_precisions(found):
    "The lines on what precisions below float32 do."
    took, rows = found["took"], []
    for x in found["labels"]:
        share = 1 - x["different"] / x["cells"]
        rows.append(dict(type=x["kind"], of="weights and cells" if x["inputs"] else "weights", equal=f"{share:.3%}", difference=f"{x['largest']:.0e}",
                         ms=f"{took[x['kind']]:.1f}" if x["inputs"] else "", ratio=f"{took['float32'] / took[x['kind']]:.1f}" if x["inputs"] else "", may="yes" if share >= 0.999 else "no"))
    return ["## Other precisions", "", f"Labels of {found['labels'][0]['cells']:,} real cells from mini, with what is named rounded to the type in all layers but the last, and products and sums in float32 "
            f"(int8: a scale for each column of weights and each cell). Milliseconds: torch's product of {speed_precisions.CELLS:,} cells and a layer of {speed_precisions.WIDTH:,} by {speed_precisions.WIDTH:,}, "
            f"cells rounded on the way in; float32 takes {took['float32']:.1f}. What the labels allow: 99.9 % equal. scimlora offers bfloat16.", "",
            *table(rows, ["type", "of", "labels equal", "difference", "ms", "faster than float32, times", "labels allow it"])]


def of_both(two):
    "The lines on what both encoders take."
    if two is None: return []
    saved = ", which the vector units do not reach: of two encoders' rows, seven products do for eight (`nbs/01aca_strassen.ipynb`)"
    return [f"The layers after the first take {two['us']:.1f} µs of that a cell and thread for both encoders, in float32: {two['rate']:,.0f} GFLOP/s, were every product made{saved * two['halved']}.", ""]


def written(args, r):
    "The lines of RESULTS.md."
    package, machine, memory, service = versions("scimlora", "torch", "numpy", "scipy", "numba", "scimilarity", "scikit-learn"), r["machine"], r["memory"], r["service"]
    lines = ["# Speed", "", f"Made by `python benchmarks/speed.py --cells {args.cells} --embed {args.embed} --rounds {args.rounds}`. Base: SCimilarity v1.1's shape ({N_GENES:,} genes, "
             f"{', '.join(map(str, HIDDEN))}, {LATENT}), random weights. Cells: real ones, tiled. Medians of rounds in turns, with {REST} s between two, since a library's threads look for more work for a while.", "",
             f"{cpu()}; {torch.get_num_threads()} threads; " + ", ".join(f"{k} {v}" for k, v in package.items()) + ".", "",
             "## Targets", "", *table([*targets(r)], ["what", "wanted", "measured", "reached"]),
             "## Embedding", "", "Ratio: to the best buffer size of SCimilarity's `CellEmbedding.get_embeddings`. Difference: largest, of any coordinate of a point of unit length.", "",
             *table(r["embed"], ["cells", "genes a cell", "method", "cells/s", "ratio", "difference"]),
             f"Peak memory of a process that embeds {args.embed:,} cells: SCimilarity with its default buffer, of 10,000 cells, {memory['upstream'] / 1e9:.2f} GB; scimlora {memory['scimlora'] / 1e9:.2f} GB "
             f"({memory['scimlora'] / memory['upstream']:.2f} of it), of which {memory['nothing'] / 1e9:.2f} GB are there before a base is opened.", "",
             f"Labels at bfloat16: {r['different']} of {r['compared']:,} real cells get another label from mini than at float32 ({1 - r['different'] / r['compared']:.3%} agree).", "",
             *other_precisions(r["precisions"]), "## Where the time goes", "", f"The machine's limits with {machine['threads']} threads, measured in the same run: {machine['float32']:,.0f} GFLOP/s in float32 through torch, {machine['numpy']:,.0f} through NumPy, {machine['bfloat16']:,.0f} in bfloat16, "
             f"{machine['read']:.1f} GB/s read from memory; the steps below are those of float32 on one thread.", ""]
    if "tiles, float32" in machine:
        units = machine["units"]
        lines += [f"Products in tiles, on the {'matrix' if units else 'vector'} units, with the rows shared among the threads: {machine['tiles, float32']:,.0f} GFLOP/s in float32"
                  + " made of three products of bfloat16" * units + (f", {machine['tiles, bfloat16']:,.0f} in bfloat16" if "tiles, bfloat16" in machine else "") + "."
                  + (f" Float32 in pairs, as embedding takes it: {machine['pairs']:,.0f}; half of the columns trade a product for two sums, which this processor makes on the side (`nbs/01ab_tiles.ipynb`)." if "pairs" in machine else "")
                  + " On a shared machine the units' rate depends on what its neighbours do, more than that of anything else here." * units, ""]
    for kind, rows in r["steps"].items(): lines += [f"{kind}:", "", *table(rows, ["step", "µs a cell", "share", "GFLOP/s"])]
    times = [dict(what=k, seconds=f"{v:.2f}") for k, v in r["times"].items()] + [dict(what="scimlora serve, until ready", seconds=f"{service['ready']:.2f}")]
    lines += ["## Fine-tuning", "", f"LoRA of rank 8 on all layers, batches of 64, AdamW, on {r['trained']:,} 10x cells; scimlora with the default's ten passes, all that it does before and after included. "
              "Macro-F1 × 100 on three tenths of the cells, held out, after three passes of either, over three seeds.", "", *table(r["training"], ["way", "cells/s", "ratio", "macro-F1"]),
              f"The frozen first layer is computed once; what is left are the products with the other frozen weights, forth and back. If nothing else were done, at the best rate above, that would be {floor(machine):,.0f} cells/s.", "",
              "## Start and service", "", *table(times, ["what", "seconds"]),
              f"One cell of {r['genes']} genes through HTTP on loopback: median {service['median']:.1f} ms ({service['least']:.1f} to {service['greatest']:.1f} in {args.rounds} services), 99 % within {service['most']:.1f} ms; of these "
              f"the model takes {service['model']:.1f} ms, and {service['bare']:.1f} ms pass where uvicorn reads the same body and does nothing. "
              f"One cell alone reads {weights(r['genes']):.1f} MB of weights.", "",
              "## Annotate", "", f"In memory, the same {r['together']:,} cells for all; scimlora with adapter, gene path, calibration and the second embedding that tells strangers. Ratio: its rate over theirs, in float32 and in bfloat16.", "",
              *table(r["beside"], ["method", "cells/s", "ratio"]), *of_both(r["two"]), "From h5ad to h5ad with the command line, start-up included; a further cell: what each takes beyond the file before. A small file needs no compiled loops, which take time to load. Copying: the same file to another until it lies on the disk, which is a part of the work.", "",
              *table(r["sizes"], ["cells", "seconds", "cells/s", "µs for a further cell", "peak memory, GB", "file, GB", "copying it, s"])]
    # Measured by a command of its own, `make bench-serve`, with its machine in it.
    load = HERE / "SERVICE.md"
    return lines + (["#" * line.startswith("#") + line for line in load.read_text().splitlines()] if load.exists() else [])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=1_000_000, help="largest file for annotate")
    parser.add_argument("--embed", type=int, default=10_000, help="cells to embed; with fewer, SCimilarity's default buffer is not full")
    parser.add_argument("--together", type=int, default=20_000, help="cells to annotate beside the peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, default=HERE.parent / ".venv-peers", help="CellTypist's environment")
    args = parser.parse_args()
    from scimilarity.cell_embedding import CellEmbedding

    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        X, names, labels, var = real_counts(TEN_X)
        deep, deep_names, _, _ = real_counts(DEEP, least=2_000)
        base = base_for(names, d / "base")
        other = {g: i for i, g in enumerate(names)}
        # Genes that the base does not know take the place of some that it does: only how many there are matters here.
        free = iter([g for g in names if g not in set(deep_names)])
        deep_names = [g if g in other else next(free) for g in deep_names]
        kinds = {"10x, PBMC": aligned(X, names, base.genes, args.embed), "deep, pancreas": aligned(deep, deep_names, base.genes, args.embed)}
        embed = embedding(base, CellEmbedding(str(d / "base")), kinds, args.rounds)
        print(*embed, sep="\n", flush=True)
        training = fine_tuning(base, aligned(X, names, base.genes, X.shape[0]), labels, args.rounds)
        print(*training, sep="\n", flush=True)
        sp.save_npz(d / "cells.npz", kinds["10x, PBMC"])
        memory = {p: child("-c", code, d / "base", d / "cells.npz")[1] for p, code in ALONE.items()}
        machine, steps = limits(torch.get_num_threads()), {k: profile(base.layers, M, args.rounds) for k, M in kinds.items()}
        two = both(base.layers, args.rounds) if _tiles() is not None else None
        different, compared = agreement()
        precisions = dict(labels=speed_precisions.agreement(LABELLED), took=speed_precisions.products(3 * args.rounds))
        print(*precisions["labels"], precisions["took"], sep="\n", flush=True)
        times = startup(args.rounds)
        bundle = tuned(base, d / "base")
        one = X[int(np.argmin(np.abs(X.getnnz(1) - 900)))]
        service = served(bundle, dict(zip(names[one.indices].tolist(), one.data.tolist())), args.rounds)
        print(times, service, flush=True)
        beside = peers(bundle, X, labels, var, together := min(args.together, args.cells), d, args.peers / "bin/python", args.rounds)
        print(*beside, sep="\n", flush=True)
        sizes = annotate_sizes(bundle, X, labels, var, sorted({min(n, args.cells) for n in (100, 10_000, 100_000, args.cells)}), d)
    r = dict(embed=embed, training=training, trained=len(labels), memory=memory, machine=machine, steps=steps, two=two, different=different, compared=compared, precisions=precisions, times=times, service=service,
             genes=one.nnz, beside=beside, together=together, sizes=sizes)
    (HERE / "RESULTS.md").write_text("\n".join(written(args, r)).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__": main()
