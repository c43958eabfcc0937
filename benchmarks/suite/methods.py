"""The methods that are compared, each one function: given a draw of training cells, it returns how to predict and what share it trained.

`fit(draw)` returns `(predict, share)`; `predict(cells)` takes a CellSet and returns probabilities (n_cells, n_classes); `share` is what
was fitted over all parameters that a prediction uses. Nothing is chosen on test cells.
"""
import importlib.metadata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC

from scimlora.base import fold, run_layers
from scimlora.encoder import weights_of
from scimlora.calibration import class_centroids, fit_temperature
from scimlora.classifier import Classifier
from scimlora.evaluation import recalibrate_batchnorm, tuned_logreg
from scimlora.genepath import fit_genepath
from scimlora.lora import TuneConfig
from scimlora.methods import fit_method
from suite.code import code_of, with_imports
from suite.tasks import LABEL

HERE = Path(__file__).parent
PINS = dict(line.split("==") for line in (HERE.parent / "requirements-peers.txt").read_text().split("\n") if "==" in line)


@dataclass(frozen=True)
class Method:
    "Name a method and say what its numbers depend on."
    name: str
    kind: str  # 'floor', 'peer' or 'ours'
    fit: object
    uses: tuple = ()  # other functions of its file
    modules: tuple = ()  # of scimlora
    packages: tuple = ("scikit-learn",)
    worker: str = ""  # function of peers_worker.py, which runs in the peers' environment
    counts: bool = False  # needs counts on both sides

    @cache
    def code(self):
        "Digest of the method's code and of its packages' versions."
        pins = PINS if self.worker else {p: importlib.metadata.version(p) for p in self.packages}
        file, names = ("peers_worker.py", (self.worker, *self.uses)) if self.worker else ("methods.py", (self.fit.__name__, *self.uses))
        own = code_of(str(HERE / file), names=names) + (code_of(*(f"scimlora.{m}" for m in self.modules)) if self.modules else "")
        return own + " ".join(f"{p} {pins[p]}" for p in self.packages)

    def left_out(self, kinds):
        "Why the method does not apply to a task whose train and test values are of these kinds; '' if it does."
        lacking = [side for side, kind in zip(("training", "test"), kinds) if kind != "counts"]
        return f"the {' and '.join(lacking)} values are no counts" if self.counts and lacking else ""


# Peers ----------------------------------------------------------------------------------------------------------------


def folds(y, groups, n=3):
    "By donor where every class stays in every training fold, else stratified."
    if groups is not None and len(set(groups)) >= n:
        f = list(StratifiedGroupKFold(n, shuffle=True, random_state=0).split(y, y, groups))
        if all(len(set(y[a])) == len(set(y)) and len(b) for a, b in f): return f
    return list(StratifiedKFold(max(2, min(n, np.bincount(y).min())), shuffle=True, random_state=0).split(y, y))


def best_of(make, grid, X, y, groups):
    "The setting with the best macro-F1 in inner cross-validation, fitted on all."
    score = [np.mean([f1_score(y[b], make(v).fit(X[a], y[a]).predict(X[b]), average="macro", zero_division=0) for a, b in folds(y, groups)]) for v in grid]
    return make(grid[int(np.argmax(np.round(score, 6)))]).fit(X, y)


def neighbours(y, groups, grid=(1, 3, 5, 15, 30)):
    "Numbers of neighbours that every inner training fold has cells for."
    most = min(len(a) for a, _ in folds(y, groups))
    return [k for k in grid if k <= max(1, most // 2)]


def majority(d):
    share = np.bincount(d.y, minlength=len(d.task.classes)) / len(d.y)
    return lambda cells: np.tile(share, (cells.adata.n_obs, 1)), 1.0


def logreg(d):
    m = best_of(lambda C: LogisticRegression(C=C, max_iter=300, tol=1e-3), (0.003, 0.01, 0.03, 0.1, 0.3, 1, 10), d.on(d.task.genes), d.y, d.groups)
    return lambda cells: m.predict_proba(cells.on(d.task.genes)), 1.0


def svm(d):
    m = best_of(lambda C: LinearSVC(C=C, tol=1e-3, max_iter=2000), (1e-4, 1e-3, 3e-3, 1e-2, 0.03, 0.1, 1), d.on(d.task.genes), d.y, d.groups)

    def predict(cells):
        s = m.decision_function(cells.on(d.task.genes))
        return softmax(np.c_[-s, s] if s.ndim == 1 else s, axis=1)
    return predict, 1.0


def knn_pca(d):
    G = d.on(d.task.genes)
    p = PCA(min(50, len(d.y) - 1), random_state=0).fit(G)
    m = best_of(KNeighborsClassifier, neighbours(d.y, d.groups), p.transform(G), d.y, d.groups)
    return lambda cells: m.predict_proba(p.transform(cells.on(d.task.genes))), 1.0


def centroid(d):
    mean, = class_centroids(d.y, len(d.task.classes), d.on(d.task.genes).toarray())
    return lambda cells: softmax(2 * (cells.on(d.task.genes) @ mean.T) - (mean**2).sum(1), axis=1), 1.0


# Ours -----------------------------------------------------------------------------------------------------------------


def with_base(base, own):
    "Share of `own` fitted numbers beside the base's."
    return own / (own + sum(p.numel() for p in base.encoder.parameters()))


def linear_on(d, embed):
    "Tuned logistic regression on an embedding."
    genes, scale = d.task.base.genes, d.task.base.latent ** 0.5
    W, b, _ = tuned_logreg(embed(d.on(genes)) * scale, d.y, d.groups)
    return lambda cells: softmax(embed(cells.on(genes)) * scale @ W.T + b, axis=1), with_base(d.task.base, W.size + b.size)


def frozen_linear(d): return linear_on(d, d.task.base.embed)


def frozen_bn(d):
    layers = fold(weights_of(recalibrate_batchnorm(d.task.base.encoder, d.on(d.task.base.genes))))
    return linear_on(d, lambda X: run_layers(layers, X))


def frozen_knn(d):
    base = d.task.base
    m = best_of(lambda k: KNeighborsClassifier(k, metric="cosine"), neighbours(d.y, d.groups), base.embed(d.on(base.genes)), d.y, d.groups)
    return lambda cells: m.predict_proba(base.embed(cells.on(base.genes))), 0.0


def prototypes(d):
    "The nearest class centroid in the frozen embedding; the temperature from inner folds."
    base, y, n = d.task.base, d.y, len(d.task.classes)
    z, out = base.embed(d.on(base.genes)), np.zeros((len(y), n))
    near = lambda rows, x: x @ class_centroids(y[rows], n, z[rows])[0].T
    for a, b in folds(y, d.groups): out[b] = near(a, z[b])
    t = fit_temperature(out * 10, y)
    return lambda cells: softmax(near(np.arange(len(y)), base.embed(cells.on(base.genes))) * 10 / t, axis=1), with_base(base, n * base.latent)


def lora(d):
    "Adapters alone on all training cells: the defaults of `TuneConfig`, the last epoch."
    m = fit_method("LoRA", d.task.base, d.on(d.task.base.genes), d.y, len(d.task.classes), TuneConfig(seed=d.seed, keep_best=False))
    return lambda cells: m.proba(cells.on(d.task.base.genes)), m.tuned.counts["fraction"]


def gene_path(d):
    base, y, n = d.task.base, d.y, len(d.task.classes)
    X, seen, out = d.on(base.genes), d.task.train.measured(base.genes), np.zeros((len(y), n))
    for a, b in folds(y, None): out[b] = fit_genepath(base, X[a], y[a], n, seen, seed=d.seed).logits(X[b], base.embed(X[b]))
    t, m = fit_temperature(out, y), fit_genepath(base, X, y, n, seen, seed=d.seed)

    def predict(cells):
        Z = cells.on(base.genes)
        return softmax(m.logits(Z, base.embed(Z), cells.measured(base.genes)) / t, axis=1)
    return predict, with_base(base, m.weight.size + n)


def product(d):
    "What a user gets: `Classifier.tune` on the AnnData with all defaults, and `predict_proba` on the AnnData."
    clf = Classifier.tune(d.adata, LABEL, d.task.donor, base=d.task.base, baselines=False, seed=d.seed)
    place = [d.task.classes.index(c) for c in clf.classes_]

    def predict(cells):
        proba = np.zeros((cells.adata.n_obs, len(d.task.classes)))
        proba[:, place] = clf.predict_proba(cells.adata, cells.units)
        return proba
    return predict, clf.bundle.manifest["parameters"]["fraction"]


_ON_BASE, _TUNED = ("base",), ("folds", "best_of")
METHODS = {m.name: m for m in (
    Method("majority", "floor", majority, packages=()),
    Method("logistic regression, genes", "peer", logreg, _TUNED),
    Method("linear SVM, genes", "peer", svm, _TUNED),
    Method("kNN on PCA", "peer", knn_pca, ("neighbours", *_TUNED)),
    Method("nearest centroid, genes", "peer", centroid, modules=("calibration",), packages=()),
    Method("gradient boosting", "peer", None, worker="boosting", packages=("xgboost-cpu", "scikit-learn")),
    Method("CellTypist", "peer", None, ("celltypist_model",), worker="celltypist_default", packages=("celltypist", "scikit-learn")),
    Method("CellTypist, features selected", "peer", None, ("celltypist_model",), worker="celltypist_selected", packages=("celltypist", "scikit-learn")),
    Method("scANVI", "peer", None, ("epochs", "scanvi_cells", "quiet_scvi"), worker="scanvi", packages=("scvi-tools", "scanpy", "torch"), counts=True),
    Method("frozen base + kNN", "ours", frozen_knn, ("neighbours", *_TUNED), _ON_BASE),
    Method("frozen base + prototypes", "ours", prototypes, ("folds", "with_base"), ("base", "calibration")),
    Method("frozen base + linear", "ours", frozen_linear, ("linear_on", "with_base"), ("base", "evaluation")),
    Method("BatchNorm recalibrated + linear", "ours", frozen_bn, ("linear_on", "with_base"), ("base", "evaluation")),
    Method("LoRA", "ours", lora, (), ("base", "heads", "lora", "methods"), ("torch", "peft")),
    Method("gene path", "ours", gene_path, ("folds", "with_base"), ("base", "genepath", "calibration")),
    Method("scimlora", "ours", product, (), with_imports("classifier"), ("torch", "peft", "scikit-learn")))}
