"""Compare ways to make one classifier out of bundles of several tissues, on donors and cells that were held out.

    make bench-merging

Pancreas (Baron, a library held out), blood (Kang, two donors), liver (Aizarani, half of the cells), brain (Darmanis, two donors). The base was
pretrained without these studies. Each tissue gets a bundle of its own, with at most 200 cells a type. Then one classifier over all types: merged by
`scimlora.merge` from cells drawn from the bundles' profiles; a fine-tune on all real cells together; each cell asked of the bundle that it is least unlike, or
of all of them by how unlike it is; and sums of the adapters (mean, sum, TIES, DARE), each with a head fitted on the same drawn cells. The sums
concern the encoder, so they are compared by the encoder alone. Strangers are cell lines and skin (Pollen). A type is also taught
later, by 25 real cells, to a bundle that lacks it. Writes MERGING.csv, MERGING.md and MERGING.png.
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
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from sklearn.metrics import f1_score, roc_auc_score  # noqa: E402

from scimlora.base import fold, run_layers  # noqa: E402
from scimlora.calibration import ece  # noqa: E402
from scimlora.classifier import Classifier  # noqa: E402
from scimlora.data import align_cells  # noqa: E402
from scimlora.evaluation import COLOURS, tuned_logreg  # noqa: E402
from scimlora.examples import baron, pollen, shared  # noqa: E402
from scimlora.lora import adapter_deltas  # noqa: E402
from scimlora.merge import merge, replay  # noqa: E402
from suite.report import markdown  # noqa: E402
from suite.store import machine  # noqa: E402
from suite.tasks import Bases  # noqa: E402

HERE = Path(__file__).parent
WITHOUT = ("kang", "aizarani", "darmanis")
TISSUES = ("pancreas", "blood", "liver", "brain")
MOST = 200  # training cells of a type


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


def some(a, seed):
    "At most MOST cells a type."
    rng, y = np.random.default_rng(seed), a.obs.label.to_numpy()
    return a[np.sort(np.concatenate([rng.permutation(np.flatnonzero(y == c))[:MOST] for c in np.unique(y)]))].copy()


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


def summed(test, parts, base, seed):
    "Adapters added up, with a head on drawn cells; the encoder alone."
    own = [{k: v.numpy() for k, v in adapter_deltas(p.bundle.adapter_config, p.bundle.adapter, base.encoder).items()} for p in parts.values()]
    rng = np.random.default_rng(seed)
    ways = {"no adapter": lambda d: 0 * d[0], "mean of adapters": lambda d: np.mean(d, axis=0), "sum of adapters": sum, "TIES": ties, "DARE": lambda d: dare(d, rng)}
    drawn = [replay(p.bundle, base.genes, 60, seed + i) for i, p in enumerate(parts.values())]
    X = [align_cells(d, base.genes, "counts").X for d in drawn]
    labels = np.concatenate([d.obs.label.to_numpy() for d in drawn])
    classes, y = np.unique(labels, return_inverse=True)
    for way, add in ways.items():
        layers = fold(base.encoder, {name: torch.from_numpy(np.asarray(add([d[name] for d in own]), np.float64)) for name in own[0]})
        embed = lambda Z: run_layers(layers, Z) * base.latent ** 0.5
        W, b, _ = tuned_logreg(np.vstack([embed(x) for x in X]), y, None)
        yield test.row(f"encoder alone, {way}", seed, classes[np.vstack([embed(c.X) @ W.T + b for c in test.cells]).argmax(1)])


def encoder_alone(test, way, seed, clf):
    p = clf.predictor
    logits = np.vstack([p.paths(c, *p.embeddings(c))[0] for c in test.cells])
    return test.row(f"encoder alone, {way}", seed, np.array(clf.classes_, dtype=object)[logits.argmax(1)])


def taught_later(sides, base, seed):
    "F1 of a type that comes later, and of the old ones before and after, for the two commonest types of each tissue."
    for tissue, (train, test) in sides.items():
        for kind in train.obs.label.value_counts().index[:2]:
            rest = some(train[(train.obs.label != kind).to_numpy()], seed)
            rng = np.random.default_rng(seed)
            few = train[rng.permutation(np.flatnonzero(train.obs.label == kind))[:25]]
            before = Classifier.tune(rest, "label", base=base, baselines=False, seed=seed)
            after = merge([before], cells=few, label="label", seed=seed)
            real = Classifier.tune(ad.concat([rest, few]), "label", base=base, baselines=False, seed=seed)
            truth, old = test.obs.label.to_numpy(), [c for c in before.classes_ if c in set(test.obs.label)]
            said = {name: c.predict(test) for name, c in (("after", after), ("real", real))}
            known = np.isin(truth, old)
            f1 = lambda y, s: f1_score(y, s, average=None, labels=old, zero_division=0).mean()
            # Before, the new type's cells are strangers; the old types are scored on their own cells, then as now.
            row = dict(tissue=tissue, type=kind, seed=seed, old_before=f1(truth[known], before.predict(test[known])), old_after=f1(truth[known], said["after"][known]))
            for name, s in said.items(): row |= {f"old_{name}_all": f1(truth, s), f"new_{name}": f1_score(truth == kind, s == kind)}
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
    yield from summed(test, parts, base, seed)


def figure(t):
    "Macro-F1 over all types by way, a dot a seed."
    order = [w for w in t.groupby("way").macro_f1.mean().sort_values().index]
    fig = Figure(figsize=(7.5, 0.3 * len(order) + 1), layout="constrained")
    ax = fig.subplots()
    for i, w in enumerate(order):
        f1 = 100 * t[t.way == w].macro_f1
        colour = COLOURS[1] if w == "merged" else COLOURS[0] if not w.startswith("encoder") else ".6"
        ax.scatter(f1, [i] * len(f1), color=colour, s=22)
        ax.plot([f1.mean()] * 2, [i - 0.3, i + 0.3], color=colour, lw=2)
    ax.set(yticks=range(len(order)), yticklabels=order, xlabel="macro-F1 × 100 over the types of four tissues")
    ax.grid(axis="x", alpha=.3)
    return fig


def page(t, later):
    "MERGING.md as text."
    spread = lambda v, scale=100, digits=1: "–" if v.isna().all() else f"{scale * v.mean():.{digits}f} ± {scale * v.std():.{digits}f}"
    head = ["way", "macro-F1", "accuracy", "called another tissue", *TISSUES, "ECE", "strangers, AUROC", "unassigned", "strangers unassigned"]
    columns = ["macro_f1", "accuracy", "other_tissue", *TISSUES, "ece", "auroc", "unassigned", "strangers_unassigned"]
    lines = [[w, *(spread(g[c], 1, 3) if c == "ece" else spread(g[c]) for c in columns)] for w, g in t.groupby("way", sort=False)]
    f1 = t.groupby("way").macro_f1.mean() * 100
    best, all_cells = f1["merged"], f1["one fine-tune on all real cells"]
    d, real = 100 * (later.old_after - later.old_before), 100 * (later.old_after_all - later.old_real_all)
    text = ["# Merging bundles", "", f"Made by `make bench-merging`, which says how in the head of `merging.py`; {t.seed.nunique()} draws of training cells, means ± standard deviations, × 100 but for ECE. "
            "A tissue's column is macro-F1 over its types on its own test cells, with all types to choose from.", "",
            f"- Merged without a real cell: {best:.1f}, {best - all_cells:+.1f} against one fine-tune on all real cells, {best - f1['each asked of its own tissue' + chr(39) + 's bundle']:+.1f} against each tissue's own bundle where the tissue is known.",
            f"- Asking the bundle that a cell is least unlike: {f1['each asked of the bundle it is least unlike']:.1f}.", "", "![By way](MERGING.png)", "", *markdown(head, lines), "",
            "## A type that comes later", "", "By 25 real cells, to a bundle that gets no cell of its old types again; beside a fine-tune that has them all. F1 × 100, mean over the old types and of the new one.", "",
            f"- The old types, on their own cells: {d.mean():+.1f} points on average, {d.min():+.1f} at worst (wanted: within 1 point); within it in {(d >= -1).sum()} of {len(d)}. Some of that no method can keep: types close to the new one now have it beside them.",
            f"- The old types, on all cells, against a fine-tune that has all of their real cells: {real.mean():+.1f} points on average, {real.min():+.1f} at worst; within 1 point in {(real >= -1).sum()} of {len(real)}.",
            f"- The new type, against the same: {100 * (later.new_after - later.new_real).mean():+.1f} points on average, {100 * (later.new_after - later.new_real).min():+.1f} at worst.", "",
            *markdown(["tissue", "type", "old types before", "after", "on all cells, after", "on all cells, with the real ones", "the new type", "with the real ones"],
                      [[tissue, kind.split(": ", 1)[1], *(spread(g[c]) for c in ("old_before", "old_after", "old_after_all", "old_real_all", "new_after", "new_real"))] for (tissue, kind), g in later.groupby(["tissue", "type"], sort=False)]),
            "", "## Made on", "", f"- {machine()}"]
    return "\n".join(text) + "\n"


def report(folder):
    "Write MERGING.md and MERGING.png from the tables."
    t, later = (pd.read_csv(folder / f"MERGING{name}.csv") for name in ("", "_LATER"))
    (folder / "MERGING.md").write_text(page(t, later), encoding="utf-8")
    figure(t).savefig(folder / "MERGING.png", dpi=110, metadata={"Software": None})


def main():
    warnings.filterwarnings("ignore")
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--bases", type=Path, default=HERE.parent / "runs" / "science" / "bases", help="where bases are kept, as for science.py")
    p.add_argument("--out", type=Path, default=HERE)
    p.add_argument("--report", action="store_true", help="run nothing, write MERGING.md anew from the tables")
    args = p.parse_args()
    if args.report: return report(args.out)
    base, sides, rows, later = Bases(args.bases)(WITHOUT), tissues(), [], []
    for seed in range(args.seeds):
        rows += measured(sides, base, seed)
        print(f"seed {seed}: ways done", flush=True)
        later += taught_later(sides, base, seed)
        print(f"seed {seed}: done", flush=True)
    t, later = pd.DataFrame(rows), pd.DataFrame(later)
    t.round(4).to_csv(args.out / "MERGING.csv", index=False)
    later.round(4).to_csv(args.out / "MERGING_LATER.csv", index=False)
    report(args.out)


if __name__ == "__main__": main()
