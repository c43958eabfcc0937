"""Write the pictures of nbs/images that are made of something else in the repository.

    python tools/make_card.py

card.png, at the head of the README and the site's social card: from benchmarks/SCIENCE.csv. architecture.png, in CONTRIBUTING.md: the last
picture of nbs/17_how_it_works.ipynb.
"""
import base64
import json
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from scimlora.evaluation import COLOURS

ROOT = Path(__file__).resolve().parent.parent
SHOTS = {"5": "5", "10": "10", "25": "25", "full": "all"}
LINES = {"scimlora": ("s", COLOURS[0], "-"), "logistic regression, genes": ("D", COLOURS[1], "--"), "CellTypist, features selected": ("v", COLOURS[2], "--"),
         "frozen base + linear": ("o", COLOURS[3], ":"), "LoRA": ("^", COLOURS[4], "-")}


def architecture():
    "The last picture that the chapter on how it works has saved."
    cells = json.loads((ROOT / "nbs/17_how_it_works.ipynb").read_text(encoding="utf-8"))["cells"]
    pictures = [o["data"]["image/png"] for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    (ROOT / "nbs/images/architecture.png").write_bytes(base64.b64decode(pictures[-1]))


def card():
    runs = pd.read_csv(ROOT / "benchmarks/SCIENCE.csv")
    mean = 100 * runs.groupby(["method", "shots", "task"]).macro_f1.mean().groupby(["method", "shots"]).mean().unstack("shots")
    fig = Figure(figsize=(12, 6.3), facecolor="white")
    fig.text(0.05, 0.80, "scimlora", fontsize=46, weight="bold", color=COLOURS[0])
    fig.text(0.05, 0.70, "Teach a foundation model of single cells\nyour own atlas, and know what it gave.", fontsize=17, va="top", linespacing=1.5)
    fig.text(0.05, 0.46, "LoRA adapters beside lines over genes\nDonors and laboratories held out\nTuned baselines in every table\nUnassigned at a stated error\nNotebook, command line, service, page", fontsize=13, va="top", color=".3", linespacing=1.9)
    ax = fig.add_axes([0.54, 0.15, 0.42, 0.68])
    for name, (mark, colour, style) in LINES.items(): ax.plot([*SHOTS.values()], mean.loc[name, [*SHOTS]], marker=mark, color=colour, ls=style, ms=8, lw=3 if name == "scimlora" else 2, label=name)
    ax.set_xlabel("training cells of each type", fontsize=13)
    ax.set_title(f"macro-F1 × 100, {runs.task.nunique()} tasks on other donors and laboratories", fontsize=13, loc="left", pad=12)
    ax.tick_params(labelsize=12)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=11, loc="lower right")
    fig.savefig(ROOT / "nbs/images/card.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    card()
    architecture()
