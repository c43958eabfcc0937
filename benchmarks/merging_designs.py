"""Compare ways to teach a bundle a further type by 25 real cells, on cells that MERGING.md does not report. Part of `make bench-merging`.

The default of `scimlora.merge` was chosen by this table: pancreas (Baron's two training libraries; Enge), blood (Kang's training donors; Zheng; 3k) and liver
(Aizarani's training half), each cut again into training and test, the three commonest types of each taken out in turn. In place of the test cells of
`merging.py`, these were looked at.
"""
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import scipy.sparse as sp
from scipy.special import log_softmax, softmax
from sklearn.metrics import f1_score

from scimlora import merge as merging
from scimlora.classifier import Classifier
from scimlora.data import align_cells
from scimlora.examples import shared
from scimlora.genepath import class_profiles, directions
from scimlora.merge import merge, replay
from scimlora.predict import Predictor

SEED = 10  # of no draw that is reported
CELLS = 25


def half(a): return np.random.default_rng(1).random(a.n_obs) < 0.5


def tasks(sides, split):
    "Name → studies that the base lacks, and (training, test) cells."
    pancreas, blood, liver = (sides[t][0] for t in ("pancreas", "blood", "liver"))
    donor = blood.obs.donor.astype(str)
    out = {"Baron, library 2": (None, split(pancreas, (pancreas.obs.library == "lib2").to_numpy(), 8)), "Kang, training donors": (None, split(blood, donor.isin(sorted(set(donor))[:2]).to_numpy(), 8)),
           "Aizarani, training half": (None, split(liver, half(liver), 8))}
    for name, file, without in (("Enge", "pancreas_enge2017_cpm", ("enge",)), ("Zheng", "pbmc_facs_zheng2017", ("zheng", "3k")), ("3k", "pbmc_3k_10x", ("zheng", "3k"))):
        a = shared(file)
        out[name] = without, split(a, half(a), 8)
    return out


def refitted(before, few, taught, seed):
    """A bundle whose adapter stands still and whose lines are all fitted anew, on drawn and new cells.

    With `taught`, drawn cells are to get the old bundle's probabilities instead of their types (Li and Hoiem, Learning without Forgetting, 2016).
    """
    p, b = before.predictor, before.bundle
    drawn, new = align_cells(replay(b, p.genes, 60, seed), p.genes, "counts"), align_cells(few, p.genes)
    X, n, k = sp.vstack([drawn.X, new.X], "csr"), len(drawn), len(b.classes)
    y = np.append(np.repeat(np.arange(k), 60), np.full(len(new), k))
    z, frozen = p.embed(X).astype(np.float64) * p.base.latent ** 0.5, p.base.embed(X)
    P = directions(X, b.genepath.prior)

    def fitted(F, old):
        target = np.eye(k + 1)[y]
        if taught: target[:n, :k] = softmax(old[:n], axis=1)
        return soft_lines(F, target, len(y) / (k + 1) / np.bincount(y)[y])

    W, bias = fitted(P.toarray(), b.genepath.line(P, frozen))
    profile, level = class_profiles(new.X, np.zeros(len(new), int), 1)
    path = replace(b.genepath, weight=W.astype(np.float32), bias=bias.astype(np.float32), embedding=np.zeros((frozen.shape[1], k + 1), np.float32),
                   profile=np.hstack([b.genepath.profile, profile]), level=np.hstack([b.genepath.level, level]))
    W, bias = fitted(z, z @ p._W + p._b)
    return Classifier(Predictor(replace(b, classes=[*b.classes, few.obs.label.iloc[0]], genepath=path, head=merging._longer_head(W.T, bias)), p.base))


def soft_lines(F, target, share, C=30.0):
    "Multinomial logistic regression on probabilities: weights and biases."
    from scipy.optimize import minimize

    U, back = merging._span(F)
    size = U.shape[1] + 1, target.shape[1]

    def loss(t):
        t = t.reshape(size)
        logp = log_softmax(U @ t[:-1] + t[-1], axis=1)
        d = C * share[:, None] * (np.exp(logp) - target)
        return (t[:-1]**2).sum() / 2 - C * (share * (logp * target).sum(1)).sum(), np.vstack([U.T @ d + t[:-1], d.sum(0)]).ravel()

    return back(minimize(loss, np.zeros(size).ravel(), jac=True, method="L-BFGS-B", options=dict(maxiter=200)).x.reshape(size))


def added(before, few, **constants):
    "New lines beside old ones, with other constants than the default's, and without prediction sets, which cost most of the time."
    with patch.multiple(merging, _longer_sets=lambda *_: {}, **{f"_{k.upper()}": v for k, v in constants.items()}): return merge([before], cells=few, label="label", seed=SEED)


WAYS = {"a fine-tune anew": lambda b, few: merge([b], cells=few, label="label", seed=SEED, anew=True),
        "adapter kept, all lines fitted anew": lambda b, few: refitted(b, few, False, SEED),
        "the same, taught the old answers": lambda b, few: refitted(b, few, True, SEED),
        "old lines kept": lambda b, few: added(b, few, odds=0.0, shallow=(1000, 8000)),
        "old lines kept, ten times the penalty": lambda b, few: added(b, few, odds=0.0, shallow=(1000, 8000), loose=30.0),
        "old lines kept, shallow drawn cells": lambda b, few: added(b, few, odds=0.0),
        "the same, held back by odds of e (default)": added,
        "the same, held back by odds of e²": lambda b, few: added(b, few, odds=2.0)}


def scores(before, after, test, kind):
    "F1 of old types on their own cells, before and after; where their cells went; F1 of the new type."
    truth = test.obs.label.to_numpy()
    old = [c for c in before.classes_ if c in set(truth)]
    known, was, said = np.isin(truth, old), before.predict(test), after.predict(test)
    f1 = lambda s: f1_score(truth[known], s[known], average=None, labels=old, zero_division=0).mean()
    return dict(old_before=f1(was), old_after=f1(said), to_new=(said[known] == kind).mean(), to_old=((said != was) & (said != kind))[known].mean(), new=f1_score(truth == kind, said == kind))


def tried(sides, bases, split, some, without):
    "A row for each task, type and way."
    for task, (lacks, (train, test)) in tasks(sides, split).items():
        base, rng = bases(lacks or without), np.random.default_rng(SEED)
        for a in (train, test): a.obs["label"] = a.obs.cell_type.astype(str).to_numpy()
        for kind in train.obs.label.value_counts().index[:3]:
            before = Classifier.tune(some(train[(train.obs.label != kind).to_numpy()], SEED), "label", base=base, baselines=False, seed=SEED)
            few = train[rng.permutation(np.flatnonzero(train.obs.label == kind))[:CELLS]].copy()
            for way, make in WAYS.items(): yield dict(task=task, type=kind, way=way) | scores(before, make(before, few), test, kind)
            print(f"{task}, {kind}: designs done", flush=True)


def lines(t):
    "A line for each way: what old types lose, where it goes, and the new type."
    t = t.assign(change=100 * (t.old_after - t.old_before))
    for way, g in t.groupby("way", sort=False):
        yield [way, f"{g.change.mean():+.1f}", f"{g.change.min():+.1f}", f"{(g.change >= -1).sum()} of {len(g)}", *(f"{100 * g[k].mean():.1f}" for k in ("to_new", "to_old", "new"))]
