"""Peers that need packages of their own; runs in `.venv-peers` and knows nothing of scimlora.

One line of JSON on stdin asks for one fit, `{"method", "cells", "out"}`; one line on stdout answers. Cells come and probabilities go as
.npz files of plain arrays.
"""
import json
import os
import sys
import time
import traceback
import warnings

import numpy as np
import scipy.sparse as sp


def matrix(f, name):
    "A CSR matrix from its three arrays."
    return sp.csr_matrix((f[f"{name}.data"], f[f"{name}.indices"], f[f"{name}.indptr"]), shape=tuple(f[f"{name}.shape"]))


def celltypist_model(f, **settings):
    "CellTypist's own `train` and `annotate`; its probabilities are one-versus-rest and do not sum to 1."
    import anndata as ad
    import celltypist
    import pandas as pd

    celltypist.logger.set_level("ERROR")
    genes = f["genes"]
    labels = np.array([f"{v:03d}" for v in f["y"]])
    model = celltypist.train(matrix(f, "G"), labels=labels, genes=genes, n_jobs=1, random_state=int(f["seed"]), **settings)
    test = ad.AnnData(matrix(f, "Gt"), var=pd.DataFrame(index=genes))
    said = celltypist.annotate(test, model=model)
    proba, score = (t.to_numpy()[:, np.argsort(t.columns)] for t in (said.probability_matrix, said.decision_matrix))
    return proba, score.argmax(1)


def celltypist_default(f): return celltypist_model(f)


def celltypist_selected(f): return celltypist_model(f, feature_selection=True)


def boosting(f):
    "XGBoost on the 1,000 genes that vary most in training; depth and number of trees by an inner split, grouped by donor if there are three."
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
    from xgboost import XGBClassifier

    G, y, groups = matrix(f, "G"), f["y"], f["groups"]
    top = np.sort(np.argsort(-np.asarray(G.multiply(G).mean(0) - np.square(G.mean(0))).ravel(), kind="stable")[:1000])
    G, Gt = (np.asarray(M[:, top].todense()) for M in (G, matrix(f, "Gt")))
    n, few = y.max() + 1, max(2, min(3, np.bincount(y).min()))
    kinds = ([StratifiedGroupKFold(3, shuffle=True, random_state=0)] if len(set(groups)) >= 3 else []) + [StratifiedKFold(few, shuffle=True, random_state=0)]
    # Every class must be in the inner training side.
    a, b = next(ab for k in kinds for ab in k.split(G, y, groups) if len(set(y[ab[0]])) == n and len(ab[1]))
    make = lambda depth, trees: XGBClassifier(n_estimators=trees, max_depth=depth, learning_rate=0.2, subsample=0.8, colsample_bytree=0.2, min_child_weight=1 if len(y) > 500 else 0.1,
                                              tree_method="hist", max_bin=64, n_jobs=1, random_state=int(f["seed"]), objective="multi:softprob")
    tried = []
    for depth in (2, 5):
        m = make(depth, 100).fit(G[a], y[a])
        for trees in (25, 50, 100):
            tried.append((log_loss(y[b], m.predict_proba(G[b], iteration_range=(0, trees)), labels=np.arange(n)), depth, trees))
    _, depth, trees = min(tried)
    proba = make(depth, trees).fit(G, y).predict_proba(Gt)
    return proba, proba.argmax(1)


def epochs(n_cells, most, steps):
    "Passes over the cells: at most `most`, at most `steps` steps of 128 cells, at least five."
    return int(max(5, min(most, steps / np.ceil(n_cells / 128))))


def scanvi_cells(f):
    "Training and test counts of the genes that vary most in training, as two AnnData with batch and label."
    import anndata as ad
    import pandas as pd
    import scanpy as sc

    var, y = pd.DataFrame(index=f["genes"]), f["y"]
    log = ad.AnnData(matrix(f, "G"), var=var)
    sc.pp.highly_variable_genes(log, n_top_genes=min(2000, len(var)))
    chosen = log.var.highly_variable.to_numpy()
    cells = lambda name, batch, label: ad.AnnData(matrix(f, name)[:, chosen].astype(np.float32), var=var[chosen],
                                                  obs=pd.DataFrame(dict(batch=batch, label=label), index=[f"{name}{i}" for i in range(len(label))]))
    return cells("counts", f["batch"], [f"{v:03d}" for v in y]), cells("counts_test", "test", ["unknown"] * len(f["yt"])), [f"{v:03d}" for v in range(y.max() + 1)]


def quiet_scvi(f):
    import logging

    import scvi
    import torch

    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.verbosity, scvi.settings.seed = logging.ERROR, int(f["seed"])
    return scvi.model.SCVI, scvi.model.SCANVI


PLAIN = dict(accelerator="cpu", enable_progress_bar=False, logger=False, enable_checkpointing=False, enable_model_summary=False)


def scanvi(f):
    """scVI on labelled and unlabelled cells together, then scANVI from it: the seed labelling of scvi-tools' own tutorial.

    It sees the test cells' counts, not their labels. The other way, the test cells as a query of a finished reference, did worse with few
    labels. Steps are bounded, so that a fit takes about a minute at most.
    """
    import anndata as ad

    SCVI, SCANVI = quiet_scvi(f)
    train, test, names = scanvi_cells(f)
    both, many = ad.concat([train, test]), train.n_obs > 1000
    SCVI.setup_anndata(both, batch_key="batch", labels_key="label")
    vae = SCVI(both, n_layers=2)
    vae.train(max_epochs=epochs(both.n_obs, 400, 2000 if many else 600), **PLAIN)
    model = SCANVI.from_scvi_model(vae, unlabeled_category="unknown", labels_key="label")
    model.train(max_epochs=epochs(both.n_obs, 100, 400 if many else 200), n_samples_per_label=100, **PLAIN)
    proba = model.predict(both[train.n_obs:].copy(), soft=True)[names].to_numpy()
    return proba, proba.argmax(1)


def main():
    warnings.filterwarnings("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is no answer
    for line in sys.stdin:
        asked, start = json.loads(line), None
        try:
            with np.load(asked["cells"], allow_pickle=False) as f: f = dict(f)
            start = time.process_time()
            proba, said = globals()[asked["method"]](f)
            answer = dict(seconds=time.process_time() - start)
            np.savez(asked["out"], proba=np.asarray(proba, np.float64), said=np.asarray(said, np.int16))
        except Exception as e:
            traceback.print_exc()
            answer = dict(error=f"{type(e).__name__}: {e}")
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__": main()
