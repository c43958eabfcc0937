"""Bad input ends with exit code 2 and one line that says what is wrong; odd but good input gives right results.

Each row of a table is one mistake on real cells. Whatever the mistake, no traceback, no half-written output, nothing left
beside it, and what stood at the output's place before still stands there.
"""
import json
import pickle
import re
import resource
import shutil
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file, save_file

from scimlora import Base
from scimlora.core import read_json, write_json
from scimlora.data import align_cells

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x06\0\0\0\x1f\x15\xc4\x89"


def tree(folder):
    "Every path under a folder, with the bytes of the files."
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob("*"))}


def one_line(ended, *words, code=2):
    "Ended with the code, said one line that holds all the words (regular expressions), and nothing else."
    assert ended.code == code, ended
    assert len(ended.err.splitlines()) == 1 and ended.err.endswith("\n"), ended.err
    assert ended.err.startswith("scimlora: ")
    assert "Traceback" not in ended.err and len(ended.err) < 600
    assert ended.out == ""
    for w in words: assert re.search(w, ended.err, re.I), f"{w!r} is not in: {ended.err}"


@pytest.fixture(scope="module")
def few(other_cells):
    "40 real cells, every fourth gene: enough to go wrong with."
    return other_cells[::3, ::4].copy()


@pytest.fixture(scope="module")
def few_file(few, tmp_path_factory):
    few.write_h5ad(path := tmp_path_factory.mktemp("few") / "cells.h5ad")
    return path


@pytest.fixture
def folder(tmp_path):
    "A folder for output, empty."
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def refused(cli, folder, bundle_dir):
    "Assert that a command refuses and writes nothing: first where there is no output yet, then over an older one."

    def check(command, *words, name="", code=2):
        out = folder / (name or {"annotate": "out.csv", "tune": "bundle"}.get(command[0], "run"))
        args = [*command, "--out", out]
        one_line(cli(*args), *words, code=code)
        assert tree(folder) == {}
        if out.suffix: out.write_text("older output\n", encoding="utf-8")
        elif command[0] == "tune": shutil.copytree(bundle_dir, out)
        else: out.mkdir(); (out / "metrics.json").write_text("{}", encoding="utf-8")
        before = tree(folder)
        one_line(cli(*args), *words, code=code)
        assert tree(folder) == before

    return check


# Values and genes ---------------------------------------------------------------------------------------------------


def with_X(a, X):
    a.X = X
    return a


def with_value(a, value):
    X = a.X.toarray()
    X[3, 5] = value
    return with_X(a, sp.csr_matrix(X))


def cp10k(a): return sp.csr_matrix(sp.diags(1e4 / np.asarray(a.X.sum(1)).ravel()) @ a.X)


def ensembl(a):
    a.var_names = [f"ENSG{i:011d}" for i in range(a.n_vars)]
    return a


def mouse_plants(a):
    a.var_names = [f"AT1G{i:05d}" for i in range(a.n_vars)]
    return a


def log2(X):
    X = X.log1p()
    X.data /= np.log(2)
    return X


VALUES = {
    "no shared genes": (mouse_plants, ["no gene shared", "AT1G00000"]),
    "made-up Ensembl ids": (ensembl, ["ENSG00000000000", "symbols or Ensembl ids"]),
    "a negative value": (lambda a: with_value(a, -1), ["X", "negative", "counts"]),
    "scaled values": (lambda a: with_X(a, a.X.toarray() - a.X.toarray().mean(0)), ["X", "negative|scaled", "counts"]),
    "NaN": (lambda a: with_value(a, np.nan), ["X", "NaN", r"\b1 cell"]),
    "NaN in a dense matrix": (lambda a: with_X(with_value(a, np.nan), with_value(a, np.nan).X.toarray()), ["X", "NaN", r"\b1 cell"]),
    "infinity": (lambda a: with_value(a, np.inf), ["X", "infinite", r"\b1 cell"]),
    "log2": (lambda a: with_X(a, log2(cp10k(a))), ["X", "already logged", "counts"]),
    "log1p after which genes were left out": (lambda a: with_X(a, cp10k(a).log1p())[:, ::3], ["X", "already logged", "counts"]),
    "no values at all": (lambda a: ad.AnnData(obs=a.obs, var=a.var), ["no expression values"]),
    "zero cells": (lambda a: a[:0], ["no cells"]),
    "zero genes": (lambda a: a[:, :0], ["no genes"]),
}


@pytest.mark.parametrize("command", ["annotate", "tune"])
@pytest.mark.parametrize("case", VALUES)
def test_values_and_genes(case, command, refused, few, bundle_dir, tmp_path):
    change, words = VALUES[case]
    change(few.copy()).copy().write_h5ad(tmp_path / "cells.h5ad")
    args = [bundle_dir, tmp_path / "cells.h5ad"] if command == "annotate" else [tmp_path / "cells.h5ad", "--label", "cell_type"]
    refused([command, *args], *words)


def test_cells_without_any_counts_teach_nothing(refused, few, tmp_path):
    with_X(few.copy(), sp.csr_matrix(few.shape, dtype=np.float32)).write_h5ad(tmp_path / "cells.h5ad")
    refused(["tune", tmp_path / "cells.h5ad", "--label", "cell_type"], "no counts|empty|zero")


def test_text_for_numbers(refused, few_file, bundle_dir, tmp_path):
    "anndata writes no such matrix, so one is put into the file by hand."
    shutil.copy(few_file, tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as f:
        shape = tuple(f["X"].attrs["shape"])
        del f["X"]
        X = f.create_dataset("X", data=np.full(shape, "many", dtype=object), dtype=h5py.string_dtype(), compression="gzip")
        X.attrs["encoding-type"], X.attrs["encoding-version"] = "string-array", "0.2.0"
    refused(["annotate", bundle_dir, tmp_path / "cells.h5ad"], "X", "number")


# Labels and donors --------------------------------------------------------------------------------------------------


def relabel(rule):
    def change(a):
        a.obs["cell_type"] = pd.Series([rule(i, t) for i, t in enumerate(a.obs.cell_type.to_numpy(str))], index=a.obs_names, dtype=object)
        return a
    return change


def with_label(a, value):
    a.obs["cell_type"] = value
    return a


LABELS = {
    "no such label column": (lambda a: a, ["--label", "celltype"], ["label column 'celltype'", "cell_type"]),
    "no such donor column": (lambda a: a, ["--label", "cell_type", "--donor", "patient"], ["donor column 'patient'", "library"]),
    "no column at all": (lambda a: ad.AnnData(a.X, var=a.var), ["--label", "cell_type"], ["label column 'cell_type'", "none"]),
    "one class": (lambda a: a[a.obs.cell_type == "beta"], ["--label", "cell_type"], ["all cells are 'beta'", "two types"]),
    "one cell": (lambda a: a[:1], ["--label", "cell_type"], ["1 usable cell", "two"]),
    "a class with one cell": (relabel(lambda i, t: "lonely" if i == 4 else t), ["--label", "cell_type"], ["'lonely' has one cell", "--min-cells"]),
    "all labels missing": (lambda a: with_label(a, np.nan), ["--label", "cell_type"], ["cell_type", "label|missing"]),
    "all labels blank": (relabel(lambda i, t: " "), ["--label", "cell_type"], ["cell_type", "label|missing|blank"]),
    # One label a line is what a bundle keeps; found out at the end, it would cost the whole fine-tune.
    "a label with a line break": (relabel(lambda i, t: t.replace("beta", "be\nta")), ["--label", "cell_type"], ["cell_type|label", "line"]),
    "a label with a carriage return": (relabel(lambda i, t: t.replace("beta", "be\rta")), ["--label", "cell_type"], ["cell_type|label", "line"]),
    "a label with Unicode's line break": (relabel(lambda i, t: t.replace("beta", "be\u2028ta")), ["--label", "cell_type"], ["cell_type|label", "line"]),
    "no class large enough": (lambda a: a, ["--label", "cell_type", "--min-cells", "500"], ["usable|min-cells|few"]),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_and_donors(case, refused, few, tmp_path):
    change, options, words = LABELS[case]
    change(few.copy()).copy().write_h5ad(tmp_path / "cells.h5ad")
    refused(["tune", tmp_path / "cells.h5ad", *options], *words)


@pytest.mark.parametrize("command", ["prepare", "evaluate", "errors"])
def test_a_missing_label_column_in_every_command(command, refused, cells_file, bundle_dir):
    files = [cells_file] if command == "prepare" else [bundle_dir, cells_file]
    refused([command, *files, "--label", "celltype"], "label column 'celltype'", "cell_type")


@pytest.mark.parametrize("command", ["evaluate", "errors"])
def test_test_cells_with_strange_labels_only(command, refused, other_cells, bundle_dir, tmp_path):
    relabel(lambda i, t: "neuron")(other_cells.copy()).write_h5ad(tmp_path / "cells.h5ad")
    refused([command, bundle_dir, tmp_path / "cells.h5ad"], "no test cell has a label")


# Files that are no cells --------------------------------------------------------------------------------------------


def make_text(p): p.write_text("cell,INS,GCG\na,1,2\n", encoding="utf-8")
def make_png(p): p.write_bytes(PNG)
def make_pickle(p): p.write_bytes(pickle.dumps({"X": [1, 2]}))


def make_other_hdf5(p):
    with h5py.File(p, "w") as f: f["matrix"] = np.arange(12).reshape(3, 4)


def make_hollow_hdf5(p):
    with h5py.File(p, "w") as f: f["obs"], f["var"] = np.arange(3), "genes"


FILES = {
    "missing": (lambda p: None, ["no such file"]),
    "empty": (lambda p: p.write_bytes(b""), ["empty"]),
    "folder": (lambda p: p.mkdir(), ["folder"]),
    "text": (make_text, ["no h5ad"]),
    "image": (make_png, ["no h5ad"]),
    "pickle": (make_pickle, ["no h5ad"]),
    "other HDF5": (make_other_hdf5, ["no h5ad", "obs"]),
    "HDF5 with obs and var of the wrong kind": (make_hollow_hdf5, ["cannot read|no h5ad"]),
}


@pytest.mark.parametrize("command", ["annotate", "tune", "prepare", "evaluate", "errors"])
@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_cells(case, command, refused, bundle_dir, tmp_path):
    make, words = FILES[case]
    make(tmp_path / "cells.h5ad")
    args = {"tune": ["--label", "cell_type"], "prepare": ["--label", "cell_type"]}.get(command, [])
    bundle = [] if command in ("tune", "prepare") else [bundle_dir]
    refused([command, *bundle, tmp_path / "cells.h5ad", *args], "cells.h5ad", *words)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.3, 0.5, 0.9, 0.999])
def test_a_file_cut_short(share, refused, cells_file, bundle_dir, tmp_path):
    whole = cells_file.read_bytes()
    (tmp_path / "cells.h5ad").write_bytes(whole[:int(len(whole) * share)])
    refused(["annotate", bundle_dir, tmp_path / "cells.h5ad"], "cells.h5ad", "cut short|no h5ad|cannot read")


def test_names_in_another_encoding(refused, few_file, bundle_dir, tmp_path):
    "Cell names in Latin-1, as an old tool may write them: HDF5 says UTF-8, the bytes say otherwise."
    shutil.copy(few_file, tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as f:
        key, attrs = f["obs"].attrs["_index"], dict(f["obs/" + f["obs"].attrs["_index"]].attrs)
        n = len(f["obs"][key])
        del f["obs"][key]
        d = f["obs"].create_dataset(key, data=[f"größe{i}".encode("latin-1") for i in range(n)], dtype=h5py.string_dtype("utf-8", 12))
        d.attrs.update(attrs)
    refused(["annotate", bundle_dir, tmp_path / "cells.h5ad"], "cells.h5ad", "cannot read|UTF-8")


SPARSE = {
    "an index beyond the last gene": ("indices", lambda v: np.where(np.arange(len(v)) == 7, 10**6, v)),
    "a negative index": ("indices", lambda v: np.where(np.arange(len(v)) == 7, -5, v)),
    "a row that ends before it starts": ("indptr", lambda v: np.where(np.arange(len(v)) == 3, v[-1], v)),
    "a row beyond the values": ("indptr", lambda v: np.append(v[:-1], v[-1] * 50)),
}


@pytest.mark.parametrize("case", SPARSE)
def test_a_sparse_matrix_that_points_elsewhere(case, cli_fork, cells_file, bundle_dir, folder, tmp_path):
    "In a process of its own, as such files have ended the process itself."
    part, damage = SPARSE[case]
    shutil.copy(cells_file, tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as f: f["X"][part][...] = damage(f["X"][part][...]).astype(f["X"][part].dtype)
    one_line(cli_fork("annotate", bundle_dir, tmp_path / "cells.h5ad", "--out", folder / "out.csv"), "cells.h5ad|X")
    assert tree(folder) == {}


# Bundles ------------------------------------------------------------------------------------------------------------

PARTS = ("manifest.json", "adapter_config.json", "adapter_model.safetensors", "head.safetensors", "label_classes.txt", "calibration.json")


def edit(name, **changes):
    return lambda b: write_json(b / name, {k: v for k, v in (read_json(b / name) | changes).items() if v is not ...})


def tensors(name, change):
    def damage(b):
        t = {k: v.clone() for k, v in load_file(b / name).items()}
        save_file({k: v.contiguous() for k, v in change(t).items()}, b / name)
    return damage


def rename_layers(t): return {k.replace("network.", "layers."): v for k, v in t.items()}
def first_A_cut(t): return {k: v[:, :-1] if ".lora_A." in k and "network.0." in k else v for k, v in t.items()}
def first_B_cut(t): return {k: v[:-1] if ".lora_B." in k and "network.0." in k else v for k, v in t.items()}
def without_B(t): return {k: v for k, v in t.items() if not (".lora_B." in k and "network.0." in k)}
def without_A(t): return {k: v for k, v in t.items() if not (".lora_A." in k and "network.0." in k)}
def nan_weights(t): return {k: torch.full_like(v, float("nan")) for k, v in t.items()}


DAMAGE = {
    **{f"{p} missing": (lambda b, p=p: (b / p).unlink(), [p]) for p in PARTS},
    **{f"{p} cut short": (lambda b, p=p: (b / p).write_bytes((b / p).read_bytes()[:(b / p).stat().st_size // 2]), [p]) for p in PARTS},
    **{f"{p} empty": (lambda b, p=p: (b / p).write_bytes(b""), [p]) for p in PARTS},
    **{f"{p} garbage": (lambda b, p=p: (b / p).write_bytes(PNG * 20), [p]) for p in PARTS},
    **{f"{p} holds {v}": (lambda b, p=p, v=v: (b / p).write_text(v), [p]) for p in PARTS if p.endswith("json") for v in ("[]", "null", '"x"', "7", "{}")},
    "schema from the future": (edit("manifest.json", schema_version=99), ["schema version 99", "update"]),
    "no schema version": (edit("manifest.json", schema_version=...), ["schema version"]),
    "schema version that is no number": (edit("manifest.json", schema_version=[1]), ["schema version"]),
    "no base in the manifest": (edit("manifest.json", base=...), ["manifest.json", "base"]),
    "base is text": (edit("manifest.json", base="mini"), ["manifest.json", "base"]),
    "base without checksums": (edit("manifest.json", base={"name": "mini", "sha256": {}}), ["manifest.json", "sha256"]),
    "base that is nowhere": (edit("manifest.json", base={"name": "nowhere", "sha256": {"encoder.ckpt": "0"}}), ["nowhere", "--base"]),
    "base with another checksum": (edit("manifest.json", base={"name": "mini", "sha256": {"encoder.ckpt": "0" * 64, "gene_order.tsv": "0" * 64}}),
                                   ["mini", "encoder.ckpt differs"]),
    "one label more": (lambda b: (b / "label_classes.txt").open("a").write("extra\n"), ["label_classes.txt", "7 labels", "6"]),
    "a label twice": (lambda b: (b / "label_classes.txt").write_text("alpha\nalpha\nbeta\ndelta\nductal\ngamma\n"), ["label_classes.txt", "alpha"]),
    "labels not UTF-8": (lambda b: (b / "label_classes.txt").write_bytes(b"\xff\nalpha\nbeta\ndelta\nductal\ngamma\n"), ["label_classes.txt"]),
    "A of the wrong shape": (tensors("adapter_model.safetensors", first_A_cut), ["adapter_model.safetensors"]),
    "B of the wrong shape": (tensors("adapter_model.safetensors", first_B_cut), ["adapter_model.safetensors"]),
    "A without B": (tensors("adapter_model.safetensors", without_B), ["adapter_model.safetensors", "lora_B"]),
    "B without A": (tensors("adapter_model.safetensors", without_A), ["adapter_model.safetensors", "lora_A"]),
    "adapter without tensors": (tensors("adapter_model.safetensors", lambda t: {"nothing": torch.zeros(1)}), ["adapter_model.safetensors"]),
    "adapter for other layers": (tensors("adapter_model.safetensors", rename_layers), ["adapter_model.safetensors", "layer"]),
    "adapter of NaN": (tensors("adapter_model.safetensors", nan_weights), ["adapter_model.safetensors", "NaN|finite"]),
    "another kind of adapter": (edit("adapter_config.json", peft_type="VERA"), ["VERA", "LoRA"]),
    "rank 0": (edit("adapter_config.json", r=0), ["adapter_config.json", r"\br\b|rank"]),
    "rank that is text": (edit("adapter_config.json", r="eight"), ["adapter_config.json", r"\br\b|rank"]),
    "rank of another adapter": (edit("adapter_config.json", r=3), ["adapter_config.json|adapter_model.safetensors", r"\br\b|rank"]),
    "no lora_alpha": (edit("adapter_config.json", lora_alpha=...), ["adapter_config.json", "lora_alpha"]),
    "head without weight": (tensors("head.safetensors", lambda t: {k: v for k, v in t.items() if k != "weight"}), ["head.safetensors", "weight"]),
    "head without bias": (tensors("head.safetensors", lambda t: {k: v for k, v in t.items() if k != "bias"}), ["head.safetensors", "bias"]),
    "head without centroids": (tensors("head.safetensors", lambda t: {k: v for k, v in t.items() if k != "centroids"}), ["head.safetensors", "centroids"]),
    "head of another width": (tensors("head.safetensors", lambda t: t | {"weight": t["weight"][:, :-1]}), ["head.safetensors"]),
    "head of NaN": (tensors("head.safetensors", nan_weights), ["head.safetensors", "NaN|finite"]),
    **{f"genepath.safetensors {how}": (lambda b, data=data: (b / "genepath.safetensors").write_bytes(data), ["genepath.safetensors"])
       for how, data in (("empty", b""), ("garbage", PNG * 20))},
    "gene path without weight": (tensors("genepath.safetensors", lambda t: {k: v for k, v in t.items() if k != "weight"}), ["genepath.safetensors", "weight"]),
    "gene path of other classes": (tensors("genepath.safetensors", lambda t: t | {"bias": t["bias"][:-1]}), ["genepath.safetensors", "fit"]),
    "gene path of other genes": (tensors("genepath.safetensors", lambda t: {k: v if k in ("bias", "scale", "embedding") else v[1:] for k, v in t.items()}), ["genepath.safetensors", "genes"]),
    "gene path of another embedding": (tensors("genepath.safetensors", lambda t: t | {"embedding": t["embedding"][1:]}), ["genepath.safetensors", "embedding"]),
    "gene path of NaN": (tensors("genepath.safetensors", nan_weights), ["genepath.safetensors", "NaN|finite"]),
    "a share of the encoder above 1": (edit("calibration.json", encoder_weight=2), ["calibration.json", "encoder_weight"]),
    "schema of old": (edit("manifest.json", schema_version=1), ["schema version 1", "tune it again"]),
    "calibration with a strange key": (edit("calibration.json", colour="red"), ["calibration.json", "colour"]),
    "temperature 0": (edit("calibration.json", temperature=0), ["calibration.json", "temperature"]),
    "temperature that is text": (edit("calibration.json", temperature="hot"), ["calibration.json", "temperature"]),
    "temperature null": (edit("calibration.json", temperature=None), ["calibration.json", "temperature"]),
}


@pytest.fixture
def damaged(bundle_dir, tmp_path):
    shutil.copytree(bundle_dir, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_bundle(case, refused, damaged, few_file):
    damage, words = DAMAGE[case]
    damage(damaged)
    refused(["annotate", damaged, few_file], *words)


@pytest.mark.parametrize("name", ["no_such_bundle", "a_file", "an_empty_folder", "../mini", ""])
def test_what_is_no_bundle(name, refused, cells_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("x", encoding="utf-8")
    (tmp_path / "an_empty_folder").mkdir()
    refused(["annotate", name, cells_file], "bundle")


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(b"garbage"), lambda p: p.write_bytes(p.read_bytes()[:-100]),
                                    lambda p: save_file(load_file(p), p),
                                    lambda p: save_file({k: v for k, v in load_file(p).items() if k != "base_knn.y"}, p)],
                         ids=["garbage", "cut short", "settings lost", "a tensor lost"])
def test_damaged_baselines(damage, refused, damaged, cells_file):
    "They serve evaluate alone, and there they are named."
    damage(damaged / "baselines.safetensors")
    refused(["evaluate", damaged, cells_file], "baselines.safetensors")


# Bases --------------------------------------------------------------------------------------------------------------


class Trap:
    "A pickle that touches a file when it is opened."

    def __init__(self, path): self.path = str(path)

    def __reduce__(self): return (open, (self.path, "w"))


@pytest.fixture
def other_base(tmp_path):
    "mini with one weight changed, saved: another base."
    base = Base.load("mini")
    with torch.no_grad(): base.encoder.network[0][1].weight[0, 0] += 1
    base.save(tmp_path / "base")
    return tmp_path / "base"


def drop_genes(b):
    genes = (b / "gene_order.tsv").read_text(encoding="utf-8").splitlines()
    (b / "gene_order.tsv").write_text("\n".join(genes[:-3]) + "\n", encoding="utf-8")


def other_shape(b):
    state = torch.load(b / "encoder.ckpt", weights_only=True)["state_dict"]
    key = next(k for k in state if k.endswith("2.weight"))
    torch.save({"state_dict": state | {key: state[key][:-1]}}, b / "encoder.ckpt")


BASES = {
    "no such folder": (shutil.rmtree, ["no base"]),
    **{f"{f} missing": (lambda b, f=f: (b / f).unlink(), [f]) for f in ("encoder.ckpt", "gene_order.tsv", "layer_sizes.json", "label_ints.csv")},
    "three genes fewer": (drop_genes, ["gene_order.tsv", "14,497", "14,500"]),
    "gene order not UTF-8": (lambda b: (b / "gene_order.tsv").write_bytes(b"\xff\xfe" * 900), ["gene_order.tsv"]),
    "gene order empty": (lambda b: (b / "gene_order.tsv").write_bytes(b""), ["gene_order.tsv"]),
    "labels garbage": (lambda b: (b / "label_ints.csv").write_bytes(PNG), ["label_ints.csv"]),
    "checkpoint garbage": (lambda b: (b / "encoder.ckpt").write_bytes(PNG * 50), ["encoder.ckpt"]),
    "checkpoint empty": (lambda b: (b / "encoder.ckpt").write_bytes(b""), ["encoder.ckpt"]),
    "checkpoint cut short": (lambda b: (b / "encoder.ckpt").write_bytes((b / "encoder.ckpt").read_bytes()[:100_000]), ["encoder.ckpt"]),
    "checkpoint of a list": (lambda b: torch.save([1, 2], b / "encoder.ckpt"), ["encoder.ckpt"]),
    "checkpoint without layers": (lambda b: torch.save({"state_dict": {"x": torch.zeros(3)}}, b / "encoder.ckpt"), ["encoder.ckpt"]),
    "checkpoint of another network": (lambda b: torch.save({"state_dict": {"fc.weight": torch.zeros(3, 3)}}, b / "encoder.ckpt"), ["encoder.ckpt"]),
    "checkpoint whose layers do not fit": (other_shape, ["encoder.ckpt"]),
}


@pytest.mark.parametrize("case", BASES)
def test_a_damaged_base(case, refused, other_base, cells_file):
    damage, words = BASES[case]
    damage(other_base)
    refused(["tune", cells_file, "--label", "cell_type", "--base", other_base], *words)


@pytest.mark.parametrize("save", [lambda v, p: p.write_bytes(pickle.dumps(v)), lambda v, p: torch.save(v, p),
                                  lambda v, p: torch.save({"state_dict": v}, p)], ids=["pickle", "torch", "torch state_dict"])
def test_a_checkpoint_with_code_in_it_does_not_run(save, refused, other_base, cells_file, tmp_path):
    save(Trap(tmp_path / "sprung"), other_base / "encoder.ckpt")
    refused(["tune", cells_file, "--label", "cell_type", "--base", other_base], "encoder.ckpt", "plain tensors")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("command", ["annotate", "evaluate", "errors"])
def test_a_bundle_for_another_base(command, refused, other_base, bundle_dir, cells_file):
    refused([command, bundle_dir, cells_file, "--base", other_base], "base 'mini'", "encoder.ckpt differs", "--base")


# Options and outputs ------------------------------------------------------------------------------------------------

OPTIONS = [
    ("tune --epochs 0", ["epochs", "at least 1"]), ("tune --epochs -3", ["epochs", "at least 1"]), ("tune --epochs many", ["--epochs", "integer"]),
    ("tune --lr 5", ["lr", "between 0 and 1"]), ("tune --lr 0", ["lr"]), ("tune --lr nan", ["lr"]), ("tune --lr -1e-3", ["lr"]),
    ("tune --r 0", [r"\br=0"]), ("tune --r 2.5", ["--r", "integer"]), ("tune --alpha 0", ["alpha"]), ("tune --alpha inf", ["alpha"]),
    ("tune --alpha nan", ["alpha"]), ("tune --dropout 1", ["dropout"]), ("tune --dropout -0.1", ["dropout"]), ("tune --batch 0", ["batch"]),
    ("tune --targets fc1", ["fc1", r"network\.0\.1"]), ("tune --targets ,", ["targets"]), ("tune --targets 1", ["'1'", r"network\.0\.1"]),
    ("tune --recipe secret", ["--recipe secret", "original"]), ("tune --units tpm", ["tpm", "log1p"]), ("tune --units counts --seed -1", ["seed"]),
    ("tune --base nowhere", ["no base 'nowhere'", "mini"]),
    ("prepare --test 1.5", ["--test"]), ("prepare --test -0.1", ["--test"]), ("prepare --test 0.6 --val 0.6", ["--test", "--val"]),
    ("prepare --test nan", ["--test"]), ("prepare --max-per-class 0", ["max-per-class"]), ("prepare --max-per-class -1", ["max-per-class"]),
    ("prepare --min-per-class 900", ["min-per-class"]), ("prepare --units tpm", ["tpm"]), ("prepare --seed -1", ["seed"]),
    ("annotate --units tpm", ["tpm", "log1p"]), ("annotate --units log1p_cp10k", ["log1p"]), ("annotate --base nowhere", ["nowhere"]),
    ("evaluate --units tpm", ["tpm"]), ("annotate --colour red", ["--colour"]), ("tune --epochs", ["--epochs"]),
]


@pytest.mark.parametrize("line, words", OPTIONS, ids=[line for line, _ in OPTIONS])
def test_options_out_of_range(line, words, refused, cells_file, bundle_dir):
    command, *options = line.split()
    files = [cells_file, "--label", "cell_type"] if command in ("tune", "prepare") else [bundle_dir, cells_file]
    refused([command, *files, *options], *words)


@pytest.mark.parametrize("args", [["fly"], ["annotate"], ["annotate", "bundle"], ["annotate", "bundle", "cells.h5ad"], ["tune", "x.h5ad", "--label", "y"],
                                  ["tune", "x.h5ad", "--out", "b"], ["doctor"], ["doctor", "a", "b"], ["--fly"], ["report"], ["serve"]], ids=" ".join)
def test_calls_that_are_no_calls(args, cli):
    one_line(cli(*args), "missing|no such|unexpected|got", "--help")


@pytest.mark.parametrize("name", ["labels.txt", "labels", "labels.h5", "labels.csv.", "h5ad"])
def test_an_output_of_the_wrong_kind(name, cli, folder, bundle_dir, cells_file):
    one_line(cli("annotate", bundle_dir, cells_file, "--out", folder / name), "h5ad", "csv")
    assert tree(folder) == {}


@pytest.mark.parametrize("command", ["annotate", "tune", "prepare", "evaluate", "errors"])
def test_an_output_inside_a_file(command, cli, folder, bundle_dir, cells_file):
    (folder / "file").write_text("I am a file", encoding="utf-8")
    files = [cells_file, "--label", "cell_type"] if command in ("tune", "prepare") else [bundle_dir, cells_file]
    more = ["--epochs", 1, "--set", "steps=0", "--no-baselines"] if command == "tune" else []
    one_line(cli(command, *files, *more, "--out", folder / "file" / ("out.csv" if command == "annotate" else "out")), "file")
    assert tree(folder) == {"file": b"I am a file"}


@pytest.mark.parametrize("command", ["annotate", "tune", "prepare", "evaluate", "errors"])
def test_an_output_that_is_something_else(command, cli, folder, bundle_dir, cells_file):
    "A folder where a file should go; a file, or a folder of other things, where a folder should go."
    files = [cells_file, "--label", "cell_type"] if command in ("tune", "prepare") else [bundle_dir, cells_file]
    if command == "annotate": (folder / "out.csv").mkdir(); (folder / "out.csv" / "thesis.txt").write_text("years of work")
    else: (folder / "out.csv").write_text("years of work")
    before = tree(folder)
    one_line(cli(command, *files, "--out", folder / "out.csv"), r"out\.csv", "folder|file")
    assert tree(folder) == before


def test_tune_does_not_replace_a_folder_of_other_things(cli, folder, cells_file):
    (folder / "home").mkdir()
    (folder / "home" / "thesis.txt").write_text("years of work", encoding="utf-8")
    before = tree(folder)
    one_line(cli("tune", cells_file, "--label", "cell_type", "--out", folder / "home"), "other things")
    assert tree(folder) == before


@pytest.mark.parametrize("out", ["labels.csv", "labels.h5ad", "run"])
def test_a_full_disk(out, cli_fork, folder, bundle_dir, cells_file):
    "A real failure, not bad input: exit code 1. The disk of this process is full at 2 kB a file."
    command = ["evaluate" if out == "run" else "annotate", bundle_dir, cells_file]
    if out != "run": (folder / out).write_text("older output", encoding="utf-8")
    before = tree(folder)
    one_line(cli_fork(*command, "--out", folder / out, file_limit=2048), code=1)
    after = tree(folder)
    if out == "run": assert not [f for f in after if "tmp" in f or f.endswith("metrics.json")]
    else: assert after == before


@pytest.mark.parametrize("older", [True, False], ids=["over an older bundle", "new"])
def test_a_disk_that_fills_up_while_a_bundle_is_saved(older, classifier, bundle_dir, folder):
    if older: shutil.copytree(bundle_dir, folder / "bundle")
    before, limits = tree(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(Exception, match="large|write|[Ii]/?[Oo]"): classifier.save(folder / "bundle")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tree(folder) == before


# Odd, but good ------------------------------------------------------------------------------------------------------


def annotated(cli, bundle, path, out):
    "Annotate to csv; returns the table and what was said."
    ended = cli("annotate", bundle, path, "--out", out)
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    return pd.read_csv(out), ended.err


@pytest.fixture(scope="module")
def plain(classifier, other_cells): return classifier.predictor.predict(other_cells)


def as_layer(a):
    b = ad.AnnData(obs=a.obs, var=a.var)
    b.layers["counts"] = a.X
    return b


def as_raw(a):
    a.raw = a.copy()
    a.X = np.asarray(a.X.todense() - a.X.mean(0))
    return a


ODD = {
    "dense": lambda a: with_X(a, a.X.toarray()),
    "dense, Fortran order": lambda a: with_X(a, np.asfortranarray(a.X.toarray())),
    "CSC": lambda a: with_X(a, a.X.tocsc()),
    "float64": lambda a: with_X(a, a.X.astype(np.float64)),
    "int64": lambda a: with_X(a, a.X.astype(np.int64)),
    "int32, dense": lambda a: with_X(a, a.X.toarray().astype(np.int32)),
    "uint16, dense": lambda a: with_X(a, a.X.toarray().astype(np.uint16)),
    "explicit zeros": lambda a: with_X(a, sp.csr_matrix((np.append(a.X.data, 0), np.append(a.X.indices, 3), np.append(a.X.indptr[:-1], a.X.nnz + 1)), a.shape)),
    "X None, counts in a layer": as_layer,
    "scaled X, counts in raw": as_raw,
    "symbols in a column, Ensembl ids as names": lambda a: ensembl(with_column(a)),
}


def with_column(a):
    a.var["feature_name"] = pd.Categorical(a.var_names)
    return a


@pytest.mark.parametrize("case", ODD)
def test_every_way_to_hold_the_same_counts(case, cli, bundle_dir, other_cells, plain, tmp_path):
    ODD[case](other_cells.copy()).write_h5ad(tmp_path / "cells.h5ad")
    table, _ = annotated(cli, bundle_dir, tmp_path / "cells.h5ad", tmp_path / "out.csv")
    assert list(table.cell_id) == list(other_cells.obs_names)
    assert list(table.cell_type) == list(plain.label)
    assert np.abs(table.confidence - plain.confidence).max() < 1e-4


@pytest.mark.parametrize("kind", ["float16", "bool"])
def test_narrow_numbers(kind, cli, bundle_dir, classifier, other_cells, tmp_path):
    "Half precision and yes/no keep less of the counts; the rest is read as it is."
    a = other_cells.copy()
    a.X = a.X.toarray().astype(kind)
    a.write_h5ad(tmp_path / "cells.h5ad")
    table, _ = annotated(cli, bundle_dir, tmp_path / "cells.h5ad", tmp_path / "out.csv")
    want = classifier.predictor.predict(with_X(a.copy(), sp.csr_matrix(a.X.astype(np.float32))))
    assert list(table.cell_type) == list(want.label)
    assert np.abs(table.confidence - want.confidence).max() < 1e-4


def test_duplicate_gene_names_are_added_up_and_counted(cli, bundle_dir, other_cells, plain, tmp_path):
    empty = other_cells[:, ["INS", "GCG", "SST"]].copy()
    empty.X = sp.csr_matrix(empty.shape, dtype=np.float32)
    names = [*other_cells.var_names, *empty.var_names]
    both = ad.AnnData(sp.hstack([other_cells.X, empty.X]).tocsr(), obs=other_cells.obs)
    both.var_names = names
    both.write_h5ad(tmp_path / "cells.h5ad")
    table, said = annotated(cli, bundle_dir, tmp_path / "cells.h5ad", tmp_path / "out.csv")
    assert list(table.cell_type) == list(plain.label)
    alone = align_cells(other_cells, Base.load("mini").genes).report["duplicated_genes"]  # two old names of SEPTIN4
    assert re.search(rf"^note: {3 + alone} genes stand in several columns", said, re.M)
    assert all(line.startswith("note: ") for line in said.splitlines()), said


def test_duplicate_cell_names_are_kept_and_counted(cli, bundle_dir, other_cells, plain, tmp_path):
    a = other_cells.copy()
    a.obs_names = [f"cell{i // 2}" for i in range(a.n_obs)]
    a.write_h5ad(tmp_path / "cells.h5ad")
    for out in ("out.csv", "out.h5ad"):
        ended = cli("annotate", bundle_dir, tmp_path / "cells.h5ad", "--out", tmp_path / out)
        assert ended.code == 0
        assert re.search(r"^note: .*cell names", ended.err, re.M)
        assert all(line.startswith("note: ") for line in ended.err.splitlines()), ended.err
    table = pd.read_csv(tmp_path / "out.csv")
    assert list(table.cell_id) == list(a.obs_names) and list(table.cell_type) == list(plain.label)


def test_one_cell_is_enough_to_annotate(cli, bundle_dir, other_cells, plain, tmp_path):
    other_cells[:1].copy().write_h5ad(tmp_path / "cells.h5ad")
    table, _ = annotated(cli, bundle_dir, tmp_path / "cells.h5ad", tmp_path / "out.csv")
    assert list(table.cell_type) == list(plain.label[:1])


def test_cells_without_counts_are_unassigned(cli, bundle_dir, other_cells, tmp_path):
    a = other_cells.copy()
    a.X = sp.csr_matrix(sp.diags((np.arange(a.n_obs) >= 5).astype(np.float32)) @ a.X)
    a.write_h5ad(tmp_path / "cells.h5ad")
    table, said = annotated(cli, bundle_dir, tmp_path / "cells.h5ad", tmp_path / "out.csv")
    assert table.unassigned[:5].all() and (table.reason[:5] == "no counts in the model's genes").all()
    assert re.search("note: 5 cells have no counts", said)


NAMES = {
    "Greek, Chinese, emoji": ["β-cell", "α细胞", "🧬"], "commas, quotes, semicolons": ['a, "b"', "c;d:0.5", "'e'\\f"],
    "spaces around": [" beta ", "al pha", "delta\t"], "what looks like numbers": ["1", "1.0", "01"], "what looks like nothing": ["NA", "null", "none?"],
}


@pytest.mark.parametrize("case", NAMES)
def test_labels_and_names_of_every_spelling(case, cli, baron_cells, tmp_path):
    "Taught, saved, and given back as they were (blanks at the ends apart)."
    a, names = baron_cells[baron_cells.obs.cell_type.isin(["alpha", "beta", "delta"])].copy(), NAMES[case]
    a.obs["Zelltyp ü"] = a.obs.cell_type.map(dict(zip(["alpha", "beta", "delta"], names))).astype(str).to_numpy()
    a.obs_names = [f"{names[i % 3].strip()}-{i}" for i in range(a.n_obs)]
    path, bundle = tmp_path / "Zellen 细胞.h5ad", tmp_path / "Bündel α"
    a.write_h5ad(path)
    ended = cli("tune", path, "--label", "Zelltyp ü", "--out", bundle, "--epochs", 1, "--set", "steps=0", "--no-baselines", "--title", names[0])
    assert ended.code == 0, ended.err
    cli("annotate", bundle, path, "--out", tmp_path / "out.h5ad")
    b = ad.read_h5ad(tmp_path / "out.h5ad")
    assert list(b.obs_names) == list(a.obs_names)
    assert set(b.obs.scimlora_label.cat.categories) == {n.strip() for n in names}
    assert (b.obs.scimlora_label.astype(str) == a.obs["Zelltyp ü"].str.strip()).mean() > 0.9
    assert cli("annotate", bundle, path, "--out", tmp_path / "out.csv").code == 0
    table = pd.read_csv(tmp_path / "out.csv", dtype=str, keep_default_na=False)
    assert list(table.cell_id) == list(a.obs_names)
    assert list(table.cell_type) == list(b.obs.scimlora_label.astype(str))


LABEL_TYPES = {
    "int": (pd.Series([0, 1, 2]), ["0", "1", "2"]),
    "float": (pd.Series([0.5, 1.5, 2.5]), ["0.5", "1.5", "2.5"]),
    "bool": (pd.Series([True, False, True]), ["False", "True"]),
    "category with unused levels": (pd.Series(pd.Categorical(["x", "y", "z"], categories=["unused", "z", "y", "x"])), ["x", "y", "z"]),
    "category of ints": (pd.Series(pd.Categorical([3, 1, 2], categories=[1, 2, 3, 4])), ["1", "2", "3"]),
    "nullable string": (pd.Series(["x", "y", "z"], dtype="string"), ["x", "y", "z"]),
    "nullable int": (pd.Series([5, 6, 7], dtype="Int64"), ["5", "6", "7"]),
}


@pytest.mark.parametrize("case", LABEL_TYPES)
def test_labels_of_every_type(case, cli, baron_cells, tmp_path):
    values, classes = LABEL_TYPES[case]
    a = baron_cells[baron_cells.obs.cell_type.isin(["alpha", "beta", "delta"])].copy()
    codes = a.obs.cell_type.map({"alpha": 0, "beta": 1, "delta": 2}).astype(int).to_numpy()
    a.obs["type"] = values.iloc[codes].set_axis(a.obs_names)
    with ad.settings.override(allow_write_nullable_strings=True): a.write_h5ad(tmp_path / "cells.h5ad")
    ended = cli("tune", tmp_path / "cells.h5ad", "--label", "type", "--out", tmp_path / "b", "--epochs", 1, "--set", "steps=0", "--no-baselines")
    assert ended.code == 0, ended.err
    assert (tmp_path / "b" / "label_classes.txt").read_text(encoding="utf-8").split() == classes
    table, _ = annotated(cli, tmp_path / "b", tmp_path / "cells.h5ad", tmp_path / "out.csv")
    assert (table.cell_type.astype(str) == a.obs["type"].astype(str).to_numpy()).mean() > 0.9


def test_some_labels_missing(cli, baron_cells, tmp_path):
    "Those cells are left out, and that is said."
    a = relabel(lambda i, t: None if i % 10 == 0 else "  " if i % 10 == 1 else t)(baron_cells.copy())
    a.write_h5ad(tmp_path / "cells.h5ad")
    ended = cli("tune", tmp_path / "cells.h5ad", "--label", "cell_type", "--out", tmp_path / "b", "--epochs", 1, "--set", "steps=0", "--no-baselines")
    assert ended.code == 0 and "note: 30 cells without a label were left out" in ended.err
    counts = read_json(tmp_path / "b" / "manifest.json")["training"]
    assert counts["cells"] == 120
    assert (tmp_path / "b" / "label_classes.txt").read_text().split() == ["acinar", "alpha", "beta", "delta", "ductal", "gamma"]


def test_columns_with_strange_names(cli, bundle_dir, other_cells, plain, tmp_path):
    a = other_cells.copy()
    for name in ("ü ñ", "label", "a.b", "scimlora_label", "index", "0", "SELECT *", "cell_type "): a.obs[name] = "x"
    a.obs["scimlora_confidence"] = "old"
    a.write_h5ad(tmp_path / "cells.h5ad")
    ended = cli("annotate", bundle_dir, tmp_path / "cells.h5ad", "--out", tmp_path / "out.h5ad")
    assert ended.code == 0, ended.err
    b = ad.read_h5ad(tmp_path / "out.h5ad")
    assert list(b.obs.scimlora_label.astype(str)) == list(plain.label)
    assert b.obs.scimlora_confidence.dtype.kind == "f"
    assert (b.obs["ü ñ"] == "x").all()


def test_annotating_what_was_annotated(cli, bundle_dir, cells_file, tmp_path):
    "The second pass replaces the first, also onto the same file."
    path = tmp_path / "cells.h5ad"
    shutil.copy(cells_file, path)
    assert cli("annotate", bundle_dir, path, "--out", path).code == 0
    once = ad.read_h5ad(path)
    assert cli("annotate", bundle_dir, path, "--out", path).code == 0
    twice = ad.read_h5ad(path)
    pd.testing.assert_frame_equal(once.obs, twice.obs)
    assert list(tmp_path.iterdir()) == [path]


# A handful in a real process ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["no label", "NaN", "another base"])
def test_in_a_process_of_its_own(case, cli_process, few, few_file, bundle_dir, other_base, folder, tmp_path):
    "What a shell sees: the code, one line, and nothing from the libraries below."
    with_value(few.copy(), np.nan).write_h5ad(tmp_path / "nan.h5ad")
    args, words = {
        "no label": (["tune", few_file, "--label", "x", "--out", folder / "b"], ["label column 'x'"]),
        "NaN": (["annotate", bundle_dir, tmp_path / "nan.h5ad", "--out", folder / "o.h5ad"], ["NaN"]),
        "another base": (["annotate", bundle_dir, few_file, "--base", other_base, "--out", folder / "o.csv"], ["encoder.ckpt differs"]),
    }[case]
    one_line(cli_process(*args), *words)
    assert tree(folder) == {}


def test_doctor_says_what_is_wrong_and_ends_with_2(cli, other_cells, tmp_path):
    "Its report is its output; there is no second line elsewhere."
    with_value(other_cells.copy(), np.nan).write_h5ad(tmp_path / "nan.h5ad")
    ended = cli("doctor", tmp_path / "nan.h5ad")
    assert ended.code == 2 and ended.err == ""
    assert "NaN" in ended.out and ended.out.splitlines()[-1].endswith("cannot be used as it is")
    ended = cli("doctor", "--json", tmp_path / "nan.h5ad")
    assert ended.code == 2 and ended.err == ""
    found = json.loads(ended.out)
    assert found["ok"] is False and "NaN" in found["error"]


@pytest.mark.parametrize("case", FILES)
def test_doctor_on_files_that_are_no_cells(case, cli, tmp_path):
    make, words = FILES[case]
    make(tmp_path / "cells.h5ad")
    one_line(cli("doctor", tmp_path / "cells.h5ad"), "cells.h5ad", *words)


def test_a_report_of_an_incomplete_run(cli, folder):
    one_line(cli("report", folder), "metrics.json", "scimlora evaluate")
    (folder / "metrics.json").write_text("{}", encoding="utf-8")
    one_line(cli("report", folder), "errors.json", "scimlora errors")
    assert list(tree(folder)) == ["metrics.json"]
