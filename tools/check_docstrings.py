"""Check that every public name says in its docstring what it takes and gives.

The first line is a sentence. A function with parameters has a section that names each of them, and one for what it returns or
yields. The command line's functions are left out: their parameters carry the help that `--help` shows.
"""
import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "scimlora"
TYPER = "cli"


def public_functions(tree):
    "Yield name and node of public functions, classes and their public methods."
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"): continue
        yield node.name, node
        for m in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef) and not m.name.startswith("_"): yield f"{node.name}.{m.name}", m


def gives(node):
    "Tell whether a function returns or yields something; what functions inside it do is theirs."
    inner = {id(n) for f in ast.walk(node) if f is not node and isinstance(f, ast.FunctionDef | ast.Lambda) for n in ast.walk(f)}
    return any(id(n) not in inner and ((isinstance(n, ast.Return) and n.value is not None) or isinstance(n, ast.Yield | ast.YieldFrom)) for n in ast.walk(node))


def faults(module, name, node):
    "Yield what a docstring lacks."
    text = ast.get_docstring(node) or ""
    if not text: return (yield "has no docstring")
    if not text.split("\n")[0].rstrip().endswith((".", ":")): yield "the first line is no sentence"
    if isinstance(node, ast.ClassDef) or module == TYPER: return
    named = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
    if named and "Parameters\n----------" not in text: return (yield f"does not say what it takes: {', '.join(named)}")
    lacking = [a for a in named if a not in text.partition("Parameters\n")[2]]
    if lacking: yield f"does not say what {', '.join(lacking)} is"
    managed = any(getattr(d, "attr", getattr(d, "id", "")) == "contextmanager" for d in node.decorator_list)
    if named and gives(node) and not managed and not any(f"{h}\n---" in text for h in ("Returns", "Yields")): yield "does not say what it gives"


def main():
    found, n = [], 0
    for path in sorted(PACKAGE.glob("[!_]*.py")):
        for name, node in public_functions(ast.parse(path.read_text(encoding="utf-8"))):
            n += 1
            found += [f"scimlora.{path.stem}.{name}: {f}" for f in faults(path.stem, name, node)]
    for line in found: print(line)
    if not found: print(f"{n} public names say what they take and give")
    sys.exit(bool(found))


if __name__ == "__main__": main()
