"""Finding terms by words and by meaning, and candidates for labels that are used by nobody before they are confirmed."""
import socket
import subprocess
import sys

import numpy as np
import pytest

from scimlora import InputError, retrieval
from scimlora.ontology import find_term, load_ontology, read_term_map
from scimlora.retrieval import Entry, Index, entries, has_meaning, recall_at, search, suggest_terms, synonym_questions, write_term_map

FEW = [Entry("A", "cell", ["plasma cell", "plasmacyte"], "A lymphocyte that secretes antibodies."), Entry("B", "cell", ["pancreatic B cell", "beta cell"], "A cell of the islets that secretes insulin."),
       Entry("C", "cell", ["astrocyte", "astroglia"], "A star-shaped glial cell."), Entry("D", "process", ["insulin secretion"], "The release of insulin.")]


def first(index, *args, **kw): return index.search(*args, **kw)[0]["id"]


def test_by_words():
    index = Index(FEW)
    assert [first(index, q, engine="words") for q in ("Plasma cells", "plasmacyt", "star shaped", "beta-cells")] == ["A", "A", "C", "B"]
    assert [f["score"] for f in index.search("cell", 4, "words")] == sorted((f["score"] for f in index.search("cell", 4, "words")), reverse=True)
    assert index.search("xyzxyz", engine="words") == []


def test_a_hidden_name_is_not_there():
    index = Index(FEW)
    assert first(index, "astroglia", engine="words") == "C"
    shown, hidden = (index.search("plasmacyte", 1, "words", hide)[0]["score"] for hide in (None, "Plasmacytes"))
    assert hidden < shown
    assert index.search("plasmacyte", 1, "words", "plasmacyte")[0]["score"] == hidden  # asking changes nothing for the next


def test_the_names_of_the_ontologies_find_themselves():
    # Functions are the smaller part of the Gene Ontology, which keeps this fast.
    for kind in ("cell", "function"):
        some = entries(kind)[::150]
        assert np.mean([e.id in [f["id"] for f in search(e.names[0], 5, kind, "words")] for e in some]) > .95


def test_synonyms_are_found_without_themselves():
    cells = entries("cell")
    questions = synonym_questions(cells, 60, seed=3)
    names = {e.id: e.names for e in cells}
    assert questions == synonym_questions(cells, 60, seed=3) and all(q in names[i][1:] for q, i in questions)
    index = retrieval._index("cell")
    assert recall_at(index, questions, hide=False) > .95 and recall_at(index, questions) > .4


@pytest.mark.parametrize("call,says", [(lambda: search("", kind="cell"), "has no word"), (lambda: search("x", kind="gene"), "is none"), (lambda: search("B", k=0, kind="cell"), "give 1 or more"), (lambda: search("B", kind="cell", engine="x"), "is none")])
def test_what_cannot_be_asked(call, says):
    with pytest.raises(InputError, match=says): call()


def test_candidates_wait_for_confirmation(tmp_path):
    t = suggest_terms(["B cells", "makes insulin", "makes insulin", "17"], "pancreas", engine="words")
    assert set(t.label) == {"makes insulin", "17"} and set(t.status) == {"suggested"} and (t.groupby("label").size() <= 3).all()
    assert all(i in load_ontology().names for i in t.id if i) and find_term("makes insulin", "pancreas")[0] is None
    held = []
    write_term_map(tmp_path / "m.tsv", t)
    assert read_term_map(tmp_path / "m.tsv", held) == {} and held == ["makes insulin", "17"]
    t.loc[t.index[t.label == "makes insulin"][0], "status"] = "confirmed"
    write_term_map(tmp_path / "m.csv", t)
    assert list(read_term_map(tmp_path / "m.csv", held)) == ["makes insulin"]
    for bad, says in ((t.assign(status="confirmed"), "two confirmed"), (t.drop(columns="status"), "no column status"), (t.assign(status="maybe"), "neither")):
        with pytest.raises(InputError, match=says): write_term_map(tmp_path / "bad.csv", bad)
    assert not (tmp_path / "bad.csv").exists()


def test_without_the_model_words_are_left(monkeypatch):
    monkeypatch.setattr(retrieval, "has_meaning", lambda: False)
    retrieval._model.cache_clear()
    index = Index(FEW)
    assert first(index, "plasma cell") == "A"
    with pytest.raises(InputError, match=r"scimlora\[search\]"): index.search("plasma cell", engine="meaning")


@pytest.mark.skipif(not has_meaning(), reason="needs the extra search")
def test_by_meaning_and_without_a_network(monkeypatch, tmp_path):
    def no(*args, **kw): raise AssertionError("asked the network")
    for name in ("connect", "connect_ex"): monkeypatch.setattr(socket.socket, name, no)
    monkeypatch.setattr(socket, "getaddrinfo", no)
    monkeypatch.setenv("SCIMLORA_CACHE", str(tmp_path))
    retrieval._model.cache_clear()
    index = Index(FEW)
    assert [first(index, q, engine="meaning") for q in ("makes immunoglobulins", "supports neurons in the brain")] == ["A", "C"] and first(index, "astroglial", engine="both") == "C"
    kept = list((tmp_path / "search").iterdir())
    assert len(kept) == 2 and all(p.suffix == ".safetensors" for p in kept)  # cells and processes
    assert np.allclose(np.linalg.norm(index.vectors, axis=1), 1, atol=1e-2)
    monkeypatch.setattr(retrieval, "_WEIGHTS", "0" * 64)
    retrieval._model.cache_clear()
    with pytest.raises(InputError, match="not the published one"): retrieval.embed_texts(["x"])


def test_importing_it_is_cheap():
    code = "import scimlora.retrieval, scimlora.go, sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'sklearn', 'scipy.stats')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
