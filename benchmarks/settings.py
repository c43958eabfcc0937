"""Choose the defaults of `TuneConfig` on held-out cells that no benchmark reports.

    SCIMLORA_DATA=… python benchmarks/settings.py

Kang's donors 1244 and 1015, Enge, 3k, Darmanis and Baron's third library are test cells elsewhere and are not touched. Every base is
pretrained without the studies of its task. Writes SETTINGS.csv: macro-F1 of every setting, task, number of cells and draw.
"""
import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # with another number of threads a base or a fit is another one

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from sklearn.metrics import f1_score  # noqa: E402

from scimlora.base import Base  # noqa: E402
from scimlora.data import align_cells, obs_column  # noqa: E402
from scimlora.examples import baron, shared  # noqa: E402
from scimlora.lora import TuneConfig  # noqa: E402
from scimlora.methods import fit_method  # noqa: E402
from scimlora.pretrain import pretrain  # noqa: E402

HERE = Path(__file__).parent
ZANINI = {"CD14 Mono": "classical monocyte", "CD16 Mono": "nonclassical monocyte", "B": "B cell", "B Activated": "B cell", "NK": "NK cell",
          "CD4 Memory T": "T cell", "CD4 Naive T": "T cell", "CD8 T": "T cell", "T activated": "T cell", "DC": "cDC"}


def donors(train, test):
    def get():
        a = shared("pbmc_kang2018_ctrl")
        d = a.obs.donor.astype(str)
        return a[d.isin(train).to_numpy()], a[d.isin(test).to_numpy()]
    return get


def halves(name):
    def get():
        a, half = shared(name), np.random.default_rng(0)
        first = half.random(a.n_obs) < 0.5
        return a[first], a[~first]
    return get


def libraries():
    a = baron()
    return a[(a.obs.library == "lib1").to_numpy()], a[(a.obs.library == "lib2").to_numpy()]


def laboratories():
    a = shared("pbmc_kang2018_ctrl")
    a = a[~a.obs.donor.astype(str).isin(["1244", "1015"]).to_numpy()].copy()
    a.obs["cell_type"] = a.obs.cell_type.astype(str).map(ZANINI)
    return a, shared("blood_zanini2018_cpm")


TASKS = {"Kang, donor 1016": (donors(["101", "107", "1039"], ["1016"]), ("kang",)), "Kang, donors 101 and 107": (donors(["1016", "1039"], ["101", "107"]), ("kang",)),
         "Zheng, half": (halves("pbmc_facs_zheng2017"), ("zheng",)), "Baron, library 2": (libraries, ("baron",)), "Zanini, half": (halves("blood_zanini2018_cpm"), ("zanini",)),
         "Aizarani, half": (halves("liver_aizarani2019_cpm"), ("aizarani",)), "Kang → Zanini": (laboratories, ("kang", "zanini")),
         "Zanini → Kang": (lambda: laboratories()[::-1], ("kang", "zanini"))}
BEFORE = dict(r=8, alpha=16, lr=1e-3, epochs=20, steps=0, head_init="centroids")
SETTINGS = {"default": {}, "as before: from centroids, r 8, lr 1e-3, 20 epochs": BEFORE, "from centroids": dict(head_init="centroids"), "from random": dict(head_init="random"),
            "distill 0.1": dict(distill=0.1), "distill 0.3": dict(distill=0.3), "distill 1": dict(distill=1.0), "distill 3": dict(distill=3.0), "distill 10": dict(distill=10.0), "distill 1, lr 4e-3": dict(distill=1.0, lr=4e-3),
            "distill 1, r 8, alpha 16": dict(distill=1.0, r=8, alpha=16), "distill 1, steps 200": dict(distill=1.0, steps=200), "mask 0.3": dict(mask_genes=0.3), "mask 0.7": dict(mask_genes=0.7),
            "lr 1e-3": dict(lr=1e-3), "lr 4e-3": dict(lr=4e-3), "steps 0": dict(steps=0), "steps 200": dict(steps=200), "steps 400, epochs 20": dict(steps=400, epochs=20), "falling lr": dict(schedule="cosine"),
            "r 8, alpha 16": dict(r=8, alpha=16), "rsLoRA": dict(variant="rslora"), "DoRA": dict(variant="dora"), "PiSSA": dict(variant="pissa"), "LoRA+ 8": dict(lora_plus=8.0),
            "first layer frozen": dict(targets="no-first"), "cosine head": dict(head="cosine"), "balanced": dict(loss="balanced"), "logit-adjusted": dict(loss="logit-adjusted"),
            "supcon 0.1": dict(supcon=0.1), "triplet 1": dict(triplet=1.0), "reconstruction 1": dict(reconstruction=1.0), "BatchNorm": dict(method="bn"), "full": dict(method="full"),
            "full, lr 5e-4": dict(method="full", lr=5e-4), "prototype": dict(method="prototype")}
FROZEN = "frozen, logistic regression by cross-validation"


def load(task, folder):
    "Cells, classes and donors of a task, aligned to a base that has not seen its studies."
    get, without = TASKS[task]
    path = folder / "-".join(without)
    base = Base.load(path) if path.exists() else pretrain(path, without, index=False)
    sides = get()
    names = [obs_column(a.obs, "cell_type") for a in sides]
    n = pd.Series([v for v in names[0] if v is not None]).value_counts()
    classes = sorted((set(n.index[n >= 5]) & set(names[1])) - {"unknown", None})
    keep = [np.isin(v.astype(str), classes) for v in names]
    (X, Xt), (y, yt) = ([align_cells(a[k], base.genes).X for a, k in zip(sides, keep)], [np.array([classes.index(v) for v in v[k]]) for v, k in zip(names, keep)])
    groups = sides[0].obs.donor.astype(str).to_numpy()[keep[0]] if "donor" in sides[0].obs else np.zeros(len(y), str)
    return dict(base=base, X=X, Xt=Xt, y=y, yt=yt, n=len(classes), donors=groups)


def draw(y, shots, seed):
    if not shots: return np.arange(len(y))
    rng = np.random.default_rng(seed)
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(y == c))[:shots] for c in np.unique(y)]))


def said(t, rows, name, seed):
    "The classes that a setting gives to the test cells."
    method, config = ("linear, C by cross-validation", {}) if name == FROZEN else ("as configured", SETTINGS[name])
    m = fit_method(method, t["base"], t["X"][rows], t["y"][rows], t["n"], TuneConfig(seed=seed, **config), donors=t["donors"][rows])
    return m.logits(t["Xt"]).argmax(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shots", nargs="*", type=int, default=[25, 0], help="0: all cells")
    parser.add_argument("--tasks", nargs="*", default=[*TASKS])
    parser.add_argument("--settings", nargs="*", default=[FROZEN, *SETTINGS])
    parser.add_argument("--bases", type=Path, default=Path(tempfile.gettempdir()) / "scimlora-bases", help="folder to keep the bases in")
    parser.add_argument("--out", type=Path, default=HERE / "SETTINGS.csv")
    args = parser.parse_args()
    os.environ["SCIMLORA_PROGRESS"] = "0"
    tasks, rows = {k: load(k, args.bases) for k in args.tasks}, []
    for name in args.settings:
        start = time.perf_counter()
        for task, t in tasks.items():
            for shots in args.shots:
                for seed in range(args.seeds):
                    f1 = f1_score(t["yt"], said(t, draw(t["y"], shots, seed), name, seed), average="macro", zero_division=0)
                    rows.append(dict(setting=name, task=task, cells_a_class=shots or "full", seed=seed, macro_f1=round(f1, 4)))
        table = pd.DataFrame(rows)
        table.to_csv(args.out, index=False)
        mean = table[table.setting == name].groupby("cells_a_class", sort=False).macro_f1.mean() * 100
        print(f"{name}: {dict(mean.round(1))}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__": main()
