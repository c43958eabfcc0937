"""Give every numbered notebook a badge that opens it in Colab, and a hidden cell that installs the package there.

    python tools/colab_badges.py            add what is missing
    python tools/colab_badges.py --check    exit 1 if something is missing or names another notebook
"""
import re
import sys
from hashlib import sha256
from pathlib import Path

from execnb.nbio import mk_cell, read_nb, write_nb
from nbdev.config import get_config

NBS = Path(__file__).resolve().parent.parent / "nbs"
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\(https://colab\.research\.google\.com/github/[^)]*/(nbs|colab)/([^)]+)\)", re.I)


def badge(name):
    "The badge of a notebook of nbs/."
    cfg = get_config()
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{cfg.user}/{cfg.repo}/blob/{cfg.branch}/nbs/{name})"


def install():
    "What a notebook runs in Colab before all else; `nbdev_test` and the pages leave it out."
    return f'#| hide\n#| eval: false\n![ -e /content ] && pip install -q "scimlora[dev] @ git+{get_config().git_url}@{get_config().branch}"'


def fault(path):
    "What is wrong with a notebook's badge; None if nothing is."
    cells = read_nb(path).cells
    found = next((m for c in cells[:3] if c.cell_type == "markdown" for m in [BADGE.search(c.source)] if m), None)
    if found is None: return "has no badge that opens it in Colab"
    if found[1] == "nbs" and found[2] != path.name: return f"its badge opens {found[2]}"
    if found[1] == "nbs" and not any(c.source == install() for c in cells[:4]): return "does not install the package in Colab"


def new_cell(kind, text, name):
    cell = mk_cell(text, kind)
    cell.id = sha256((name + text).encode()).hexdigest()[:8]
    return cell


def add(path):
    "Put badge and install below the title."
    nb = read_nb(path)
    nb.cells[1:1] = [new_cell("markdown", badge(path.name), path.name), new_cell("code", install(), path.name)]
    write_nb(nb, path)


def main():
    numbered = sorted(NBS.glob("[0-9]*.ipynb"))
    faults = {p: f for p in numbered if (f := fault(p))}
    if "--check" in sys.argv[1:]:
        for p, f in faults.items(): print(f"nbs/{p.name}: {f}; run tools/colab_badges.py")
        sys.exit(bool(faults))
    for p, f in faults.items():
        if "no badge" not in f: sys.exit(f"nbs/{p.name}: {f}; mend it by hand")
        add(p)
    print(f"{len(faults)} of {len(numbered)} notebooks got a badge")


if __name__ == "__main__": main()
