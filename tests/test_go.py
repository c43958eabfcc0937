"""The Gene Ontology: files that are cut or damaged, the true path, the test, and the package's own cut."""
import gzip
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import fisher_exact, hypergeom

from scimlora import InputError
from scimlora.go import GeneOntology, Term, enrich, enrichment_text, load_go, open_go, read_gaf, read_obo
from scimlora.ontology import read_term_map

HEADER = "format-version: 1.2\ndata-version: releases/2019-01-27\ndefault-namespace: gene_ontology\nontology: go\n\n"
TYPEDEF = "[Typedef]\nid: part_of\nname: part of\nis_transitive: true\n\n"


def as_obo(terms):
    "Terms as the Gene Ontology writes them: by id, each closed by an empty line, relations last."
    lines = lambda t: [f"id: {t.id}", f"name: {t.name}", f"namespace: {t.namespace}", f'def: "{t.definition}" [GOC:go]', *(f'synonym: "{s}" EXACT []' for s in t.synonyms),
                       *(f"is_a: {p} ! parent" for p in t.parents[:1]), *(f"relationship: part_of {p}" for p in t.parents[1:])]
    return HEADER + "".join("[Term]\n" + "\n".join(lines(t)) + "\n\n" for t in sorted(terms, key=lambda t: t.id)) + TYPEDEF


@pytest.fixture(scope="module")
def real():
    "Terms around glycolysis, as a file: each with its ancestors among them, definitions cut to keep the file small."
    go, ids = load_go(), ("GO:0006091", "GO:0006096", "GO:0008150", "GO:0016052", "GO:0061621")
    above = lambda i: sorted(p for p in ids if p in go.up(i) and p not in (i, "GO:0008150")) or ["GO:0008150"] * (i != "GO:0008150")
    return as_obo([replace(go.terms[i], definition=go.terms[i].definition[:40], parents=above(i)) for i in ids])


def refused(read, path, raw, n):
    path.write_bytes(raw[:n])
    try: read(path)
    except InputError as e:
        assert "\n" not in str(e) and str(path) in str(e)
        return str(e)


def test_a_real_extract_is_refused_wherever_it_is_cut(tmp_path, real):
    raw = real.encode()
    passed = [n for n in range(len(raw)) if not refused(read_obo, tmp_path / "cut.obo", raw, n)]
    # What cannot be told: behind a whole stanza, before a relation is used, with all parents above.
    ends = {m.start() + 2 for m in re.finditer(rb"\n\n\[", raw)}
    assert set(passed) <= {n for n in ends if n <= raw.index(b"relationship:")}
    assert len(passed) < len(ends) and refused(read_obo, tmp_path / "cut.obo", raw, len(raw)) is None


def test_a_gzipped_obo_is_refused_wherever_it_is_cut(tmp_path, real):
    packed = gzip.compress(real.encode(), mtime=0)
    assert all(refused(read_obo, tmp_path / "cut.obo.gz", packed, n) for n in range(0, len(packed), 7))
    assert refused(read_obo, tmp_path / "cut.obo.gz", packed, len(packed)) is None


@pytest.mark.parametrize("old,new,says", [
    ("format-version", "version", "line 1: has no format-version"), ("is_a: GO:0008150", "is_a: GO:0000000", "which is not in the file"), ("name: glycolytic process\n", "", "has no name"),
    ("is_transitive: true", "transitive", "is no 'tag: value'"), ("id: part_of", "id: has_part", "uses the relation part_of"), ('def: "', "def: ", "no text between quotation marks"),
    ("id: GO:0008150", "id: GO:0006096", "stands there twice")])
def test_a_damaged_obo_says_what_and_where(tmp_path, real, old, new, says):
    assert old in real
    (tmp_path / "bad.obo").write_text(real.replace(old, new, 1))
    with pytest.raises(InputError, match=re.escape(says)): read_obo(tmp_path / "bad.obo")


def test_no_obo_at_all(tmp_path):
    for name, raw, says in (("a", b"", "is empty"), ("b", b"\x89PNG\r\n\x1a\n", "no UTF-8"), ("g", b"id,name\n", "no format-version"), ("c", b"format-version: 1.2\n\n", "has no terms"), ("d", b"format-version: \xff\n", "no UTF-8"),
                            ("e", b"x" * (2 << 20), "no text file"), ("f", gzip.compress(b"format-version: 1.2\n" * 9)[:-4] + b"abcd", "damaged")):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(InputError, match=says): read_obo(tmp_path / name)
    with pytest.raises(InputError, match="no such file"): read_obo(tmp_path / "nothing")
    with pytest.raises(InputError, match="cannot be read"): read_obo(tmp_path)


def test_a_loop_is_refused(tmp_path):
    a, b, c = (Term(f"GO:000000{i}", "x", "p", "d", [], [f"GO:000000{p}"]) for i, p in ((1, 2), (2, 3), (3, 1)))
    (tmp_path / "loop.obo").write_text(as_obo([a, b, c]))
    with pytest.raises(InputError, match="its own ancestor"): read_obo(tmp_path / "loop.obo")


def test_parents_of_another_ontology_are_counted(tmp_path):
    (tmp_path / "cl.obo").write_text(as_obo([Term("CL:0000000", "cell", "cell"), Term("CL:0000001", "primary", "cell", "d", [], ["CL:0000000", "UBERON:0000955"])]))
    o = read_obo(tmp_path / "cl.obo")
    assert o.terms["CL:0000001"].parents == ["CL:0000000"] and o.left_out == {"parents of other ontologies": 1}


def gaf(*rows):
    line = lambda symbol, term, evidence="IDA", qualifier="", taxon="taxon:9606": "\t".join(["UniProtKB", "P0", symbol, qualifier, term, "PMID:1", evidence, "", "P", "", "", "protein", taxon, "20190112", "X", "", ""]) + "\n"
    return "!gaf-version: 2.1\n!Generated: 2019-01-14\n" + "".join(line(*r) for r in rows)


def test_a_gaf_counts_what_it_leaves_out(tmp_path):
    text = gaf(("INS", "GO:0006096"), ("GCG", "GO:0006096", "IEA"), ("SST", "GO:0006096", "IDA", "NOT|involved_in"), ("Ins1", "GO:0006096", "IDA", "", "taxon:10090"), ("PPY", "GO:0006096", "ND"),
               ("ALB", "GO:0006096", "IDA", "", "taxon:9606|taxon:5833"))
    (tmp_path / "a.gaf.gz").write_bytes(gzip.compress(text.encode()))
    a = read_gaf(tmp_path / "a.gaf.gz")
    assert list(a.table.symbol) == ["INS", "ALB"] and a.left_out == {"evidence IEA": 1, "NOT": 1, "another species": 1, "evidence ND": 1} and a.lines == 6
    assert list(read_gaf(tmp_path / "a.gaf.gz", taxon="10090").table.symbol) == ["Ins1"] and len(read_gaf(tmp_path / "a.gaf.gz", without=()).table) == 4


def test_a_gaf_that_is_cut(tmp_path):
    raw = gaf(("INS", "GO:0006096"), ("GCG", "GO:0006096")).encode()
    lines = [m.end() for m in re.finditer(b"\n", raw)]
    assert {n for n in range(len(raw)) if not refused(read_gaf, tmp_path / "cut.gaf", raw, n)} == {lines[2]}  # at the end of a line nothing shows
    packed = gzip.compress(raw, mtime=0)
    assert all(refused(read_gaf, tmp_path / "cut.gaf.gz", packed, n) for n in range(len(packed)))


@pytest.mark.parametrize("old,new,says", [("!gaf-version: 2.1", "!gpa-version: 2.1", "no GAF 2 file"), ("!gaf-version: 2.1", "!gaf-version: 1.0", "no GAF 2 file"), ("\tX\t\t\n", "\n", "has 14 columns"),
                                          ("GO:0006096", "6096", "line 3: term"), ("IDA", "", "evidence code"), ("taxon:9606", "9606", "taxon"), ("INS", "", "gene symbol")])
def test_a_damaged_gaf_says_what_and_where(tmp_path, old, new, says):
    (tmp_path / "bad.gaf").write_text(gaf(("INS", "GO:0006096")).replace(old, new, 1))
    with pytest.raises(InputError, match=says): read_gaf(tmp_path / "bad.gaf")


def test_annotations_climb(tmp_path, real):
    (tmp_path / "a.obo").write_text(real)
    (tmp_path / "a.gaf").write_text(gaf(("PKM", "GO:0061621"), ("HK1", "GO:0006096"), ("X", "GO:9999999")))
    go = open_go(tmp_path / "a.obo", tmp_path / "a.gaf")
    assert go.genes("GO:0061621") == {"PKM"} and go.genes("GO:0006096") == go.genes("GO:0008150") == {"PKM", "HK1"}
    assert go.about["terms"] == {"terms that the ontology does not have": 1} and go.terms_of("ENSG00000067225")[0] == "GO:0061621"
    (tmp_path / "b.gaf").write_text(gaf(("X", "GO:9999999")))
    with pytest.raises(InputError, match="belong together"): open_go(tmp_path / "a.obo", tmp_path / "b.gaf")


def test_the_cut_of_the_package():
    go = load_go()
    assert all(go.genes(p) >= go.genes(i) for i in go.terms for p in go.terms[i].parents)
    assert min(map(len, go.annotated.values())) == 5 and {"INS", "GCK"} <= go.genes("GO:0042593")  # glucose homeostasis
    assert all(t.name and t.definition for t in go.terms.values())


def test_enrichment_is_fishers_test():
    go, rng = load_go(), np.random.default_rng(0)
    background = list(rng.choice(go.matrix[2], 4000, replace=False))
    known = sorted(go.genes("GO:0006096") & set(background))
    t = enrich(known + background[:20], background, go)
    assert t.term[0] in go.up("GO:0006096") | {"GO:0006096"} or t.p[0] <= t.set_index("term").p["GO:0006096"]
    for r in t.iloc[:: max(1, len(t) // 40)].itertuples():
        assert len(r.hits) == r.k and set(r.hits) <= go.genes(r.term)
        assert r.p == pytest.approx(fisher_exact([[r.k, r.n - r.k], [r.K - r.k, r.N - r.K - r.n + r.k]], alternative="greater").pvalue, rel=1e-7)
        assert r.fold == pytest.approx(r.k / r.n * r.N / r.K)
    assert (np.diff(t.p) >= 0).all() and (t.fdr >= t.p).all() and (t.K.between(5, 500)).all()
    assert "GO:0006096" in enrichment_text(t, top=50)


def test_enrichment_by_hand():
    # 10 genes, 5 with the term, 3 drawn, all with it: C(5,3) / C(10,3).
    genes = ["INS", "GCG", "SST", "PPY", "ALB", "CD19", "CD3E", "NKG7", "LYZ", "PPBP"]
    go = GeneOntology({"GO:1": Term("GO:1", "all", "biological_process"), "GO:2": Term("GO:2", "some", "biological_process", parents=["GO:1"])}, {"GO:1": set(genes), "GO:2": set(genes[:5])})
    t = enrich(genes[:3] + ["nobody"], genes + ["unknown"], go)
    assert t.p[0] == pytest.approx(10 / 120) and t.fdr[0] == pytest.approx(20 / 120) and t.hits[0] == sorted(genes[:3]) and hypergeom.sf(2, 10, 5, 3) == pytest.approx(t.p[0])
    assert t.attrs["not_in_background"] == ["nobody"] and t.attrs["background_not_annotated"] == 1 and (t.N == 10).all()
    short = enrich(genes[:3], genes, go, specific=True)
    assert list(short.term) == ["GO:2"] and short.attrs["redundant"] == 1 and short.fdr[0] == t.fdr[0]


def test_the_null_gives_few_alarms():
    go, rng = load_go(), np.random.default_rng(1)
    background = list(rng.choice(go.matrix[2], 3000, replace=False))
    alarms = [(enrich(rng.choice(background, 40, replace=False), background, go, namespace="molecular_function").fdr < .05).any() for _ in range(100)]
    assert np.mean(alarms) <= .05 + 2 * np.sqrt(.05 * .95 / 100)


def test_only_confirmed_rows_of_a_term_map_count(tmp_path):
    path = tmp_path / "map.csv"
    path.write_text("label,id,status\na,CL:0000084,confirmed\nb,CL:0000236,suggested\n")
    held = []
    assert read_term_map(path, held) == {"a": "CL:0000084"} and held == ["b"]
    with pytest.warns(UserWarning, match="1 labels have suggested terms only"): read_term_map(path)
    path.write_text("label,id\na,CL:0000084\nb,CL:0000236\n")
    assert len(read_term_map(path)) == 2
