"""CellTypist's part of speed.py, in its own environment: train on one file, then annotate another each time that a line names the model.

    python benchmarks/speed_celltypist.py TRAIN.h5ad CELLS.h5ad

The first line of output is a JSON list of the models, then comes one line after each annotation.
"""
import json
import os
import sys

import anndata as ad
import celltypist
import scanpy as sc


def logged(path):
    a = ad.read_h5ad(path)
    sc.pp.normalize_total(a, target_sum=1e4)
    sc.pp.log1p(a)
    return a


if __name__ == "__main__":
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer
    celltypist.logger.set_level(50)
    train, cells = logged(sys.argv[1]), logged(sys.argv[2])
    models = {name: celltypist.train(train, labels="cell_type", feature_selection=chosen, top_genes=300, use_SGD=True, check_expression=False)
              for name, chosen in (("CellTypist, all genes", False), ("CellTypist, feature selection", True))}
    print(json.dumps([*models]), file=said, flush=True)
    for line in sys.stdin:
        celltypist.annotate(cells, model=models[line.strip()], majority_voting=False)
        print("done", file=said, flush=True)
