"""Measure embedding on a graphics card beside the processor and beside a plain dense loop, and write GPU.md beside this script.

    python benchmarks/gpu.py                        # on the shared data's 10x cells
    python benchmarks/gpu.py --cells aligned.npz    # cells aligned elsewhere, where there is no shared data

The base has SCimilarity v1.1's shape and random weights. The plain loop is what SCimilarity's `get_embeddings` does on a card, written out: a dense
array of a buffer of cells, to the card, through the module, back.
"""
import argparse
import platform
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch

from scimlora.base import Base
from scimlora.encoder import Encoder
from scimlora.core import versions

HERE = Path(__file__).parent
N_GENES, HIDDEN, LATENT = 28_231, (1024, 1024, 1024), 128


def plain(encoder, X, buffer):
    out = []
    with torch.no_grad():
        for a in range(0, X.shape[0], buffer): out.append(encoder(torch.from_numpy(X[a:a + buffer].toarray()).cuda()).cpu())
    return torch.cat(out).numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=Path, help="npz of aligned cells; by default the shared data's")
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "GPU.md")
    args = parser.parse_args()
    if not torch.cuda.is_available(): raise SystemExit("no CUDA device here: nothing was measured or written")
    from speed_turns import in_turns, tiled

    torch.manual_seed(0)
    encoder = Encoder(N_GENES, HIDDEN, LATENT).eval().requires_grad_(False)
    base = Base(encoder, [f"G{i}" for i in range(N_GENES)])
    if args.cells: real = sp.load_npz(args.cells).tocsr().astype(np.float32)
    else:
        from speed import TEN_X, aligned, real_counts

        counts, names, _, _ = real_counts(TEN_X)
        real = aligned(counts, names, [*names, *(f"NOGENE{i}" for i in range(N_GENES - len(names)))], counts.shape[0])
    X = tiled(real, args.n)
    few, card = X[:16_384], Encoder(N_GENES, HIDDEN, LATENT).eval().requires_grad_(False)
    card.load_state_dict(encoder.state_dict())
    card = card.cuda()
    buffers = (500, 2_500, 10_000)
    jobs = {f"plain loop on the card, buffer {b:,}": (few, lambda b=b: plain(card, few, b)) for b in buffers}
    for p in ("float32", "bfloat16"):
        jobs[f"scimlora on the card, {p}"] = X, lambda p=p: base.embed(X, precision=p, device="cuda")
        jobs[f"scimlora on the processor, {p}"] = few, lambda p=p: base.embed(few, precision=p, device="cpu")
    took = in_turns({k: f for k, (_, f) in jobs.items()}, args.rounds)
    want = base.embed(few, device="cpu")
    rates = {k: cells.shape[0] / took[k] for k, (cells, _) in jobs.items()}
    best = max(v for k, v in rates.items() if k.startswith("plain"))
    far = lambda k: np.abs((plain(card, few, 2_500) if k.startswith("plain") else base.embed(few, precision=k.split(", ")[1], device="cuda" if "card" in k else "cpu")) - want).max()
    package = versions("scimlora", "torch", "numpy", "scipy", "numba")
    lines = ["# Embedding on a graphics card", "", f"Made by `python benchmarks/gpu.py --n {args.n}`. Base: SCimilarity v1.1's shape, random weights. Cells: real 10x ones with {X.nnz / X.shape[0]:,.0f} "
             f"genes, tiled to {args.n:,}. Medians of {args.rounds} rounds in turns. Ratio: to the best plain loop. Difference: largest, to scimlora's float32 on the processor.", "",
             f"{torch.cuda.get_device_name()}; {platform.machine()}, {torch.get_num_threads()} threads; " + ", ".join(f"{k} {v}" for k, v in package.items()) + ".", "",
             "| way | cells/s | ratio | difference |", "| --- | ---: | ---: | ---: |", *(f"| {k} | {v:,.0f} | {v / best:.1f} | {far(k):.1e} |" for k, v in rates.items())]
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__": main()
