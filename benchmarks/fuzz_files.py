"""Throw broken and malicious files at scimlora.guard and count how it ends.

    python benchmarks/fuzz_files.py --n 2000 --seed 0

makes small real files (h5ad in several layouts, Cell Ranger's h5, csv, csv.gz) from Baron et al.'s pancreas cells, breaks
each copy in one way, opens it with `open_untrusted` and the reader that the service uses, and writes FUZZ.md beside this
script. A canary stands beside the files: links, external storage and virtual datasets point at it, and its random token
may not occur in any result. As a control, the same files are opened without the guard.

Every attack is made by a function `(f, rng, canary)` that edits an open HDF5 file, or `(bytes, rng)` that edits bytes.
"""
import argparse
import gzip
import io
import json
import secrets
import shutil
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import scipy.sparse as sp

from scimlora.examples import baron
from scimlora.files import read_cells
from scimlora.guard import Refused, Worker, open_untrusted, run_limited

SECONDS, CONTROL_SECONDS, MEMORY = 8, 2, 2 << 30
HOST = "/etc/hostname"

# Files to begin with -------------------------------------------------------------------------------------------------


def cells(n=50, genes=1500):
    "Real cells with what real files have: raw, layers, categories, missing values, graphs, nested notes."
    a = baron()[:n, :genes].copy()
    a.obs["n_counts"] = np.asarray(a.X.sum(1)).ravel()
    a.obs["good"] = np.arange(n) % 2 == 0
    a.obs["cell_type"] = a.obs.cell_type.astype("category")
    a.var["feature_name"] = a.var_names.to_numpy()
    a.layers["counts"] = a.X.copy()
    a.raw = a.copy()
    a.obsm["X_pca"] = np.zeros((n, 5), "f4")
    a.obsp["connectivities"] = sp.identity(n, format="csr", dtype="f4")
    a.uns["notes"] = {"params": {"method": "umap", "n": 15}}
    return a


def write_10x(a, path):
    "Write Cell Ranger's layout, version 3."
    X = sp.csc_matrix(a.X.T)
    with h5py.File(path, "w") as f:
        m = f.create_group("matrix")
        for part in ("data", "indices", "indptr"): m.create_dataset(part, data=getattr(X, part).astype("i4"), compression="gzip")
        m["shape"], m["barcodes"] = np.array(X.shape, "i4"), a.obs_names.to_numpy("S")
        for part in ("id", "name", "feature_type", "genome"): m[f"features/{part}"] = a.var_names.to_numpy("S")


def seeds(folder):
    "Write the whole files; returns their paths."
    a, plain = cells(), baron()[:50, :1500].copy()
    a.write_h5ad(folder / "full.h5ad")
    a.write_h5ad(folder / "gzip.h5ad", compression="gzip")
    plain.write_h5ad(folder / "plain.h5ad")
    plain.X = plain.X.tocsc()
    plain.write_h5ad(folder / "csc.h5ad", compression="lzf")
    plain.X = plain.X.toarray()
    plain.write_h5ad(folder / "dense.h5ad", compression="gzip")
    write_10x(a, folder / "10x.h5")
    plain.to_df().to_csv(folder / "cells.csv")
    plain.to_df().to_csv(folder / "cells.csv.gz")
    return sorted(p for p in folder.iterdir() if p.is_file())


class Canary:
    "A secret on the server's disk, as text, as HDF5 text and as HDF5 numbers; `token` may not turn up anywhere."

    def __init__(self, folder, n=100_000):
        self.token = secrets.token_hex(16).encode()
        self.text, self.h5 = folder / "secret.txt", folder / "secret.h5"
        self.text.write_bytes(self.token * (n // 8))
        with h5py.File(self.h5, "w") as f:
            f["text"] = np.full(n, self.token, "S32")
            f["numbers"] = np.frombuffer(self.token * (n // 8), "f4")

    def seen_in(self, found):
        "Is the token in a text or an AnnData?"
        return self.token in (found.encode() if isinstance(found, str) else content(found))


def content(adata):
    "Every byte of an AnnData that could carry something: names, columns, values."
    parts = [adata.obs.to_csv(), adata.var.to_csv()]
    parts = [p.encode("utf-8", "replace") for p in parts]
    for X in [adata.X, *adata.layers.values(), *([adata.raw.X] if adata.raw is not None else [])]:
        parts += [np.asarray(v).tobytes() for v in ((X.data, X.indices, X.indptr) if sp.issparse(X) else (X,)) if v is not None]
    return b"\n".join(parts)


# Broken bytes --------------------------------------------------------------------------------------------------------


def flip_bits(b, rng):
    at = rng.integers(len(b), size=2 ** rng.integers(7))
    b[at] ^= 1 << rng.integers(8, size=len(at)).astype("u1")
    return b


def random_bytes(b, rng):
    at = rng.integers(len(b), size=2 ** rng.integers(9))
    b[at] = rng.integers(256, size=len(at))
    return b


def near_the_start(b, rng):
    at = rng.integers(min(len(b), 8192), size=2 ** rng.integers(5))
    b[at] = rng.integers(256, size=len(at))
    return b


def truncate(b, rng): return b[:rng.integers(len(b))]


def block(b, rng):
    "A block's bounds, of any size from 1 byte to a tenth of the file."
    n = int(2 ** rng.uniform(0, np.log2(max(len(b) // 10, 2))))
    i = int(rng.integers(max(len(b) - n, 1)))
    return i, i + n


def fill_block(b, rng):
    i, j = block(b, rng)
    b[i:j] = rng.choice([0, 255, 32])
    return b


def splice(b, rng):
    (i, j), at = block(b, rng), int(rng.integers(len(b)))
    return np.concatenate([b[:at], b[i:j], b[at:]])


def cut_out(b, rng):
    i, j = block(b, rng)
    return np.concatenate([b[:i], b[j:]])


def overwrite(b, rng):
    (i, j), at = block(b, rng), int(rng.integers(len(b)))
    piece = b[i:j][:len(b) - at].copy()
    b[at:at + len(piece)] = piece
    return b


def extreme_numbers(b, rng):
    "Numbers at the edges, where sizes and addresses stand: many are aligned to 8 bytes."
    for at in rng.integers(len(b) // 8, size=2 ** rng.integers(6)) * 8:
        edges = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(b), len(b) - 1], "<u8")
        b[at:at + 8] = edges[[rng.integers(len(edges))]].view("u1")
    return b


BYTES = [flip_bits, random_bytes, near_the_start, truncate, fill_block, splice, cut_out, overwrite, extreme_numbers]

# Malicious structure -------------------------------------------------------------------------------------------------


def things(f, kind):
    "Paths of all groups or all datasets."
    found = []
    f.visititems(lambda name, obj: found.append(name) if isinstance(obj, kind) else None)
    return found


def place(f, rng):
    "A path that is free: new in a group, or that of something that is taken away."
    if rng.random() < 0.5: return f"{rng.choice(['', *things(f, h5py.Group)])}/more"
    name = rng.choice([*things(f, h5py.Group), *things(f, h5py.Dataset)])
    del f[name]
    return name


def replaced(f, rng, make):
    "Replace a dataset by what `make(parent, name, shape, dtype)` makes, attributes kept."
    path = rng.choice([d for d in things(f, h5py.Dataset) if f[d].shape])
    old = f[path]
    attributes, shape, dtype = dict(old.attrs), old.shape, old.dtype
    del f[path]
    made = make(path, shape, dtype)
    for k, v in attributes.items(): made.attrs[k] = v


def external_link(f, rng, canary):
    target = rng.choice([str(canary.h5), HOST, str(canary.text), f.filename, "secret.h5"])
    f[place(f, rng)] = h5py.ExternalLink(target, rng.choice(["/", "/text", "/numbers"]))


def external_storage(f, rng, canary):
    def make(path, shape, dtype):
        dtype = np.dtype("S32") if dtype.hasobject else dtype
        source = str(rng.choice([str(canary.text), HOST, "secret.txt"]))
        return f.create_dataset(path, shape, dtype, external=[(source, 0, h5py.h5f.UNLIMITED)])
    replaced(f, rng, make)


def virtual_dataset(f, rng, canary):
    def make(path, shape, dtype):
        text = dtype.hasobject
        n = int(np.prod(shape))
        layout = h5py.VirtualLayout((n,), "S32" if text else "f4")
        layout[:] = h5py.VirtualSource(str(rng.choice([str(canary.h5), "secret.h5"])), "text" if text else "numbers", shape=(100_000,))[:n]
        return f.create_virtual_dataset(path, layout)
    replaced(f, rng, make)


def huge_shape(f, rng, canary):
    def make(path, shape, dtype):
        big = tuple(int(n) * int(10 ** rng.uniform(2, 7)) + 1 for n in shape)
        chunks = tuple(min(n, 10_000) for n in big) if rng.random() < 0.7 else tuple(min(n, 2**31 // len(big) // 64) for n in big)
        return f.create_dataset(path, big, dtype, chunks=chunks if len(chunks) == 1 else (1000,) * len(big), compression="gzip")
    replaced(f, rng, make)


def huge_dense(f, rng, canary):
    side = int(10 ** rng.uniform(4, 9))
    f.create_dataset(place(f, rng), (side, side), "f4", chunks=(1000, 1000), compression="gzip")


def sparse_groups(f): return [g for g in things(f, h5py.Group) if "indptr" in f[g]]


def other_values(v, rng):
    "A vector with some entries moved out of place, its type kept where it can be."
    v, info = v.copy(), np.iinfo(v.dtype)
    at = rng.integers(len(v), size=2 ** rng.integers(4))
    v[at] = rng.choice([0, -1, len(v), 10**6, info.max, info.min, info.max // 2], size=len(at))
    return v


def bad_indptr(f, rng, canary):
    d = f[rng.choice(sparse_groups(f))]["indptr"]
    d[:] = rng.choice([other_values(d[:], rng), d[:][::-1], d[:] * 2, d[:] - 1], axis=0)


def bad_indices(f, rng, canary):
    d = f[rng.choice(sparse_groups(f))]["indices"]
    d[:] = rng.choice([other_values(d[:], rng), d[:] + 1000, -d[:]], axis=0)


def other_length(f, rng, canary):
    "A dataset that is longer, shorter, or of another rank than its place asks for."
    def make(path, shape, dtype):
        shape = [(max(shape[0] + int(rng.integers(-3, 4)), 0), *shape[1:]), (0,), (), (*shape, 2)][rng.integers(4)]
        return f.create_dataset(path, shape, dtype)
    replaced(f, rng, make)


def other_type(f, rng, canary):
    def make(path, shape, dtype):
        dtype = [h5py.string_dtype(), "S8", "i1", "u8", "f2", "c16", "V16", h5py.ref_dtype, h5py.regionref_dtype, h5py.vlen_dtype("f8"),
                 [("a", "i4"), ("b", "S4")], h5py.enum_dtype({"A": 1}), "(3,)f4", np.longdouble][rng.integers(14)]
        return f.create_dataset(path, shape, dtype)
    replaced(f, rng, make)


def other_attribute(f, rng, canary):
    "The attributes that tell a reader what to do: another encoding, shape, index or order."
    obj = f[rng.choice(["/", *things(f, h5py.Group), *things(f, h5py.Dataset)])]
    name = rng.choice(["encoding-type", "encoding-version", "shape", "_index", "column-order", "h5sparse_format", "h5sparse_shape", "ordered"])
    values = ["csr_matrix", "csc_matrix", "dataframe", "categorical", "awkward-array", "array", "../../X", "/X/data", "", "0.9.9", b"\xff\xfe",
              np.array([2**62, 2**62]), np.array([-1, 5]), np.array([1.5, np.nan]), f["/"].ref, np.zeros((3, 3)), 7]
    obj.attrs[name] = values[rng.integers(len(values))]


def many_attributes(f, rng, canary):
    for i in range(1200): f["/"].attrs[f"a{i}"] = i


def loop(f, rng, canary):
    "A group in itself, by a hard or a soft link, or soft links that lead to each other."
    groups = things(f, h5py.Group)
    where, other = rng.choice(groups), rng.choice(["/", *groups])
    if rng.random() < 0.5: f[f"{where}/more"] = f[other]
    else: f[f"{where}/more"], f[f"{where}/again"] = h5py.SoftLink(f"/{where}/again"), h5py.SoftLink(f"/{where}/more")


def doubled_ladder(f, rng, canary):
    "30 groups of which each holds the next one twice: 2 ** 30 paths."
    g = f.require_group("uns/ladder")
    for _ in range(30):
        below = g.create_group("a")
        g["b"], g = below, below


def deep_nesting(f, rng, canary): f.create_group("uns/" + "/".join("d" * int(rng.integers(40, 900))))


def long_names(f, rng, canary):
    name = rng.choice(["n" * 5000, "line\nbreak" * 50, "\x1b[31mred", "☃" * 400, " ", "%s{0}"])
    f[f"{rng.choice(things(f, h5py.Group))}/{name}"] = np.arange(3)


def many_objects(f, rng, canary):
    g = f.create_group("uns/many")
    for i in range(int(rng.choice([500, 21_000], p=[0.9, 0.1]))): g.create_group(str(i))


def unknown_filter(f, rng, canary):
    def make(path, shape, dtype):
        made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        made.set_chunk(tuple(max(n, 1) for n in shape))
        made.set_filter(int(rng.choice([256, 300, 32001, 32015, 40000])), h5py.h5z.FLAG_OPTIONAL, (1,))
        kind, space = h5py.h5t.py_create(dtype, logical=True), h5py.h5s.create_simple(shape)
        return h5py.Dataset(h5py.h5d.create(f.id, path.encode(), kind, space, made))
    replaced(f, rng, make)


def bad_codes(f, rng, canary):
    groups = [g for g in things(f, h5py.Group) if "codes" in f[g]]
    if not groups: return bad_indices(f, rng, canary)
    d = f[rng.choice(groups)]["codes"]
    d[:] = other_values(d[:], rng)


STRUCTURE = [external_link, external_storage, virtual_dataset, huge_shape, huge_dense, bad_indptr, bad_indices, other_length, other_type,
             other_attribute, many_attributes, loop, doubled_ladder, deep_nesting, long_names, many_objects, unknown_filter, bad_codes]


# Text ----------------------------------------------------------------------------------------------------------------


def csv_bomb(b, rng):
    "Up to 128 MB of text, 1,000 times smaller when packed."
    piece = rng.choice([b"0,", b"0\n", b'"', b"\n", b"a" * 64, b",\t"])
    out = io.BytesIO()
    with gzip.open(out, "wb", compresslevel=1) as f:
        for _ in range(int(2 ** rng.integers(2, 9))): f.write(bytes(piece) * ((1 << 19) // len(piece)))
    return np.frombuffer(out.getvalue(), "u1")


def broken_csv(b, rng):
    "A line that is longer, shorter or quoted without end, or text that is no text."
    lines = (gzip.decompress(b.tobytes()) if bytes(b[:2]) == b"\x1f\x8b" else b.tobytes()).split(b"\n")
    at = int(rng.integers(len(lines)))
    lines[at] = [lines[at] + b",1,2,3", lines[at][:20], b'"' + lines[at], b"\0" * 50, b"\xff\xfe" * 9, b"=cmd|' /C calc'!A0", b"1e999," * 9][rng.integers(7)]
    return np.frombuffer(gzip.compress(b"\n".join(lines), 1), "u1")


TEXT = [csv_bomb, broken_csv]

# One after the other -------------------------------------------------------------------------------------------------


def is_text(path): return ".csv" in path.name


def plan(files, n, rng):
    "Yield `(attack, file)` n times, so that all attacks come in turn: bytes on all files, structure on HDF5, text on csv."
    kinds = [(a, None) for a in BYTES] + [(a, False) for a in STRUCTURE] + [(a, True) for a in TEXT]
    for i in range(n):
        attack, text = kinds[i % len(kinds)]
        fit = [p for p in files if text is None or is_text(p) == text]
        if attack in (bad_indptr, bad_indices, bad_codes): fit = [p for p in fit if p.name != "dense.h5ad"]
        yield attack, fit[rng.integers(len(fit))]


def broken_copy(attack, source, folder, rng, canary):
    "Make a broken copy of a file; returns its path."
    path = folder / f"upload{''.join(source.suffixes)}"
    if attack in STRUCTURE:
        shutil.copy(source, path)
        with h5py.File(path, "r+") as f: attack(f, rng, canary)
    else: attack(np.fromfile(source, "u1"), rng).tofile(path)
    return path


def outcome(path, canary, worker):
    "Open a file as the service does; returns how it ended and in which words. A token in the result is an AssertionError."
    try: found, kind, said = open_untrusted(path, read_cells, memory=MEMORY, seconds=SECONDS, worker=worker), "opened", ""
    except Refused as e: found, kind, said = str(e), e.kind, str(e)
    assert not canary.seen_in(found), f"{path}: a file of the server was read"
    assert "\n" not in said and len(said) < 900, said
    assert str(path.parent) not in said, said
    return kind, said


def unguarded(path, token):
    "The control, in a child: open with anndata alone and add up; returns whether a file of the server was read."
    a = ad.read_h5ad(path)
    for X in (a.X, *a.layers.values()): X @ np.ones(X.shape[1])
    return token.encode() in content(a)


def control(path, canary, worker):
    "Open a file without the guard; returns 'opened', 'leaked', 'error', 'memory', 'time' or 'crash'."
    try: return "leaked" if run_limited("fuzz_files:unguarded", path, canary.token.decode(), memory=MEMORY, seconds=CONTROL_SECONDS, worker=worker) else "opened"
    except Refused as e: return e.kind


def fuzz(n, seed, folder, with_control=True):
    "Break and open n files; yields one dictionary each."
    rng, worker = np.random.default_rng(seed), Worker()
    for name in ("seeds", "server", "uploads"): (folder / name).mkdir()
    # Beside the uploads as well, where a relative name would find it.
    canary = Canary(folder / "server")
    for p in (canary.text, canary.h5): shutil.copy(p, folder / "uploads")
    for attack, source in plan(seeds(folder / "seeds"), n, rng):
        path = broken_copy(attack, source, folder / "uploads", rng, canary)
        start = time.perf_counter()
        kind, said = outcome(path, canary, worker)
        row = dict(attack=attack.__name__, file=source.name, outcome=kind, said=said, seconds=time.perf_counter() - start)
        if with_control and not is_text(path): row["control"] = control(path, canary, worker)
        yield row
        path.unlink()
    worker.close()


# The page ------------------------------------------------------------------------------------------------------------

KINDS = ["opened", "refused", "error", "memory", "time", "crash"]


def table(rows, key, kinds, of="outcome"):
    "A Markdown table of counts."
    counts = defaultdict(Counter)
    for r in rows: counts[r[key]][r[of]] += 1
    lines = [f"| {key} | files | " + " | ".join(kinds) + " |", "| --- |" + " ---: |" * (len(kinds) + 1)]
    for name, c in [*sorted(counts.items()), ("**all**", sum(counts.values(), Counter()))]:
        lines.append(f"| {name} | {sum(c.values())} | " + " | ".join(str(c[k]) for k in kinds) + " |")
    return "\n".join(lines)


def page(rows, n, seed):
    "FUZZ.md."
    seconds = np.array([r["seconds"] for r in rows])
    slowest, controls = rows[int(seconds.argmax())], [r for r in rows if "control" in r]
    c = Counter(r["control"] for r in controls)
    return f"""# Broken and malicious files

`python benchmarks/fuzz_files.py --n {n} --seed {seed}` wrote this page: {len(rows):,} files, each a small real file broken in one
way, opened by `scimlora.guard.open_untrusted` with the service's reader.

- The parent process never crashed, and the secret token that links, external storage and virtual datasets pointed at
  occurred in no result and no message.
- Crashes of the child, each answered as a message in one line: {sum(r["outcome"] == "crash" for r in rows)}.
- Time per file: median {np.median(seconds):.2f} s, slowest {seconds.max():.1f} s ({slowest["attack"]} on {slowest["file"]}, ended as '{slowest["outcome"]}'); limit {SECONDS} s.

*opened*: the file reads in spite of the damage (a changed expression value looks like any other). *refused*: a message of
`scimlora` in one line. *error*: an error of the reader, as one line. *memory*, *time*, *crash*: the child came to its
limits of {MEMORY >> 30} GB and {SECONDS} s, or was ended by a signal.

## By attack

{table(rows, "attack", KINDS)}

## By file

{table(rows, "file", KINDS)}

## The same HDF5 files without the guard

Opened by anndata in the same kind of child process, followed by a multiplication: {c["crash"]} crashed it, {c["leaked"]} gave
away the secret, {c["memory"] + c["time"]} ran into the limits.

{table(controls, "attack", ["opened", "leaked", "error", "memory", "time", "crash"], of="control") if controls else "Not run."}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("FUZZ.md"))
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # anndata's, about names that stand twice
    with tempfile.TemporaryDirectory() as d: rows = list(fuzz(args.n, args.seed, Path(d)))
    args.out.write_text(page(rows, args.n, args.seed), encoding="utf-8")
    print(json.dumps(Counter(r["outcome"] for r in rows)))


if __name__ == "__main__": main()
