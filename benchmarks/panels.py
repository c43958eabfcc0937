"""Measure what is lost when the cells to be annotated have fewer genes than the training cells.

    make benchmark-panels

Methods are fitted on all training cells with all their genes, then annotate the test cells of which only some genes are kept: 5,000 to
10 at random (three draws), or those that vary most in the training cells, or markers (Wilcoxon, each type against the rest, on training
cells): the ten best of every type, and ten in all, taken from the types in turn. And a study of the kind that comes in practice: the
six blood markers CD3D, MS4A1, LYZ, NKG7, CD14 and IL7R missing, and with them 60 % of the other genes.

Logistic regression comes twice: *zeros for missing genes*, as trained on all genes, which is what happens in practice, and *retrained*,
fitted anew for every panel on the genes that are measured, which a service cannot do but is the stronger peer. Every method sees values
scaled to 10,000 over the genes that are there. Fits are kept as those of science.py. Writes PANELS.csv, PANELS.md and PANELS.png.
"""
import argparse
import os
import sys
import warnings
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

os.environ.setdefault("SCIMLORA_PROGRESS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # with another number of threads a base or a fit is another one

import anndata as ad  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import scanpy as sc  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from scimlora.evaluation import COLOURS  # noqa: E402
from suite.methods import METHODS  # noqa: E402
from suite.report import markdown, scores, spread  # noqa: E402
from suite.store import Store, machine  # noqa: E402
from suite.tasks import PUBLIC, TASKS, Bases, Draw, load_task  # noqa: E402

HERE = Path(__file__).parent
SIZES, DRAWS = (5000, 1000, 300, 100, 10), 3
MISSING, DROPPED = ("CD3D", "MS4A1", "LYZ", "NKG7", "CD14", "IL7R"), 0.6
BLOOD = ("Kang, donor 1244", "Zheng → 3k", "Kang, donor 1015", "3k → Zheng")
LR, ZERO, AGAIN = "logistic regression, genes", "logistic regression, zeros for missing genes", "logistic regression, retrained"
OWN = ("frozen base + linear", "LoRA", "gene path", "scimlora")
ORDER = [ZERO, AGAIN, *OWN]


# Panels ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    "Name a choice of genes."
    kind: str  # 'all', 'random', 'variance', 'markers', 'markers missing'
    size: int  # genes asked for; of markers: all together
    draw: int
    genes: tuple

    @property
    def name(self): return f"{self.kind}, {self.size}, {self.draw}"


def most_varying(task, n):
    "Genes by the variance of their values over the training cells, the most varying first."
    G = task.train.on(task.genes).astype(np.float64)
    variance = np.asarray(G.multiply(G).mean(0)).ravel() - np.asarray(G.mean(0)).ravel() ** 2
    return [task.genes[i] for i in np.argsort(-variance, kind="stable")[:n]]


def ranked_markers(task):
    "For every type its genes, the best marker first: Wilcoxon's rank sum against all other training cells."
    a = ad.AnnData(task.train.on(task.genes), var=pd.DataFrame(index=task.genes), obs=pd.DataFrame(dict(type=pd.Categorical([task.classes[i] for i in task.y])), index=[str(i) for i in range(len(task.y))]))
    sc.tl.rank_genes_groups(a, "type", method="wilcoxon", n_genes=50)
    return {c: [str(g) for g in a.uns["rank_genes_groups"]["names"][c]] for c in task.classes}


def in_turn(ranked, n):
    "The first n genes that come up when the types give their best marker in turn, then their second best, and so on."
    return list(dict.fromkeys(g for rank in zip(*ranked.values()) for g in rank))[:n]


def without_markers(genes, rng):
    "What is left when the six markers are missing, and of the others a share."
    rest = [g for g in genes if g not in MISSING]
    return [rest[i] for i in np.sort(rng.permutation(len(rest))[:round(len(rest) * (1 - DROPPED))])]


def panels(task):
    "All choices of genes for a task."
    rng, n = np.random.default_rng, len(task.genes)
    out = [Panel("all", n, 0, tuple(task.genes))]
    if task.name in PUBLIC:
        out += [Panel("random", k, s, tuple(rng([s, k]).permutation(task.genes)[:k])) for k in SIZES if k < n for s in range(DRAWS)]
        out += [Panel("variance", k, 0, tuple(most_varying(task, k))) for k in SIZES if k < n]
        ranked = ranked_markers(task)
        out += [Panel("markers", 10, 0, tuple(in_turn(ranked, 10)))]
        each = tuple(sorted({g for names in ranked.values() for g in names[:10]}))
        out += [Panel("markers", len(each), 0, each)]
    if task.name in BLOOD: out += [Panel("markers missing", 0, s, tuple(without_markers(task.genes, rng(s)))) for s in range(DRAWS)]
    return out


# Fits -----------------------------------------------------------------------------------------------------------------


def reduced(task, panel):
    "The task with only the panel's genes, in training too."
    return replace(task, train=task.train.only(panel.genes), test=task.test.only(panel.genes), genes=list(panel.genes))


def what(name, panel): return f"{name}|{panel.name}|{sha256(' '.join(panel.genes).encode()).hexdigest()}"


def fit_one(store, name, task, chosen):
    "One method on all panels; return what failed."
    draw, failed, predict = Draw(task, 0, 0), [], None
    method = METHODS[LR if name in (ZERO, AGAIN) else name]
    for p in chosen:
        if store.has(method, draw, what(name, p)): continue
        try:
            if name == AGAIN: test = (t := reduced(task, p)).test; predict, share = method.fit(Draw(t, 0, 0))
            else:
                if predict is None: predict, share = method.fit(draw)
                test = task.test if p.kind == "all" else task.test.only(p.genes)
            proba = np.asarray(predict(test))
            store.keep(method, draw, proba, proba.argmax(1), share, 0.0, what(name, p), shown=name, panel=p.kind, size=len(p.genes), asked=p.size, choice=p.draw)
        # A panel that a method refuses must not cost the others; it is told in the page.
        except Exception as e: failed.append(f"{task.name}, {name}, {p.name}: {type(e).__name__}: {e}")
        print(f"{task.name}: {name}, {p.name}" + (f" FAILED {failed[-1]}" if failed and p.name in failed[-1] else ""), flush=True)
    return failed


def run_table(rows):
    "One line a prediction."
    t = pd.DataFrame([dict(task=r.task, panel=r.meta["panel"], asked=r.meta["asked"], genes=r.meta["size"], draw=r.meta["choice"], method=r.meta["shown"], **scores(r)) for r in rows])
    order = {k: i for i, k in enumerate(TASKS)}, {k: i for i, k in enumerate(ORDER)}
    return t.sort_values(["task", "panel", "asked", "draw", "method"], key=lambda c: c.map(order[0]) if c.name == "task" else c.map(order[1]) if c.name == "method" else c, kind="stable").reset_index(drop=True)


# The page -------------------------------------------------------------------------------------------------------------


def size_lines(t):
    "Macro-F1 × 100 by panel and method for one task."
    lines = []
    kinds = [("all", None)] + [(k, s) for k in ("random", "variance", "markers") for s in sorted(t[t.panel == k].asked.unique(), reverse=True)]
    for kind, size in kinds:
        g = t[(t.panel == kind) & (True if size is None else t.asked == size)]
        lines.append([kind, f"{g.genes.max():,}", *(spread(g[g.method == m].macro_f1) for m in ORDER)])
    return markdown(["genes kept", "number", *ORDER], lines)


def losses(t):
    "Points of macro-F1 that each method loses in the study of missing markers, mean over draws: tasks × methods."
    f1 = t.groupby(["panel", "task", "method"], sort=False).macro_f1.mean() * 100
    if "markers missing" not in f1.index: return pd.DataFrame()
    return (f1["all"] - f1["markers missing"]).dropna().unstack().reindex(columns=[m for m in ORDER if m in set(t.method)], index=[k for k in BLOOD if k in set(t.task)])


def missing_lines(t):
    "Losses, and whether scimlora loses less than half of what logistic regression loses."
    loss = losses(t)
    if not len(loss): return
    yield from markdown(["task", *loss.columns], [[k, *("–" if np.isnan(v) else f"{v:+.1f}" for v in row)] for k, row in zip([*loss.index, "mean"], [*loss.to_numpy(), loss.mean().to_numpy()])])
    yield ""
    for peer in (ZERO, AGAIN):
        for m in OWN:
            if not {m, peer} <= set(loss) or loss[[m, peer]].isna().any(axis=None): continue
            own, theirs = loss[m].mean(), loss[peer].mean()
            reached = own < theirs / 2
            yield f"- {m} loses {own:.1f} points, {peer} {theirs:.1f}: wanted is less than half, {theirs / 2:.1f}; " + ("**reached**." if reached else f"**missed** by {own - theirs / 2:.1f} points.")


def figure(t):
    "Macro-F1 against the number of genes: random above, by variance below."
    tasks, sizes = [k for k in PUBLIC if k in set(t.task)], sorted(SIZES)
    fig = Figure(figsize=(max(9, 3 * len(tasks) + 0.6), 6.6), layout="constrained")
    axes = fig.subplots(2, len(tasks), sharey="row", sharex=True, squeeze=False)
    for row, kind in zip(axes, ("random", "variance")):
        for ax, k in zip(row, tasks):
            g = t[(t.task == k) & ((t.panel == kind) | (t.panel == "all"))]
            here = [s for s in sizes if s in set(g.asked)]
            for i, m in enumerate(ORDER):
                x = g[g.method == m]
                f1 = [x[x.asked == s].macro_f1 * 100 for s in here] + [x[x.panel == "all"].macro_f1 * 100]
                if not all(map(len, f1)): continue
                ax.errorbar(range(len(f1)), [v.mean() for v in f1], [v.std() if len(v) > 1 else 0 for v in f1], marker="osD^vP"[i], color=COLOURS[i], label=m, lw=2.2 if m == "scimlora" else 1.2, ms=5, capsize=2, ls="--" if m in (ZERO, AGAIN) else "-")
            ax.set(title=f"{k}", xticks=range(len(here) + 1), xticklabels=[*(f"{s:,}" for s in here), "all"], ylim=(0, 102))
            ax.grid(axis="y", alpha=.3)
            ax.tick_params(axis="x", rotation=40)
        row[0].set_ylabel(f"macro-F1 × 100, genes {'at random' if kind == 'random' else 'by variance'}")
    fig.supxlabel("genes measured in the test cells")
    handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels())}
    names = [m for m in ORDER if m in handles]
    fig.legend([handles[m] for m in names], names, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return fig


def page(t, rows, failed):
    "PANELS.md as text."
    lines = ["# Fewer genes", "", f"Made by `make benchmark-panels`, which says how in the head of `panels.py`. All training cells; macro-F1 × 100 on the test cells, mean ± standard deviation over {DRAWS} random choices of genes. Every prediction stands in `PANELS.csv`."]
    for k in PUBLIC:
        if k in set(t.task): lines += ["", f"## {k}", "", *size_lines(t[t.task == k])]
    lines += ["", "## A study whose gene list misses markers", "", f"{', '.join(MISSING)} and {DROPPED:.0%} of the other genes are taken out of the test cells, {DRAWS} times. Points of macro-F1 lost:", "", *missing_lines(t)]
    if failed: lines += ["", "## Refused or failed", "", *(f"- {f}" for f in failed)]
    return "\n".join(lines + ["", "## Made on", "", *(f"- {m}" for m in sorted({r.meta['machine'] for r in rows}) or [machine()])]) + "\n"


def write(store, out, failed):
    "Write PANELS.csv, PANELS.md and PANELS.png from what is kept; return the table."
    out.mkdir(parents=True, exist_ok=True)
    rows = store.rows()
    t = run_table(rows)
    t.round(5).to_csv(out / "PANELS.csv", index=False)
    (out / "PANELS.md").write_text(page(t, rows, failed), encoding="utf-8")
    figure(t).savefig(out / "PANELS.png", dpi=110, metadata={"Software": None})
    return t


def main(argv=None):
    warnings.filterwarnings("ignore")
    matplotlib.use("agg")
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tasks", nargs="*", default=list(dict.fromkeys([*PUBLIC, *BLOOD])))
    p.add_argument("--methods", nargs="*", default=ORDER, metavar="METHOD", help="one or more of: " + "; ".join(ORDER))
    p.add_argument("--cache", type=Path, default=HERE.parent / "runs" / "science", help="where fits are kept, as for science.py")
    p.add_argument("--bases", type=Path, help="as for science.py")
    p.add_argument("--out", type=Path, default=HERE)
    p.add_argument("--fresh", action="store_true", help="forget what is kept of panels")
    args = p.parse_args(argv)
    store, bases, failed = Store(args.cache, args.fresh, "panels"), Bases(args.cache / "bases", args.bases), []
    for name in args.tasks:
        task = load_task(name, bases)
        chosen = panels(task)
        for m in args.methods: failed += fit_one(store, m, task, chosen)
    write(store, args.out, failed)
    for f in failed: print(f"failed: {f}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__": sys.exit(main())
