"""Genes as people paste them, and presets from real cells."""
import re
from pathlib import Path

import pandas as pd
from .backend import Problem

_HEADINGS = {"gene", "genes", "symbol", "gene_symbol", "gene_name", "feature", "feature_name", "name"}


def _number(text):
    try: return float(text)
    except ValueError: return None


def _rows(text):
    "Yield line number, gene and value; a line of several names stands for as many lines without values."
    for n, line in enumerate(text.splitlines(), 1):
        fields = [f.strip("\"'") for f in re.split(r"[\s,;]+", line.strip()) if f]
        if not fields or (n == 1 and fields[0].lower() in _HEADINGS): continue
        if len(fields) == 2 and _number(fields[1]) is not None: yield n, fields[0], _number(fields[1])
        elif any(_number(f) is not None for f in fields):
            raise Problem(f"Line {n}, “{line.strip()[:60]}”, should be a gene and a number, such as “INS 7.4”.")
        else: yield from ((n, f, None) for f in fields)


def parse_genes(text):
    """Read a pasted table of genes.

    Parameters
    ----------
    text : str
        A gene and a value a line, or just names. A gene without a value gets the mean of the others, or 1.

    Returns
    -------
    dict of str to float

    Raises
    ------
    Problem
        If it is empty, a line is no gene and number, or a gene comes twice.
    """
    cell = {}
    for n, gene, value in _rows(text):
        if gene in cell: raise Problem(f"Line {n}: {gene} was there before; give each gene once.")
        cell[gene] = value
    if not cell: raise Problem("There are no genes yet: paste some, pick some, or take an example.")
    given = [v for v in cell.values() if v is not None]
    usual = sum(given) / len(given) if given else 1.0
    return {g: usual if v is None else v for g, v in cell.items()}


def _plain(label):
    return re.sub(r"[^a-z0-9]|cells?$", "", label.lower()).rstrip("s")


def presets(labels):
    """Return examples: name → table of genes, those that the model was taught first, and two that it was not.

    Parameters
    ----------
    labels : sequence of str
        The model's cell types.

    Returns
    -------
    dict of str to pandas.DataFrame
        With `gene`, `value` (mean log1p CP10K in real cells of that type) and `source`.
    """
    table = pd.read_csv(Path(__file__).with_name("presets.tsv"), sep="\t")
    known = {_plain(x) for x in labels}
    groups = dict(list(table.groupby("cell_type", sort=False)))
    taught = {n: g for n, g in groups.items() if _plain(n) in known}
    return taught | {f"{n} (not taught)": groups[n] for n in [n for n in groups if n not in taught][:2]}


def preset_text(table):
    "Write a preset as a person would paste it."
    return "\n".join(f"{g} {v:g}" for g, v in zip(table.gene, table.value))
