"""Check the site in _docs/ that tools/build_docs.py built: warnings, dead links and anchors, symbols without a place."""
import runpy
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from nbdev.config import get_config
from run_notebooks import MACHINE_PATH

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT/"_docs"
cfg = get_config(path=ROOT)
SITE = f"{cfg.doc_host}{cfg.doc_baseurl}/"


class Page(HTMLParser):
    "The anchors, links, classes and visible text of one page."
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.classes, self.text, self.silent = set(), [], set(), [], False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.silent = tag in ("script", "style")
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        self.links += [attrs[k] for k in ("href", "src") if attrs.get(k)]
        self.classes |= set((attrs.get("class") or "").split())

    def handle_endtag(self, tag): self.silent = False

    def handle_data(self, data):
        if not self.silent: self.text.append(data)


page = cache(Page)


def dead(link, name):
    "Say what is wrong with a link on page `name`; None for a good one and for one that leaves the site."
    url = urljoin(SITE + name, link)
    if not url.startswith(SITE): return None
    parts = urlsplit(url.removeprefix(SITE))
    target = DOCS/(unquote(parts.path) or "index.html")
    if not target.is_file(): return f"{link} leads to no file"
    anchor = unquote(parts.fragment)
    if anchor and target.suffix == ".html" and anchor not in page(target).ids:
        return f"{link} leads to no such place on its page (a method has one where a notebook says show_doc)"


def page_faults():
    "Yield what is wrong on each page."
    for path in sorted(DOCS.rglob("*.html")):
        name, shown = path.relative_to(DOCS).as_posix(), page(path)
        for link in sorted(set(shown.links)):
            if fault := dead(link, name): yield f"{name}: {fault}"
        if "cell-output-error" in shown.classes: yield f"{name}: shows an error; run the notebook again with tools/run_notebooks.py"
        if found := MACHINE_PATH.search("".join(shown.text)): yield f"{name}: names a path of this machine: {found[0]}"


def symbol_faults():
    "Yield each public symbol of the package that has no place on the site, and each notebook that the sidebar leaves out."
    index = runpy.run_path(str(cfg.lib_path/"_modidx.py"))["d"]["syms"]
    for module, symbols in index.items():
        for symbol, (place, _) in symbols.items():
            name = symbol.removeprefix(f"{module}.")
            # A method inside a class body has a place of its own only where a notebook says `show_doc`.
            if name.startswith("_") or "." in name: continue
            if fault := dead(place, "index.html"): yield f"{symbol}: {fault}; its cell is hidden or the notebook was not exported"
    sidebar = (ROOT/"nbs"/"sidebar.yml").read_text(encoding="utf-8")
    for path in sorted((ROOT/"nbs").glob("[!_.]*.ipynb")):
        if path.name not in sidebar: yield f"{path.name}: not in nbs/sidebar.yml; add a line there"


def main():
    if not (DOCS/"index.html").exists(): sys.exit("_docs/ holds no index.html; write nbs/index.ipynb and run tools/build_docs.py")
    # `smalldocs check` builds the staging copy once more, aside, and fails on any warning.
    warned = subprocess.run([Path(sys.executable).with_name("smalldocs"), "check", ROOT/"_proc"]).returncode
    faults = [*page_faults(), *symbol_faults()]
    if faults or warned: sys.exit("\n".join([*faults, f"the site has {len(faults)} faults, and smalldocs {'warned' if warned else 'did not warn'}"]))
    print(f"{len(list(DOCS.rglob('*.html')))} pages: no warning, no dead link, every symbol in its place")


if __name__ == "__main__":
    main()
