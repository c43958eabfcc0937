"""Measure how often prediction sets hold the true label, on donors and laboratories that were held out.

    make bench-conformal

Tasks and bases are those of science.py. For each, a bundle is tuned on all training cells with all defaults, and the sets of its
calibration are asked for the test cells. *As served*: a threshold for each type, donors alike, and never an empty set, since a cell
without any label helps nobody. Beside it, the same without that rule, and one threshold for all types. A set that is never empty is
right at least as often as the label itself, so what is wanted below the accuracy cannot be met by it. Writes CONFORMAL.csv and
CONFORMAL.md.
"""
import argparse
import os
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("SCIMLORA_PROGRESS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # with another number of threads a base or a fit is another one

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from scimlora import calibration  # noqa: E402
from scimlora.calibration import MISSES, conformal_thresholds  # noqa: E402
from scimlora.classifier import Classifier  # noqa: E402
from suite.report import markdown  # noqa: E402
from suite.store import machine  # noqa: E402
from suite.tasks import LABEL, TASKS, Bases, Draw, load_task  # noqa: E402

HERE = Path(__file__).parent
WAYS = ("as served", "a threshold a type, empty sets allowed", "one threshold, empty sets allowed", "one threshold")


def tuned(draw):
    "A classifier, and what its sets were calibrated on: probabilities and classes of the cells held out in training."
    seen = []

    def fit(proba, y, donors=None, miss=0.1):
        seen[:] = [(proba, np.asarray(y))]
        return conformal_thresholds(proba, y, donors, miss)

    with patch.object(calibration, "conformal_thresholds", fit):
        clf = Classifier.tune(draw.adata, LABEL, draw.task.donor, base=draw.task.base, baselines=False, seed=draw.seed)
    return clf, *seen[0]


def sets(way, clf, proba, held, y, miss):
    "Prediction sets of cells, (n_cells, n_classes)."
    cal = clf.bundle.calibration
    if way == "as served": return cal.sets(proba, miss)
    if way.startswith("one"):
        own = held[np.arange(len(y)), y]
        level = np.ceil((len(y) + 1) * (1 - miss)) / len(y)
        found = proba >= (0 if level > 1 else np.quantile(own, 1 - level, method="lower"))
    else: found = proba >= np.array(cal.conformal[str(miss)])
    return found if "empty" in way else found | (proba == proba.max(1, keepdims=True))


def measured(task, seed):
    "Rows of the table for one task."
    clf, held, y = tuned(Draw(task, 0, seed))
    proba = clf.predict_proba(task.test.adata, task.test.units)
    truth = np.array([list(clf.classes_).index(task.classes[c]) for c in task.yt])
    for miss in MISSES:
        for way in WAYS:
            found = sets(way, clf, proba, held, y, miss)
            right = found[np.arange(len(truth)), truth]
            yield dict(task=task.name, wanted=1 - miss, way=way, held=right.mean(), labels=found.sum(1).mean(), no_label=(~found.any(1)).mean(),
                       accuracy=(proba.argmax(1) == truth).mean(), cells=len(truth), calibrated_on=len(y))


def page(t):
    "The lines of CONFORMAL.md."
    lines = ["# Prediction sets", "", "Made by `make bench-conformal`, which says how in the head of `conformal.py`. How often the set of a held-out cell holds its true label, %; in brackets, labels a set.", ""]
    off = 100 * (t.held - t.wanted)
    for way, g in t.groupby("way", sort=False):
        d = off[g.index]
        lines.append(f"- {way[0].upper()}{way[1:]}: {d.abs().mean():.1f} points from what was wanted on average over {len(d)} rows, from {d.min():+.1f} to {d.max():+.1f}; within 2 points (wanted) in {(d.abs() <= 2).sum()}, "
                     f"below by more in {(d < -2).sum()}; {100 * g.no_label.mean():.1f} % of the sets empty.")
    served = t[t.way == "as served"]
    can = 100 * (served.held - served[["wanted", "accuracy"]].max(axis=1))
    for where, rows in (("held-out donors", ~served.task.str.contains("→")), ("another laboratory, where nothing is promised", served.task.str.contains("→"))):
        lines.append(f"- As served, on {where}, against the larger of what was wanted and the accuracy, below which a set that is never empty cannot be: {can[rows].abs().mean():.1f} points off on average, "
                     f"from {can[rows].min():+.1f} to {can[rows].max():+.1f}; within 2 points in {(can[rows].abs() <= 2).sum()} of {rows.sum()}.")
    table = [[task, f"{100 * g.accuracy.iloc[0]:.1f}", f"{g.calibrated_on.iloc[0]:,}", f"{100 * wanted:.0f}", *(f"{100 * r.held:.1f} ({r.labels:.2f})" for r in g.itertuples())]
             for (task, wanted), g in t.groupby(["task", "wanted"], sort=False)]
    return lines + ["", *markdown(["task", "accuracy", "cells calibrated on", "wanted", *WAYS], table), "", "## Made on", "", f"- {machine()}"]


def main():
    warnings.filterwarnings("ignore")
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tasks", nargs="*", default=[*TASKS], metavar="TASK", help="one or more of: " + "; ".join(TASKS))
    p.add_argument("--bases", type=Path, default=HERE.parent / "runs" / "science" / "bases", help="where bases are kept, as for science.py")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=HERE)
    args = p.parse_args()
    for task in args.tasks:
        if task not in TASKS: sys.exit(f"no task '{task}'; choose from: {'; '.join(TASKS)}")
    bases, rows = Bases(args.bases), []
    for name in args.tasks:
        rows += measured(load_task(name, bases), args.seed)
        print(name, flush=True)
    t = pd.DataFrame(rows)
    t.round(4).to_csv(args.out / "CONFORMAL.csv", index=False)
    (args.out / "CONFORMAL.md").write_text("\n".join(page(t)) + "\n", encoding="utf-8")


if __name__ == "__main__": main()
