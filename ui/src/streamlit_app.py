"""The page: type genes or drop a file, and see what cell types the model takes them for.

    streamlit run ui/src/streamlit_app.py

It asks scimlora's service where API_URL is set, and else opens a bundle in this process: SCIMLORA_BUNDLE, or `blood`, which
the package brings. A link may say what to show: ?page=Annotate+a+file, ?example=B+cell, ?genes=CD19:2.4,MS4A1:3.
"""
import contextlib
import logging
import os
import re
from pathlib import Path

import pandas as pd
import streamlit as st
from page import charts

from scimlora.backends import Local, Remote, Trouble, grouped_by
from scimlora.core import InputError
from scimlora.page import genes_from_link, genes_to_link, parse_genes, pca_xy, preset_text, presets
from scimlora.sources import sources_of
from scimlora.uploads import KINDS

UNITS = {"auto": "whatever the numbers look like", "counts": "counts", "cpm": "scaled to one total, not logged (CPM, TPM)",
         "log1p_cp10k": "log-normalised (log1p CP10K)"}
METHODS = {"majority": "always the commonest type", "base_knn": "base model, nearest cells", "base_linear": "base model, linear head",
           "base_linear_bn_recalibrated": "base model, recalibrated", "logreg_genes": "logistic regression on genes", "lora": "adapted encoder alone",
           "gene_path": "genes alone"}
PAGES = ("Type genes", "Annotate a file", "Ask in words", "How good is it", "About the model")
COLOURS = {"cell_type": "label of each cell", "majority": "label of its cluster", "confidence": "confidence"}


@contextlib.contextmanager
def in_plain_words():
    "Show a sentence where something fails, and keep the details for the log."
    try: yield
    except Trouble as e: st.error(str(e), icon=":material/error:")
    except InputError as e: st.error(sentences([str(e)]), icon=":material/error:")
    except Exception:
        logging.getLogger("scimlora.ui").exception("the page failed")
        st.error("Something went wrong that this page did not foresee. Try again; if it stays so, the log of the page says more.",
                 icon=":material/error:")


def setting(name):
    "Return a setting from the environment, else from secrets.toml, else ''."
    if os.environ.get(name): return os.environ[name]
    return str(st.secrets.get(name, "")) if st.secrets.load_if_toml_exists() else ""


@st.cache_resource(max_entries=2, show_spinner="Opening the model …")
def open_bundle(bundle, changed):
    "Open a bundle once for all visitors; `changed`, a folder's time stamp, opens it anew after another fine-tune."
    return Local(bundle)


@st.cache_resource(max_entries=2, show_spinner=False)
def open_service(url, key, timeout): return Remote(url, key, timeout)


def seconds(text):
    "API_TIMEOUT as a number."
    try: return float(text or 60)
    except ValueError: raise Trouble(f"API_TIMEOUT is no number of seconds: “{text}”.") from None


def find_backend():
    "Return the service or the bundle that answers."
    if url := setting("API_URL"): return open_service(url, setting("API_KEY"), seconds(setting("API_TIMEOUT")))
    bundle = setting("SCIMLORA_BUNDLE") or "blood"
    manifest = Path(bundle) / "manifest.json"
    return open_bundle(bundle, manifest.stat().st_mtime if manifest.exists() else 0)


def model_of(backend):
    "Return the manifest. A service is asked once a session: what is on the page stays there when it goes away."
    if isinstance(backend, Local): return backend.model()
    if "model" not in st.session_state: st.session_state.model = backend.model()
    return st.session_state.model


def sentences(texts):
    "Join texts that start small and end without a stop."
    return " ".join(f"{t[:1].upper()}{t[1:].rstrip('.')}." for t in texts)


def units_choice(key):
    "Ask what the values are; returns scimlora's word for it."
    return st.selectbox("The values are", list(UNITS), format_func=UNITS.get, key=key,
                        help="Leave the first choice unless a message here says that it cannot be told.")


def figures(**values):
    "Show numbers with their names, as many in a row as the screen has room for."
    with st.container(horizontal=True):
        for name, value in values.items(): st.metric(name.replace("_", " "), value, width=155)


# Type genes -----------------------------------------------------------------------------------------------------------

def use_preset(examples):
    if st.session_state.get("example") in examples: st.session_state.genes_text = preset_text(examples[st.session_state.example])


def add_picked():
    lines = [*st.session_state.get("genes_text", "").splitlines(), *st.session_state.picked]
    st.session_state.genes_text, st.session_state.picked = "\n".join(dict.fromkeys(lines)), []


def follow_link(examples):
    "Once a session: take genes or an example from the page's address. Returns whether there is something to ask."
    if "followed" in st.session_state: return False
    st.session_state.followed = True
    if word := st.query_params.get("genes"): st.session_state.genes_text = genes_from_link(word)
    else: use_preset(examples)
    return bool(st.session_state.get("genes_text"))


def type_genes(backend, model):
    "Ask for genes and show what cell they make."
    examples = presets(model["labels"])
    st.pills("Start from an example", list(examples), key="example", on_change=use_preset, args=(examples,), bind="query-params",
             help="Known markers of a cell type, with their mean values in real cells.")
    linked = follow_link(examples)
    if name := st.session_state.get("example"): st.caption(f"Values: mean log1p CP10K in real cells, {examples[name].source.iloc[0]}.")
    with in_plain_words():
        st.multiselect(f"Search the model's {len(backend.genes):,} genes", backend.genes, key="picked", on_change=add_picked, placeholder="type a gene symbol")
    # Said anew in every run: a browser that puts the tab together again has nothing else to fill the box with.
    st.session_state.genes_text = st.session_state.get("genes_text", "")
    text = st.text_area("Genes and values, one gene a line", key="genes_text", height=220, placeholder="CD19 1.2\nMS4A1 2.6\nCD79A 3.4",
                        help="Names alone will do. A gene without a value is taken as the mean of the others.")
    units = units_choice("typed_units")
    if st.button("What cell is this?", type="primary") or linked:
        st.session_state.pop("typed", None)
        with in_plain_words(), st.spinner("Asking the model …"):
            st.session_state.typed = backend.ask(parse_genes(text), units), text
            st.session_state.pop("why", None)
            if word := genes_to_link(text): st.query_params["genes"] = word
            else: st.query_params.pop("genes", None)
    if "typed" in st.session_state:
        show_answer(*st.session_state.typed, text)
        explain_answer(backend, st.session_state.typed[1], units)


def show_answer(answer, asked, text):
    "Show the label of one cell, or why there is none."
    if asked != text: st.caption("This is the answer to the genes as they were when you last asked.")
    if answer["unassigned"]:
        st.warning(f"**Unassigned**: {answer['reason']}. The nearest label would be {answer['cell_type']} ({answer['confidence']:.0%}), "
                   "but do not rely on it.", icon=":material/help:")
    else: st.success(f"**{answer['cell_type']}**, with a confidence of {answer['confidence']:.0%}", icon=":material/check_circle:")
    st.altair_chart(charts.predictions_chart(answer["predictions"], not answer["unassigned"]), alt="Bars: the most likely cell types and their probabilities")
    used, unknown = answer["genes_used"], answer["genes_unknown"]
    st.caption(sentences([f"{used:,} of {used + unknown:,} genes used", f"values read as {UNITS.get(answer['units'], answer['units'])}",
                          *answer["warnings"]]))
    if st.query_params.get("genes"): st.caption("The address of this page is now a link to this answer.")


def explain_answer(backend, asked, units):
    "Say why the cell was called so, when it is asked for: the genes, what they are known for, and the sources."
    if st.button("Why?", icon=":material/quiz:", help="Which genes carried this, what they are known for, and where that is written."):
        with in_plain_words(), st.spinner("Taking genes away and looking them up …"): st.session_state.why = backend.explain(parse_genes(asked), units)
    if "why" not in st.session_state: return
    why = st.session_state.why
    told(why)
    st.altair_chart(charts.genes_chart(why["genes"]), alt="Bars: what each gene gave to the label, in nats of log-odds")
    st.caption("A nat is a factor of 2.7 in the odds of the label. Genes that are absent count too where the label's cells lack them.")


def told(said):
    "Show sentences, and the sources that they cite."
    st.markdown("\n".join(f"- {plain(s)}" for s in said["sentences"]))
    listed = [f"- **[{plain(k)}]** {plain(v)}" for k, v in sources_of(said["sentences"], said["sources"]).items()]
    if listed:
        with st.expander(f"Sources ({len(listed)})"): st.markdown("\n".join(listed))
    if said["notes"]: st.caption(plain(sentences(said["notes"])))


def plain(text):
    "Text in which nothing is taken for Markdown."
    return re.sub(r"([\\`*_{}\[\]<>#$~|])", r"\\\1", text)


# Ask in words ---------------------------------------------------------------------------------------------------------

def ask_in_words(backend):
    "Ask for a question about cell types, processes or genes, and show what the ontologies and the model say."
    with st.form("words", border=False):
        question = st.text_input("A question about cell types, processes or genes", key="question", max_chars=500, placeholder="Which cells express CD19?")
        asked = st.form_submit_button("Ask", type="primary")
    st.caption("Answered from the Cell Ontology, the Gene Ontology and this model's mean expression, each sentence with its source.")
    if asked:
        st.session_state.pop("said", None)
        with in_plain_words(), st.spinner("Looking it up …"): st.session_state.said = backend.ask_in_words(question)
    if "said" in st.session_state: told(st.session_state.said)


# Annotate a file ------------------------------------------------------------------------------------------------------

def annotate_file(backend):
    "Ask for a file, show what is in it, annotate it."
    file = st.file_uploader("A file of human cells: h5ad, 10x h5, loom, csv or tsv", type=sorted({k.rsplit(".", 1)[1] for k in KINDS}))
    st.caption(f"Up to {st.get_option('server.maxUploadSize')} MB. A larger file: `scimlora annotate BUNDLE FILE --out labels.csv` on a machine of your own.")
    units = units_choice("file_units")
    if file is None: return
    state = st.session_state.get("file")
    if state is None or state["of"] != (file.file_id, units):
        state = st.session_state.file = {"of": (file.file_id, units), "xy": {}, "grouped": {}}
    if "findings" not in state:
        with st.spinner("Looking into the file …"): state["findings"] = backend.findings(file.name, file.getvalue(), units)
    show_findings(state["findings"])
    if not state["findings"]["ok"]: return
    if st.button("Annotate the cells", type="primary"):
        state.pop("result", None)
        state["xy"], state["grouped"] = {}, {}
        state["result"] = annotated(backend, file, units)
    if "result" in state: show_annotated(with_clusters(state), state["xy"], Path(file.name).name.split(".")[0])


def with_clusters(state):
    "Ask whose clusters vote, where the file has some of its own; each choice is computed once."
    result = state["result"]
    if not len(result.seen.own.columns): return result
    column = st.selectbox("Clusters that vote", [None, *result.seen.own], format_func=lambda c: "found here, by Leiden's method" if c is None else f"the file's {c}", key="clusters",
                          help="Each cluster takes the label of its majority.")
    if column is None: return result
    if column not in state["grouped"]: state["grouped"][column] = grouped_by(result, column)
    return state["grouped"][column]


def annotated(backend, file, units):
    "Annotate a file under a progress bar."
    what = "Annotating …" if isinstance(backend, Local) else "The service annotates …"
    bar = st.progress(0.0, what)
    try: return backend.annotate(file.name, file.getvalue(), units, lambda share: bar.progress(share, what if share < 1 else "Looking at the cells …"))
    finally: bar.empty()


def show_findings(found):
    "Show what a file holds and what is wrong with it."
    st.subheader("What the file holds")
    f = found["findings"]
    more = {"Of_the_model's_genes": f"{f['coverage']:.0%}", "Genes_a_cell_(median)": f"{f['median_genes_a_cell']:,.0f}"} if f else {}
    figures(Cells=f"{found['cells']:,}", Genes=f"{found['genes']:,}", **more)
    if found["error"]: return st.error(f"This file cannot be used as it is: {found['error']}.", icon=":material/error:")
    if found["problems"]: st.info(sentences(found["problems"]), icon=":material/info:")
    else: st.success("Nothing is wrong with it.", icon=":material/check_circle:")
    with st.expander("All findings"): st.code(found["text"], language=None, wrap_lines=True)


def show_annotated(result, xy, stem):
    "Show labels, confidences and downloads of an annotated file."
    seen = result.seen
    t = seen.table
    st.subheader("What the model says")
    figures(Cell_types_found=t.cell_type[~t.unassigned].nunique(), Unassigned=f"{t.unassigned.mean():.1%}", Mean_confidence=f"{t.confidence.mean():.0%}")
    with st.container(horizontal=True):
        st.download_button("Table (csv)", t.to_csv(index=False).encode(), f"{stem}_scimlora.csv", "text/csv", on_click="ignore",
                           icon=":material/download:")
        st.download_button("Annotated file (h5ad)", result.h5ad, f"{stem}_scimlora.h5ad", "application/octet-stream", on_click="ignore",
                           icon=":material/download:")
    st.subheader("Cells of each type")
    st.altair_chart(charts.counts_chart(t), alt="Bars: cells of each type, assigned and unassigned")
    show_map(seen, xy)
    st.subheader("How sure the model is")
    st.altair_chart(charts.confidence_chart(t), alt="Histogram of the cells' confidences")
    show_unassigned(t)
    if len(seen.dots):
        st.subheader("What marks each label")
        st.caption("For each label, the genes that are highest in its cells compared with every other label's. If they are not what you know of that type, doubt the label.")
        st.altair_chart(charts.dots_chart(seen.dots), alt="Dots: the share of each label's cells that express its marker genes, and how much")
    show_tables(seen)


def show_map(seen, xy):
    "Show the cells as points."
    st.subheader("A map of the cells")
    with st.container(horizontal=True):
        how = st.segmented_control("Laid out by", ["UMAP", "PCA"], default="UMAP", required=True, key="layout", bind="query-params")
        by = st.selectbox("Coloured by", list(COLOURS), format_func=COLOURS.get, key="coloured", width=220, bind="query-params")
    if how not in xy:
        with st.spinner("Laying out the cells …"): xy[how] = laid_out(seen.z, how)
    t = seen.table.iloc[seen.rows]
    st.altair_chart(charts.map_chart(xy[how], t, by, how), alt=f"Points: cells by {how}, coloured by {COLOURS[by]}")
    if len(t) < len(seen.table): st.caption(f"{len(t):,} of {len(seen.table):,} cells, drawn at random.")


def laid_out(z, how):
    "Coordinates of cells; UMAP is loaded only where it is wanted."
    if how == "PCA" or len(z) < 10: return pca_xy(z)
    from scimlora.umaps import umap_xy

    return umap_xy(z)


def show_unassigned(t):
    "Show how many cells have no label that should be believed, and why."
    if not t.unassigned.any(): return st.caption("No cell was left unassigned.")
    st.markdown("**Unassigned, and why**")
    why = t.reason[t.unassigned].value_counts()
    st.markdown("\n".join(f"- {n:,} {'cell' if n == 1 else 'cells'}: {reason}" for reason, n in why.items()))


def show_tables(seen):
    "Show clusters and cells as tables."
    share = lambda name: st.column_config.ProgressColumn(name, min_value=0, max_value=1, format="percent")
    st.subheader("Every cluster")
    st.caption("Each takes the label of its majority. Unless the file's own are chosen above, they are cells that lie together, found by Leiden's method on the model's embedding.")
    st.dataframe(seen.clusters, hide_index=True, height=min(320, 38 + 35 * len(seen.clusters)), column_config={
        "cluster": "Cluster", "majority": "Majority", "cells": "Cells", "agree": share("Agree"), "unassigned": share("Unassigned"), "confidence": share("Confidence")})
    st.subheader("Every cell")
    st.dataframe(seen.table[["cell_id", "cell_type", "confidence", "majority", "reason", "top3", "cluster"]], hide_index=True, height=320, column_config={
        "cell_id": "Cell", "cell_type": "Cell type", "majority": "Its cluster's", "reason": "Why unassigned", "top3": "Three most likely",
        "cluster": "Cluster", "confidence": share("Confidence")})


# How good is it -------------------------------------------------------------------------------------------------------

def how_good(model):
    "Show the bundle's evaluation on held-out cells, beside simpler methods, and what it leaves out."
    m = model.get("metrics") or {}
    if not m:
        return st.info("This model carries no numbers on held-out cells. `scimlora evaluate BUNDLE TEST.h5ad --out DIR --record` measures it on "
                       "labelled cells of yours and writes them into the bundle.", icon=":material/info:")
    st.caption(f"On {m['n_cells']:,} cells of {model.get('metrics_on', 'held-out cells')}.")
    with st.container(horizontal=True):
        st.metric("Macro-F1", f"{m['macro_f1']:.1%}", width=155, help="Mean over the cell types, so rare ones count as much.")
        st.metric("Accuracy", f"{m['accuracy']:.1%}", width=155)
        st.metric("Calibration error", f"{m['ece']:.1%}", width=155, help="How far confidence and accuracy are apart.")
    for key, show, _ in SECTIONS:
        if m.get(key): show(m)
    if lacking := [name for key, _, name in SECTIONS if not m.get(key)]: st.caption(f"Not in this bundle: {', '.join(lacking)}.")
    if held := model.get("held_out"):
        st.subheader("What was held out")
        st.dataframe(pd.DataFrame(held).T[["n_cells", "accuracy", "macro_f1", "unassigned"]].astype(float).reset_index(), hide_index=True, column_config={
            "index": "Held out", "n_cells": st.column_config.NumberColumn("Cells", format="%d"), "accuracy": st.column_config.NumberColumn("Accuracy", format="percent"),
            "macro_f1": st.column_config.NumberColumn("Macro-F1", format="percent"), "unassigned": st.column_config.NumberColumn("Unassigned", format="percent")})
    if notes := model.get("split", {}).get("notes"): st.caption(sentences(notes[:1] if held else notes))


def show_comparison(m):
    st.subheader("Base against LoRA, and simpler methods")
    scores = {METHODS.get(k, k): s["macro_f1"] for k, s in (m.get("paths", {}) | m["baselines"]).items()}
    st.altair_chart(charts.comparison_chart({"this model": m["macro_f1"]} | scores), alt="Bars: macro-F1 of this model and of simpler methods")


def show_confusion(m):
    st.subheader("What is taken for what")
    st.altair_chart(charts.confusion_chart(**m["confusion"]), alt="Confusion matrix: true types in rows, called types in columns")


def show_classes(m):
    st.subheader("Each type")
    rows = pd.DataFrame(m["per_class"]).T.astype(float).query("support > 0").sort_values("f1").reset_index()
    number = lambda name: st.column_config.NumberColumn(name, format="%.2f")
    st.dataframe(rows, hide_index=True, height=min(500, 38 + 35 * len(rows)), column_config={
        "index": "Cell type", "precision": number("Precision"), "recall": number("Recall"), "f1": number("F1"), "support": st.column_config.NumberColumn("Cells", format="%d")})


def show_reliability(m):
    st.subheader("Whether its confidence can be believed")
    st.altair_chart(charts.reliability_chart(m["reliability"]), alt="Line: share of cells called rightly at each confidence")
    st.caption("Bins of ten cells or more. On the dashed line, cells with a confidence of 80 % are right four times in five. Below it, the model is too sure of itself.")


def show_forgetting(m):
    st.subheader("What it forgot of other tissues")
    st.altair_chart(charts.forgetting_chart(m["forgetting"]["curve"]), alt="Lines: what is kept of other tissues' types as the adapter gets stronger")
    st.caption(f"{m['forgetting']['cells']:,} cells: {m['forgetting']['source']}.")


SECTIONS = (("baselines", show_comparison, "the comparison with simpler methods"), ("confusion", show_confusion, "the confusion matrix"),
            ("per_class", show_classes, "the table of types"), ("reliability", show_reliability, "the calibration"),
            ("forgetting", show_forgetting, "what was forgotten"))


# About the model ------------------------------------------------------------------------------------------------------

def about(model):
    "Show the model's card: what it is, what it was taught, what it cannot do."
    if not model["training"]["cells"]: st.markdown(f"The base model **{model['base']['name']}** with its own {len(model['labels'])} labels; nothing was fine-tuned.")
    else:
        st.markdown(f"LoRA adapters and a head for **{len(model['labels'])} cell types** on the frozen base model **{model['base']['name']}**, "
                    f"taught with {model['training']['cells']:,} cells; {model['parameters']['trainable']:,} parameters "
                    f"({model['parameters']['fraction']:.1%}) were trained.")
    st.subheader("What it was taught")
    taught, terms = model["training"].get("per_class", {}), model["labels"]
    rows = pd.DataFrame([dict(type=k, cells=taught.get(k), term=terms[k] if isinstance(terms, dict) else None) for k in terms])
    st.dataframe(rows.sort_values("cells", ascending=False), hide_index=True, height=min(600, 38 + 35 * len(rows)), column_config={
        "type": "Cell type", "cells": "Training cells", "term": "Cell Ontology"})
    if model.get("notes"): st.caption(sentences(model["notes"]))
    st.subheader("What it reads")
    st.markdown(f"Human genes by symbol or Ensembl id; the values are brought to one form: {model['normalisation']}.")
    st.subheader("What it cannot do")
    st.markdown("It knows no other cell types than these. Cells far from all of them are marked unassigned, which does not catch "
                "every stranger. Not for clinical use.")
    st.caption(f"Made with [scimlora](https://github.com/scimlora/scimlora) {model['versions'].get('scimlora', '')}.")


def main():
    st.set_page_config("scimlora", page_icon=":material/genetics:", layout="centered")
    st.title("scimlora")
    st.caption("What cell types a fine-tuned SCimilarity takes your cells for, and how sure it is.")
    with in_plain_words():
        backend = find_backend()
        model = model_of(backend)
        st.markdown(f"Model: **{model.get('title', 'scimlora bundle')}** · {len(model['labels'])} cell types · runs {backend.where}")
        genes, file, words, good, card = st.tabs(list(PAGES), key="page", on_change="rerun", bind="query-params")
        with genes, in_plain_words(): type_genes(backend, model)
        with file, in_plain_words(): annotate_file(backend)
        with words, in_plain_words(): ask_in_words(backend)
        with good, in_plain_words(): how_good(model)
        with card, in_plain_words(): about(model)


main()
