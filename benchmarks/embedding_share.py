"""Choose when the gene path's line reads the frozen embedding too, on held-out cells that no benchmark reports.

    make bench-coverage

Where the base knows the tissue, its embedding beside the genes makes the line better; where it does not, it misleads, above all on cells of
another laboratory. What tells the two apart must be seen from the training cells and the base alone: `scimlora.genepath.coverage`. Tasks
are between donors, halves and laboratories of blood, pancreas, liver and brain, some of them twice: on a base without the task's
studies, and on one that has seen nothing of the tissue. Test cells of science.py are not touched. Writes COVERAGE.csv: coverage, and
the macro-F1 of the line by the embedding's share, for every task, number of cells and draw.
"""
import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("SCIMLORA_PROGRESS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # with another number of threads a base or a fit is another one

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from sklearn.metrics import f1_score  # noqa: E402

from scimlora.base import Base  # noqa: E402
from scimlora.data import align_cells, obs_column  # noqa: E402
from scimlora.examples import baron, shared  # noqa: E402
from scimlora.genepath import coverage, fit_genepath  # noqa: E402
from scimlora.genes import match_genes  # noqa: E402
from scimlora.pretrain import pretrain  # noqa: E402
from settings import draw  # noqa: E402
from suite.tasks import PBMC3K, ZHENG  # noqa: E402

HERE = Path(__file__).parent
SHARES = (0.0, 0.2, 0.35)
NO_BLOOD, NO_PANCREAS, NO_BRAIN = ("kang", "zanini", "zheng", "3k", "croote", "breast"), ("enge", "pdac"), ("darmanis", "pollen", "tirosh", "devculture")
HELD_OUT = {"1244", "1015", "AB_S7", "FB_S3"}  # donors that are test cells elsewhere

# Labels in words that two studies share.
ZANINI = {"classical monocyte": "monocyte", "nonclassical monocyte": "CD16 monocyte", "B cell": "B", "NK cell": "NK", "T cell": "T", "cDC": "DC", "pDC": "pDC", "plasmablast": "plasma"}
KANG = {"CD14 Mono": "monocyte", "CD16 Mono": "CD16 monocyte", "B": "B", "B Activated": "B", "NK": "NK", "CD4 Memory T": "T", "CD4 Naive T": "T", "CD8 T": "T", "T activated": "T", "DC": "DC"}
KANG_T = {"CD14 Mono": "monocyte", "B": "B", "B Activated": "B", "NK": "NK", "CD4 Memory T": "CD4 T", "CD4 Naive T": "CD4 T", "CD8 T": "CD8 T"}
BREAST = {"CD8_T": "T", "CD4_T": "T", "Treg": "T", "gdT": "T", "B_memory": "B", "B_naive": "B", "B_GC": "B", "NK": "NK", "plasma": "plasma", "DC": "DC", "pDC": "pDC", "MDC": "monocyte"}
BREAST_T = {"CD8_T": "CD8 T", "CD4_T": "CD4 T", "Treg": "CD4 T", "B_memory": "B", "B_naive": "B", "NK": "NK", "MDC": "monocyte"}
PDAC = {"Ductal_CRISP3_high-centroacinar_like": "ductal", "Ductal_terminal_ductal_like": "ductal", "Ductal_MHC_Class_II": "ductal", "Ductal_APOL1_high-hypoxic": "ductal",
        "Macrophages_A": "macrophage", "Macrophages_B": "macrophage", "Mast_cells": "mast", "Acinar_cells": "acinar", "Endothelial_cells": "endothelial"}


def study(name, labels=None, column=None, values=None):
    "A study, or the cells with some values of a column; never those that are test cells elsewhere. And the map of its labels."
    def get():
        a = baron() if name == "baron" else shared(name)
        keep = ~a.obs.donor.astype(str).isin(HELD_OUT).to_numpy() if "donor" in a.obs else np.ones(a.n_obs, bool)
        if name == "baron": keep &= (a.obs.library != "lib3").to_numpy()
        if column: keep &= a.obs[column].astype(str).isin(values).to_numpy()
        return a[keep], labels
    return get


def half(name, first):
    "One half of a study's cells, drawn by cell."
    def get():
        a = shared(name)
        side = np.random.default_rng(0).random(a.n_obs) < 0.5
        return a[side if first else ~side], None
    return get


_kang, _zanini, _zheng, _3k, _breast, _pdac, _liver, _brain = ("pbmc_kang2018_ctrl", "blood_zanini2018_cpm", "pbmc_facs_zheng2017", "pbmc_3k_10x", "breast_tumour_immune_spectra_lognorm",
                                                                "pancreas_pdac_moncada2020", "liver_aizarani2019_cpm", "brain_darmanis2015")
_DONORS = [study(_brain, None, "donor", d) for d in (("AB_S1", "AB_S3", "AB_S5", "FB_S1"), ("AB_S2", "AB_S4", "AB_S8", "FB_S2"))]
_PAIRS = {"Kang → Zanini": (study(_kang, KANG), study(_zanini, ZANINI), ("kang", "zanini")), "Zanini → Kang": (study(_zanini, ZANINI), study(_kang, KANG), ("kang", "zanini")),
          "Zheng → Kang": (study(_zheng, ZHENG), study(_kang, KANG_T), ("kang", "zheng", "3k")), "3k → Kang": (study(_3k, PBMC3K), study(_kang, KANG_T), ("kang", "zheng", "3k")),
          "Zanini, half": (half(_zanini, True), half(_zanini, False), ("zanini",)), "Baron → Moncada": (study("baron"), study(_pdac, PDAC), ("pdac",)),
          "Moncada → Baron": (study(_pdac, PDAC), study("baron"), ("pdac",)), "Baron, library 2": (study("baron", None, "library", ["lib1"]), study("baron", None, "library", ["lib2"]), ("pdac",)),
          "Darmanis, donors": (*_DONORS, ("darmanis",))}
_WITHOUT = {"Moncada": NO_PANCREAS, "Baron": NO_PANCREAS, "Darmanis": NO_BRAIN}
TASKS = {"Kang, donor 1016": (study(_kang, None, "donor", ["101", "107", "1039"]), study(_kang, None, "donor", ["1016"]), ("kang",)),
         "Kang, donors 101 and 107": (study(_kang, None, "donor", ["1016", "1039"]), study(_kang, None, "donor", ["101", "107"]), ("kang",)),
         "Breast tumour → Zanini": (study(_breast, BREAST), study(_zanini, ZANINI), ("breast", "zanini")), "Kang → breast tumour": (study(_kang, KANG_T), study(_breast, BREAST_T), ("kang", "breast")),
         "Aizarani, half": (half(_liver, True), half(_liver, False), ("aizarani",)), **_PAIRS,
         **{f"{k}, tissue unseen": (a, b, next((w for name, w in _WITHOUT.items() if name in k), NO_BLOOD)) for k, (a, b, _) in _PAIRS.items()}}


def load(task, folder):
    "Cells, classes and measured genes of a task, aligned to a base that has not seen its studies."
    *sides, without = TASKS[task]
    path = folder / "-".join(without)
    base = Base.load(path) if path.exists() else pretrain(path, without, index=False)
    read = [get() for get in sides]
    names = [obs_column(a.obs, "cell_type") if m is None else np.array([m.get(v) for v in obs_column(a.obs, "cell_type")], dtype=object) for a, m in read]
    n = pd.Series([v for v in names[0] if v is not None]).value_counts()
    classes = sorted((set(n.index[n >= 5]) & set(names[1])) - {"unknown", None})
    keep = [np.isin(v.astype(str), classes) for v in names]
    units = ["log1p_cp10k" if str(a.uns.get("value", "")).startswith("log-normalised") else "auto" for a, _ in read]
    X, Xt = (align_cells(a[k], base.genes, u).X for (a, _), k, u in zip(read, keep, units))
    y, yt = (np.array([classes.index(v) for v in v[k]]) for v, k in zip(names, keep))
    measured = [match_genes(list(a.var_names), base.genes).matrix.getnnz(0) > 0 for a, _ in read]
    return dict(base=base, X=X, Xt=Xt, y=y, yt=yt, n=len(classes), measured=measured, z=base.embed(X), zt=base.embed(Xt))


def one_draw(t, shots, seed):
    "Coverage of the training cells, and macro-F1 on the test cells by the embedding's share."
    rows, (seen, seen_t) = draw(t["y"], shots, seed), t["measured"]
    out = dict(coverage=coverage(t["base"], t["z"][rows], t["y"][rows]))
    for share in SHARES:
        path = fit_genepath(t["base"], t["X"][rows], t["y"][rows], t["n"], seen, share=share, seed=seed)
        out[f"share {share:g}"] = f1_score(t["yt"], path.logits(t["Xt"], t["zt"], seen_t).argmax(1), average="macro", zero_division=0)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shots", nargs="*", type=int, default=[5, 10, 25, 0], help="0: all cells")
    parser.add_argument("--tasks", nargs="*", default=[*TASKS])
    parser.add_argument("--bases", type=Path, default=Path(tempfile.gettempdir()) / "scimlora-bases", help="folder to keep the bases in")
    parser.add_argument("--out", type=Path, default=HERE / "COVERAGE.csv")
    args = parser.parse_args()
    rows = []
    for task in args.tasks:
        start, t = time.perf_counter(), load(task, args.bases)
        rows += [dict(task=task, unseen=task.endswith("unseen"), cells_a_class=shots or "full", draw=seed, **one_draw(t, shots, seed)) for shots in args.shots for seed in range(args.seeds if shots else 1)]
        pd.DataFrame(rows).round(4).to_csv(args.out, index=False)
        print(f"{task}: coverage {np.mean([r['coverage'] for r in rows if r['task'] == task]):.2f}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__": main()
