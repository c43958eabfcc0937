"""Check that modules import downward only, so that the notebooks can be read in order.

A module may import only from modules whose notebook stands before its own; imports inside functions count too.
In notebooks, imports stand in cells of their own: nbdev runs a cell that imports once more when it builds the pages, and
what it prints then would take the place of the saved output.
"""
import ast
import json
import re
import sys
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "scimlora"
DEFAULT_EXP = re.compile(r"^#\|\s*default_exp\s+(\S+)", re.M)
MAY_MIX = re.compile(r"^#\|\s*(exports?|exporti|eval:\s*false)\b", re.M)


def code_cells():
    "Yield `(notebook name, cell id, source)` for every code cell, notebooks in reading order."
    for path in sorted((ROOT/"nbs").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code": yield path.name, cell["id"], "".join(cell["source"])


def module_order():
    "Return `{module: notebook name}` in reading order: sorted names of the notebooks that have a `default_exp`."
    found = ((DEFAULT_EXP.search(source), name) for name, _, source in code_cells())
    return {f"{PACKAGE}.{match[1]}": name for match, name in found if match}


def mixed_cells():
    "Yield one line for each cell that imports and does something else, by nbdev's own rule."
    for name, cell, source in code_cells():
        try: kinds = {type(node) for node in ast.walk(ast.parse(source))}
        except SyntaxError: continue   # a shell line or a magic
        if kinds & {ast.Import, ast.ImportFrom} and kinds & {ast.Expr, ast.Assign} and not MAY_MIX.search(source):
            yield f"{name}, cell {cell}: imports and does something else; give the imports a cell of their own"


def imports(module, source, known):
    "Yield `(line, imported module)` for each import from the package in `source`; the package itself if no module is named."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names: yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
            for alias in node.names:
                # `from scimlora import data` and `from scimlora.data import X` both import scimlora.data.
                name = f"{base}.{alias.name}"
                if base == PACKAGE and alias.name == "__version__": continue   # set before __init__ imports any module
                yield node.lineno, name if name in known else base


def offences(order):
    "Yield one line for each import that does not point downward."
    place = {module: i for i, module in enumerate(order)}
    for module, notebook in order.items():
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        if not path.exists():
            yield f"{notebook}: {path.relative_to(ROOT)} is missing; run nbdev_export"
            continue
        for line, name in imports(module, path.read_text(encoding="utf-8"), place):
            if name.split(".")[0] != PACKAGE or place.get(name, len(place)) < place[module]: continue
            what = f"of {order[name]}, which does not stand before {notebook}" if name in order else "which no notebook exports"
            yield f"{path.relative_to(ROOT)}:{line}: imports {name}, {what}; import from an earlier module"


if __name__ == "__main__":
    order = module_order()
    if found := [*offences(order), *mixed_cells()]: sys.exit("\n".join(found))
    print(f"{len(order)} modules import downward only, and notebooks import in cells of their own")
