"""Compare ways to make one classifier out of bundles of several tissues, on donors and cells that were held out.

    make bench-merging

Pancreas (Baron, a library held out), blood (Kang, two donors), liver (Aizarani, half of the cells), brain (Darmanis, two donors). The base was
pretrained without these studies. Each tissue gets a bundle of its own, with at most 200 cells a type. Then one classifier over all types: merged by
`scimlora.merge` from cells drawn from the bundles' profiles; a fine-tune on all real cells together; each cell asked of the bundle that it is least unlike, or
of all of them by how unlike it is; and sums of the adapters (mean, sum, SVD, TIES, DARE), each with a head fitted on the same drawn cells. Adapters laid
side by side (PEFT's cat) compute what their sum does, exactly. With 5 or 25 real cells a type, the adapters' weights in the sum are learned, for each adapter or
for each adapter and layer, and the head is fitted on drawn and real cells together; beside that, merging with the same real cells. What concerns the encoder
only is compared by the encoder alone; strangers are then told by the distance to the nearest type in its embedding. Strangers are cell lines and skin (Pollen).

What the merged adapter forgets is measured as in `forgetting.py`: on a base that was also kept from a quarter of the other studies' cells, the bundles are
tuned and merged again, and the merged adapter is faded in.

A type is also taught later, by 25 real cells, to a bundle that lacks it. How that is done was chosen in `merging_designs.py`, on other cells.
Writes MERGING.csv, MERGING_KEPT.csv, MERGING_LATER.csv, MERGING_TRIED.csv, MERGING.md and two pictures.
"""
import argparse
import os
import warnings
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("SCIMLORA_PROGRESS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # with another number of threads a base or a fit is another one

import anndata as ad  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import scipy.sparse as sp  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import f1_score, roc_auc_score  # noqa: E402

from forgetting import Bases as BasesThatKeep  # noqa: E402
from merging_designs import CELLS, lines as design_lines, tried  # noqa: E402
from scimlora.adapters import adapted_layers, adapter_deltas  # noqa: E402
from scimlora.base import fold, run_layers  # noqa: E402
from scimlora.calibration import centroid_distance, class_means, ece  # noqa: E402
from scimlora.classifier import Classifier  # noqa: E402
from scimlora.data import align_cells  # noqa: E402
from scimlora.evaluation import COLOURS, score, tuned_logreg  # noqa: E402
from scimlora.examples import baron, pollen, shared  # noqa: E402
from scimlora.forgetting import forgetting  # noqa: E402
from scimlora.merge import merge, replay  # noqa: E402
from scimlora.predict import Predictor  # noqa: E402
from suite.report import markdown  # noqa: E402
from suite.store import machine  # noqa: E402
from suite.tasks import Bases  # noqa: E402

HERE = Path(__file__).parent
WITHOUT = ("kang", "aizarani", "darmanis")
TISSUES = ("pancreas", "blood", "liver", "brain")
MOST = 200  # training cells of a type
FEW = (5, 25)  # real cells of a type that weights are learned from


def split(a, test, least):
    "Training and test cells with the types of both that have enough to train on; labels carry the tissue."
    kind = [x.obs.cell_type.astype(str) for x in (a[~test], a[test])]
    n = kind[0].value_counts()
    types = set(n.index[n >= least]) & set(kind[1]) - {"unknown", "nan"}
    return [x[k.isin(types).to_numpy()].copy() for x, k in zip((a[~test], a[test]), kind)]


def tissues():
    "Tissue → training and test cells, with `obs['label']`."
    b, k, v, d = baron(), shared("pbmc_kang2018_ctrl"), shared("liver_aizarani2019_cpm"), shared("brain_darmanis2015")
    donors = lambda a, column, names: a.obs[column].astype(str).isin(names).to_numpy()
    sides = dict(pancreas=split(b, donors(b, "library", ["lib3"]), 8), blood=split(k, donors(k, "donor", ["1244", "1015"]), 8),
                 liver=split(v, np.random.default_rng(0).random(v.n_obs) < 0.5, 8), brain=split(d, donors(d, "donor", ["AB_S7", "FB_S3"]), 5))
    for tissue, pair in sides.items():
        for a in pair: a.obs["label"] = [f"{tissue}: {c}" for c in a.obs.cell_type.astype(str)]
    return sides


def some(a, seed, most=MOST):
    "At most so many cells a type."
    rng, y = np.random.default_rng(seed), a.obs.label.to_numpy()
    return a[np.sort(np.concatenate([rng.permutation(np.flatnonzero(y == c))[:most] for c in np.unique(y)]))].copy()


def unlike(clf, cells):
    p = clf.predictor
    return p.bundle.calibration.unlike(p.distances(*p.embeddings(cells)))


class Test:
    "Hold the test cells of all tissues, and strangers."

    def __init__(self, sides, base):
        self.cells = [align_cells(test, base.genes) for _, test in sides.values()]
        self.y = np.concatenate([test.obs.label.to_numpy() for _, test in sides.values()])
        self.tissue = np.repeat([*sides], [test.n_obs for _, test in sides.values()])
        strangers = pollen()
        self.strangers = align_cells(strangers[~strangers.obs.cell_type.astype(str).str.startswith("GW").to_numpy()], base.genes)  # fetal cortex is no stranger to brain

    def row(self, way, seed, said, confidence=None, strange=None):
        "Metrics of one way: over all types, and within each tissue; `strange` holds the scores of test cells and of strangers."
        out = dict(way=way, seed=seed, macro_f1=f1_score(self.y, said, average="macro", zero_division=0), accuracy=(said == self.y).mean(),
                   other_tissue=np.mean([s.split(":")[0] != t for s, t in zip(said, self.tissue)]))
        for t in np.unique(self.tissue):
            m = self.tissue == t
            out[t] = f1_score(self.y[m], said[m], average="macro", labels=np.unique(self.y[m]), zero_division=0)
        if confidence is not None: out["ece"] = ece(confidence, said == self.y)
        if strange is not None: out["auroc"] = roc_auc_score(np.repeat([0, 1], [len(self.y), len(self.strangers)]), np.concatenate(strange))
        return out

    def whole(self, way, seed, clf):
        "A classifier over all types: the bundle's answer."
        found = [clf.predictor.predict(c) for c in self.cells]
        row = self.row(way, seed, np.concatenate([f.label for f in found]), np.concatenate([f.confidence for f in found]),
                       (np.concatenate([unlike(clf, c) for c in self.cells]), unlike(clf, self.strangers)))
        return row | dict(unassigned=np.concatenate([f.unassigned for f in found]).mean(), strangers_unassigned=clf.predictor.predict(self.strangers).unassigned.mean())


def routed(test, parts, seed):
    "Each cell asked of one bundle, or of all by how unlike it is; and each of its own tissue's, which nobody knows beforehand."
    proba = [np.vstack([p.predictor.predict(c).proba for c in test.cells]) for p in parts.values()]
    far = np.array([np.concatenate([unlike(p, c) for c in test.cells]) for p in parts.values()])
    far_strangers = np.array([unlike(p, test.strangers) for p in parts.values()])
    said = np.array([np.array(p.classes_, dtype=object)[v.argmax(1)] for p, v in zip(parts.values(), proba)])
    sure, cell = np.array([v.max(1) for v in proba]), np.arange(len(test.y))
    own = np.array([[*parts].index(t) for t in test.tissue])
    for way, which in (("each asked of its own tissue's bundle", own), ("each asked of the bundle it is least unlike", far.argmin(0))):
        yield test.row(way, seed, said[which, cell], sure[which, cell], (far[which, cell], far_strangers.min(0)))
    share = np.exp(far.min(0) - far)
    mixed = np.hstack([v * s[:, None] for v, s in zip(proba, share / share.sum(0))])
    classes = np.array([c for p in parts.values() for c in p.classes_], dtype=object)
    yield test.row("each asked of all, by how unlike it is", seed, classes[mixed.argmax(1)], mixed.max(1), (far.min(0), far_strangers.min(0)))


def ties(deltas, keep=0.2):
    "Yadav et al., TIES-Merging, NeurIPS 2023: the largest changes, those that agree with the sign of their sum."
    kept = [np.where(np.abs(d) >= np.quantile(np.abs(d), 1 - keep), d, 0) for d in deltas]
    sign = np.sign(sum(kept))
    agree = [np.where(np.sign(d) == sign, d, 0) for d in kept]
    return sum(agree) / np.maximum(sum(a != 0 for a in agree), 1)


def dare(deltas, rng, drop=0.5):
    "Yu et al., DARE, ICML 2024: changes dropped at random and the others scaled up, then summed."
    return sum(d * (rng.random(d.shape) >= drop) / (1 - drop) for d in deltas)


def svd(deltas, rank):
    "The sum, cut to the rank of one adapter."
    u, size, v = np.linalg.svd(sum(deltas), full_matrices=False)
    return u[:, :rank] * size[:rank] @ v[:rank]


def encoder_row(test, way, seed, embed, classes, logits, centroids):
    "Metrics of an encoder and its head, without a gene path."
    z, strange = (np.vstack([embed(c) for c in cells]) for cells in (test.cells, [test.strangers]))
    return test.row(f"encoder alone, {way}", seed, classes[logits(z).argmax(1)], strange=(centroid_distance(z, centroids), centroid_distance(strange, centroids)))


def encoder_alone(test, way, seed, clf):
    p = clf.predictor
    return encoder_row(test, way, seed, p.embed, np.array(clf.classes_, dtype=object), lambda z: z * z.shape[1] ** 0.5 @ p._W + p._b, p.bundle.centroids)


def with_head(test, way, seed, base, deltas, X, y, classes, C):
    "Metrics of a sum of adapters, and a head fitted on given cells with a penalty of 1 / C."
    layers, root = fold(base.weights, {k: np.asarray(d, np.float64) for k, d in deltas.items()}), base.latent ** 0.5
    z = run_layers(layers, X)
    m = LogisticRegression(C=C, max_iter=1000).fit(z * root, y)
    return encoder_row(test, way, seed, lambda c: run_layers(layers, c.X), classes, lambda z: m.decision_function(z * root), class_means(z, y, len(classes)))


def own_deltas(parts, base):
    "What each bundle's adapter adds to each layer."
    return [adapter_deltas(p.bundle.adapter_config, p.bundle.adapter, base.weights) for p in parts.values()]


def weighted(deltas, weights): return {k: sum(w * d[k] for w, d in zip(ws, deltas)) for k, ws in zip(deltas[0], weights)}


def drawn_cells(parts, base, seed):
    "Cells drawn of all bundles' types, their labels."
    drawn = [replay(p.bundle, base.genes, 60, seed + i) for i, p in enumerate(parts.values())]
    return sp.vstack([align_cells(d, base.genes, "counts").X for d in drawn], "csr"), np.concatenate([d.obs.label.to_numpy() for d in drawn])


def summed(test, parts, base, drawn, C, seed):
    "Adapters added up, with a head on drawn cells."
    own, rng = own_deltas(parts, base), np.random.default_rng(seed)
    rank = next(iter(parts.values())).bundle.adapter_config["r"]
    ways = {"no adapter": lambda d: 0 * d[0], "mean of adapters": lambda d: np.mean(d, axis=0), "sum of adapters (cat)": sum, "SVD of the sum": lambda d: svd(d, rank),
            "TIES": ties, "DARE": lambda d: dare(d, rng)}
    classes, y = np.unique(drawn[1], return_inverse=True)
    for way, add in ways.items(): yield with_head(test, way, seed, base, {k: add([d[k] for d in own]) for k in own[0]}, drawn[0], y, classes, C)


def learned_weights(base, deltas, X, y, n_classes, by_layer, seed, steps=200):
    "Weights of adapters in their sum, (n_layers, n_adapters), by gradient on the cross-entropy of a head over all types."
    torch.manual_seed(seed)
    plain = fold(base.weights)
    moved = [fold(base.weights, d) for d in deltas]
    W, b, slope = zip(*((*(torch.from_numpy(np.array(v, np.float32)) for v in (l.weight, l.bias, l.slope)),) for l in plain))
    D = [[torch.from_numpy(m[i].weight) - W[i] for m in moved] for i in range(len(plain))]
    first = torch.stack([torch.from_numpy(np.asarray(X @ w.numpy())) for w in (W[0], *D[0])])  # of given cells they never change
    share = torch.full((len(plain) if by_layer else 1, len(deltas)), 1 / len(deltas), requires_grad=True)
    head = torch.nn.Linear(base.latent, n_classes)
    opt, y = torch.optim.Adam([dict(params=[share], lr=0.02), dict(params=head.parameters(), lr=0.02)]), torch.from_numpy(y)
    for _ in range(steps):
        a = share.expand(len(plain), -1)
        h = first[0] + torch.einsum("k,kno->no", a[0], first[1:]) + b[0]
        for i in range(1, len(plain)):
            h = torch.where(h > 0, h, h * slope[i - 1])
            h = h @ W[i] + sum(w * (h @ d) for w, d in zip(a[i], D[i])) + b[i]
        loss = torch.nn.functional.cross_entropy(head(torch.nn.functional.normalize(h) * base.latent ** 0.5), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return share.detach().expand(len(plain), -1).numpy()


def learned(test, parts, train, base, drawn, C, seed):
    "Weights of the adapters learned from a few real cells; and the mean, and merging, with the same cells."
    own, (drawn, labels) = own_deltas(parts, base), drawn
    mean = np.full((len(own[0]), len(own)), 1 / len(own))
    for n in FEW:
        few = ad.concat([some(a, seed, n) for a in train.values()], join="outer", fill_value=0)
        R, cells = align_cells(few, base.genes).X, f"{n} real cells a type"
        classes, y = np.unique(np.append(labels, few.obs.label), return_inverse=True)
        X, real = sp.vstack([drawn, R], "csr"), y[len(labels):]
        yield with_head(test, f"mean of adapters, {cells}", seed, base, weighted(own, mean), X, y, classes, C)
        for by_layer in (False, True):
            w = learned_weights(base, own, R, real, len(classes), by_layer, seed)
            yield with_head(test, f"learned weights{' by layer' if by_layer else ''}, {cells}", seed, base, weighted(own, w), X, y, classes, C) | dict(weights=" ".join(f"{v:.2f}" for v in w.ravel()))
        merged = merge([*parts.values()], cells=few, label="label", seed=seed)
        yield test.whole(f"merged, {cells}", seed, merged)
        yield encoder_alone(test, f"merged, {cells}", seed, merged)


def kept(sides, base, cells, seed):
    "What the base's own labels lose and what the task gains while a merged adapter is faded in."
    parts = [Classifier.tune(some(a, seed), "label", base=base, baselines=False, seed=seed, title=t) for t, (a, _) in sides.items()]
    p = merge(parts, seed=seed).predictor
    test = ad.concat([t for _, t in sides.values()], join="outer", fill_value=0)
    target = align_cells(test, base.genes), test.obs.label.to_numpy(object)
    curve = forgetting(p, align_cells(cells, base.genes).X, cells.obs.cell_type.to_numpy(str), target)
    alone = Predictor(replace(p.bundle, genepath=None), base)
    curve["encoder_macro_f1"] = [score(target[1], alone.proba(target[0], z, z), alone.classes)["macro_f1"] for z in (run_layers(adapted_layers(base.weights, p.bundle.adapter_config, p.bundle.adapter, a), target[0].X) for a in curve.alpha)]
    return [dict(seed=seed, cells=cells.n_obs, labels=cells.obs.cell_type.nunique()) | r for r in curve.to_dict("records")]


def taught_later(sides, base, seed):
    "F1 of a type that comes later, and of the old ones before and after, for the two commonest types of each tissue."
    for tissue, (train, test) in sides.items():
        for kind in train.obs.label.value_counts().index[:2]:
            rest = some(train[(train.obs.label != kind).to_numpy()], seed)
            rng = np.random.default_rng(seed)
            few = train[rng.permutation(np.flatnonzero(train.obs.label == kind))[:25]]
            before = Classifier.tune(rest, "label", base=base, baselines=False, seed=seed)
            after, anew = (merge([before], cells=few, label="label", seed=seed, anew=a) for a in (False, True))
            real = Classifier.tune(ad.concat([rest, few]), "label", base=base, baselines=False, seed=seed)
            truth, old = test.obs.label.to_numpy(), [c for c in before.classes_ if c in set(test.obs.label)]
            said = {name: c.predict(test) for name, c in (("after", after), ("anew", anew), ("real", real))}
            known, was = np.isin(truth, old), before.predict(test)
            f1 = lambda y, s: f1_score(y, s, average=None, labels=old, zero_division=0).mean()
            # Before, the new type's cells are strangers; the old types are scored on their own cells, then as now.
            row = dict(tissue=tissue, type=kind, seed=seed, old_before=f1(truth[known], was[known]))
            for name, s in said.items():
                row |= {f"old_{name}": f1(truth[known], s[known]), f"old_{name}_all": f1(truth, s), f"new_{name}": f1_score(truth == kind, s == kind),
                        f"to_new_{name}": (s == kind)[known].mean(), f"to_old_{name}": ((s != was) & (s != kind))[known].mean()}
            yield row


def measured(sides, base, seed):
    "Rows of one seed."
    test, train = Test(sides, base), {t: some(a, seed) for t, (a, _) in sides.items()}
    parts = {t: Classifier.tune(a, "label", base=base, baselines=False, seed=seed, title=t) for t, a in train.items()}
    yield from routed(test, parts, seed)
    together = Classifier.tune(ad.concat([*train.values()], join="outer", fill_value=0), "label", base=base, baselines=False, seed=seed)
    merged = merge([*parts.values()], seed=seed)
    plain = replace(merged.bundle, calibration=Classifier.tune(ad.concat([*(replay(p.bundle, base.genes, 60, seed + i) for i, p in enumerate(parts.values()))], join="outer", fill_value=0), "label",
                                                               base=base, baselines=False, units="counts", seed=seed).bundle.calibration)
    yield test.whole("merged", seed, merged)
    yield test.whole("merged, calibrated on drawn cells", seed, Classifier(type(merged.predictor)(plain, base)))
    yield test.whole("one fine-tune on all real cells", seed, together)
    yield encoder_alone(test, "merged", seed, merged)
    yield encoder_alone(test, "one fine-tune on all real cells", seed, together)
    drawn = drawn_cells(parts, base, seed)
    C = tuned_logreg(base.embed(drawn[0]) * base.latent ** 0.5, np.unique(drawn[1], return_inverse=True)[1], None)[2]  # one penalty for all heads
    yield from summed(test, parts, base, drawn, C, seed)
    yield from learned(test, parts, train, base, drawn, C, seed)


def figure(t):
    "Macro-F1 over all types by way, a dot a seed."
    order = [w for w in t.groupby("way").macro_f1.mean().sort_values().index]
    fig = Figure(figsize=(7.5, 0.3 * len(order) + 1), layout="constrained")
    ax = fig.subplots()
    for i, w in enumerate(order):
        f1 = 100 * t[t.way == w].macro_f1
        colour = COLOURS[1] if w == "merged" else ".6" if w.startswith("encoder") else COLOURS[0]
        ax.scatter(f1, [i] * len(f1), color=colour, s=22)
        ax.plot([f1.mean()] * 2, [i - 0.3, i + 0.3], color=colour, lw=2)
    ax.set(yticks=range(len(order)), yticklabels=order, xlabel="macro-F1 × 100 over the types of four tissues")
    ax.grid(axis="x", alpha=.3)
    return fig


def kept_figure(t):
    "What is kept of the base's labels, and what the merged types get, by the adapter's strength; a thin line a seed, a thick one their mean."
    fig = Figure(figsize=(8.6, 3.2), layout="constrained")
    panels = [("the base's own labels", [("knn", "by neighbours"), ("linear", "by a line")]), ("the merged types", [("encoder_macro_f1", "encoder alone, macro-F1"), ("target_macro_f1", "whole answer, macro-F1")])]
    for ax, (title, shown) in zip(fig.subplots(1, 2), panels):
        for i, (k, name) in enumerate(shown):
            for _, g in t.groupby("seed"): ax.plot(g.alpha, 100 * g[k], color=COLOURS[i], lw=0.6, alpha=0.6)
            m = 100 * t.groupby("alpha")[k].mean()
            ax.plot(m.index, m, "os"[i] + "-", color=COLOURS[i], ms=5, label=name)
        ax.set(title=title, xlabel="strength of the merged adapter (0: base)", ylabel="accuracy × 100" if shown[0][0] == "knn" else "macro-F1 × 100", xticks=sorted(set(t.alpha)))
        ax.grid(axis="y", alpha=.3)
        ax.legend(frameon=False, fontsize=9)
    return fig


def spread(v, scale=100, digits=1): return "–" if v.isna().all() else f"{scale * v.mean():.{digits}f} ± {scale * v.std():.{digits}f}"


def way_lines(t):
    "What merging costs, in words; then a line of the table for each way."
    f1 = 100 * t.groupby("way").macro_f1.mean()
    best, alone = f1["merged"], {w: v for w, v in f1.items() if w.startswith("encoder alone") and "fine-tune" not in w}
    sums = {w.removeprefix("encoder alone, "): v for w, v in alone.items() if "real cells" not in w and "merged" not in w and "no adapter" not in w}
    top = max(sums, key=sums.get)
    yield f"- Merged without a real cell: {best:.1f}, {best - f1['one fine-tune on all real cells']:+.1f} against one fine-tune on all real cells, {best - f1['each asked of its own tissue' + chr(39) + 's bundle']:+.1f} against each tissue's own bundle where the tissue is known."
    yield f"- Asking the bundle that a cell is least unlike: {f1['each asked of the bundle it is least unlike']:.1f}."
    yield f"- By the encoder alone, merging gives {f1['encoder alone, merged']:.1f}; the best sum of adapters ({top}) {sums[top]:.1f}. *cat* computes what the sum does, exactly, at the rank of all together; *SVD* is that sum at the rank of one adapter."
    for real in (f"{n} real cells a type" for n in FEW):
        learned = {w.removeprefix("encoder alone, ").split(",")[0]: v for w, v in alone.items() if "learned" in w and w.endswith(f" {real}")}
        spread_of = t[t.way == f"encoder alone, merged, {real}"].macro_f1.std() * 100
        yield (f"- With {real}, by the encoder alone: {' and '.join(f'{w} {v:.1f}' for w, v in learned.items())}, the plain mean of the adapters with the same cells in its head {f1[f'encoder alone, mean of adapters, {real}']:.1f}, "
               f"merging with the same cells {f1[f'encoder alone, merged, {real}']:.1f} (± {spread_of:.1f} over draws), and by its whole answer {f1[f'merged, {real}']:.1f}.")


def way_table(t):
    head = ["way", "macro-F1", "accuracy", "called another tissue", *TISSUES, "ECE", "strangers, AUROC", "unassigned", "strangers unassigned"]
    columns = ["macro_f1", "accuracy", "other_tissue", *TISSUES, "ece", "auroc", "unassigned", "strangers_unassigned"]
    return markdown(head, [[w, *(spread(g[c], 1, 3) if c == "ece" else spread(g[c]) for c in columns)] for w, g in t.groupby("way", sort=False)])


def kept_lines(t):
    "The retention curve of the merged adapter."
    t = t.assign(kept=(t.knn + t.linear) / 2)
    m = 100 * t.groupby("alpha")[["knn", "linear", "kept", "encoder_macro_f1", "target_macro_f1"]].mean()
    change = m.kept - m.kept[0]
    mild = change[change >= -1].index.max()
    yield from ("## What the merged adapter forgets", "", f"{t.cells.max():,} cells held out of pretraining, of {t.labels.max()} of the base's own labels; *kept* by neighbours and by a line as in `FORGETTING.md`, means of {t.seed.nunique()} draws.", "",
                f"- At full strength, accuracy on the base's own labels changes by {change[1]:+.1f} points; the encoder alone gains {m.encoder_macro_f1[1] - m.encoder_macro_f1[0]:+.1f} on the merged types, the whole answer {m.target_macro_f1[1] - m.target_macro_f1[0]:+.1f} (the head is that of full strength).",
                f"- The greatest strength at which no more than a point is lost is {mild:g}; there, the whole answer is at {m.target_macro_f1[mild]:.1f}.", "", "![Kept and gained by strength](MERGING_KEPT.png)", "")
    yield from markdown(["strength", "by neighbours", "by a line", "change", "macro-F1 of the encoder alone", "macro-F1"], [[f"{a:g}", f"{r.knn:.1f}", f"{r.linear:.1f}", f"{change[a]:+.1f}", f"{r.encoder_macro_f1:.1f}", f"{r.target_macro_f1:.1f}"] for a, r in m.iterrows()])


def later_lines(t):
    "What old types lose when one comes later."
    change = lambda name: 100 * (t[f"old_{name}"] - t.old_before)
    by = pd.DataFrame({name: change(name) for name in ("after", "real")}).groupby([t.tissue, t.type]).mean()
    worst = by.after.idxmin()
    d, anew, real = change("after"), change("anew"), 100 * (t.old_after_all - t.old_real_all)
    yield from ("## A type that comes later", "", "By 25 real cells, to a bundle that gets no cell of its old types again; beside a bundle tuned anew on drawn cells and the new ones, and a fine-tune that has all real cells. F1 × 100, mean over the old types and of the new one.", "",
                f"- The old types, on their own cells: {d.mean():+.1f} points on average, {d.min():+.1f} at worst (wanted: within 1 point); within it in {(d >= -1).sum()} of {len(d)}. Tuned anew: {anew.mean():+.1f}, {anew.min():+.1f}, {(anew >= -1).sum()}; with all real cells: {change('real').mean():+.1f}, {change('real').min():+.1f}, {(change('real') >= -1).sum()}.",
                f"- Where they go: {100 * t.to_new_after.mean():.1f} % of the old types' cells are now called the new type and {100 * t.to_old_after.mean():.1f} % change from one old type to another; tuned anew {100 * t.to_new_anew.mean():.1f} % and {100 * t.to_old_anew.mean():.1f} %.",
                f"- Most is lost beside {worst[1].split(': ', 1)[1]} of {worst[0]}: {by.after[worst]:+.1f}, and {by.real[worst]:+.1f} with all real cells: types that are like the new one have it beside them now.",
                f"- The old types, on all cells, against a fine-tune that has all of their real cells: {real.mean():+.1f} points on average, {real.min():+.1f} at worst.",
                f"- The new type: {100 * t.new_after.mean():.1f}; tuned anew {100 * t.new_anew.mean():.1f}, with all real cells {100 * t.new_real.mean():.1f}.", "")
    yield from markdown(["tissue", "type", "old types before", "after", "tuned anew", "with the real ones", "the new type", "tuned anew", "with the real ones"],
                        [[tissue, kind.split(": ", 1)[1], *(spread(g[c]) for c in ("old_before", "old_after", "old_anew", "old_real", "new_after", "new_anew", "new_real"))] for (tissue, kind), g in t.groupby(["tissue", "type"], sort=False)])


def tried_lines(t):
    "What the design was chosen by."
    yield from ("### What was tried", "", f"On {t.task.nunique()} other sets of cells (`merging_designs.py`), {len(t[['task', 'type']].drop_duplicates())} types in all, {CELLS} cells each, on a draw of their own. *Anew*: on drawn and new cells; *old answers*: drawn cells are to get the old bundle's probabilities (learning without forgetting); *shallow*: drawn with as few counts as poor cells have; *held back*: the odds that a new type needs.", "")
    yield from markdown(["way", "old types, change", "at worst", "within 1 point", "of their cells called the new type, %", "changed among old types, %", "F1 of the new type"], [*design_lines(t)])


def page(t, later, kept, tried):
    "MERGING.md as text."
    text = ["# Merging bundles", "", f"Made by `make bench-merging`, which says how in the head of `merging.py`; {t.seed.nunique()} draws of training cells, means ± standard deviations, × 100 but for ECE. "
            "A tissue's column is macro-F1 over its types on its own test cells, with all types to choose from.", "", *way_lines(t), "", "![By way](MERGING.png)", "", *way_table(t), "",
            *kept_lines(kept), "", *later_lines(later), "", *tried_lines(tried), "", "## Made on", "", f"- {machine()}"]
    return "\n".join(text) + "\n"


TABLES = dict(ways="MERGING", later="MERGING_LATER", kept="MERGING_KEPT", tried="MERGING_TRIED")


def report(folder):
    "Write MERGING.md and the pictures from the tables."
    t = {k: pd.read_csv(folder / f"{name}.csv") for k, name in TABLES.items()}
    (folder / "MERGING.md").write_text(page(t["ways"], t["later"], t["kept"], t["tried"]), encoding="utf-8")
    for name, fig in (("MERGING", figure(t["ways"])), ("MERGING_KEPT", kept_figure(t["kept"]))): fig.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})


def rows_of(part, args):
    "All rows of one table."
    sides, bases = tissues(), Bases(args.bases)
    if part == "tried": return [*tried(sides, bases, split, some, WITHOUT)]
    base, held = (bases(WITHOUT), None) if part != "kept" else BasesThatKeep(args.kept_bases)(WITHOUT)[::2]
    make = dict(ways=measured, later=taught_later, kept=lambda sides, base, seed: kept(sides, base, held, seed))[part]
    rows = []
    for seed in range(args.seeds):
        rows += make(sides, base, seed)
        print(f"{part}, seed {seed}: done", flush=True)
    return rows


def main():
    warnings.filterwarnings("ignore")
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--only", nargs="*", choices=[*TABLES], default=[*TABLES], help="tables to make; the others stay as they are")
    p.add_argument("--bases", type=Path, default=HERE.parent / "runs" / "science" / "bases", help="where bases are kept, as for science.py")
    p.add_argument("--kept-bases", type=Path, default=HERE.parent / "runs" / "forgetting" / "bases", help="where bases are kept that lack a quarter of every study, as for forgetting.py")
    p.add_argument("--out", type=Path, default=HERE)
    p.add_argument("--report", action="store_true", help="run nothing, write MERGING.md anew from the tables")
    args = p.parse_args()
    for part in [] if args.report else args.only: pd.DataFrame(rows_of(part, args)).round(4).to_csv(args.out / f"{TABLES[part]}.csv", index=False)
    if all((args.out / f"{name}.csv").exists() for name in TABLES.values()): report(args.out)


if __name__ == "__main__": main()
