"""Pass a file that is larger than memory through prepare and annotate, and measure how much memory they took.

    python benchmarks/large_files.py --cells 1000000

tiles real cells (the 10x PBMC of the shared data, or Baron's pancreas cells where there are none), thins each tile so that
no two cells are alike, writes them as h5ad by cell (CSR), h5ad by gene (CSC) and zarr, runs the command line on each in
a process of its own, and writes LARGE.md beside this script. Peak memory is the operating system's own figure for the process.
"""
import argparse
import os
import platform
import shutil
import tempfile
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from speed_turns import child
from scimlora.core import versions
from scimlora.data import find_counts, obs_column
from scimlora.examples import baron, shared, shared_dir
from scimlora.rows import CsrWriter, turn_over

DONORS = 40


def real_cells():
    "Labelled counts, and what they are."
    a = shared("pbmc_3k_10x") if shared_dir() is not None else baron()
    e = find_counts(a)
    return e.X.astype(np.float32), e.var, obs_column(a.obs, "cell_type"), "PBMC 3k, 10x" if shared_dir() is not None else "pancreas, Baron"


def tiles(X, n, seed=0):
    "Yield tiles of n cells in all; every count is kept with a chance of 0.9 a molecule."
    rng = np.random.default_rng(seed)
    for first in range(0, n, X.shape[0]):
        part = X[:min(X.shape[0], n - first)].copy()
        part.data = rng.binomial(part.data.astype(int), 0.9).astype(np.float32)
        part.eliminate_zeros()
        yield first, part


def write_h5ad(path, X, var, labels, n):
    "Write n tiled cells by cell."
    obs = pd.DataFrame(dict(cell_type=pd.Categorical(np.resize(labels, n)), donor=pd.Categorical(np.resize([f"donor {i}" for i in range(DONORS)], n // len(labels) + 1).repeat(len(labels))[:n])),
                       index=[f"cell{i}" for i in range(n)])
    with h5py.File(path, "w") as f:
        ad.io.write_elem(f, "/", ad.AnnData(obs=obs, var=var))
        w = CsrWriter(f, "X", X.shape[1])
        for _, part in tiles(X, n): w.append(part)
        w.close()


def by_gene(source, path):
    "Write the same cells with X by gene."
    shutil.copyfile(source, path)
    with h5py.File(path, "r+") as f:
        g = f["X"]
        n, m = (int(v) for v in g.attrs["shape"])
        # What is stored by cell is, read as if by gene, the transpose.
        turn_over(g["data"], g["indices"], g["indptr"], (m, n), path.with_suffix(".turned"), "X")
        del f["X"]
        with h5py.File(path.with_suffix(".turned")) as t: t.copy("X", f)
        f["X"].attrs.update({"encoding-type": "csc_matrix", "shape": np.array([n, m])})
    path.with_suffix(".turned").unlink()


def to_zarr(source, path):
    "Write the same cells as zarr."
    import zarr

    with h5py.File(source) as f:
        root = zarr.open_group(str(path), mode="w")
        whole = {k: ad.io.read_elem(f[k]) for k in ("obs", "var")}
        ad.io.write_elem(root, "/", ad.AnnData(**whole))
        X = root.create_group("X")
        X.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [int(v) for v in f["X"].attrs["shape"]]})
        for k in ("data", "indices", "indptr"):
            z = X.create_dataset(k, shape=f["X"][k].shape, dtype=f["X"][k].dtype, chunks=1 << 20)
            for a in range(0, len(z), 1 << 24): z[a:a + (1 << 24)] = f["X"][k][a:a + (1 << 24)]


def run(*args):
    "Run the command line; return seconds, peak resident memory in GB and the last line that it printed."
    seconds, peak, text = child("-m", "scimlora", *args)
    return seconds, peak / 1e9, text.strip().splitlines()[-1]


def size_of(path): return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 1e9 if path.is_dir() else path.stat().st_size / 1e9


def measure(n, n_by_gene, bundle, folder):
    "Make the files and run the commands; returns rows of the table."
    X, var, labels, what = real_cells()
    files = {}
    for kind, cells, make in (("h5ad by cell", n, lambda p: write_h5ad(p, X, var, labels, n)), ("zarr", n, lambda p: to_zarr(files["h5ad by cell"][0], p)),
                              ("h5ad small", n_by_gene, lambda p: write_h5ad(p, X, var, labels, n_by_gene)),
                              ("h5ad by gene", n_by_gene, lambda p: by_gene(files["h5ad small"][0], p))):
        path = folder / (kind.replace(" ", "_") + (".zarr" if kind == "zarr" else ".h5ad"))
        make(path)
        files[kind] = path, cells
        print(f"{kind}: {cells:,} cells, {size_of(path):.1f} GB", flush=True)
    prepare = ["--label", "cell_type", "--donor", "donor", "--out", folder / "prepared"]
    jobs = [("h5ad by cell", "prepare", prepare), ("h5ad by cell", "annotate", ["--out", folder / "out.csv"]), ("h5ad by cell", "annotate", ["--out", folder / "out.h5ad"]),
            ("zarr", "annotate", ["--out", folder / "out.h5ad"]), ("h5ad by gene", "annotate", ["--out", folder / "out.csv"])]
    rows = []
    for kind, command, options in jobs:
        path, cells = files[kind]
        seconds, memory, last = run(command, *([bundle] if command == "annotate" else []), path, *options)
        rows.append(dict(command=f"{command} {'to ' + Path(options[-1]).suffix[1:] if command == 'annotate' else ''}".strip(), file=kind, cells=f"{cells:,}", GB=f"{size_of(path):.1f}",
                         peak=f"{memory:.2f}", seconds=f"{seconds:.0f}", rate=f"{cells / seconds:,.0f}"))
        print(rows[-1], last, flush=True)
    return rows, what


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--cells-by-gene", type=int, default=200_000)
    parser.add_argument("--bundle", default="runs/demo/bundle", help="made by scimlora demo")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as d:
        os.environ["SCIMLORA_CACHE"] = str(Path(d) / "cache")
        rows, what = measure(args.cells, args.cells_by_gene, args.bundle, Path(d))
    names = ("command", "file", "cells", "GB", "peak", "seconds", "rate")
    heads = ("command", "file", "cells", "file, GB", "peak memory, GB", "seconds", "cells/s")
    lines = ["# Files larger than memory", "", f"Made by `python benchmarks/large_files.py --cells {args.cells}`: real cells ({what}) tiled and thinned; base mini.",
             f"{os.cpu_count()} cores, {platform.machine()}; " + ", ".join(f"{k} {v}" for k, v in versions("scimlora", "anndata", "h5py", "scipy", "zarr").items()) + ".", "",
             "| " + " | ".join(heads) + " |", "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    lines += ["| " + " | ".join(r[k] for k in names) + " |" for r in rows]
    (Path(__file__).parent / "LARGE.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__": main()
