"""Gene names on the installed package: what real files call genes, what must stay out, and what a match must always hold."""
import gzip
import hashlib
import json
import subprocess
import sys
import time
import timeit
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest

from scimlora import genes
from scimlora.genes import KINDS, current_symbols, gene_names, identify, match_genes, place_genes

ASSETS = files("scimlora") / "assets"
MINI = (ASSETS / "mini" / "gene_order.tsv").read_text().split()


def placed(names, order):
    "The model's gene for each name, or None."
    return [order[j] if j >= 0 else None for j in place_genes(names, order)]


# The table -------------------------------------------------------------------------------------------------------------

def test_the_table_is_the_recorded_one_with_source_version_and_licence():
    folder = ASSETS / "genes"
    recorded, packed = json.loads((folder / "sources.json").read_text()), (folder / "genes.tsv.gz").read_bytes()
    assert hashlib.sha256(gzip.decompress(packed)).hexdigest() == recorded["sha256"]
    assert all(s["package"] and s["version"] and s["package_licence"] and s["table_licence"] for s in recorded["sources"])
    assert sum(len(f.read_bytes()) for f in folder.iterdir()) < 2 << 20


def test_the_table_names_every_gene_once():
    t = gene_names()
    assert len(t.symbols) == len(set(t.symbols)) == len(t.current) == len(t.ids) > 50_000
    assert all(0 <= g < len(t.symbols) for by in (t.ensembl, t.ncbi, t.hgnc) for g in by.values())
    assert len(t.ensembl) == sum(len(ids.split()) for ids in t.ids)


@pytest.mark.parametrize(("name", "symbol"), [
    ("ENSG00000254647", "INS"), ("ENSG00000254647.7", "INS"), ("ensg00000254647", "INS"), ("INS|ENSG00000254647", "INS"),
    ("ENSG00000254647_INS", "INS"), ("ENSG00000198223.19_PAR_Y", "CSF2RA"), ("C10orf10", "DEPP1"), ("C10ORF10", "DEPP1"),
    ("FAM26F", "CALHM6"), ("MARCH1", "MARCHF1"), ("SEPT2", "SEPTIN2"), ("SEP15", "SELENOF"), ("ATP5B", "ATP5F1B"), ("AARS", "AARS1"),
    ("MLL2", "KMT2D"), ("LOC3630", "INS"), ("HGNC:6081", "INS"), ("HLA.DRA", "HLA-DRA"), ("NKX2.1", "NKX2-1"), ("PD-L1", "CD274"),
    ("3-Mar", "MARCHF3"), ("Mar-03", "MARCHF3"), ("03-Mar", "MARCHF3"), ("2-SEP", "SEPTIN2"), ("15-Sep", "SELENOF"),
    ("1-Dec", "DELEC1"), ("41338", "MARCHF5")])
def test_a_name_that_means_one_gene(name, symbol):
    t = gene_names()
    assert [t.symbols[g] for g in identify(name)[1]] == [symbol]
    assert current_symbols([name]) == [symbol]


@pytest.mark.parametrize("name", ["FOO1", "", "nan", "0", "7157", "31-Mar", "12-Mar", "16-Sep",
                                  "ENSG00000000000", "ENST00000381330", "chr1:100-200"])
def test_a_name_that_means_none(name):
    assert current_symbols([name, "INS"]) == [name, "INS"] and placed([name, "INS"], MINI) == [None, "INS"]


# From a file to a model ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "gene"), [
    ("INS", "INS"), (" INS", "INS"), ("INS\t", "INS"), ("\ufeffINS", "INS"), ("INS\u00a0", "INS"), ("ins", "INS"), ("GRCh38_INS", "INS"),
    ("hg19_INS", "INS"), ("GRCh38______INS", "INS"), ("GRCh38_ENSG00000254647", "INS"), ("INS__chr11", "INS"), ("DEPP1", "C10orf10"),
    ("ENSG00000165507", "C10orf10"), ("MARCH1", "MARCHF1"), ("ENSG00000145416.9", "MARCHF1"), ("2-Sep", "SEPT2"), ("SEPTIN2", "SEPT2"),
    ("hla.dra", "HLA-DRA"), ("mm10_Ins1", None), ("mm10___INS", None), ("GRCm38_Ins2", None), ("ENSMUSG00000035804", None),
    ("1-Mar", None), ("INS.1", None), ("INS-IGF2", None), ("ERCC-00002", None), ("no_feature", None), ("N_unmapped", None)])
def test_one_name_finds_its_column_or_none(name, gene):
    assert placed([name], ["INS", "C10orf10", "MARCHF1", "MARC1", "SEPT2", "HLA-DRA"]) == [gene]


@pytest.mark.parametrize(("names", "order", "to"), [
    (["INS", "ins"], ["INS"], ["INS", None]),                                    # the exact name beside another case
    (["Ins", "ins"], ["INS"], [None, None]),                                     # two cases, none exact
    (["MARCH1", "MARCHF1"], ["MARCHF1"], [None, "MARCHF1"]),                     # held under its own name
    (["MARCH1", "ENSG00000145416"], ["MARCHF1"], [None, "MARCHF1"]),             # or by its id
    (["MARCH1", "MARCHF1"], ["MARCH1"], ["MARCH1", None]),                       # or by the model's own word
    (["MARCH1", "MARCHF1"], ["MARCHF1", "MARCH1"], ["MARCH1", "MARCHF1"]),       # a model with both: by exact names
    (["ENSG00000145416"], ["MARCHF1", "MARCH1"], ["MARCHF1"]),
    (["CSF2RA", "ENSG00000292357"], ["CSF2RA"], ["CSF2RA", "CSF2RA"]),           # two loci of one symbol
    (["TBCE", "TBCE-1", "TBCE.2"], ["TBCE"], ["TBCE"] * 3),                      # made unique
    (["c10orf10", "c10orf10-1"], ["DEPP1"], ["DEPP1"] * 2),
    (["NKX2", "NKX2-1"], ["NKX2", "NKX2-1"], ["NKX2", "NKX2-1"]),                # a symbol that only looks numbered
    (["MIR4482", "MIR4482-2"], ["MIR4482"], ["MIR4482", None]),
    (["MLL4"], ["KMT2B"], [None]),                                               # two genes' name, though the model has one of them
    (["MLL4", "KMT2D"], ["KMT2B"], ["KMT2B", None]),                             # settled by what else is in the file
    (["1-Mar", "MARCHF1"], ["MARCHF1", "MTARC1"], ["MTARC1", "MARCHF1"]),
    (["B7-H", "PD-L1"], ["CD274"], [None, None])])                               # two names for one gene
def test_what_a_name_means_depends_on_its_neighbours_but_not_on_their_order(names, order, to):
    assert placed(names, order) == to
    assert placed(names[::-1], order) == to[::-1]


def test_a_model_with_ensembl_ids_is_met_by_symbols_and_by_other_versions():
    order = ["ENSG00000254647.5", "ENSG00000145416", "ENSG00000999999"]
    assert placed(["INS", "MARCH1", "ENSG00000999999.2"], order) == order
    assert placed(["ENSG00000254647.7", "ENSG00000145416.1"], order) == order[:2]


def test_bare_numbers_are_dates_only_where_there_are_few():
    assert placed(["41338", "INS"], ["MARCHF5"]) == ["MARCHF5", None]
    assert place_genes([str(i) for i in range(41300, 41400)], ["MARCHF5"]).max() == -1      # positions, or NCBI ids


@pytest.mark.parametrize("kind", [list, tuple, np.array, pd.Index, pd.Series, lambda x: np.array(x, object),
                                  lambda x: pd.Index(x, dtype="category")])
def test_names_come_in_any_container(kind):
    assert place_genes(kind(["DEPP1", "INS"]), ["INS", "C10orf10"]).tolist() == [1, 0]


def test_no_names_and_no_genes():
    assert place_genes([], MINI).tolist() == [] and place_genes(["INS"], []).tolist() == [-1]
    m = match_genes([], ["INS"])
    assert m.matrix.shape == (0, 1) and m.missing == ["INS"] and m.kinds == {} and m.coverage == 0


# What always holds -----------------------------------------------------------------------------------------------------

def some_names(rng, n=400):
    "Names of all sorts, for the same few hundred genes."
    t = gene_names()
    genes = rng.choice(len(t.symbols), 150, replace=False)
    forms = ("mm10_{}", " {}", "GRCh38_{}", "{}-1", "{}")
    of = {int(g): [*(f.format(t.symbols[g]) for f in forms), *(f"ENSG{int(i):011d}.3" for i in t.ids[g].split())] for g in genes}
    for by in (t.previous, t.alias):
        for name, meant in by.items():
            for g in meant:
                if g in of: of[g].append(name)
    names = [n for several in of.values() for n in several] + ["no_feature", "ERCC-00002", "FOO1", "1-Mar", "2-Sep"]
    names += [t.symbols[g].lower() for g in of]
    order = [several[4] if rng.random() < 0.6 else several[-1] for several in of.values()]
    return list(rng.choice(names, n)), list(dict.fromkeys(order))


@pytest.mark.parametrize("seed", range(20))
def test_every_column_is_accounted_for_and_order_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    names, order = some_names(rng)
    m, to = match_genes(names, order), place_genes(names, order)
    lists = m.unmatched + m.not_genes + m.ambiguous + m.other_species
    assert sum(m.kinds.values()) + len(lists) == len(names) and set(m.kinds) <= set(KINDS)
    assert m.matrix.sum() == sum(m.kinds.values()) == (to >= 0).sum()
    assert m.n_matched == len(set(to[to >= 0])) and all(to[i] == order.index(n) for i, n in enumerate(names) if n in order)
    shuffle, again = rng.permutation(len(names)), rng.permutation(len(order))
    assert (place_genes([names[i] for i in shuffle], order) == to[shuffle]).all()
    other = place_genes(names, [order[j] for j in again])
    assert (np.where(other < 0, -1, again[other]) == to).all()
    assert (place_genes(names * 2, order) == np.tile(to, 2)).all()


@pytest.mark.parametrize("old", ["pbmc_kang2018_ctrl", "pancreas_baron_h1", "brain_pollen2014"])
def test_a_real_file_loses_no_gene_that_exact_names_find(old, shared):
    names = list(shared(old).var_names)
    to, place = place_genes(names, MINI), {g: j for j, g in enumerate(MINI)}
    assert all(to[i] == place[g] for i, g in enumerate(names) if g in place and not g.startswith("Spike"))
    assert (to >= 0).sum() > len(set(names) & set(place))


# Cost ------------------------------------------------------------------------------------------------------------------

def test_exact_names_do_not_read_the_table():
    code = "from scimlora.genes import *; place_genes(['INS', 'GCG'], ['GCG', 'INS']); print(gene_names.cache_info().currsize)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "0\n"


def test_a_cell_of_five_genes_takes_less_than_five_milliseconds():
    cell = ["DEPP1", "INS", "ENSG00000145416", "FOO1", "PD-L1"]
    place_genes(cell, MINI)
    assert min(timeit.repeat(lambda: place_genes(cell, MINI), timer=time.process_time, number=1, repeat=30)) < 5e-3


def test_names_that_no_column_can_stand_for_leave_nothing_to_settle(monkeypatch):
    "Then a cell with an unknown name costs hardly more than one without; where a column could be meant, all names are weighed."
    order = ["INS", "GCG", "CD274"]
    assert place_genes(["PD-L1"], order).tolist() == [2]
    monkeypatch.setattr(genes, "settle", lambda names: pytest.fail("names were settled"))
    assert place_genes(["GCG", "FOO1", "INS", "ENSG99999999999", "MS4A1"], order).tolist() == [1, -1, 0, -1, -1]
    with pytest.raises(pytest.fail.Exception): place_genes(["GCG", "PD-L1"], order)


def test_the_table_is_read_in_less_than_half_a_second():
    assert min(timeit.repeat(gene_names.__wrapped__, timer=time.process_time, number=1, repeat=3)) < 0.5
