"""One set of cells in every format and naming gives one answer, and files larger than memory are no other files."""
import gzip
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from scimlora import InputError, files
from scimlora.core import ScimloraError
from scimlora.data import Alignment, align_cells
from scimlora.files import open_cells, read_cells
from scimlora.genes import gene_names, identify
from scimlora.predict import Predictor, annotate_file
from scimlora.rows import CsrWriter, h5_for_writing
from scimlora.splits import prepare_files

# One set of cells, seven formats, two namings -------------------------------------------------------------------------


def with_ids(cells):
    "The cells restricted to genes that have exactly one Ensembl id and one name here, and those ids."
    t, ids = gene_names(), {}
    for name in cells.var_names:
        kind, genes = identify(name)
        if kind == "symbol" and len(found := t.ids[genes[0]].split()) == 1: ids[name] = f"ENSG{int(found[0]):011d}"
    assert len(ids) > 0.8 * cells.n_vars
    return cells[:, list(ids)].copy(), list(ids.values())


def write_10x_h5(cells, path):
    T = cells.X.T.tocsc()
    with h5py.File(path, "w") as f:
        for k, v in dict(data=T.data.astype("i4"), indices=T.indices, indptr=T.indptr, shape=T.shape, barcodes=list(cells.obs_names)).items(): f[f"matrix/{k}"] = v
        for k, v in dict(id=list(cells.var_names), name=list(cells.var_names), feature_type=["Gene Expression"] * cells.n_vars).items(): f[f"matrix/features/{k}"] = v


def write_10x_folder(cells, path):
    path.mkdir()
    with gzip.open(path / "matrix.mtx.gz", "wb") as f: scipy.io.mmwrite(f, cells.X.T.astype(int))
    pd.DataFrame({0: cells.var_names, 1: cells.var_names, 2: "Gene Expression"}).to_csv(path / "features.tsv.gz", sep="\t", header=False, index=False)
    pd.Series(cells.obs_names).to_csv(path / "barcodes.tsv.gz", header=False, index=False)


def write_loom(cells, path):
    with h5py.File(path, "w") as f:
        f["matrix"], f["row_attrs/Gene"], f["col_attrs/CellID"] = cells.X.T.toarray(), list(cells.var_names), list(cells.obs_names)


def write_by_gene(cells, path):
    cells = cells.copy()
    cells.X = cells.X.tocsc()
    cells.write_h5ad(path)


WRITERS = {"cells.h5ad": lambda c, p: c.write_h5ad(p), "by_gene.h5ad": write_by_gene, "cells.zarr": lambda c, p: c.write_zarr(p), "cells.h5": write_10x_h5,
           "cellranger": write_10x_folder, "cells.loom": write_loom, "cells.csv": lambda c, p: c.to_df().to_csv(p), "genes.tsv.gz": lambda c, p: c.to_df().T.to_csv(p, sep="\t")}


@pytest.fixture(scope="module")
def predictor(bundle_dir): return Predictor(bundle_dir)


@pytest.fixture(scope="module")
def namings(other_cells):
    "The same cells named by symbols, by Ensembl ids, and by ids with versions."
    symbols, ids = with_ids(other_cells)
    named = {"symbols": symbols, "ids": symbols.copy(), "versions": symbols.copy()}
    named["ids"].var_names, named["versions"].var_names = ids, [f"{g}.{3 + i % 9}" for i, g in enumerate(ids)]
    return named


@pytest.fixture(scope="module")
def answer(namings, predictor, tmp_path_factory):
    path = tmp_path_factory.mktemp("answer") / "cells.h5ad"
    namings["symbols"].write_h5ad(path)
    return annotate_file(predictor, path, path.with_suffix(".csv")).table


@pytest.mark.parametrize("naming", ["symbols", "ids", "versions"])
@pytest.mark.parametrize("name", WRITERS)
def test_format_and_naming_do_not_matter(namings, answer, predictor, tmp_path, name, naming):
    WRITERS[name](namings[naming], tmp_path / name)
    done = annotate_file(predictor, tmp_path / name, tmp_path / "out.csv")
    pd.testing.assert_frame_equal(done.table, answer)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out.csv", keep_default_na=False, dtype={"cell_id": str}), answer, check_dtype=False)


@pytest.mark.parametrize("name", WRITERS)
def test_an_h5ad_comes_out_of_every_format(namings, answer, predictor, tmp_path, name):
    WRITERS[name](namings["symbols"], tmp_path / name)
    annotate_file(predictor, tmp_path / name, tmp_path / "out.h5ad")
    a = ad.read_h5ad(tmp_path / "out.h5ad")
    assert list(a.obs.scimlora_label) == list(answer.cell_type) and (sp.csr_matrix(a.X) != namings["symbols"].X).nnz == 0


# A chunk at a time ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch):
    "Files are read 37 cells at a time."
    monkeypatch.setattr(files.CellFile, "chunks", lambda self, where, values=0: [slice(a, min(a + 37, self.n_obs)) for a in range(0, self.n_obs, 37)])


def test_chunks_change_nothing(small_chunks, other_cells, predictor, cells_file, tmp_path):
    done = annotate_file(predictor, cells_file, tmp_path / "out.h5ad")
    a, whole = ad.read_h5ad(tmp_path / "out.h5ad"), predictor.predict(other_cells)
    assert list(done.table.cell_type) == list(whole.label) and np.allclose(a.obsm["X_scimlora"], whole.embedding, atol=1e-6)
    with open_cells(cells_file) as f: aligned = align_cells(f, predictor.genes)
    assert (aligned.X != align_cells(other_cells, predictor.genes).X).nnz == 0 and aligned.report == align_cells(other_cells, predictor.genes).report


def test_what_else_is_in_the_file_stays(other_cells, predictor, tmp_path):
    a = other_cells.copy()
    a.layers["spliced"], a.obsm["X_pca"], a.uns["note"] = a.X * 2, np.ones((a.n_obs, 3)), {"by": "somebody"}
    a.raw = a.copy()
    a.obsp["near"] = sp.identity(a.n_obs, format="csr")
    a.write_h5ad(tmp_path / "in.h5ad")
    annotate_file(predictor, tmp_path / "in.h5ad", tmp_path / "out.h5ad")
    annotate_file(predictor, tmp_path / "out.h5ad", tmp_path / "out.h5ad")  # again, and onto itself
    b = ad.read_h5ad(tmp_path / "out.h5ad")
    assert list(b.obs.columns) == [*a.obs.columns, *(f"scimlora_{c}" for c in ("label", "confidence", "unassigned", "reason", "top3"))]
    assert (b.layers["spliced"] != a.layers["spliced"]).nnz == 0 and b.obsm["X_pca"].shape == (a.n_obs, 3) and b.uns["note"]["by"] == "somebody"
    assert (b.raw.X != a.raw.X).nnz == 0 and (b.obsp["near"] != a.obsp["near"]).nnz == 0
    assert {p.name for p in tmp_path.iterdir()} == {"in.h5ad", "out.h5ad"}


def spoil(path, value, last=1):
    "Put a value into the last cells of a file."
    with h5py.File(path, "r+") as f: f["X/data"][-last:] = value


@pytest.mark.parametrize("value, says", [(np.nan, "NaN or infinite values in 1 cells"), (-3, "negative values")])
@pytest.mark.parametrize("out", ["out.csv", "out.h5ad"])
def test_a_bad_value_far_into_the_file_ends_it_with_nothing_written(small_chunks, monkeypatch, other_cells, predictor, tmp_path, value, says, out):
    monkeypatch.setattr("scimlora.data.spread", lambda n: [slice(0, 10)])
    other_cells.write_h5ad(tmp_path / "in.h5ad")
    spoil(tmp_path / "in.h5ad", value)
    with pytest.raises(InputError, match=f"cells 112 to 120.*{says}"): annotate_file(predictor, tmp_path / "in.h5ad", tmp_path / out)
    assert [p.name for p in tmp_path.iterdir()] == ["in.h5ad"]
    with pytest.raises(InputError, match=says): prepare_files([tmp_path / "in.h5ad"], predictor.genes, "cell_type", out=tmp_path / "p")
    assert not list((tmp_path / "p").glob("*.h5ad"))


def test_a_matrix_by_gene_is_turned_over_once(monkeypatch, other_cells, predictor, answer, namings, tmp_path):
    monkeypatch.setenv("SCIMLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_IN_MEMORY", 100)
    monkeypatch.setattr("scimlora.rows._PILE", 5000)
    write_by_gene(namings["symbols"], tmp_path / "in.h5ad")
    done = annotate_file(predictor, tmp_path / "in.h5ad", tmp_path / "out.csv")
    pd.testing.assert_frame_equal(done.table, answer)
    kept, = (tmp_path / "cache" / "by_cell").iterdir()
    assert any("stored by gene" in n and str(kept) in n for n in done.notes)
    made = kept.stat().st_mtime_ns
    annotate_file(predictor, tmp_path / "in.h5ad", tmp_path / "out.csv")
    assert [p.stat().st_mtime_ns for p in kept.parent.iterdir()] == [made]


@pytest.mark.parametrize("damage", ["indices", "indptr"])
def test_a_damaged_matrix_by_gene_is_told(monkeypatch, other_cells, tmp_path, damage):
    monkeypatch.setattr(files, "_IN_MEMORY", 100)
    monkeypatch.setenv("SCIMLORA_CACHE", str(tmp_path / "cache"))
    write_by_gene(other_cells, tmp_path / "in.h5ad")
    with h5py.File(tmp_path / "in.h5ad", "r+") as f: f["X"][damage][5] = 10**6
    with pytest.raises(InputError, match="damaged"):
        with open_cells(tmp_path / "in.h5ad"): pass
    assert not list((tmp_path / "cache").rglob("*.h5"))


def test_a_full_disk_is_told(other_cells, predictor, cells_file, cli_fork, bundle_dir, tmp_path):
    e = cli_fork("annotate", bundle_dir, cells_file, "--out", tmp_path / "out.h5ad", file_limit=cells_file.stat().st_size + 10_000)
    assert e.code == 1 and "disk full" in e.err and not list(tmp_path.iterdir())


def test_writing_that_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "a.h5").write_text("old")
    with pytest.raises(ScimloraError):
        with h5_for_writing(tmp_path / "a.h5") as f:
            f["x"] = 1
            raise ScimloraError("stop")
    assert (tmp_path / "a.h5").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


# Prepare --------------------------------------------------------------------------------------------------------------


def test_prepare_in_chunks_is_prepare_at_once(small_chunks, monkeypatch, baron_cells, predictor, tmp_path):
    baron_cells.write_h5ad(tmp_path / "in.h5ad")
    prepare = lambda out: prepare_files([tmp_path / "in.h5ad"], predictor.genes, "cell_type", "library", tmp_path / out, max_per_class=12)
    chunked = prepare("chunked")
    monkeypatch.undo()
    assert prepare("whole") == chunked
    for side in ("train", "val", "test"):
        a, b = (ad.read_h5ad(tmp_path / k / f"{side}.h5ad") for k in ("chunked", "whole"))
        assert (a.X != b.X).nnz == 0 and a.obs.equals(b.obs) and list(a.var_names) == predictor.genes
        m = Alignment(baron_cells[a.obs_names].copy(), predictor.genes)
        assert abs(m.linear(slice(0, a.n_obs)) - a.X).max() == 0


def test_a_side_of_an_earlier_split_does_not_stay(baron_cells, predictor, tmp_path):
    baron_cells.write_h5ad(tmp_path / "in.h5ad")
    for sizes, there in (((0.6, 0.2, 0.2), ["test", "train", "val"]), ((0.7, 0, 0.3), ["test", "train"])):
        prepare_files([tmp_path / "in.h5ad"], predictor.genes, "cell_type", "library", tmp_path / "out", sizes)
        assert sorted(p.stem for p in (tmp_path / "out").glob("*.h5ad")) == there


def test_identical_cells_on_both_sides_are_counted(baron_cells, predictor, cli, tmp_path):
    twice = ad.concat([baron_cells, baron_cells])
    twice.obs_names_make_unique()
    twice.obs["library"] = ["a"] * baron_cells.n_obs + ["b"] * baron_cells.n_obs
    twice.write_h5ad(tmp_path / "in.h5ad")
    info = prepare_files([tmp_path / "in.h5ad"], predictor.genes, "cell_type", "library", tmp_path / "out", (0.5, 0, 0.5))
    assert info["leaks"] == {"donors": [], "identical_cells": baron_cells.n_obs}
    e = cli("prepare", tmp_path / "in.h5ad", "--label", "cell_type", "--donor", "library", "--out", tmp_path / "out", "--test", "0.5")
    assert e.code == 0 and "identical to training cells" in e.err


def test_labels_are_merged_and_files_held_out(baron_cells, other_cells, cli, tmp_path):
    for i, c in enumerate((baron_cells, other_cells)): c.write_h5ad(tmp_path / f"study{i}.h5ad")
    (tmp_path / "map.tsv").write_text("label\tbecomes\nalpha\tislet\nbeta\tislet\ngamma\t\nghost\tislet\n")
    e = cli("prepare", tmp_path / "study0.h5ad", tmp_path / "study1.h5ad", "--label", "cell_type", "--by", "study", "--map", tmp_path / "map.tsv",
            "--out", tmp_path / "out", "--test", "0.4")
    train, test = (ad.read_h5ad(tmp_path / "out" / f"{s}.h5ad") for s in ("train", "test"))
    assert e.code == 0 and "no cell has: ghost" in e.err and set(train.obs.cell_type) == {"acinar", "islet", "delta", "ductal"}
    assert set(train.obs.scimlora_file) == {"study0"} and set(test.obs.scimlora_file) == {"study1"}
    assert (train.obs.cell_type_in_file[train.obs.cell_type == "islet"].isin(["alpha", "beta"])).all() and "45 cells without a label" in e.err


@pytest.mark.parametrize("name, text, says", [("map.csv", "a,b,c\n1,2,3\n", "has 3 columns"), ("map.csv", "label,becomes\na,b\na,c\n", "'a' more than once"), ("map.csv", "", "no table"),
                                              ("map.json", "[1]", "no JSON object"), ("map.json", "{", "cannot be read as JSON"), ("none.csv", None, "no such file")])
def test_a_bad_mapping_is_told(baron_cells, cli, tmp_path, name, text, says):
    baron_cells.write_h5ad(tmp_path / "in.h5ad")
    if text is not None: (tmp_path / name).write_text(text)
    e = cli("prepare", tmp_path / "in.h5ad", "--label", "cell_type", "--map", tmp_path / name, "--out", tmp_path / "out")
    assert e.code == 2 and says in e.err and e.err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, says", [(["--by", "moon"], "choose one of donor, study, cell"), (["--by", "donor"], "name the column"),
                                           (["--by", "study"], "too few to hold whole ones out"), (["--by", "donor", "--donor", "cell_type_"], "no donor column")])
def test_a_split_that_cannot_be_is_told(baron_cells, cli, tmp_path, options, says):
    baron_cells.write_h5ad(tmp_path / "in.h5ad")
    e = cli("prepare", tmp_path / "in.h5ad", "--label", "cell_type", *options, "--out", tmp_path / "out")
    assert e.code == 2 and says in e.err and e.err.count("\n") == 1 and not (tmp_path / "out").exists()


# Memory ---------------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_file(predictor, bundle_dir, baron_cells, tmp_path):
    # 20 and 200 times the same 150 cells: 5 and 50 million values, 400 MB if they were all in memory at once.
    code = ("import resource, sys; from scimlora.predict import Predictor, annotate_file\n"
            "annotate_file(Predictor(sys.argv[1]), sys.argv[2], sys.argv[3])\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    peak = []
    for n in (40, 200):
        path = tmp_path / f"{n}.h5ad"
        with h5py.File(path, "w") as f:
            ad.io.write_elem(f, "/", ad.AnnData(obs=pd.DataFrame(index=[str(i) for i in range(n * 150)]), var=baron_cells.var))
            w = CsrWriter(f, "X", baron_cells.n_vars)
            for _ in range(n): w.append(baron_cells.X)
            w.close()
        said = subprocess.run([sys.executable, "-c", code, bundle_dir, path, tmp_path / "out.h5ad"], capture_output=True, text=True, check=True).stdout
        peak.append(int(said))
    assert read_cells(path).X.nnz > 3 * 8_000_000 and peak[1] - peak[0] < 120_000, peak  # kilobytes


def test_backed_anndata_is_read_too(cells_file, predictor, other_cells):
    assert (align_cells(ad.read_h5ad(Path(cells_file), backed="r"), predictor.genes).X != align_cells(other_cells, predictor.genes).X).nnz == 0


@pytest.mark.parametrize("n, a_cell, slices, largest", [(100, 1000, 1, 100), (2_048, 800, 1, 2_048), (4_999, 800, 4, 1_250), (20_000, 850, 10, 2_000), (20_000, 4_000, 16, 1_250),
                                                        (1_000_000, 850, 490, 2_041), (1_000, 100_000, 16, 63), (300_000, 2, 6, 50_000)])
def test_slices_hold_each_cell_once_and_are_of_one_size(n, a_cell, slices, largest):
    f = SimpleNamespace(n_obs=n, places={"X": SimpleNamespace(nnz=n * a_cell)})
    rows = files.CellFile.chunks(f, "X")
    sizes = [r.stop - r.start for r in rows]
    assert [r.start for r in rows] == [0, *(r.stop for r in rows[:-1])] and rows[-1].stop == n
    assert len(rows) == slices and max(sizes) == largest and max(sizes) - min(sizes) <= 1 and largest * a_cell <= 64 * 100_000
