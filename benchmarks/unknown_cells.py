"""Compare scores that tell cells of an untaught kind from cells of taught ones.

    python benchmarks/unknown_cells.py

For each of three tasks, a quarter of the cell types at a time is left out of training. A bundle is tuned on the rest, and the held-out
donors' cells of taught types stand against (a) cells of the types left out, (b) doublets, sums of two real cells of different types,
and (c) empty droplets, 50 to 300 molecules drawn from the mean of all cells. Every score gets its area under the ROC curve. The base
has not seen the study: mini never saw Baron, the others are pretrained without it. Writes UNKNOWN.csv and UNKNOWN.md beside this
script.
"""
import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # with another number of threads a base or a fit is another one

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import scipy.sparse as sp  # noqa: E402
from scipy.special import logsumexp, softmax  # noqa: E402
from sklearn.covariance import LedoitWolf  # noqa: E402
from sklearn.metrics import roc_auc_score  # noqa: E402

from scimlora.adapters import adapted_layers  # noqa: E402
from scimlora.base import load_base, run_layers  # noqa: E402
from scimlora.calibration import centroid_distance, class_centroids, fit_temperature, spread_of  # noqa: E402
from scimlora.data import align_cells, log1p_cp10k, obs_column  # noqa: E402
from scimlora.examples import baron, shared  # noqa: E402
from scimlora.lora import TuneConfig, train_lora  # noqa: E402
from scimlora.pretrain import pretrain  # noqa: E402

FOLDS, MIN_CELLS = 4, 15
TASKS = {"Baron, library 3": (baron, "library", ["lib3"], ()), "Kang, donor 1244": (lambda: shared("pbmc_kang2018_ctrl"), "donor", ["1244"], ("kang",)),
         "Darmanis, AB_S7 and FB_S3": (lambda: shared("brain_darmanis2015"), "donor", ["AB_S7", "FB_S3"], ("darmanis",))}


def mahalanobis(z, centroids, precision):
    return np.stack([np.einsum("ij,jk,ik->i", z - c, precision, z - c) for c in centroids], 1).min(1)


def in_one_embedding(ref, y, z, name):
    "Scores that need an embedding only; larger is stranger."
    mu, = class_centroids(y, y.max() + 1, ref)
    near = 1 - np.sort(z @ ref.T, axis=1)[:, ::-1]
    return {f"centroid, {name}": centroid_distance(z, mu), f"Mahalanobis, {name}": mahalanobis(z, mu, LedoitWolf().fit(ref - mu[y]).precision_),
            f"5th neighbour, {name}": near[:, 4], f"15th neighbour, {name}": near[:, 14]}


def all_scores(ref, y, z, logits, temperature):
    "Scores of cells; `ref` and `z` are pairs of adapted and base embeddings."
    out = {"highest probability": 1 - softmax(logits / temperature, axis=1).max(1), "energy": -logsumexp(logits, axis=1)}
    for name, a, b in zip(("adapted", "base"), ref, z): out |= in_one_embedding(a, y, b, name)
    return out


SUMS = {"centroid, adapted + base": ("centroid, adapted", "centroid, base"), "energy + centroid, base": ("energy", "centroid, base"),
        "highest probability + centroid, base": ("highest probability", "centroid, base"), "Mahalanobis, adapted + base": ("Mahalanobis, adapted", "Mahalanobis, base")}


def with_sums(scores, held_out):
    "Add sums of scores, each in units of its spread over held-out cells of taught types."
    for name, parts in SUMS.items():
        center, scale = spread_of(np.stack([held_out[p] for p in parts], 1))
        scores[name] = ((np.stack([scores[p] for p in parts], 1) - center) / scale).sum(1)
    return scores


def doublets(linear, y, n, rng):
    i, j = rng.integers(0, len(y), (2, 4 * n))
    ok = np.flatnonzero(y[i] != y[j])[:n]
    return log1p_cp10k(linear[i[ok]] + linear[j[ok]])


def empty_droplets(linear, n, rng):
    p = np.asarray(linear.sum(0), dtype=float).ravel()
    return log1p_cp10k(sp.csr_matrix(np.stack([rng.multinomial(rng.integers(50, 300), p / p.sum()) for _ in range(n)]).astype(float)))


def one_fold(base, X, labels, test, left, seed):
    "Tune without the types in `left`; yield (what, score, AUROC)."
    rng, known = np.random.default_rng(seed), sorted(set(labels[labels != ""]) - set(left))
    rows = np.flatnonzero(~test & np.isin(labels, known))
    y = np.array([known.index(v) for v in labels[rows]])
    val = rng.random(len(rows)) < 0.2
    val &= np.bincount(y[~val], minlength=len(known))[y] > 0
    tuned = train_lora(base, X[rows[~val]], y[~val], len(known), TuneConfig(seed=seed, keep_best=False))
    layers, W, b = adapted_layers(base.weights, tuned.adapter_config, tuned.adapter), *(v.detach().numpy() for v in (tuned.head.linear.weight, tuned.head.linear.bias))
    embed = lambda M: (run_layers(layers, M), base.embed(M))
    logits = lambda z: z[0] * z[0].shape[1] ** 0.5 @ W.T + b
    ref, held = embed(X[rows[~val]]), embed(X[rows[val]])
    t = fit_temperature(logits(held), y[val])
    held = all_scores(ref, y[~val], held, logits(held), t)
    see = lambda M: with_sums(all_scores(ref, y[~val], (z := embed(M)), logits(z), t), held)
    taught = np.flatnonzero(test & np.isin(labels, known))
    linear = X[taught].expm1()
    strangers = {"untaught types": X[np.flatnonzero(np.isin(labels, left))], "doublets": doublets(linear, labels[taught], 300, rng), "empty droplets": empty_droplets(linear, 300, rng)}
    own = see(X[taught])
    for what, M in strangers.items():
        theirs = see(M)
        for name in own: yield what, name, roc_auc_score(np.repeat([0, 1], [len(taught), M.shape[0]]), np.r_[own[name], theirs[name]])


def rows_of(task, seed, bases):
    read, donor, held_out, without = TASKS[task]
    a, name = read(), "-".join(without) or "mini"
    if name not in bases: bases[name] = load_base("mini") if not without else pretrain(Path(tempfile.mkdtemp()) / name, without, index=False)
    labels = obs_column(a.obs, "cell_type").astype(str)
    n = pd.Series(labels).map(pd.Series(labels).value_counts()).to_numpy()
    labels[n < MIN_CELLS] = ""
    X, test = align_cells(a, bases[name].genes).X, np.isin(a.obs[donor].astype(str), held_out)
    types = np.random.default_rng(seed).permutation(sorted(set(labels) - {""}))
    for f in range(FOLDS):
        for what, score, auroc in one_fold(bases[name], X, labels, test, types[f::FOLDS], seed): yield dict(task=task, seed=seed, fold=f, against=what, score=score, auroc=auroc)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    args, bases, rows = parser.parse_args(), {}, []
    for task in TASKS:
        for seed in range(args.seeds): rows += rows_of(task, seed, bases)
    t, here = pd.DataFrame(rows), Path(__file__).parent
    t.round(4).to_csv(here / "UNKNOWN.csv", index=False)
    wide = t.groupby(["score", "against", "task"]).auroc.mean().unstack().assign(mean=lambda d: d.mean(1))
    mean = wide["mean"].unstack().assign(all=lambda d: d.mean(1)).sort_values("all", ascending=False)
    lines = ["# Cells of an untaught kind", "", f"Made by `python benchmarks/unknown_cells.py --seeds {args.seeds}` (see its head). Area under the ROC curve × 100, mean over "
             f"{len(TASKS)} tasks, {FOLDS} folds of left-out types and {args.seeds} seeds; ± is the standard deviation over tasks, folds and seeds of the first column.", "",
             "| score | untaught types | doublets | empty droplets | mean | " + " | ".join(TASKS) + " |", "| --- |" + " ---: |" * (4 + len(TASKS))]
    for name, m in mean.iterrows():
        sd = t[(t.score == name) & (t.against == "untaught types")].auroc.std()
        tasks = " | ".join(f"{100 * wide.loc[(name, 'untaught types'), k]:.1f}" for k in TASKS)
        lines.append(f"| {name} | {100 * m['untaught types']:.1f} ± {100 * sd:.1f} | {100 * m['doublets']:.1f} | {100 * m['empty droplets']:.1f} | {100 * m['all']:.1f} | {tasks} |")
    lines += ["", "The columns with a task's name are for untaught types alone. `scimlora` uses *centroid, adapted + base*."]
    (here / "UNKNOWN.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__": main()
