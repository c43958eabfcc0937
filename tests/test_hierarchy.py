"""What is a kind of what: backing off to what is certain, and how wrong a wrong label is."""
import itertools
from dataclasses import replace

import numpy as np
import pytest

from scimlora import Classifier
from scimlora.hierarchy import back_off, hierarchical_scores, hierarchy
from scimlora.ontology import cl_ids, load_ontology
from scimlora.predict import Predictor

LABELS = cl_ids(["naive B cell", "memory B cell", "CD8 T cell", "CD4 T cell", "NK cell", "CD14 monocyte", "platelet"])


def test_terms_are_over_their_labels_and_narrow_ones_come_first():
    tree, cl, ids = hierarchy(LABELS), load_ontology(), list(LABELS.values())
    assert len(tree.terms) == len(set(tree.terms)) > 5
    for term, under in zip(tree.terms, tree.under): assert [term in cl.up(i) for i in ids] == under.tolist() and 1 < under.sum() < len(ids)
    assert (np.diff(tree.under.sum(1)) >= 0).all()
    for a, b in itertools.combinations(range(len(tree.terms)), 2):
        if (tree.under[a] == tree.under[b]).all(): assert tree.terms[a] not in cl.up(tree.terms[b]) or tree.terms[a] == tree.terms[b], "no narrower term stands behind"


def test_no_other_term_would_have_been_narrower():
    tree, rng = hierarchy(LABELS), np.random.default_rng(0)
    p = rng.dirichlet(np.full(len(LABELS), 0.3), 500)
    for row, found in zip(p, back_off(p, tree, 0.9)):
        sure = [i for i, under in enumerate(tree.under) if row[under].sum() >= 0.9]
        assert found == (sure[0] if sure else -1)


def test_the_truth_is_under_the_term_as_often_as_was_asked():
    "Cells whose labels are drawn from the probabilities themselves, so that these are calibrated."
    tree, rng = hierarchy(LABELS), np.random.default_rng(1)
    p = rng.dirichlet(np.full(len(LABELS), 0.3), 4000)
    y, found = np.array([rng.choice(len(LABELS), p=row) for row in p]), back_off(p, tree, 0.95)
    held = [tree.under[i][c] for i, c in zip(found, y) if i >= 0]
    assert len(held) > 500 and np.mean(held) > 0.95


def test_scores_by_hand():
    cl = load_ontology()
    b, t4, t8, t = "CL:0000236", "CL:0000624", "CL:0000625", "CL:0000084"
    s = hierarchical_scores([t4, t4, t4, b], [t4, t8, t, None])
    assert (s["n_cells"], s["without_term"]) == (3, 1)
    assert s["accuracy"] == pytest.approx(1 / 3) and s["accuracy_by_rule"] == pytest.approx(2 / 3)
    up = {x: set(cl.up(x)) for x in (t4, t8, t)}
    both, said, true = (sum(len(f(x)) for x in (t4, t8, t)) for f in (lambda x: up[t4] & up[x], lambda x: up[x], lambda x: up[t4]))
    assert s["precision"] == pytest.approx(both / said) and s["recall"] == pytest.approx(both / true)
    assert s["distance"] == pytest.approx((cl.distance(t4, t8) + cl.distance(t4, t)) / 3) and s["distance_of_errors"] == pytest.approx(s["distance"] * 3 / 2)


def test_evaluate_says_how_far_errors_lie(classifier, other_cells):
    m = classifier.evaluate(other_cells)
    assert m["hierarchy"]["n_cells"] == m["n_cells"] and m["hierarchy"]["accuracy"] == pytest.approx(m["accuracy"])
    assert m["hierarchy"]["f1"] >= m["hierarchy"]["accuracy"]


def test_unsure_cells_are_told_what_they_surely_are(classifier, other_cells):
    b = classifier.bundle
    strict = Classifier(Predictor(replace(b, calibration=replace(b.calibration, min_confidence=0.999999)), classifier.predictor.base))
    p = strict.predictor.predict(other_cells)
    tree = hierarchy(b.manifest["labels"])
    more = [r.split("; surely ")[1] for r in p.reason if "; surely " in r]
    assert more and set(more) <= set(tree.names)
    for reason, row in zip(p.reason, p.proba):
        if "; surely " in reason: assert row[tree.under[tree.names.index(reason.split("; surely ")[1])]].sum() >= 0.95 - 1e-9
    assert all("surely" not in r for r in p.reason if "unlike" in r), "a stranger is not surely anything"
