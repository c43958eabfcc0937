"""The page: type genes or drop a file, and see what cell types the model takes them for.

    streamlit run ui/src/streamlit_app.py

It asks scimlora's service where API_URL is set, and else opens a bundle in this process: the folder SCIMLORA_BUNDLE, or
what `scimlora demo` left in runs/demo/bundle.
"""
import contextlib
import logging
import os
from pathlib import Path

import pandas as pd
import streamlit as st
from page.backend import Local, Problem, Remote
from page.charts import comparison_chart, confidence_chart, counts_chart, predictions_chart
from page.genes import parse_genes, preset_text, presets

UNITS = {"auto": "whatever the numbers look like", "counts": "counts", "cpm": "scaled to one total, not logged (CPM, TPM)",
         "log1p_cp10k": "log-normalised (log1p CP10K)"}
METHODS = {"majority": "always the commonest type", "base_knn": "base model, nearest cells", "base_linear": "base model, linear head",
           "base_linear_bn_recalibrated": "base model, recalibrated", "logreg_genes": "logistic regression on genes", "lora": "adapted encoder alone",
           "gene_path": "genes alone, weighted by the base"}
NO_MODEL = ("No model is loaded. Make one with `scimlora demo` (a few minutes) and start this page again in the same folder. "
            "Or set `SCIMLORA_BUNDLE` to a folder that `scimlora tune` wrote, or `API_URL` to where `scimlora serve` runs.")


@contextlib.contextmanager
def in_plain_words():
    "Show a sentence where something fails, and keep the details for the log."
    try: yield
    except Problem as e: st.error(str(e), icon=":material/error:")
    except Exception:
        logging.getLogger("scimlora.ui").exception("the page failed")
        st.error("Something went wrong that this page did not foresee. Try again; if it stays so, the log of the page says more.",
                 icon=":material/error:")


def setting(name):
    "Return a setting from the environment, else from secrets.toml, else ''."
    if os.environ.get(name): return os.environ[name]
    return str(st.secrets.get(name, "")) if st.secrets.load_if_toml_exists() else ""


@st.cache_resource(max_entries=2, show_spinner="Opening the model …")
def open_bundle(folder, changed):
    "Open a bundle once for all visitors; `changed`, its time stamp, opens it anew after another fine-tune."
    return Local(folder)


def find_backend():
    "Return the service or the bundle that answers, or None."
    if url := setting("API_URL"): return Remote(url, setting("API_KEY"), float(setting("API_TIMEOUT") or 60))
    folder = setting("SCIMLORA_BUNDLE") or "runs/demo/bundle"
    manifest = Path(folder) / "manifest.json"
    if setting("SCIMLORA_BUNDLE") or manifest.exists():
        return open_bundle(folder, manifest.stat().st_mtime if manifest.exists() else 0)


def model_of(backend):
    "Return the manifest. A service is asked once a session: what is on the page stays there when it goes away."
    if isinstance(backend, Local): return backend.model()
    if "model" not in st.session_state: st.session_state.model = backend.model()
    return st.session_state.model


def sentences(texts):
    "Join texts that start small and end without a stop."
    return " ".join(f"{t[:1].upper()}{t[1:]}." for t in texts)


def units_choice(key):
    "Ask what the values are; returns scimlora's word for it."
    return st.selectbox("The values are", list(UNITS), format_func=UNITS.get, key=key,
                        help="Leave the first choice unless a message here says that it cannot be told.")


# Type genes -----------------------------------------------------------------------------------------------------------

def use_preset(examples):
    if st.session_state.preset: st.session_state.genes_text = preset_text(examples[st.session_state.preset])


def add_picked():
    lines = [*st.session_state.get("genes_text", "").splitlines(), *st.session_state.picked]
    st.session_state.genes_text, st.session_state.picked = "\n".join(dict.fromkeys(lines)), []


def type_genes(backend, model):
    "Ask for genes and show what cell they make."
    examples = presets(model["labels"])
    st.pills("Start from an example", list(examples), key="preset", on_change=use_preset, args=(examples,),
             help="Known markers of a cell type, with their mean values in real cells.")
    if st.session_state.get("preset"):
        st.caption(f"Values: mean log1p CP10K in real cells, {examples[st.session_state.preset].source.iloc[0]}.")
    if backend.genes:
        st.multiselect(f"Or pick from the model's {len(backend.genes):,} genes", backend.genes, key="picked", on_change=add_picked,
                       placeholder="type a gene symbol")
    text = st.text_area("Genes and values, one gene a line", key="genes_text", height=220, placeholder="INS 7.4\nIAPP 6.2\nPDX1 1.1",
                        help="Names alone will do. A gene without a value is taken as the mean of the others.")
    units = units_choice("typed_units")
    if st.button("What cell is this?", type="primary"):
        st.session_state.pop("typed", None)
        with in_plain_words(), st.spinner("Asking the model …"): st.session_state.typed = backend.ask(parse_genes(text), units), text
    if "typed" in st.session_state: show_answer(*st.session_state.typed, text)


def show_answer(answer, asked, text):
    "Show the label of one cell, or why there is none."
    if asked != text: st.caption("This is the answer to the genes as they were when you last asked.")
    if answer["unassigned"]:
        st.warning(f"**Unassigned**: {answer['reason']}. The nearest label would be {answer['cell_type']} ({answer['confidence']:.0%}), "
                   "but do not rely on it.", icon=":material/help:")
    else: st.success(f"**{answer['cell_type']}**, with a confidence of {answer['confidence']:.0%}", icon=":material/check_circle:")
    st.altair_chart(predictions_chart(answer["predictions"], not answer["unassigned"]))
    used, unknown = answer["genes_used"], answer["genes_unknown"]
    st.caption(sentences([f"{used:,} of {used + unknown:,} genes used", f"values read as {UNITS.get(answer['units'], answer['units'])}",
                          *answer["warnings"]]))


# Annotate a file ------------------------------------------------------------------------------------------------------

def annotate_file(backend):
    "Ask for a file, show what is in it, annotate it."
    file = st.file_uploader("An h5ad file of human cells", type=["h5ad"])
    st.caption("A larger file: `scimlora annotate BUNDLE FILE --out labels.csv` on a machine of your own.")
    units = units_choice("file_units")
    if file is None: return
    state = st.session_state.get("file")
    if state is None or state["of"] != (file.file_id, units):
        state = st.session_state.file = {"of": (file.file_id, units)}
    with in_plain_words():
        if isinstance(backend, Local):
            if "findings" not in state:
                with st.spinner("Looking into the file …"): state["findings"] = backend.findings(file.name, file.getvalue(), units)
            show_findings(*state["findings"])
            if not state["findings"][0]["ok"]: return
        if st.button("Annotate the cells", type="primary"):
            state.pop("result", None)
            with st.spinner("Annotating …"): state["result"] = backend.annotate(file.name, file.getvalue(), units)
        if "result" in state: show_annotated(state["result"], Path(file.name).stem)


def show_findings(found, text):
    "Show what a file holds and what is wrong with it."
    st.subheader("What the file holds")
    f = found["findings"]
    with st.container(horizontal=True):
        st.metric("Cells", f"{found['cells']:,}", width=155)
        st.metric("Genes", f"{found['genes']:,}", width=155)
        if f:
            st.metric("Of the model's genes", f"{f['coverage']:.0%}", width=155)
            st.metric("Genes a cell (median)", f"{f['median_genes_a_cell']:,.0f}", width=155)
    if found["error"]: return st.error(f"This file cannot be used as it is: {found['error']}.", icon=":material/error:")
    if found["problems"]: st.info(sentences(found["problems"]), icon=":material/info:")
    else: st.success("Nothing is wrong with it.", icon=":material/check_circle:")
    with st.expander("All findings"): st.code(text, language=None, wrap_lines=True)


def show_annotated(result, stem):
    "Show labels, confidences and downloads of an annotated file."
    t = result.table
    st.subheader("What the model says")
    with st.container(horizontal=True):
        st.metric("Cell types found", t.cell_type[~t.unassigned].nunique(), width=155)
        st.metric("Unassigned", f"{t.unassigned.mean():.1%}", width=155)
        st.metric("Mean confidence", f"{t.confidence.mean():.0%}", width=155)
    if result.h5ad is None:  # in this process the doctor has said so already
        st.caption(sentences(result.notes))
    with st.container(horizontal=True):
        st.download_button("Table (csv)", t.to_csv(index=False).encode(), f"{stem}_scimlora.csv", "text/csv", on_click="ignore",
                           icon=":material/download:")
        if result.h5ad is not None:
            st.download_button("Annotated file (h5ad)", result.h5ad, f"{stem}_scimlora.h5ad", "application/octet-stream",
                               on_click="ignore", icon=":material/download:")
    st.subheader("Cells of each type")
    st.altair_chart(counts_chart(t))
    st.subheader("How sure the model is")
    st.altair_chart(confidence_chart(t))
    st.caption(sentences(f"{n:,} cells unassigned: {reason}" for reason, n in t.reason[t.unassigned].value_counts().items()))
    st.subheader("Every cell")
    st.dataframe(t[["cell_id", "cell_type", "confidence", "reason", "top3"]], hide_index=True, height=320, column_config={
        "cell_id": "Cell", "cell_type": "Cell type", "reason": "Why unassigned", "top3": "Three most likely",
        "confidence": st.column_config.ProgressColumn("Confidence", min_value=0, max_value=1, format="percent")})


# About the model ------------------------------------------------------------------------------------------------------

def about(model):
    "Show the model's card: what it was taught, how good it is, what it cannot do."
    st.markdown(f"LoRA adapters and a head for **{len(model['labels'])} cell types** on the frozen base model **{model['base']['name']}**, "
                f"taught with {model['training']['cells']:,} cells; {model['parameters']['trainable']:,} parameters "
                f"({model['parameters']['fraction']:.1%}) were trained.")
    metrics = model.get("metrics") or {}
    if metrics: show_metrics(metrics, model.get("metrics_on", "held-out cells"))
    else: st.info("This model carries no numbers on held-out cells. `scimlora evaluate` measures it on labelled cells of yours.")
    st.subheader("What it was taught")
    taught, scores = model["training"]["per_class"], metrics.get("per_class", {})
    rows = [dict(type=k, cells=taught.get(k), f1=scores.get(k, {}).get("f1")) for k in model["labels"]]
    rows = pd.DataFrame(rows).sort_values("cells", ascending=False)
    st.dataframe(rows, hide_index=True, height=min(600, 38 + 35 * len(rows)), column_config={
        "type": "Cell type", "cells": "Training cells", "f1": st.column_config.NumberColumn("F1, held out", format="%.2f")})
    st.caption(sentences([*model["split"].get("notes", []), *model.get("notes", [])]))
    st.subheader("What it cannot do")
    st.markdown("It knows no other cell types than these. Cells far from all of them are marked unassigned, which does not catch "
                "every stranger. Not for clinical use.")


def show_metrics(metrics, where):
    "Show the numbers on held-out cells, beside those of simpler methods."
    st.subheader("How good it is")
    st.caption(f"On {metrics['n_cells']:,} cells of {where}, which it was not taught with.")
    with st.container(horizontal=True):
        st.metric("Macro-F1", f"{metrics['macro_f1']:.1%}", width=155, help="Mean over the cell types, so rare ones count as much.")
        st.metric("Accuracy", f"{metrics['accuracy']:.1%}", width=155)
        st.metric("Calibration error", f"{metrics['ece']:.1%}", width=155, help="How far confidence and accuracy are apart.")
    if others := metrics.get("baselines"):
        st.subheader("Beside simpler methods")
        scores = {METHODS.get(k, k): m["macro_f1"] for k, m in (metrics.get("paths", {}) | others).items()}
        st.altair_chart(comparison_chart({"this model": metrics["macro_f1"]} | scores))


def main():
    st.set_page_config("scimlora", page_icon=":material/genetics:", layout="centered")
    st.title("scimlora")
    st.caption("What cell types a fine-tuned SCimilarity takes your cells for, and how sure it is.")
    with in_plain_words():
        backend = find_backend()
        if backend is None: return st.info(NO_MODEL, icon=":material/info:")
        model = model_of(backend)
        st.markdown(f"Model: **{model.get('title', 'scimlora bundle')}** · {len(model['labels'])} cell types · runs {backend.where}")
        first, second, third = st.tabs(["Type genes", "Annotate a file", "About the model"])
        with first, in_plain_words(): type_genes(backend, model)
        with second, in_plain_words(): annotate_file(backend)
        with third, in_plain_words(): about(model)


main()
