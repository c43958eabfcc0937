"""What the stored runs come to: a table of runs, a page and a figure. Every number is computed from the stored predictions."""
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from scimlora.calibration import ece
from scimlora.core import read_json, write_json
from scimlora.evaluation import COLOURS, paired_difference
from suite.methods import METHODS, PINS
from suite.tasks import CONFIRM, PUBLIC

HERE = Path(__file__).parent.parent
OURS, PEERS = ([m.name for m in METHODS.values() if m.kind == kind] for kind in ("ours", "peer"))
SHOWN = ("logistic regression, genes", "CellTypist, features selected", "scANVI", "frozen base + linear", "LoRA", "scimlora")  # lines of the figure


def scores(row):
    "Metrics of one stored run."
    top3 = np.argsort(-row.proba, axis=1, kind="stable")[:, :3]
    # A class that no test cell has would warn; recall is over classes that are there.
    return dict(accuracy=accuracy_score(row.y, row.said), macro_f1=f1_score(row.y, row.said, average="macro", zero_division=0), balanced_accuracy=balanced_accuracy_score(row.y, row.said),
                top3_accuracy=(top3 == row.y[:, None]).any(1).mean(), ece=ece(row.proba.max(1), row.said == row.y))


class Differences:
    "Paired bootstrap differences, kept in a file: they cost more than all other numbers."

    def __init__(self, path): self.path, self.known = path, read_json(path) if path.exists() else {}

    def __call__(self, y, first, second):
        key = sha256(b"".join(np.asarray(v, np.int16).tobytes() for v in (y, first, second))).hexdigest()[:24]
        if key not in self.known: self.known[key] = {k: float(v) for k, v in paired_difference(y, first, second).items()}
        return self.known[key]

    def save(self): write_json(self.path, self.known)


def run_table(rows, differences):
    "One line a run, with its difference to the best peer of the same draw: best on the test cells themselves, so in the peers' favour."
    out, place = [], {m: i for i, m in enumerate(METHODS)}
    tasks = {k: i for i, k in enumerate(PUBLIC | CONFIRM)}
    for r in sorted(rows, key=lambda r: (tasks.get(r.task, 99), r.shots or 10**6, r.seed, place[r.method])):
        out.append(dict(task=r.task, public=r.task in PUBLIC, shots=r.shots or "full", seed=r.seed, method=r.method, kind=METHODS[r.method].kind, cells=r.cells, test_cells=len(r.y), **scores(r), seconds=r.seconds, trainable_share=r.share))
    t = pd.DataFrame(out)
    for name in ("best_peer", "difference", "low", "high"): t[name] = pd.Series([None] * len(t), dtype=object if name == "best_peer" else float)
    by = {(r.task, r.shots or "full", r.seed, r.method): r for r in rows}
    for draw, g in t.groupby(["task", "shots", "seed"], sort=False):
        peers = g[g.kind == "peer"]
        if not len(peers): continue
        best = peers.method[peers.macro_f1.idxmax()]
        t.loc[g.index, "best_peer"] = best
        for i in g.index[g.kind == "ours"]:
            r = by[*draw, t.method[i]]
            d = differences(r.y, r.said, by[*draw, best].said)
            for k in ("difference", "low", "high"): t.loc[i, k] = d[k]
    return t


def standard_error(t): return (t.high - t.low) / (2 * 1.96)


# Tables ---------------------------------------------------------------------------------------------------------------


def markdown(head, lines):
    return ["| " + " | ".join(head) + " |", "| " + " | ".join("---" if h in ("cells a class", "method", "task", "genes kept") else "---:" for h in head) + " |", *("| " + " | ".join(c) + " |" for c in lines)]


def spread(x, scale=100, digits=1):
    return "–" if not len(x) else f"{x.mean() * scale:.{digits}f}" + (f" ± {x.std() * scale:.{digits}f}" if len(x) > 1 else "")


def _each(t):
    "Groups of one number of cells and one method, in order."
    for shots in t.shots.unique():
        for method in METHODS:
            g = t[(t.shots == shots) & (t.method == method)]
            if len(g): yield shots, method, g


def f1_lines(t, tasks):
    "Macro-F1 × 100 of every task, mean ± standard deviation over draws; the mean is over tasks, and only where all are there."
    lines = []
    for shots, method, g in _each(t):
        cells = [g[g.task == k].macro_f1 for k in tasks]
        mean = f"{np.mean([c.mean() for c in cells]) * 100:.1f}" if all(map(len, cells)) else "–"
        lines.append([str(shots), method, *map(spread, cells), mean])
    return markdown(["cells a class", "method", *tasks, "mean"], lines)


def metric_lines(t):
    "All metrics, means over tasks and draws."
    lines = [[str(shots), method, str(g.task.nunique()), *(f"{g.groupby('task')[k].mean().mean() * 100:.1f}" for k in ("accuracy", "macro_f1", "balanced_accuracy", "top3_accuracy")),
              f"{g.groupby('task').ece.mean().mean():.3f}", f"{g.seconds.mean():.1f}", f"{g.trainable_share.mean() * 100:.2f} %"] for shots, method, g in _each(t)]
    return markdown(["cells a class", "method", "tasks", "accuracy", "macro-F1", "balanced accuracy", "top 3", "ECE", "seconds", "trained"], lines)


def difference_lines(t, tasks):
    "Differences to the best peer in points, means over draws, with the mean interval."
    lines = []
    for shots, method, g in _each(t[(t.kind == "ours") & t.difference.notna()]):
        d = g.groupby("task")[["difference", "low", "high"]].mean() * 100
        cells = [f"{d.difference[k]:+.1f} ({d.low[k]:+.1f} to {d.high[k]:+.1f})" if k in d.index else "–" for k in tasks]
        lines.append([str(shots), method, *cells, f"{d.difference.mean():+.1f}", f"{d.difference.min():+.1f}"])
    return markdown(["cells a class", "method", *tasks, "mean", "worst"], lines)


# Targets --------------------------------------------------------------------------------------------------------------

# In points of macro-F1, and ECE as a share. These are what is wanted; whether it is there is computed.
WANTED = dict(full=0.0, few_mean=3.0, few_worst=-1.0, lora=2.0, ece=0.05)


def _said(reached, miss, digits=1, unit=" points"):
    return "**reached**" if reached else f"**missed** by {miss:.{digits}f}{unit}"


def _full_target(t):
    g = t[(t.method == "scimlora") & (t.shots == "full") & t.difference.notna()]
    for r in g.itertuples():
        d, se = r.difference * 100, standard_error(r) * 100
        how = "ahead" if d > se else "a tie" if d >= -se else "behind"
        yield (f"- All cells, {r.task}: {r.macro_f1 * 100:.1f} against {(r.macro_f1 - r.difference) * 100:.1f} ({r.best_peer}), {d:+.1f} with a standard error of {se:.1f}: {how}; "
               + _said(d >= WANTED["full"] - se, WANTED["full"] - se - d) + ".")


def _few_target(t):
    g = t[(t.method == "scimlora") & (t.shots != "full") & t.difference.notna()]
    if not len(g): return
    d = g.groupby(["task", "shots"]).difference.mean() * 100
    yield f"- 5 to 25 cells a class, mean lead over the best peer: {d.mean():+.1f} points over {len(d)} settings (wanted: {WANTED['few_mean']:+.1f}); {_said(d.mean() >= WANTED['few_mean'], WANTED['few_mean'] - d.mean())}."
    yield f"- The worst setting: {d.min():+.1f} ({d.idxmin()[0]}, {d.idxmin()[1]} cells a class; wanted: {WANTED['few_worst']:+.1f} or better); {_said(d.min() >= WANTED['few_worst'], WANTED['few_worst'] - d.min())}."


def _lora_target(t):
    wide = t.pivot_table(index=["task", "shots", "seed"], columns="method", values="macro_f1", sort=False) * 100
    if not {"LoRA", "frozen base + linear"} <= set(wide): return
    d = (wide["LoRA"] - wide["frozen base + linear"]).dropna().groupby(["task", "shots"]).mean().reset_index(name="d")
    for shots in (25, "full"):
        x = d[d.shots == shots].d
        if len(x): yield f"- LoRA against frozen base + linear, {shots} cells{' a class' if shots != 'full' else ''}: {x.mean():+.1f} points on average, ahead in {(x > 0).sum()} of {len(x)} tasks, worst {x.min():+.1f}; {_said(x.mean() > WANTED['lora'], WANTED['lora'] - x.mean())}."


def _ece_target(t):
    for shots in t.shots.unique():
        g = t[(t.method == "scimlora") & (t.shots == shots)].groupby("task").ece.mean()
        if len(g): yield f"- ECE of scimlora, {shots} cells{' a class' if shots != 'full' else ''}: {g.mean():.3f} on average, {g.max():.3f} at worst ({g.idxmax()}; wanted: {WANTED['ece']} or less on average); {_said(g.mean() <= WANTED['ece'], g.mean() - WANTED['ece'], 3, '')}."


def target_lines(t):
    "The targets, each with what was found."
    lines = [line for part in (_full_target, _few_target, _lora_target, _ece_target) for line in part(t)]
    return lines or ["No run of scimlora is stored yet."]


# What was missed ------------------------------------------------------------------------------------------------------


def behind(t):
    "Settings in which scimlora is behind the best peer by more than wanted, or LoRA behind frozen base + linear: (what, task, shots, first, second or None for the best peer)."
    full, few = ((t.method == "scimlora") & t.difference.notna() & ((t.shots == "full") == f) for f in (True, False))
    for r in t[full].itertuples():
        if r.difference < -standard_error(r): yield "scimlora, best peer", r.task, "full", "scimlora", None
    d = t[few].groupby(["task", "shots"]).difference.mean() * 100
    for task, shots in d.index[d < WANTED["few_worst"]]: yield "scimlora, best peer", task, shots, "scimlora", None
    for (task, shots), g in t.groupby(["task", "shots"], sort=False):
        f1 = g.groupby("method").macro_f1.mean()
        if shots in (25, "full") and f1.get("LoRA", 1) < f1.get("frozen base + linear", 0): yield "LoRA, frozen base + linear", task, shots, "LoRA", "frozen base + linear"


def behind_lines(t, rows):
    "A table of these settings with what explains them: how well the base tells the types, and how few cells decide."
    true, lines = {r.task: r.y for r in rows}, []
    for what, task, shots, first, second in behind(t):
        g = t[(t.task == task) & (t.shots == shots)]
        mine, theirs = (g[g.method == first], g[g.method == g.best_peer] if second is None else g[g.method == second])
        diff = [100 * (mine[k].mean() - theirs[k].mean()) for k in ("macro_f1", "accuracy")]
        known = 100 * (g[g.method == "frozen base + linear"].macro_f1.mean() - g[g.method == "logistic regression, genes"].macro_f1.mean())
        count = np.bincount(true[task])
        lines.append([what, f"{task}, {shots}", *(f"{d:+.1f}" for d in diff), f"{known:+.1f}", str(count[count > 0].min()), f"{100 / (len(count) * count[count > 0].min()):.1f}"])
    head = ["method", "task", "macro-F1", "accuracy", "base against genes", "cells of the rarest type", "one of them is worth"]
    return [*markdown(head, lines), "", "*Base against genes*: frozen base + linear less logistic regression on genes, in points of macro-F1: how much the base knows of what is asked. "
            "*One of them is worth*: points of macro-F1 that one test cell of the rarest type decides."] if lines else ["Nothing."]


def share_lines(s):
    "What another share of the encoder and other temperatures gave, from SHARE.csv."
    where = [("that the base knows", s.coverage >= 0.6), ("that it does not", s.coverage < 0.6)]
    f1 = {float(c.removeprefix("F1 at ")): 100 * s[c] for c in s if c.startswith("F1 at ")}
    for name, rows in where:
        mean = {k: v[rows].groupby(s.task).mean().mean() for k, v in f1.items()}
        best = max(mean, key=mean.get)
        yield (f"- Another share for the encoder, on {s.task[rows].nunique()} held-out tasks {name} (`SHARE.csv`): {', '.join(f'{k:g} gives {v - mean[0.2]:+.1f}' for k, v in mean.items() if k in (0, 0.4, 0.6, 1))} "
               f"points against 0.2; the best is {best:g}, {mean[best] - mean[0.2]:+.1f}.")
    served = s["ECE, as served"]
    for shots, rows in s.groupby("cells_a_class", sort=False).groups.items():
        other = {c.removeprefix("ECE, "): s[c][rows].mean() - served[rows].mean() for c in s if c.startswith("ECE, ") and c != "ECE, as served"}
        yield (f"- ECE with {shots} cells{' a class' if shots != 'full' else ''}, on the same tasks: {served[rows].mean():.3f} as served; temperatures "
               + ", ".join(f"{name} {d:+.3f}" for name, d in other.items()) + ".")


def tried_lines(t, folder):
    "What was tried against it, and what it gave, from the tables of those runs."
    ours, tried = t[t.method == "scimlora"], pd.read_csv(folder / "TRIED.csv")
    for what, g in tried[tried.method == "scimlora"].groupby("tried", sort=False):
        both = g.astype({"shots": str}).merge(ours.astype({"shots": str}), on=["task", "shots", "seed"], suffixes=("", "_now"))
        d = 100 * (both.macro_f1 - both.macro_f1_now).groupby(both.task).mean()
        if len(d): yield f"- {what[0].upper()}{what[1:]}, on every task (`TRIED.csv`): {d.mean():+.1f} points against what is there now, best {d.max():+.1f} ({d.idxmax()}), worst {d.min():+.1f} ({d.idxmin()})."
    c = pd.read_csv(folder / "COVERAGE.csv")
    for known, g in c.groupby(c.coverage >= 0.6):
        d = 100 * (g["share 0.35"] - g["share 0"]).groupby(g.task).mean()
        yield (f"- The gene path's line with the embedding beside the genes, on {len(d)} held-out tasks that the base {'knows' if known else 'does not know'} (`COVERAGE.csv`): {d.mean():+.1f} points, "
               f"from {d.min():+.1f} to {d.max():+.1f}. " + ("So it has it there." if known else "So it reads the genes alone there."))
    yield from share_lines(pd.read_csv(folder / "SHARE.csv"))
    s = pd.read_csv(folder / "SETTINGS.csv").groupby(["setting", "task", "cells_a_class"]).macro_f1.mean().unstack("setting") * 100
    between = s.index.get_level_values("task").str.contains("→")
    for name in s.columns.drop("default"):
        d = s[name] - s.default
        yield (f"- In place of LoRA's default, {name} (`SETTINGS.csv`, on cells that no benchmark reports): {d.mean():+.1f} points; between laboratories {d[between].mean():+.1f}, "
               f"within a study {d[~between].mean():+.1f}.")


# The page -------------------------------------------------------------------------------------------------------------


def missing_lines(t, tasks):
    "What was left out on purpose, and what has not been computed."
    done, lines = set(zip(t.task, t.shots.astype(str), t.seed, t.method)), []
    draws = t[["task", "shots", "seed"]].drop_duplicates()
    for m in METHODS.values():
        for name in draws.task.unique():
            why, of = m.left_out(tasks[name]["kinds"]), draws[draws.task == name]
            gone = sum((name, str(s), d, m.name) not in done for s, d in zip(of.shots, of.seed))
            if why: lines.append(f"- {m.name}, {name}: {why}.")
            elif gone: lines.append(f"- {m.name}, {name}: not computed" + (f" for {gone} of {len(of)} draws." if gone < len(of) else "."))
    return lines


def older_lines(rows):
    "Methods whose stored runs are of other code than is there now."
    now = {m.name: sha256(m.code().encode()).hexdigest()[:12] for m in METHODS.values()}
    old = pd.Series([r.method for r in rows if r.meta["code"] != now[r.method]], dtype=object).value_counts()
    return [f"- {k}: {n} stored run(s) of older code; run the command again." for k, n in old.items()]


def base_lines(rows):
    "Which base each task had, by its SHA-256."
    used = {(r.task, r.meta["base"]["encoder.ckpt"][:12]) for r in rows if r.meta["base"]}
    return ["- Bases, SHA-256 of the encoder: " + ", ".join(f"{task} {sha}" for task, sha in sorted(used)) + "."] if used else []


def figure(t, tasks):
    "Macro-F1 against cells a class, a panel a task."
    shots = [s for s in (5, 10, 25, "full") if s in set(t.shots)]
    fig = Figure(figsize=(11.5, 3.1 * ((len(tasks) + 3) // 4) + 0.5), layout="constrained")
    axes = np.ravel(fig.subplots((len(tasks) + 3) // 4, min(4, len(tasks)), sharey=False, squeeze=False))
    for ax, k in zip(axes, tasks):
        for i, m in enumerate(SHOWN):
            g = t[(t.task == k) & (t.method == m)].groupby("shots", sort=False).macro_f1
            if not len(g): continue
            at, mean, sd = [shots.index(s) for s in g.groups], g.mean().reindex(g.groups) * 100, g.std().reindex(g.groups).fillna(0) * 100
            order = np.argsort(at)
            ax.errorbar(np.array(at)[order] + (i - 2.5) * 0.05, mean.iloc[order], sd.iloc[order], marker="osD^vP"[i], color=COLOURS[i], label=m, lw=2.2 if m == "scimlora" else 1.2, ms=5, capsize=2,
                        ls="-" if METHODS[m].kind == "ours" else "--")
        ax.set(title=k, xticks=range(len(shots)), xticklabels=shots)
        ax.grid(axis="y", alpha=.3)
    for ax in axes[len(tasks):]: ax.axis("off")
    fig.supxlabel("training cells a class")
    fig.supylabel("macro-F1 × 100 (each panel its own scale)")
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels())}
    fig.legend([handles[m] for m in SHOWN if m in handles], [m for m in SHOWN if m in handles], loc="outside upper center", ncols=len(SHOWN), frameon=False, fontsize=9)
    return fig


def page(t, rows, tasks, command):
    "SCIENCE.md as text."
    names = [[k for k in group if k in set(t.task)] for group in (PUBLIC, CONFIRM)]
    names[1] += sorted(set(t.task) - set(PUBLIC) - set(CONFIRM))
    seeds = t[t.shots != "full"].seed.nunique()
    lines = ["# Methods against tuned peers", "", f"Made by `{command}`, which says how in the head of `science.py`; {seeds} draws of training cells, and all of them once. Every run stands in `SCIENCE.csv`.", "",
             "Macro-F1 × 100, mean ± standard deviation over draws. *scimlora* is what a user gets, `Classifier.tune` and `predict_proba` with all defaults; the other rows of ours are its parts. "
             "The *best peer* of a draw is the one with the highest macro-F1 on the test cells themselves, which favours the peers. Seconds are processor time of fitting and predicting, one thread, when a run was made first. "
             "ECE is of each method's highest probability: the SVM's are softmaxed margins, CellTypist's one-versus-rest. scANVI needs counts and sees the test cells without their labels.",
             "", "## Targets", "", *target_lines(t)]
    lines += ["", "## Where it is behind, and what was tried", "", *behind_lines(t, rows), "", *tried_lines(t, HERE)]
    for group, head, note in ((names[0], "The public tasks", "The gene path (its constants, and how lines and profiles are mixed) was built while looking at these: take its lead as flattered."),
                              (names[1], "Tasks that no constant of the gene path was chosen on", "The base had not seen these studies either. The encoder's share (0.2, or none where it is 10 points behind) was fixed on the public tasks and two of these, and kept after a look at all.")):
        if group:
            part = t[t.task.isin(group)]
            lines += ["", f"## {head}", "", note, "", *f1_lines(part, group), "", "Difference in macro-F1 to the best peer of each draw, in points, mean over draws, with the mean 95 % bootstrap interval over test cells:", "", *difference_lines(part, group)]
    lines += ["", "## All metrics", "", "Means over the tasks that a method was run on (their number is given), × 100 but for ECE, seconds and the share of trained parameters.", "", *metric_lines(t)]
    lines += ["", "## Tasks", "", *markdown(["task", "training cells", "test cells", "classes", "genes", "values, train and test", "training donors for inner folds"],
              [[k, f"{v['train']:,}", f"{v['test']:,}", str(len(v["classes"])), f"{v['genes']:,}", " and ".join(v["kinds"]), str(v["donors"] or "fewer than 3")] for k, v in tasks.items() if k in set(t.task)])]
    gone = missing_lines(t, tasks) + older_lines(rows)
    if gone: lines += ["", "## Left out", "", *gone]
    lines += ["", "## Made on", "", *(f"- {m}" for m in sorted({r.meta["machine"] for r in rows})), *base_lines(rows), "- Peers' own environment: " + ", ".join(f"{k} {v}" for k, v in PINS.items()) + "."]
    return "\n".join(lines) + "\n"


def write(store, out, command="make benchmark-science"):
    "Write SCIENCE.csv, SCIENCE.md and SCIENCE.png from what is stored; return the table."
    out.mkdir(parents=True, exist_ok=True)
    rows, differences = store.rows(), Differences(store.folder / "differences.json")
    t = run_table(rows, differences)
    differences.save()
    t.round(5).to_csv(out / "SCIENCE.csv", index=False)
    (out / "SCIENCE.md").write_text(page(t, rows, store.tasks(), command), encoding="utf-8")
    figure(t, list(dict.fromkeys(t.task))).savefig(out / "SCIENCE.png", dpi=110, metadata={"Software": None})
    return t
