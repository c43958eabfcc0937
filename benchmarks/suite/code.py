"""Tell whether code has changed: a digest of what it does, blind to comments, docstrings and layout."""
import ast
import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path

_DOC = (ast.FunctionDef, ast.ClassDef, ast.Module)


def _bare(tree):
    "The tree without docstrings."
    for node in ast.walk(tree):
        if isinstance(node, _DOC) and len(node.body) > 1 and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant): del node.body[0]
    return tree


@lru_cache
def _dump(path, stamp):
    return {getattr(n, "name", None) or f"line {n.lineno}": ast.dump(n) for n in _bare(ast.parse(Path(path).read_text(encoding="utf-8"))).body}


def code_of(*modules, names=None):
    "Digest of modules given by name or path; of the named functions and classes in them only, if `names` are given."
    h = hashlib.sha256()
    for m in modules:
        path = Path(m) if str(m).endswith(".py") else Path(importlib.util.find_spec(m).origin)
        parts = _dump(str(path), path.stat().st_mtime_ns)
        for k in (parts if names is None else names): h.update((parts[k] if names else f"{parts[k]}").encode())
    return h.hexdigest()


def with_imports(*modules):
    "Names of scimlora's modules and of all those that they import, one after the other."
    found, ahead = [], list(modules)
    while ahead:
        if (m := ahead.pop()) in found: continue
        found.append(m)
        tree = ast.parse(Path(importlib.util.find_spec(f"scimlora.{m}").origin).read_text(encoding="utf-8"))
        ahead += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module]
    return tuple(sorted(found))
