"""Measure what a base forgets when it is taught, at every strength of the adapter, and what the strength is worth on the task.

    make bench-forgetting

For every task of `suite/tasks.py` a base is pretrained without the task's studies and without a quarter of the cells of every other study.
Those cells, whose labels are the base's own, are the ones that may be forgotten. They are cut in two: one half is given to
`Classifier.tune` as `retention`, which chooses the strength by it; all that is reported is measured on the other half. There, half of
the cells lend their labels to the rest, by neighbours and by a line (`scimlora.forgetting`). Macro-F1 is of the task's test cells, which
no choice looks at. 25 training cells a class, three draws, and all of them once. The same again with other settings, as `TRIED` lists them.

Runs are kept under runs/forgetting under a key of the code; the same command goes on where it was stopped. Writes FORGETTING.csv (every run
and strength), FORGETTING_TRIED.csv (the same of what was tried), FORGETTING.md and FORGETTING.png.
"""
import argparse
import os
import sys
import warnings
from dataclasses import replace
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from unittest.mock import patch
from zlib import crc32

os.environ.setdefault("SCIMLORA_PROGRESS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # with another number of threads a base or a fit is another one

import anndata as ad  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import scipy.sparse as sp  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from scimlora.adapters import adapted_layers  # noqa: E402
from scimlora.base import load_base, run_layers  # noqa: E402
from scimlora.classifier import Classifier  # noqa: E402
from scimlora.core import read_json, write_json  # noqa: E402
from scimlora.data import align_cells, gene_match, log1p_cp10k  # noqa: E402
from scimlora.evaluation import COLOURS, score  # noqa: E402
from scimlora.forgetting import forgetting, halves  # noqa: E402
from scimlora.predict import Predictor  # noqa: E402
from scimlora.pretrain import corpus_studies, pretrain  # noqa: E402
from suite.code import code_of, with_imports  # noqa: E402
from suite.report import markdown, spread  # noqa: E402
from suite.store import machine  # noqa: E402
from suite.tasks import LABEL, TASKS, Draw, load_task, slug  # noqa: E402

HERE = Path(__file__).parent
STRENGTHS, HELD_OUT, LIMIT = (0.0, 0.25, 0.5, 0.75, 1.0), 0.25, 1.0
TRIED = {"distill 1": dict(distill=1.0)}


# Bases, and the cells that they have not seen -------------------------------------------------------------------------


def rows_of(study, rows):
    "Some cells of a study."
    return replace(study, X=study.X[rows], linear=study.linear[rows], sets=study.sets[rows], obs=study.obs.iloc[np.flatnonzero(rows)])


def cut(studies):
    "Every study in two: cells to pretrain on, and those held out."
    held = [np.random.default_rng(crc32(s.name.encode())).random(len(s.sets)) < HELD_OUT for s in studies]
    return [rows_of(s, ~h) for s, h in zip(studies, held)], [rows_of(s, h) for s, h in zip(studies, held)]


def labelled(studies, base):
    "Held-out cells as one AnnData in the base's gene order, with the base's own class as `cell_type`; only cells that may be of one class."
    own = [rows_of(s, np.array([x in set(base.labels.values()) for x in s.sets])) for s in studies]
    X = sp.vstack([log1p_cp10k(s.linear @ gene_match(s.var, base.genes)[0].matrix) for s in own], format="csr")
    obs = pd.DataFrame(dict(cell_type=np.concatenate([s.sets for s in own]).astype(str), study=np.repeat([s.name for s in own], [len(s.sets) for s in own])), index=[str(i) for i in range(X.shape[0])])
    a = ad.AnnData(X, obs=obs, var=pd.DataFrame(index=base.genes))
    return a[np.diff(X.indptr) > 0].copy()


class Bases:
    "Pretrain bases without some studies and without the held-out cells of the others; open those that are there."

    def __init__(self, folder): self.folder = folder

    @cache
    def __call__(self, without):
        "The base, and its held-out cells in two halves: to choose by, and to measure on."
        seen, held = cut(corpus_studies(without))
        path = self.folder / f"{'-'.join(without) or 'all'}-{code_of('scimlora.pretrain', 'scimlora.base', 'scimlora.data', 'scimlora.genes')[:8]}"
        base = load_base(path) if path.is_dir() else pretrain(path, studies=seen, index=False)
        a = labelled(held, base)
        return base, *(a[np.sort(rows)].copy() for rows in halves(a.obs.cell_type.to_numpy(str), seed=1))


# Runs -----------------------------------------------------------------------------------------------------------------


def adapter_alone(predictor, cells, labels, strengths):
    "Macro-F1 of the adapted encoder without the gene path."
    b = predictor.bundle
    alone = Predictor(replace(b, genepath=None), predictor.base)
    for s in strengths:
        z = run_layers(adapted_layers(predictor.base.weights, b.adapter_config, b.adapter, s), cells.X)
        yield score(labels, alone.proba(cells, z, z), b.classes)["macro_f1"]


def one_run(draw, base, to_choose, to_measure):
    "Tune with retention cells and measure at every strength: one dict a strength."
    clf = Classifier.tune(draw.adata, LABEL, draw.task.donor, base=base, retention=to_choose, baselines=False, seed=draw.seed)
    chosen = clf.bundle.manifest["choice"].get("strength", 1.0)
    test = draw.task.test.adata
    cells, labels = align_cells(test, base.genes), test.obs[LABEL].astype(str).to_numpy(object)
    alphas = [s / chosen for s in STRENGTHS]  # the bundle's adapter is kept at the chosen strength
    curve = forgetting(clf.predictor, align_cells(to_measure, base.genes).X, to_measure.obs.cell_type.to_numpy(str), (cells, labels), alphas)
    curve["alpha"], curve["adapter_macro_f1"] = STRENGTHS, list(adapter_alone(clf.predictor, cells, labels, alphas))
    about = dict(task=draw.task.name, cells_a_class=draw.shots or "full", draw=draw.seed, chosen=chosen, encoder_weight=clf.bundle.calibration.encoder_weight,
                 retention_cells=to_measure.n_obs, retention_labels=to_measure.obs.cell_type.nunique())
    return [about | r for r in curve.rename(columns=dict(alpha="strength", target_macro_f1="macro_f1")).to_dict("records")]


def kept_run(cache, draw, bases, tried=""):
    "A run from the cache, or made now; with the settings of `TRIED`, if one is named."
    key = sha256("".join([code_of(*(f"scimlora.{m}" for m in with_imports("classifier"))), code_of(str(HERE / "forgetting.py"), names=("one_run", "adapter_alone", "cut", "labelled")), draw.task.content]).encode()).hexdigest()[:12]
    path = cache / "rows" / f"{slug(draw.task.name)}-{draw.shots}-{draw.seed}-{f'{slug(tried)}-' if tried else ''}{key}.json"
    if not path.exists():
        with patch.object(Classifier, "tune", partial(Classifier.tune, **TRIED.get(tried, {}))): write_json(path, dict(rows=one_run(draw, *bases(draw.task.without))))
        print(f"{draw.task.name}, {draw.shots or 'full'}, draw {draw.seed}{f', {tried}' if tried else ''}", flush=True)
    return [r | dict(tried=tried) if tried else r for r in read_json(path)["rows"]]


# The page -------------------------------------------------------------------------------------------------------------


def with_loss(t):
    "Add what is kept, the mean of both probes, and the points lost against the same run's base."
    t = t.assign(kept=(t.knn + t.linear) / 2)
    base = t[t.strength == 0].set_index(["task", "cells_a_class", "draw"])
    at = pd.MultiIndex.from_frame(t[["task", "cells_a_class", "draw"]])
    return t.assign(**{f"{k}_loss": 100 * (base[k].reindex(at).to_numpy() - t[k].to_numpy()) for k in ("knn", "linear", "kept")})


def chosen_lines(t):
    "One line a task and number of cells: at full strength, and at the one that `tune` chose."
    for (task, shots), g in t.groupby(["task", "cells_a_class"], sort=False):
        whole, at = g[g.strength == 1], g[g.strength == g.chosen]
        yield [task, str(shots), spread(g[g.strength == 0].kept), ", ".join(f"{c:g}" for c in at.chosen), *(spread(x.kept_loss, 1) for x in (whole, at)),
               *(spread(x[k]) for k in ("macro_f1", "adapter_macro_f1") for x in (whole, at))]


def target_lines(t):
    "Whether the loss at the chosen strength stays within the limit."
    at = t[t.strength == t.chosen].groupby(["task", "cells_a_class"], sort=False)[["knn_loss", "linear_loss", "kept_loss"]].mean()
    worst = at.kept_loss.idxmax()
    over = at.kept_loss.max() - LIMIT
    yield f"- Lost at the chosen strength: {at.kept_loss.mean():+.1f} points on average over {len(at)} settings (neighbours {at.knn_loss.mean():+.1f}, line {at.linear_loss.mean():+.1f})."
    yield f"- The worst setting: {at.kept_loss.max():+.1f} ({worst[0]}, {worst[1]} cells a class; wanted: {LIMIT:.1f} or less); " + ("**reached**." if over <= 0 else f"**missed** by {over:.1f} points.")
    yield f"- Settings that lose more than {LIMIT:.0f} point: {(at.kept_loss > LIMIT).sum()} of {len(at)} at the chosen strength, {(t[t.strength == 1].groupby(['task', 'cells_a_class']).kept_loss.mean() > LIMIT).sum()} at full strength."
    off = t[t.strength == 0]
    yield f"- Switched off, the encoder is the base: cosine {off.cosine.min():.6f} at least, neighbour overlap {off.neighbour_overlap.min():.0%}."


def curve_lines(t):
    "Means over tasks by strength."
    for (shots, s), g in t.groupby(["cells_a_class", "strength"], sort=False):
        yield [str(shots), f"{s:g}", *(f"{100 * g[k].mean():.1f}" for k in ("knn", "linear")), f"{g.kept_loss.mean():+.1f}", f"{g.cosine.mean():.3f}", f"{100 * g.neighbour_overlap.mean():.0f}", *(f"{100 * g[k].mean():.1f}" for k in ("adapter_macro_f1", "macro_f1"))]


def tried_lines(t, tried):
    "What other settings give, at the chosen strength, beside the default: a summary and a table for each."
    at = lambda x: x[x.strength == x.chosen].groupby(["task", "cells_a_class"], sort=False)[["kept_loss", "macro_f1", "adapter_macro_f1"]].mean()
    now = at(t)
    for name, g in tried.groupby("tried", sort=False):
        new = at(g)
        gain = 100 * (new - now.loc[new.index])[["macro_f1", "adapter_macro_f1"]].mean()
        between = new.index.get_level_values("task").str.contains("→")
        of = 100 * (new - now.loc[new.index]).adapter_macro_f1
        yield from (f"In place of LoRA's default, `{name.replace(' ', '=')}`: lost {new.kept_loss.mean():+.1f} points on average and {new.kept_loss.max():+.1f} at worst (the default: {now.kept_loss.mean():+.1f} and {now.kept_loss.max():+.1f}); "
                    f"macro-F1 {gain.macro_f1:+.1f}, of the adapter alone {gain.adapter_macro_f1:+.1f}: {of[between].mean():+.1f} between laboratories and {of[~between].mean():+.1f} within a study.", "")
        lines = [[task, str(shots), *(f"{x.loc[(task, shots)].kept_loss:+.1f}" for x in (now, new)), *(f"{100 * x.loc[(task, shots)][k]:.1f}" for k in ("macro_f1", "adapter_macro_f1") for x in (now, new))] for task, shots in new.index]
        yield from (*markdown(["task", "cells a class", "lost, default", f"lost, {name}", "macro-F1, default", f"macro-F1, {name}", "of the adapter alone, default", f"of the adapter alone, {name}"], lines), "")


def page(t, tried=None):
    "FORGETTING.md as text."
    n = t.groupby("task").retention_cells.first()
    lines = ["# What a base forgets", "", f"Made by `make bench-forgetting`, which says how in the head of `forgetting.py`. {n.min():,} to {n.max():,} cells held out of pretraining, of {t.retention_labels.min()} to {t.retention_labels.max()} of the base's own labels; "
             f"{t[t.cells_a_class != 'full'].draw.nunique()} draws of training cells, and all of them once. *Kept* is the mean of two accuracies over labels, by neighbours and by a line, × 100; *lost* is in points against the adapter off, ± the standard deviation over draws. Every run and strength stands in `FORGETTING.csv`.",
             "", *target_lines(t), "", "![Kept and gained by strength](FORGETTING.png)", "", "## By task", "",
             *markdown(["task", "cells a class", "kept, off", "strength chosen", "lost, full strength", "lost, chosen", "macro-F1, full strength", "macro-F1, chosen", "of the adapter alone, full strength", "of the adapter alone, chosen"], list(chosen_lines(t))),
             "", "`tune` chooses by training cells held out and by the other half of the retention cells, never by these numbers.", "", "## By strength", "", "Means over tasks and draws.", "",
             *markdown(["cells a class", "strength", "by neighbours", "by a line", "lost", "cosine with the base's", "neighbours kept, %", "macro-F1 of the adapter alone", "macro-F1"], list(curve_lines(t)))]
    if tried is not None: lines += ["", "## What was tried", "", *list(tried_lines(t, tried))[:-1]]
    return "\n".join([*lines, "", "## Made on", "", f"- {machine()}"]) + "\n"


def figure(t):
    "Above what is lost by strength, below what the adapter is worth on the task; a column for few cells and one for all."
    shots = list(t.cells_a_class.unique())
    fig = Figure(figsize=(5.2 * len(shots) + 2.2, 7), layout="constrained")
    axes = fig.subplots(2, len(shots), sharex=True, sharey="row", squeeze=False)
    for column, s in zip(axes.T, shots):
        for i, (task, g) in enumerate(t[t.cells_a_class == s].groupby("task", sort=False)):
            m = g.groupby("strength")[["kept_loss", "adapter_macro_f1"]].mean()
            style = dict(color=COLOURS[i % len(COLOURS)], marker="osD^vPX*"[i % 8], ls="-" if i < 4 else "--", ms=5, label=task)
            column[0].plot(m.index, -m.kept_loss, **style)
            column[1].plot(m.index, 100 * m.adapter_macro_f1, **style)
        column[0].axhline(-LIMIT, color="0.5", lw=1, ls=":")
        column[0].set_title("all training cells" if s == "full" else f"{s} training cells a class")
        column[1].set_xlabel("strength of the adapter (0: base, 1: as trained)")
        for ax in column: ax.grid(axis="y", alpha=.3); ax.set_xticks(STRENGTHS)
    axes[0, 0].set_ylabel("points of accuracy on the base's own labels")
    axes[1, 0].set_ylabel("macro-F1 × 100 of the adapter alone")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return fig


def write(rows, out, tried=()):
    "Write FORGETTING.csv, .md and .png, and FORGETTING_TRIED.csv if something else was tried."
    t, other = pd.DataFrame(rows), pd.DataFrame(tried)
    t.round(5).to_csv(out / "FORGETTING.csv", index=False)
    if len(other): other.round(5).to_csv(out / "FORGETTING_TRIED.csv", index=False)
    t = with_loss(t)
    other = pd.concat([with_loss(g) for _, g in other.groupby("tried", sort=False)]) if len(other) else None
    (out / "FORGETTING.md").write_text(page(t, other), encoding="utf-8")
    figure(t).savefig(out / "FORGETTING.png", dpi=110, metadata={"Software": None})


def main(argv=None):
    warnings.filterwarnings("ignore")
    matplotlib.use("agg")
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tasks", nargs="*", default=[*TASKS], metavar="TASK", help="one or more of: " + "; ".join(TASKS))
    p.add_argument("--shots", nargs="*", type=int, default=[25, 0], help="cells a class; 0: all cells")
    p.add_argument("--seeds", type=int, default=3, help="draws of training cells")
    p.add_argument("--cache", type=Path, default=HERE.parent / "runs" / "forgetting", help="where runs and bases are kept")
    p.add_argument("--out", type=Path, default=HERE, help="where FORGETTING.* go")
    args = p.parse_args(argv)
    bases, rows, other = Bases(args.cache / "bases"), [], []
    for name in args.tasks:
        task = load_task(name, lambda without: bases(without)[0])
        for shots in args.shots:
            for seed in range(args.seeds if shots else 1):
                draw = Draw(task, shots, seed)
                rows += kept_run(args.cache, draw, bases)
                for tried in TRIED: other += kept_run(args.cache, draw, bases, tried)
    write(rows, args.out, other)


if __name__ == "__main__": sys.exit(main())
