"""Bundles that become one, and bundles that learn a type later: what comes out, what is refused."""
import json
from dataclasses import replace

import numpy as np
import pytest

from scimlora import Classifier, InputError
from scimlora.bundle import base_of, load_bundle
from scimlora.merge import join_labels, merge, replay
from scimlora.predict import Predictor


@pytest.fixture(scope="module")
def halves(baron_cells, other_cells, tmp_path_factory):
    "Two bundles that know three types each, and cells of all six that neither has seen."
    kind, folder = baron_cells.obs.cell_type.astype(str), tmp_path_factory.mktemp("halves")
    sides = [kind.isin(t).to_numpy() for t in (["acinar", "alpha", "beta"], ["delta", "ductal", "gamma"])]
    for name, side in zip("ab", sides): Classifier.tune(baron_cells[side].copy(), "cell_type", epochs=3, baselines=False, title=f"half {name}").save(folder / name)
    return folder / "a", folder / "b"


@pytest.fixture(scope="module")
def merged(halves): return merge(halves, epochs=3, seed=1)


def right(clf, cells): return (clf.predict(cells) == cells.obs.cell_type.to_numpy(str)).mean()


def test_both_halves_are_known(merged, halves, other_cells):
    assert len(merged.classes_) == 6
    assert right(merged, other_cells) > 0.85
    alone = [right(Classifier.load(h), other_cells[other_cells.obs.cell_type.isin(Classifier.load(h).classes_).to_numpy()]) for h in halves]
    assert right(merged, other_cells) > np.mean(alone) - 0.08, alone


def test_it_is_a_bundle_like_any_other(merged, other_cells, tmp_path):
    again = Classifier.load(merged.save(tmp_path / "both"))
    assert np.abs(again.predict_proba(other_cells) - merged.predict_proba(other_cells)).max() < 1e-6
    m = json.loads((tmp_path / "both/manifest.json").read_text())
    assert [x["title"] for x in m["split"]["merged"]] == ["half a", "half b"] and "measure it on real ones" in m["split"]["notes"][0]
    assert "merged from half a, half b" in (tmp_path / "both/README.md").read_text()


def test_the_same_seed_gives_the_same_numbers(halves, merged, other_cells):
    assert (merge(halves, epochs=3, seed=1).predict_proba(other_cells) == merged.predict_proba(other_cells)).all()


def test_thresholds_are_the_bundles_own(merged, halves):
    own, cal = [load_bundle(h) for h in halves], merged.bundle.calibration
    assert cal.min_confidence == max(b.calibration.min_confidence for b in own) and cal.max_unlike == max(b.calibration.max_unlike for b in own)
    for b in own:
        for miss, thresholds in b.calibration.conformal.items():
            assert [cal.conformal[miss][merged.classes_.index(c)] for c in b.classes] == thresholds


def test_real_cells_are_not_taken_for_strangers(merged, other_cells):
    assert merged.predictor.predict(other_cells).unassigned.mean() < 0.25


def test_a_type_that_comes_later(halves, baron_cells, other_cells):
    few = baron_cells[(baron_cells.obs.cell_type == "ductal").to_numpy()].copy()
    more = merge([halves[0]], cells=few, label="cell_type", epochs=3)
    assert more.classes_ == ["acinar", "alpha", "beta", "ductal"] and more.bundle.manifest["training"]["cells"] == 3 * 60 + few.n_obs
    known = other_cells[other_cells.obs.cell_type.isin(more.classes_).to_numpy()]
    assert right(more, known) > 0.9 and right(more, known[(known.obs.cell_type == "ductal").to_numpy()]) > 0.8


@pytest.fixture(scope="module")
def longer(halves, baron_cells):
    "The first half, told of two more types; and the first half."
    few = baron_cells[baron_cells.obs.cell_type.isin(["ductal", "delta"]).to_numpy()].copy()
    return merge(halves[:1], cells=few, label="cell_type"), Classifier.load(halves[0])


def test_old_answers_stand_still(longer, other_cells):
    "A cell keeps its label or gets a new type's, and the odds among old types are what they were."
    more, before = longer
    assert more.classes_ == ["acinar", "alpha", "beta", "delta", "ductal"]
    was, now = before.predict(other_cells), more.predict(other_cells)
    assert ((was == now) | np.isin(now, ["delta", "ductal"])).all() and right(more, other_cells[other_cells.obs.cell_type.isin(more.classes_).to_numpy()]) > 0.9
    odds = more.predict_proba(other_cells)[:, :3]
    assert np.allclose(odds / odds.sum(1, keepdims=True), before.predict_proba(other_cells), atol=1e-6)


def test_a_bundle_with_further_types_is_a_bundle(longer, other_cells, tmp_path):
    more, before = longer
    again = Classifier.load(more.save(tmp_path / "longer"))
    assert np.abs(again.predict_proba(other_cells) - more.predict_proba(other_cells)).max() < 1e-6
    m = again.bundle.manifest
    assert m["labels"]["ductal"] and m["training"]["per_class"].keys() == set(more.classes_) and "measure it on real ones" in m["split"]["notes"][0] and not m["metrics"]
    for miss, thresholds in before.bundle.calibration.conformal.items(): assert again.bundle.calibration.conformal[miss][:3] == thresholds
    assert before.bundle.genepath.level.shape[1] == 3 and len(before.classes_) == 3, "the old bundle is as it was"


def test_a_bundle_can_grow_again_and_be_merged(longer, baron_cells, other_cells):
    few = baron_cells[(baron_cells.obs.cell_type == "gamma").to_numpy()].copy()
    six = merge([longer[0]], cells=few, label="cell_type")
    assert len(six.classes_) == 6 and right(six, other_cells) > 0.85
    typed = six.predictor.predict(six.predictor.read([{"GCG": 8.0, "TTR": 7.0}, {"PPY": 9.0, "SST": 0.5}]))
    assert typed.label.tolist() == ["alpha", "gamma"]


def test_genes_that_the_new_cells_lack_say_nothing(halves, baron_cells, other_cells):
    few = baron_cells[(baron_cells.obs.cell_type == "ductal").to_numpy()].copy()[:, np.arange(0, baron_cells.n_vars, 2)]
    more = merge(halves[:1], cells=few, label="cell_type")
    assert any("say nothing of the new types" in n for n in more.bundle.manifest["split"]["notes"])
    known = other_cells[other_cells.obs.cell_type.isin(more.classes_).to_numpy()]
    assert right(more, known) > 0.85


def test_one_cell_is_no_type(halves, baron_cells):
    few = baron_cells[np.flatnonzero(baron_cells.obs.cell_type == "ductal")[:1]].copy()
    with pytest.raises(InputError, match="'ductal' has one cell"): merge(halves[:1], cells=few, label="cell_type")


def test_drawn_cells_have_the_profiles_mean(halves):
    bundle = load_bundle(halves[0])
    drawn = replay(bundle, base_of(bundle).genes, 300)
    there = bundle.genepath.prior > 0
    for c, name in enumerate(bundle.classes):
        X = drawn[(drawn.obs.label == name).to_numpy()].X.toarray()
        share, want = (X / X.sum(1, keepdims=True)).mean(0), bundle.genepath.level[there, c].astype(float)
        assert np.corrcoef(share, want)[0, 1] > 0.99


def test_joined_labels_keep_the_first_name():
    maps, notes = join_labels([{"B": "CL:0000236"}, {"B cell": "CL:0000236", "T": None}, {"T": "CL:0000084"}])
    assert maps == [{"B": "B"}, {"B cell": "B", "T": "T"}, {"T": "T"}] and len(notes) == 1


def test_two_labels_of_one_bundle_stay_two():
    "They mean the same term, but somebody told them apart."
    maps, notes = join_labels([{"naive T": "CL:0000084", "memory T": "CL:0000084"}, {"T cell": "CL:0000084"}])
    assert maps[0] == {"naive T": "naive T", "memory T": "memory T"} and len(set(maps[1].values()) & {"T cell", "naive T"}) == 1


BAD = {"one bundle and no cells": ["A"], "is a base and no bundle": ["A", "mini"], "with --label": ["A", "--cells", "CELLS"],
       "no label column": ["A", "--cells", "CELLS", "--label", "nothing"], "nowhere": ["A", "nowhere"], "keeps no profiles": ["A", "BARE"]}


@pytest.mark.parametrize("said", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(said, halves, cells_file, cli, tmp_path):
    replace(load_bundle(halves[1]), genepath=None).save(tmp_path / "bare")
    names = dict(A=halves[0], CELLS=cells_file, BARE=tmp_path / "bare")
    ended = cli("merge", *(names.get(x, x) for x in BAD[said]), "--out", tmp_path / "out")
    assert ended.code == 2 and said in ended.err and len(ended.err.strip().splitlines()) == 1 and "Traceback" not in ended.err, ended.err
    assert not (tmp_path / "out").exists()


def test_bundles_of_different_bases_are_refused(halves, classifier):
    one, two = Predictor(halves[0]), Predictor(halves[1])
    two.base = replace(two.base, sha256={**two.base.sha256, "encoder.ckpt": "0" * 64})
    with pytest.raises(InputError, match="on different bases"): merge([one, two])


def test_a_label_of_two_meanings_is_refused(halves):
    one, two = Predictor(halves[0]), Predictor(halves[1])
    two.bundle = replace(two.bundle, classes=["alpha", *two.bundle.classes[1:]], manifest=two.bundle.manifest | {"labels": {"alpha": "CL:0000169"}})
    one.bundle = replace(one.bundle, manifest=one.bundle.manifest | {"labels": {"alpha": "CL:0000171"}})
    with pytest.raises(InputError, match="'alpha' is CL:0000171 in one bundle and CL:0000169 in another"): merge([one, two])
