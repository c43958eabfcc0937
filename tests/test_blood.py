"""The bundle that the package brings: marker sets, its size, its name in place of a folder, and its card."""
import json

import pytest

from scimlora.answers import EXAMPLE, answer
from scimlora.base import BASES
from scimlora.predict import Predictor

SETS = {"B cell": "CD19 MS4A1 CD79A CD79B", "B cell, more": "MS4A1 CD79A BANK1 CD74", "NK cell": "NKG7 GNLY KLRD1 KLRF1", "NK cell, more": "GNLY NKG7 PRF1 FCGR3A KLRD1",
        "CD14 monocyte": "CD14 LYZ S100A8 S100A9", "CD14 monocyte, more": "CD14 LYZ VCAN FCN1", "dendritic cell": "FCER1A CD1C CLEC10A HLA-DRA", "CD16 monocyte": "FCGR3A MS4A7 CDKN1C LST1",
        "T cell": "CD3D CD3E CD3G IL7R CCR7", "CD8 T cell": "CD3D CD3E CD8A CD8B"}


@pytest.fixture(scope="module")
def blood(): return Predictor("blood")


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("value", [8.5, 30], ids=["log1p", "counts"])
def test_marker_sets(blood, name, value):
    a = answer(blood, [dict.fromkeys(SETS[name].split(), value)])[0]
    assert a["cell_type"].endswith(name.partition(",")[0]) and not a["unassigned"] and a["confidence"] >= 0.5, a


def test_the_original_request(blood):
    a = answer(blood, [EXAMPLE["expression"]])[0]
    assert a["cell_type"] == "B cell" and not a["unassigned"] and 0.5 < a["confidence"] < 1 and a["units"] == "log1p_cp10k"


@pytest.mark.parametrize("genes", ["INS GCG", "INS GCG TTR", "ALB APOA1 TF"])
def test_what_it_cannot_know_is_unassigned(blood, genes): assert answer(blood, [dict.fromkeys(genes.split(), 8.5)])[0]["unassigned"]


def test_size_and_card(blood):
    "Small, on the embedded base, and the card says what was held out and that mini has seen the studies."
    files, card = list((BASES / "blood").iterdir()), (BASES / "blood" / "README.md").read_text()
    assert sum(f.stat().st_size for f in files) < 2e6 and blood.base.name == "mini"
    held = json.loads((BASES / "blood" / "manifest.json").read_text())["held_out"]
    assert {"study kang", "study zheng", "study 3k"} <= held.keys() and all(h["accuracy"] > 0.8 and h["balanced_accuracy"] > 0.8 for h in held.values())
    assert "mini saw all of these studies" in card and all(f"{h['n_cells']:,} cells, accuracy {h['accuracy']:.3f}" in card for h in held.values())


def test_any_command_takes_the_name(cli, cells_file, tmp_path, monkeypatch):
    "Also where a folder of that name stands, which is no bundle."
    (tmp_path / "blood").mkdir()
    monkeypatch.chdir(tmp_path)
    ended = cli("annotate", "blood", cells_file, "--out", "labels.csv")
    assert ended.code == 0 and "120 cells" in ended.out


def test_held_out_studies_of_this_machine(blood, shared):
    "Not the card's numbers, as this bundle has seen the study: a check that reading and mapping still fit."
    from scimlora.blood import blood_cells

    shared("pbmc_3k_10x")
    cells = blood_cells(blood.genes, ["3k"], per_class=30)
    assert (blood.predict(cells, "log1p_cp10k").label == cells.obs.cell_type.to_numpy(object)).mean() > 0.85
