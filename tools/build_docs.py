"""Build the documentation into _docs/ where Quarto cannot be installed.

With Quarto, `nbdev_docs` does this. Here nbdev processes the notebooks as it always does, and smalldocs renders them.
"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent
STAGE = ROOT/"_proc"
LINK = re.compile(r"(?<![\w/])(\d+[a-zA-Z0-9]*_\w+\.ipynb)")
CODE = re.compile(r"^```.*?^```", re.M | re.S)


def page_name(notebook):
    "Return the name under which nbdev publishes a notebook, still as ipynb: `00a_genes.ipynb` → `genes.ipynb`."
    return _nbpath2html(Path(notebook)).with_suffix(".ipynb").name


def relink(text):
    "Let links to numbered notebooks name the pages, and links to our own site stay within it."
    cfg = get_config()
    text = text.replace(f"{cfg.doc_host}{cfg.doc_baseurl}/", "")
    return LINK.sub(lambda m: page_name(m[1]), text)


def mend_signature(code):
    "Undo two slips of `show_doc` in a signature: links inside the code, and a comment's next line that is no comment."
    text = re.sub(r"\[(`[^`]+`)\]\([^)]*\)", r"\1", code[0])
    return re.sub(r"\n(?!    |def |async def |class |@|\)|```)", " ", text)


def rename(path):
    "Do in the staging copy what Quarto's `output-file` would do, which smalldocs does not read."
    nb = read_nb(path)
    for cell in nb.cells:
        if cell.cell_type == "raw": cell.source = re.sub(r"^output-file:.*\n", "", cell.source, flags=re.M)
        if cell.cell_type == "markdown": cell.source = relink(cell.source)
        for out in cell.get("outputs", []):
            shown = out.get("data", {})
            if "text/markdown" not in shown: continue
            text = relink("".join(shown["text/markdown"]))
            if "show_doc(" in cell.source: text = CODE.sub(mend_signature, text)
            shown["text/markdown"] = text.splitlines(True)
    target = path.with_name(page_name(path))
    if target != path and target.exists(): sys.exit(f"{path.name} and another notebook both become {target.stem}.html; rename one")
    path.unlink()
    write_nb(nb, target)


def main():
    os.chdir(ROOT)
    shutil.rmtree("_docs", ignore_errors=True)   # a build that fails leaves no site, not an old one
    refresh_quarto_yml()
    # A relative path: nbdev skips files under any folder whose name starts with a dot, the checkout's own included.
    proc_nbs("nbs", n_workers=2, force=True)
    for path in sorted(STAGE.glob("*.ipynb")): rename(path)
    sidebar = STAGE/"sidebar.yml"
    sidebar.write_text(relink(sidebar.read_text(encoding="utf-8")), encoding="utf-8")
    subprocess.run([Path(sys.executable).with_name("smalldocs"), "render", STAGE], check=True)
    shutil.copytree(STAGE/"_docs", ROOT/"_docs")


if __name__ == "__main__":
    main()
