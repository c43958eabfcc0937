"""What another share of the encoder, and other temperatures, would give on held-out cells that no benchmark reports.

    make bench-share

The tasks of embedding_share.py: donors, halves and laboratories of blood, pancreas, liver and brain, some twice, on a base that has seen nothing of the
tissue. Both paths are fitted on a draw of training cells, and on its folds for the temperatures, as `tune` does with few cells; all
training cells at once are checked on one fold. Logits are kept (`--cache`), so the command goes on where it stopped. Writes SHARE.csv: for every task, number
of cells and draw, coverage, how far the encoder is ahead of the genes on the held-out folds, macro-F1 by the encoder's share, and ECE by what is
done to the temperatures.
"""
import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("SCIMLORA_PROGRESS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # with another number of threads a base or a fit is another one

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from scipy.optimize import minimize_scalar  # noqa: E402
from scipy.special import log_softmax  # noqa: E402
from sklearn.metrics import f1_score  # noqa: E402

from embedding_share import TASKS, load  # noqa: E402
from scimlora.calibration import Calibration, ece  # noqa: E402
from scimlora.choice import choose  # noqa: E402
from scimlora.genepath import coverage, fit_genepath  # noqa: E402
from scimlora.lora import TuneConfig  # noqa: E402
from scimlora.methods import fit_method  # noqa: E402
from scimlora.splits import folds  # noqa: E402
from settings import draw  # noqa: E402

HERE = Path(__file__).parent
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
HEAT = {"as served": (1, 1.0), "pulled 5 times as hard towards 1": (5, 1.0), "pulled 20 times": (20, 1.0), "pulled 100 times": (100, 1.0), "1.25 times as hot": (1, 1.25), "0.8 times": (1, 0.8)}


def both_paths(t, rows, X, z, measured, seed):
    "Logits of LoRA's default and of the gene path, fitted on some training cells."
    base, y = t["base"], t["y"][rows]
    path = fit_genepath(base, t["X"][rows], y, t["n"], t["measured"][0], seed=seed)
    lora = fit_method("as configured", base, t["X"][rows], y, t["n"], TuneConfig(seed=seed, keep_best=False))
    return dict(lora=lora.logits(X), genes=path.logits(X, z, measured))


def logits(t, shots, seed):
    "Logits of both paths on the test cells (t_) and on held-out folds of the training cells (h_), with the true classes (yt, yh)."
    rows = draw(t["y"], shots, seed)
    parts = folds(t["y"][rows], seed=seed)[:None if shots else 1]
    test = both_paths(t, rows, t["Xt"], t["zt"], t["measured"][1], seed)
    held = [both_paths(t, rows[a], t["X"][rows[h]], t["z"][rows[h]], t["measured"][0], seed) for a, h in parts]
    return dict(yt=t["yt"], yh=np.concatenate([t["y"][rows[h]] for _, h in parts]), cov=coverage(t["base"], t["z"][rows], t["y"][rows]),
                **{f"t_{k}": v for k, v in test.items()}, **{f"h_{k}": np.concatenate([h[k] for h in held]) for k in test})


def temperature(logits, y, pull):
    "As `scimlora.calibration.fit_temperature` finds it, with another pull towards 1."
    rows = np.arange(len(y))
    loss = lambda t: -log_softmax(logits / np.exp(t), axis=1)[rows, y].sum() + pull * t**2
    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded").x))


def calibration(d, share, pull=1, heat=1.0):
    c = Calibration(encoder_weight=share, encoder_temperature=temperature(d["h_lora"], d["yh"], pull), gene_temperature=temperature(d["h_genes"], d["yh"], pull))
    c.temperature = temperature(c.join(d["h_lora"], d["h_genes"]), d["yh"], pull) * heat
    return c


def row(d):
    "Coverage, the lead on held-out folds, macro-F1 by share, ECE by temperature."
    chosen = choose("auto", d["h_lora"], d["h_genes"], d["yh"])
    out = dict(coverage=float(d["cov"]), lead=chosen["encoder_accuracy"] - chosen["genes_accuracy"], share=chosen["encoder_weight"])
    for s in SHARES: out[f"F1 at {s:g}"] = f1_score(d["yt"], calibration(d, s).join(d["t_lora"], d["t_genes"]).argmax(1), average="macro", zero_division=0)
    for name, how in HEAT.items():
        p = calibration(d, chosen["encoder_weight"], *how).proba(d["t_lora"], d["t_genes"])
        out[f"ECE, {name}"] = ece(p.max(1), p.argmax(1) == d["yt"])
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--shots", nargs="*", type=int, default=[5, 25, 0], help="0: all cells, once")
    parser.add_argument("--tasks", nargs="*", default=[*TASKS])
    parser.add_argument("--bases", type=Path, default=Path(tempfile.gettempdir()) / "scimlora-bases", help="folder to keep the bases in")
    parser.add_argument("--cache", type=Path, default=HERE.parent / "runs" / "share", help="folder to keep logits in")
    parser.add_argument("--out", type=Path, default=HERE / "SHARE.csv")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    rows = []
    for task in args.tasks:
        t = None
        for shots in args.shots:
            for seed in range(args.seeds if shots else 1):
                kept = args.cache / f"{task}-{shots}-{seed}.npz".replace(" ", "_")
                if not kept.exists(): np.savez(kept, **logits(t := t or load(task, args.bases), shots, seed))
                with np.load(kept) as d: rows.append(dict(task=task, cells_a_class=shots or "full", draw=seed, **row(d)))
        pd.DataFrame(rows).round(4).to_csv(args.out, index=False)
        print(task, flush=True)


if __name__ == "__main__": main()
