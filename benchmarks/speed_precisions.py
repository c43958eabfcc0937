"""What precisions below float32 do to embeddings and labels, and how long a layer's product takes in each."""
import warnings

import numpy as np
import scipy.sparse as sp
import torch
from speed_turns import in_turns

from scimlora.base import load_base, load_head
from scimlora.data import align_cells
from scimlora.examples import shared

KINDS = ("bfloat16", "float16", "int8")
WIDTH = 1024
CELLS = 2_500  # of a block


def rounded(values, kind, scale):
    "Values as a type holds them, as float32; an int8 is a whole number, times `scale`."
    if kind == "int8": return (np.rint(values / scale) * scale).astype(np.float32)
    return torch.from_numpy(values).to(getattr(torch, kind)).float().numpy()


def _steps(most): return np.where(most > 0, most, 1) / 127


def of_weights(W, kind):
    "Weights, with a scale for each column."
    return rounded(W, kind, _steps(np.abs(W).max(0)))


def of_cells(h, kind):
    "What cells give to a layer, dense or sparse, with a scale for each cell."
    if not sp.issparse(h): return rounded(h, kind, _steps(np.abs(h).max(1, keepdims=True)))
    steps = _steps(abs(h).max(1).toarray().ravel())
    return sp.csr_matrix((rounded(h.data, kind, np.repeat(steps, np.diff(h.indptr))), h.indices, h.indptr), h.shape)


def embedded(layers, X, kind=None, inputs=False):
    "Embeddings with weights of the type `kind` in all layers but the last, and inputs of it too; products and sums are float32."
    h = X
    for layer in layers:
        low = kind is not None and layer is not layers[-1]
        h = (of_cells(h, kind) if low and inputs else h) @ (of_weights(layer.weight, kind) if low else layer.weight) + layer.bias
        if layer.slope.size: h = np.where(h < 0, h * layer.slope, h)
    return h / np.linalg.norm(h, axis=1, keepdims=True)


def agreement(names):
    "Labels of real cells from mini, against those at float32: rows with the type, what is of it, how many labels differ, of how many, and the largest difference of a coordinate."
    mini = load_base("mini")
    weight, bias = load_head(mini.path)
    said = lambda z: (z @ weight.T * z.shape[1]**0.5 + bias).argmax(1)
    rows = [dict(kind=k, inputs=i, different=0, cells=0, largest=0.0) for k in KINDS for i in (False, True)]
    for name in names:
        X = align_cells(shared(name), mini.genes).X
        full = embedded(mini.layers, X)
        for row in rows:
            z = embedded(mini.layers, X, row["kind"], row["inputs"])
            row.update(different=row["different"] + int((said(z) != said(full)).sum()), cells=row["cells"] + len(z), largest=max(row["largest"], float(np.abs(z - full).max())))
    return rows


def products(rounds):
    "Milliseconds of the product of a block of cells and a layer's weights in torch, cells rounded on the way in, by type."
    layer = torch.nn.Linear(WIDTH, WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this part of torch moves to another package
        whole = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), dtype=torch.qint8)

    def job(kind, x):
        if kind == "int8": return lambda: whole(x)
        w = layer.weight.detach().T.contiguous().to(kind := getattr(torch, kind))
        return lambda: (x.to(kind) @ w).float()

    with torch.inference_mode():
        return {k: v * 1e3 for k, v in in_turns({k: job(k, torch.randn(CELLS, WIDTH)) for k in ("float32", *KINDS)}, rounds).items()}
