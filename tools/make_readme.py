"""Write README.md from nbs/index.ipynb, as `nbdev_readme` does where Quarto can be installed.

    python tools/make_readme.py            write README.md and the pictures in index_files/
    python tools/make_readme.py --check    exit 1 if they are not what would be written
"""
import os
import re
import sys
from pathlib import Path

import nbformat
from execnb.nbio import nb2str, read_nb
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html
from nbdev.processors import FilterDefaults

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)\s]+)|((?:src|href)=\")([^\"]+)")


def says(cell, option):
    "Tell whether a cell has the Quarto option `#| option: false`."
    return cell.get("directives_", {}).get(f"{option}:") == ["false"]


def to_repo(link):
    "Return `link`, written in nbs/index.ipynb, as one that works on GitHub from the README: into the repository."
    cfg = get_config()
    site, blob = f"{cfg.doc_host}{cfg.doc_baseurl}/", f"{cfg.git_url}/blob/{cfg.branch}/"
    if link.startswith(site):   # nbdev links names in backticks to their page; its notebook shows the same
        page = link.removeprefix(site).partition("#")[0]
        link = next((p.name for p in (ROOT/"nbs").glob("*.ipynb") if _nbpath2html(p).name == page), page)
    if re.match(r"\w+:|#", link) and not link.startswith(blob): return link
    path = link.removeprefix(blob) if link.startswith(blob) else os.path.normpath(f"nbs/{link}")
    if not (ROOT/path.partition("#")[0]).exists(): sys.exit(f"nbs/index.ipynb: {link} leads to no file; mend the link")
    return path


def relink(text): return LINK.sub(lambda m: (m[1] or m[3]) + to_repo(m[2] or m[4]), text)


def readme():
    "Return the README's text and its pictures as `{path: bytes}`."
    nb = read_nb(ROOT/"nbs"/"index.ipynb")
    FilterDefaults()(nb)
    front = nb.frontmatter_
    nb.cells[0].update(cell_type="markdown", source=f"# {front['title']}\n\n> {front['description']}")
    nb.cells = [c for c in nb.cells if not says(c, "include")]
    for cell in nb.cells:
        if cell.cell_type == "markdown": cell.source = relink(cell.source)
        else:
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
            cell.metadata["tags"] = ["no-code"] if says(cell, "echo") else []
            if says(cell, "output"): cell.outputs = []
            for out in cell.outputs:   # GitHub shows the style sheet that pandas adds to a table as text
                data = out.get("data", {})
                if "text/html" in data: data["text/html"] = re.sub(r"<style.*?</style>\n?", "", "".join(data["text/html"]), flags=re.S)
    nb.metadata["language_info"] = {"name": "python"}   # nbconvert marks code blocks with it
    exporter = MarkdownExporter(config={"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"no-code"}}})
    resources = {"output_files_dir": "index_files", "unique_key": "output"}
    text, resources = exporter.from_notebook_node(nbformat.reads(nb2str(nb), as_version=4), resources)
    text = re.sub(r"\n(\s*\n){2,}", "\n\n", text).strip() + "\n"
    return text, resources["outputs"]


def main():
    os.chdir(ROOT)
    text, pictures = readme()
    files = {"README.md": text.encode(), **pictures}
    stale = [name for name, data in files.items() if not Path(name).exists() or Path(name).read_bytes() != data]
    stale += sorted({p.as_posix() for p in Path("index_files").glob("*")} - files.keys())
    if "--check" in sys.argv:
        if stale: sys.exit(f"not what nbs/index.ipynb says: {', '.join(stale)}; run make readme")
        return
    for name in stale:
        if name not in files: Path(name).unlink()
        else:
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_bytes(files[name])


if __name__ == "__main__":
    main()
