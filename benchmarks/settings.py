"""Choose the defaults of `TuneConfig` and of the gene path on held-out cells that no benchmark reports.

    make bench-settings

Kang's donors 1244 and 1015, Enge, 3k, Darmanis' two donors and Baron's third library are test cells elsewhere and are not touched; 3k and
Zheng teach here, and test nothing. Every base is pretrained without the studies of its task. Every fit is kept under runs/settings, so
the same command goes on where it was stopped. Writes SETTINGS.csv: macro-F1 of every setting, task, number of cells and draw.
"""
import argparse
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import f1_score

from scimlora.core import read_json, write_json
from scimlora.data import align_cells, obs_column
from scimlora.examples import baron, shared
from scimlora.genepath import fit_genepath
from scimlora.genes import match_genes
from scimlora.lora import TuneConfig
from scimlora.methods import fit_method
from suite.code import code_of
from suite.tasks import PBMC3K, ZHENG, Bases

HERE = Path(__file__).parent
ROOT = HERE.parent
# Labels in the words of both studies of a task.
KANG = {"CD14 Mono": "monocyte", "CD16 Mono": "CD16 monocyte", "B": "B", "B Activated": "B", "NK": "NK", "CD4 Memory T": "T", "CD4 Naive T": "T", "CD8 T": "T", "T activated": "T", "DC": "DC"}
KANG_T = {"CD14 Mono": "monocyte", "B": "B", "B Activated": "B", "NK": "NK", "CD4 Memory T": "CD4 T", "CD4 Naive T": "CD4 T", "CD8 T": "CD8 T"}
ZANINI = {"classical monocyte": "monocyte", "nonclassical monocyte": "CD16 monocyte", "B cell": "B", "NK cell": "NK", "T cell": "T", "cDC": "DC", "pDC": "pDC", "plasmablast": "plasma"}
BREAST = {"CD8_T": "T", "CD4_T": "T", "Treg": "T", "gdT": "T", "B_memory": "B", "B_naive": "B", "B_GC": "B", "NK": "NK", "plasma": "plasma", "DC": "DC", "pDC": "pDC", "MDC": "monocyte"}
BREAST_T = {"CD8_T": "CD8 T", "CD4_T": "CD4 T", "Treg": "CD4 T", "B_memory": "B", "B_naive": "B", "NK": "NK", "MDC": "monocyte"}
PDAC = {"Ductal_CRISP3_high-centroacinar_like": "ductal", "Ductal_terminal_ductal_like": "ductal", "Ductal_MHC_Class_II": "ductal", "Ductal_APOL1_high-hypoxic": "ductal",
        "Macrophages_A": "macrophage", "Macrophages_B": "macrophage", "Mast_cells": "mast", "Acinar_cells": "acinar", "Endothelial_cells": "endothelial"}
TAUGHT = ["101", "107", "1016", "1039"]  # Kang's donors that no benchmark tests on


def whole(name, labels=None): return lambda: (shared(name), labels)


def donors(names, labels=None):
    def get():
        a = shared("pbmc_kang2018_ctrl")
        return a[a.obs.donor.astype(str).isin(names).to_numpy()], labels
    return get


def half(name, first):
    def get():
        a = shared(name)
        return a[(np.random.default_rng(0).random(a.n_obs) < 0.5) == first], None
    return get


def libraries():
    a = baron()
    return a[a.obs.library.isin(["lib1", "lib2"]).to_numpy()], None


ZANINI_CELLS, BREAST_CELLS, LIVER = "blood_zanini2018_cpm", "breast_tumour_immune_spectra_lognorm", "liver_aizarani2019_cpm"
# Training cells, test cells, and the studies that the base must not have seen.
TASKS = {"Kang, donor 1016": (donors(["101", "107", "1039"]), donors(["1016"]), ("kang",)),
         "Kang, donors 101 and 107": (donors(["1016", "1039"]), donors(["101", "107"]), ("kang",)),
         "Kang → Zanini": (donors(TAUGHT, KANG), whole(ZANINI_CELLS, ZANINI), ("kang", "zanini")),
         "Zanini → Kang": (whole(ZANINI_CELLS, ZANINI), donors(TAUGHT, KANG), ("kang", "zanini")),
         "Zheng → Kang": (whole("pbmc_facs_zheng2017", ZHENG), donors(TAUGHT, KANG_T), ("kang", "zheng", "3k")),
         "3k → Kang": (whole("pbmc_3k_10x", PBMC3K), donors(TAUGHT, KANG_T), ("kang", "zheng", "3k")),
         "Breast → Zanini": (whole(BREAST_CELLS, BREAST), whole(ZANINI_CELLS, ZANINI), ("breast", "zanini")),
         "Kang → Breast": (donors(TAUGHT, KANG_T), whole(BREAST_CELLS, BREAST_T), ("kang", "breast")),
         "Baron → tumour": (libraries, whole("pancreas_pdac_moncada2020", PDAC), ("pdac",)),
         "Zanini, half": (half(ZANINI_CELLS, True), half(ZANINI_CELLS, False), ("zanini",)),
         "Aizarani, half": (half(LIVER, True), half(LIVER, False), ("aizarani",))}
BEFORE = dict(teach=0.0, a_rate=1.0)
SETTINGS = {"default": {}, "labels alone, one rate (the default before)": BEFORE, "labels alone": dict(teach=0.0), "teach 0.9": dict(teach=0.9), "one rate": dict(a_rate=1.0), "a_rate 0.01": dict(a_rate=0.01),
            "from centroids": dict(head_init="centroids"), "distill 0.3": dict(distill=0.3), "mask 0.5": dict(mask_genes=0.5), "lr 1e-3": dict(lr=1e-3), "lr 4e-3": dict(lr=4e-3), "steps 200": dict(steps=200),
            "r 8, alpha 16": dict(r=8, alpha=16), "rsLoRA": dict(variant="rslora"), "DoRA": dict(variant="dora"), "PiSSA": dict(variant="pissa"), "LoRA+ 8": dict(lora_plus=8.0), "first layer frozen": dict(targets="no-first"),
            "cosine head": dict(head="cosine"), "logit-adjusted": dict(loss="logit-adjusted"), "supcon 0.1": dict(supcon=0.1), "triplet 1": dict(triplet=1.0), "BatchNorm": dict(method="bn"), "full": dict(method="full")}
FROZEN = "frozen, logistic regression by cross-validation"
SHARES = {f"gene path, embedding's share {s}": s for s in (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 0.95)}
NAMES = [FROZEN, *SHARES, *SETTINGS]


def labels_of(a, names):
    y = obs_column(a.obs, "cell_type")
    return y if names is None else np.array([names.get(v) for v in y], dtype=object)


def load(task, bases):
    "Cells, classes and donors of a task, aligned to a base that has not seen its studies."
    train, test, without = TASKS[task]
    base, sides = bases(without), (train(), test())
    names = [labels_of(*s) for s in sides]
    n = pd.Series([v for v in names[0] if v is not None]).value_counts()
    classes = sorted((set(n.index[n >= 5]) & set(names[1])) - {"unknown", None})
    keep = [np.isin(v.astype(str), classes) for v in names]
    # The breast cells' logarithms lack the genes left out after normalising, which the reader would rather ask about.
    units = ["log1p_cp10k" if a.n_vars == 6397 else "auto" for a, _ in sides]
    (X, Xt), (y, yt) = ([align_cells(a[k], base.genes, u).X for (a, _), k, u in zip(sides, keep, units)], [np.array([classes.index(v) for v in v[k]]) for v, k in zip(names, keep)])
    seen, there = (match_genes(list(a.var_names), base.genes).matrix.getnnz(0) > 0 for a, _ in sides)
    groups = sides[0][0].obs.donor.astype(str).to_numpy()[keep[0]] if "donor" in sides[0][0].obs else np.zeros(len(y), str)
    return dict(base=base, X=X, Xt=Xt, y=y, yt=yt, n=len(classes), donors=groups, seen=seen, there=there)


def draw(y, shots, seed):
    if not shots: return np.arange(len(y))
    rng = np.random.default_rng(seed)
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(y == c))[:shots] for c in np.unique(y)]))


def said(t, rows, name, seed):
    "The classes that a setting gives to the test cells."
    base, X, y = t["base"], t["X"][rows], t["y"][rows]
    if name in SHARES: return fit_genepath(base, X, y, t["n"], t["seen"], share=SHARES[name], seed=seed).logits(t["Xt"], base.embed(t["Xt"]), t["there"]).argmax(1)
    method, config = ("linear, C by cross-validation", {}) if name == FROZEN else ("as configured", SETTINGS[name])
    return fit_method(method, base, X, y, t["n"], TuneConfig(seed=seed, **config), donors=t["donors"][rows]).logits(t["Xt"]).argmax(1)


def measured(t, name, shots, seeds):
    "Macro-F1 of a setting on each draw of a task; all cells are one draw, with as many seeds of the fit."
    return [dict(cells_a_class=s or "full", seed=d, macro_f1=round(f1_score(t["yt"], said(t, draw(t["y"], s, d), name, d), average="macro", zero_division=0), 4)) for s in shots for d in range(seeds)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--shots", nargs="*", type=int, default=[5, 25, 0], help="0: all cells")
    parser.add_argument("--tasks", nargs="*", default=[*TASKS])
    parser.add_argument("--settings", nargs="*", default=NAMES)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "settings", help="where fits and bases are kept")
    parser.add_argument("--bases", type=Path, help="folder of bases pretrained elsewhere, named by the studies they lack")
    parser.add_argument("--out", type=Path, default=HERE / "SETTINGS.csv")
    args = parser.parse_args()
    os.environ["SCIMLORA_PROGRESS"] = "0"
    bases, code = Bases(args.cache / "bases", args.bases), code_of("scimlora.methods", "scimlora.lora", "scimlora.genepath", "scimlora.evaluation", "scimlora.heads", "scimlora.losses")[:8]
    tasks, rows = {}, []
    for name in args.settings:
        start = time.perf_counter()
        for task in args.tasks:
            kept = args.cache / f"{code}-{NAMES.index(name)}-{[*TASKS].index(task)}-{args.seeds}-{'-'.join(map(str, args.shots))}.json"
            if not kept.exists():
                if task not in tasks: tasks[task] = load(task, bases)
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_json(kept, measured(tasks[task], name, args.shots, args.seeds))
            rows += [dict(setting=name, task=task, **r) for r in read_json(kept)]
        table = pd.DataFrame(rows)
        table.to_csv(args.out, index=False)
        mean = table[table.setting == name].groupby("cells_a_class", sort=False).macro_f1.mean() * 100
        print(f"{name}: {dict(mean.round(1))}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__": main()
