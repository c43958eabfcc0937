"""The page's charts, in colours that colour-blind readers can tell apart."""
import altair as alt
import pandas as pd

# Okabe & Ito's palette, and a grey for what is only shown beside.
OKABE_ITO = dict(blue="#0072B2", orange="#E69F00", green="#009E73", vermillion="#D55E00", purple="#CC79A7", sky="#56B4E9")
GREY = "#9AA5B1"
STATES = {"assigned": OKABE_ITO["blue"], "unassigned": OKABE_ITO["orange"]}

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
