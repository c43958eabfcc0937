"""The page's charts, in colours that colour-blind readers can tell apart."""
import altair as alt
import pandas as pd

# Okabe & Ito's palette, and a grey for what is only shown beside.
OKABE_ITO = dict(blue="#0072B2", orange="#E69F00", green="#009E73", vermillion="#D55E00", purple="#CC79A7", sky="#56B4E9")
GREY = "#9AA5B1"
STATES = {"assigned": OKABE_ITO["blue"], "unassigned": OKABE_ITO["orange"]}
# Paul Tol's muted scheme; where there are more types than colours, shapes tell them apart.
TYPES = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499")
SHAPES = ("circle", "triangle-up", "square", "diamond", "cross")
SHADES = "viridis"

_PERCENT = alt.Axis(format="%", values=[0, .25, .5, .75, 1])


def _names(field, sort):
    return alt.Y(f"{field}:N", sort=sort, title=None, axis=alt.Axis(labelLimit=140, ticks=False, domain=False))


def _share_bars(names, shares, title, colour, sort=None):
    "Bars from 0 to 100 %, each with its number; the first in `colour`, the others grey."
    t = pd.DataFrame(dict(name=list(names), share=list(shares)))
    x = alt.X("share:Q", title=title, scale=alt.Scale(domain=[0, 1.12], nice=False), axis=_PERCENT)
    base = alt.Chart(t, height=alt.Step(26)).encode(x=x, y=_names("name", sort))
    first = alt.condition(alt.datum.name == t.name[0], alt.value(colour), alt.value(GREY))
    return base.mark_bar(size=18).encode(color=first) + base.mark_text(align="left", dx=4).encode(text=alt.Text("share:Q", format=".1%"))


def predictions_chart(predictions, believed):
    "Bars of the most probable labels; the first in blue, or orange where the cell is unassigned."
    t = pd.DataFrame(predictions)
    return _share_bars(t.cell_type, t.confidence, "confidence", STATES["assigned" if believed else "unassigned"])


def genes_chart(genes):
    "Bars of what each gene gave to a label; `genes` is role → rows with gene and gave, as an explanation has them."
    rows = [(g["gene"] + " (absent)" * (role == "absent"), g["gave"], role) for role, n in (("for", 10), ("absent", 3), ("against", 3)) for g in genes.get(role, [])[:n]]
    t = pd.DataFrame(rows, columns=["gene", "nats", "speaks"]).replace({"speaks": {"absent": "for"}}).sort_values("nats", ascending=False)
    colour = alt.Color("speaks:N", title=None, legend=None, scale=alt.Scale(domain=["for", "against"], range=[OKABE_ITO["blue"], STATES["unassigned"]]))
    return alt.Chart(t, height=alt.Step(22)).mark_bar(size=15).encode(x=alt.X("nats:Q", title="given to the label (nats)"), y=_names("gene", t.gene.tolist()), color=colour,
                                                                      tooltip=["gene", alt.Tooltip("nats:Q", format="+.2f")])


def comparison_chart(scores):
    "Bars of macro-F1 of this model and of what it is compared with; `scores` is name → macro-F1, this model first."
    return _share_bars(scores, scores.values(), "macro-F1", OKABE_ITO["blue"], "-x")


def _state(unassigned):
    "Each cell's state, and its colour; no legend where all cells are assigned."
    legend = alt.Legend(orient="top", offset=4) if unassigned.any() else None
    return unassigned.map({True: "unassigned", False: "assigned"}), alt.Color(
        "state:N", title=None, legend=legend, scale=alt.Scale(domain=list(STATES), range=list(STATES.values())))


def counts_chart(table):
    "Bars of cells of each label, assigned and not, with the number of each label."
    state, colour = _state(table.unassigned)
    t = table.assign(state=state).groupby(["cell_type", "state"], as_index=False).size().rename(columns={"size": "cells"})
    total = t.groupby("cell_type", as_index=False).cells.sum()
    order = total.sort_values("cells", ascending=False).cell_type.tolist()
    x = alt.X("cells:Q", title="cells", axis=alt.Axis(tickMinStep=1, tickCount=5),
              scale=alt.Scale(domain=[0, 1.12 * int(total.cells.max())], nice=False))
    bars = alt.Chart(t, height=alt.Step(26)).mark_bar(size=18).encode(x=x, y=_names("cell_type", order), color=colour,
                                                                      tooltip=["cell_type", "state", "cells"])
    return bars + alt.Chart(total).mark_text(align="left", dx=4).encode(x="cells:Q", y=_names("cell_type", order),
                                                                        text=alt.Text("cells:Q", format=","))


def confidence_chart(table):
    "Histogram of the confidences. Binned here, so that a million cells cost the browser no more than ten."
    state, colour = _state(table.unassigned)
    edges = [i / 20 for i in range(21)]
    low = pd.cut(table.confidence, edges, labels=edges[:-1], include_lowest=True).astype(float)
    t = pd.DataFrame(dict(low=low, state=state)).groupby(["low", "state"], as_index=False).size()
    t["high"] = t.low + 0.05
    x = alt.X("low:Q", bin="binned", title="confidence", scale=alt.Scale(domain=[0, 1]), axis=_PERCENT)
    return alt.Chart(t, height=280).mark_bar().encode(
        x=x, x2="high:Q", y=alt.Y("size:Q", title="cells", axis=alt.Axis(tickMinStep=1, tickCount=5)), color=colour,
        tooltip=[alt.Tooltip("low:Q", format=".0%", title="from"), "state", alt.Tooltip("size:Q", title="cells")])


def _legend(): return alt.Legend(orient="bottom", columns=2, title=None, labelLimit=150, symbolOpacity=1)


def map_chart(xy, table, by, axes):
    "Cells in two dimensions, coloured by `cell_type`, `majority` or `confidence`; a row of `table` is a row of `xy`."
    t = table[["cell_type", "majority", "confidence"]].assign(x=xy[:, 0], y=xy[:, 1])
    if by == "cell_type": t["cell_type"] = t.cell_type.where(~table.unassigned, "unassigned")
    hidden = alt.Axis(labels=False, ticks=False, grid=False)
    places = [alt.X("x:Q", title=f"{axes} 1", axis=hidden, scale=alt.Scale(zero=False)), alt.Y("y:Q", title=f"{axes} 2", axis=hidden, scale=alt.Scale(zero=False))]
    size = 45 if len(t) < 500 else 12
    tip = ["cell_type", "majority", alt.Tooltip("confidence:Q", format=".0%")]
    if by == "confidence":
        colour = alt.Color("confidence:Q", scale=alt.Scale(scheme=SHADES, domain=[0, 1]), legend=alt.Legend(orient="bottom", format="%", gradientLength=200))
        return alt.Chart(t, height=420).mark_circle(size=size, opacity=.8).encode(*places, color=colour, tooltip=tip)
    names = [n for n in t[by].value_counts().index if n != "unassigned"]
    colours, shapes = [TYPES[i % len(TYPES)] for i in range(len(names))], [SHAPES[i // len(TYPES) % len(SHAPES)] for i in range(len(names))]
    if (t[by] == "unassigned").any(): names, colours, shapes = [*names, "unassigned"], [*colours, "#C9D0D6"], [*shapes, "circle"]
    return alt.Chart(t, height=420).mark_point(size=size, opacity=.8, filled=True).encode(
        *places, color=alt.Color(f"{by}:N", scale=alt.Scale(domain=names, range=colours), legend=_legend()),
        shape=alt.Shape(f"{by}:N", scale=alt.Scale(domain=names, range=shapes), legend=_legend()), tooltip=tip)


def dots_chart(dots):
    "Marker genes in rows and labels in columns; a dot's size is the share of cells that express it, its shade how much."
    genes = dots.drop_duplicates("gene").gene.tolist()
    return alt.Chart(dots, height=alt.Step(18)).mark_circle().encode(
        x=alt.X("cell_type:N", title=None, axis=alt.Axis(labelAngle=-45, labelLimit=110, labelOverlap=False, grid=True)), y=alt.Y("gene:N", sort=genes, title=None, axis=alt.Axis(grid=True)),
        size=alt.Size("share:Q", title="cells that express it", scale=alt.Scale(domain=[0, 1], range=[0, 170]), legend=alt.Legend(orient="bottom", format="%", values=[.25, .5, 1])),
        color=alt.Color("mean:Q", title="mean log1p CP10K", scale=alt.Scale(scheme="blues", domainMin=0), legend=alt.Legend(orient="bottom", gradientLength=110)),
        tooltip=["gene", "cell_type", alt.Tooltip("share:Q", format=".0%"), alt.Tooltip("mean:Q", format=".2f"), "marks"])


def confusion_chart(labels, cells):
    "The confusion matrix: shade is the share of a row, numbers are cells."
    t = pd.DataFrame([dict(label=a, called=b, cells=n, share=n / max(1, sum(row))) for a, row in zip(labels, cells) for b, n in zip(labels, row)])
    base = alt.Chart(t, height=alt.Step(30)).encode(
        x=alt.X("called:N", title="called", sort=labels, axis=alt.Axis(labelAngle=-60, labelLimit=110, labelOverlap=False)), y=alt.Y("label:N", title="truth", sort=labels, axis=alt.Axis(labelLimit=110)),
        tooltip=["label", "called", "cells", alt.Tooltip("share:Q", format=".0%")])
    boxes = base.mark_rect(stroke="#FFFFFF").encode(color=alt.Color("share:Q", title="share of the row", scale=alt.Scale(scheme="blues", domain=[0, 1]), legend=alt.Legend(orient="bottom", format="%", gradientLength=200)))
    # Numbers need 18 pixels a box; a narrow screen or many labels leave no room, and the boxes say it by their shade.
    if len(labels) > 12: return boxes
    number = alt.condition(alt.datum.share > .5, alt.value("#FFFFFF"), alt.value("#0B141C"))
    return boxes + base.mark_text(fontSize=9).transform_filter(alt.datum.cells > 0).encode(text=alt.Text("cells:Q"), color=number)


def reliability_chart(bins):
    "How often cells of a confidence are called rightly, beside the line on which both are equal; bins of fewer than ten cells say nothing."
    t = pd.DataFrame(bins).query("cells >= 10")
    line = alt.Chart(pd.DataFrame(dict(confidence=[0, 1], accuracy=[0, 1]))).mark_line(color=GREY, strokeDash=[4, 4])
    x, y = (alt.X("confidence:Q", axis=_PERCENT, scale=alt.Scale(domain=[0, 1])), alt.Y("accuracy:Q", title="called rightly", axis=_PERCENT, scale=alt.Scale(domain=[0, 1])))
    base = alt.Chart(t, height=300).encode(x=x, y=y, tooltip=[alt.Tooltip("confidence:Q", format=".0%"), alt.Tooltip("accuracy:Q", format=".0%"), "cells"])
    return line.encode(x=x, y=y) + base.mark_line(color=OKABE_ITO["blue"]) + base.mark_circle(color=OKABE_ITO["blue"], opacity=1).encode(
        size=alt.Size("cells:Q", scale=alt.Scale(range=[30, 250]), legend=None))


_KEPT = {"knn": "kept, by neighbours", "linear": "kept, by a line", "target_macro_f1": "what was taught (macro-F1)"}


def forgetting_chart(curve):
    "What is kept of other tissues' types, and what is gained on those taught, against the adapter's strength."
    t = pd.DataFrame(curve)
    long = t.melt("alpha", [k for k in _KEPT if k in t], "what", "share").replace({"what": _KEPT})
    names = [v for k, v in _KEPT.items() if k in t]
    colours = [OKABE_ITO[c] for c in ("blue", "orange", "green")][:len(names)]
    return alt.Chart(long, height=300).mark_line(point=alt.OverlayMarkDef(size=60, filled=True)).encode(
        x=alt.X("alpha:Q", title="strength of the adapter (0 is the base, 1 this model)", axis=alt.Axis(values=sorted(t.alpha), format=".2f")),
        y=alt.Y("share:Q", title=None, axis=alt.Axis(format="%"), scale=alt.Scale(zero=False)),
        color=alt.Color("what:N", scale=alt.Scale(domain=names, range=colours), legend=alt.Legend(orient="bottom", title=None, columns=1)),
        shape=alt.Shape("what:N", scale=alt.Scale(domain=names), legend=alt.Legend(orient="bottom", title=None, columns=1)), tooltip=["what", "alpha", alt.Tooltip("share:Q", format=".1%")])
