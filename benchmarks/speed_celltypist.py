"""CellTypist's part of speed.py, in its own environment: train on one file, annotate another, print median seconds as JSON.

    python benchmarks/speed_celltypist.py TRAIN.h5ad CELLS.h5ad ROUNDS
"""
import json
import sys
import time

import anndata as ad
import celltypist
import numpy as np
import scanpy as sc


def logged(path):
    a = ad.read_h5ad(path)
    sc.pp.normalize_total(a, target_sum=1e4)
    sc.pp.log1p(a)
    return a


def seconds(model, cells, rounds):
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        celltypist.annotate(cells, model=model, majority_voting=False)
        took.append(time.perf_counter() - start)
    return float(np.median(took))


if __name__ == "__main__":
    celltypist.logger.set_level(50)
    train, cells, rounds = logged(sys.argv[1]), logged(sys.argv[2]), int(sys.argv[3])
    out = {}
    for name, chosen in (("CellTypist, all genes", False), ("CellTypist, feature selection", True)):
        model = celltypist.train(train, labels="cell_type", feature_selection=chosen, top_genes=300, use_SGD=True, check_expression=False)
        out[name] = seconds(model, cells, rounds)
    print(json.dumps(out))
