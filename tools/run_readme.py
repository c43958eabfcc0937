"""Run the commands of README.md and of the page Start as they stand: in a new clone, with a new environment, in their order.

    python tools/run_readme.py                  run them all (what is committed: a clone has no more)
    python tools/run_readme.py --show START     print the one block that starts so, for what runs it elsewhere

Every fenced block needs an entry in BLOCKS, under its first line: how it is run and what it must leave, or where else it is run. A block
without an entry, or an entry without a block, fails before anything is run. Not a character of a block is replaced. What README takes for
granted is put there first: files of real cells under the names in its commands, for Python the AnnData objects, and for the Hub a false
one on this machine (`tests/fake_hub.py`), since OWNER/NAME is nobody's.
"""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack, closing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"tests"))
from fake_hub import FakeHub  # noqa: E402

PORT = 8000  # that of README's curl lines
FENCE, ANY_FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S), re.compile(r"^\s*(?:```|~~~)", re.M)

# Baron's libraries stand for donors, since all its cells are one person's; 24 cells a type keep it quick.
CELLS = """
import numpy as np
from scimlora.examples import baron, pollen

cells = baron()
cells.obs["donor"] = cells.obs.library.astype(str)
cells = cells[np.random.default_rng(0).permutation(cells.n_obs)]
kinds = cells.obs.cell_type.astype(str)
rank, size = kinds.groupby(kinds).cumcount().to_numpy(), kinds.map(kinds.value_counts()).to_numpy()
cells[(size > 50) & (rank < 24)].write_h5ad("cells.h5ad")
new = cells[(size > 50) & (rank >= 24) & (rank < 48)].copy()
new.write_h5ad("labelled.h5ad")
del new.obs["cell_type"]
new.write_h5ad("new.h5ad")
pollen().write_h5ad("other_tissue.h5ad")
"""
PYTHON = """
import sys
import anndata as ad

given = dict(adata=ad.read_h5ad("cells.h5ad"), other=ad.read_h5ad("new.h5ad"), test=ad.read_h5ad("labelled.h5ad"))
exec(compile(sys.stdin.read(), "README.md", "exec"), given)
assert "scimlora_label" in given["other"].obs and "X_scimlora" in given["other"].obsm
"""


class Failed(Exception): pass


class Terminal:
    "A reader's terminal in a clone, which the blocks are typed into one after the other."

    def __init__(self, folder, hub):
        self.folder, self.active, self.service = folder, "", None
        # A reader's shell knows nothing of the environment that this runs in.
        own = (Path(sys.prefix)/"bin").resolve()
        self.env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")}
        self.env["PATH"] = os.pathsep.join(p for p in self.env["PATH"].split(os.pathsep) if Path(p).resolve() != own)
        self.env.update(HF_ENDPOINT=hub.url, HF_TOKEN="hf_" + "x" * 34, HF_HOME=str(folder.parent/"hub"))

    def start(self, script, **streams):
        return subprocess.Popen(["bash", "-euo", "pipefail", "-c", self.active + script], cwd=self.folder, env=self.env, start_new_session=True,
                                text=True, stderr=subprocess.STDOUT, **streams)

    def run(self, script, given="", seconds=1800):
        "Run a script to its end; returns what it printed."
        p = self.start(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try: said, _ = p.communicate(given, timeout=seconds)
        except BaseException as e:
            os.killpg(p.pid, signal.SIGKILL)
            if isinstance(e, subprocess.TimeoutExpired): raise Failed(f"not done after {seconds} s") from None
            raise
        if p.returncode: raise Failed(f"exit code {p.returncode}:\n{said[-3000:]}")
        return said

    def close(self):
        "End the service, if there is one, as a reader does with Ctrl-C."
        if self.service is None: return
        service, self.service = self.service, None
        if service.poll() is None: os.killpg(service.pid, signal.SIGINT)
        try: service.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(service.pid, signal.SIGKILL)
            raise Failed("the service does not end on Ctrl-C") from None


# How a block is run ---------------------------------------------------------------------------------------------------


def leaves(*files):
    "Run it to its end; it must have written these."
    def run(terminal, text):
        start = time.time()
        terminal.run(text)
        for f in files:
            if not (terminal.folder/f).exists() or (terminal.folder/f).stat().st_mtime < start - 1: raise Failed(f"did not write {f}")
    return run


def activates(terminal, text):
    "It holds for all later blocks; the files that they read are made here, with the clone's own package."
    terminal.active = text
    if ".venv/bin/scimlora" not in terminal.run("command -v scimlora"): raise Failed("finds no scimlora of the new environment")
    terminal.run("python -", CELLS)


def in_python(terminal, text):
    terminal.run(f"python -c '{PYTHON}'", text)
    if not (terminal.folder/"bundle"/"manifest.json").exists(): raise Failed("did not write bundle")


def serves(terminal, text):
    "It goes on until the next block has asked it."
    def answers():
        try: return urllib.request.urlopen(f"http://localhost:{PORT}/readyz", timeout=2).status == 200
        except OSError: return False

    if answers(): raise Failed(f"port {PORT} is taken; end what listens there")
    log, until = terminal.folder.parent/"service.log", time.monotonic() + 300
    with open(log, "w") as out: terminal.service = terminal.start(text, stdin=subprocess.DEVNULL, stdout=out)
    while not answers():
        if terminal.service.poll() is not None or time.monotonic() > until: raise Failed(f"does not serve:\n{log.read_text()[-3000:]}")
        time.sleep(0.5)


def is_told(cell_type):
    "Run it while the block before it serves; the answer must be this."
    def run(terminal, text):
        try: said = terminal.run(text, seconds=60)
        finally: terminal.close()
        if f'"cell_type":"{cell_type}"' not in said.replace(": ", ":"): raise Failed(f"was not told '{cell_type}': {said[:500]}")
    return run


def by_ci(terminal, text):
    "`.ci/run` takes this block from --show and runs it as it stands, in the checkout: nothing else may run the tests."
    if f"run_readme.py --show '{text[:9]}'" not in (ROOT/".ci"/"run").read_text(encoding="utf-8"): raise Failed(".ci/run no longer runs this block")


def by_nbdev(terminal, text):
    "`nbdev_test` runs it: it must be a code cell of nbs/index.ipynb."
    cells = json.loads((ROOT/"nbs"/"index.ipynb").read_text(encoding="utf-8"))["cells"]
    if text.strip() not in ("".join(c["source"]).strip() for c in cells if c["cell_type"] == "code"): raise Failed("is no code cell of nbs/index.ipynb")


PANCREAS, BLOOD = ("curl -s localhost:8000/predict -H 'content-type: application/json' -d '{\"expression\": {%s}}'" % genes for genes in (
    '"INS": 9.5, "IAPP": 7.0, "TTR": 4.2', '"MS4A1": 12, "CD79A": 20, "CD79B": 9, "CD74": 60'))
BLOCKS = {
    "make demo     # makes .venv, installs, fine-tunes on real pancreas cells, writes runs/demo/report.html": by_ci,
    "python3 -m venv .venv": leaves(".venv/bin/scimlora", "runs/demo/report.html", "runs/demo/bundle/manifest.json"),
    "source .venv/bin/activate": activates,
    "import tempfile": by_nbdev,
    'metrics = run_demo(tempfile.mkdtemp() + "/demo", say=lambda line: None)': by_nbdev,
    "from scimlora import Base, Classifier": in_python,
    "scimlora doctor cells.h5ad                                        # what is in it, what would be done, what is wrong": leaves(
        "data/train.h5ad", "data/test.h5ad", "runs/mine/bundle/manifest.json", "runs/mine/metrics.json", "runs/mine/forgetting.csv", "runs/mine/errors.json",
        "runs/mine/Design_Analysis_Report.html", "labels.csv", "runs/why/explanation.json", "runs/both/bundle/manifest.json"),
    "scimlora serve runs/demo/bundle": serves,
    PANCREAS: is_told("beta"),
    "pip install -c constraints.txt -e '.[hub]'                        # what the Hub needs": leaves("bundle/manifest.json"),
    "scimlora serve blood": serves,
    BLOOD: is_told("B cell"),
}


def blocks():
    "README's fenced blocks by first line, then those of Start that README has not."
    start = json.loads((ROOT/"nbs"/"10_start.ipynb").read_text(encoding="utf-8"))
    pages = [(ROOT/"README.md").read_text(encoding="utf-8"), *("".join(c["source"]) + "\n" for c in start["cells"] if c["cell_type"] == "markdown")]
    if odd := [page for page in pages if len(ANY_FENCE.findall(page)) != 2 * len(FENCE.findall(page))]: sys.exit(f"a fence that this cannot read, in: {odd[0][:60]!r}")
    texts = list(dict.fromkeys(text for page in pages for text in FENCE.findall(page)))
    found = {text.partition("\n")[0]: text for text in texts}
    if len(found) < len(texts): sys.exit("two blocks differ but for their first line; let them start differently")
    return found


def main():
    found = blocks()
    if sys.argv[1:2] == ["--show"]:
        print(*[text for text in found.values() if text.startswith(sys.argv[2])] or sys.exit(f"no block starts with {sys.argv[2]}"))
        return
    if new := [line for line in found if line not in BLOCKS]: sys.exit(f"say in BLOCKS of tools/run_readme.py how this block is run: {new[0]}")
    if gone := [line for line in BLOCKS if line not in found]: sys.exit(f"no block starts so any more; take it out of BLOCKS: {gone[0]}")
    with tempfile.TemporaryDirectory() as folder, closing(FakeHub()) as hub, ExitStack() as stack:
        clone = Path(folder)/"scimlora"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        terminal = stack.enter_context(closing(Terminal(clone, hub)))
        for line, text in found.items():
            start = time.monotonic()
            try: BLOCKS[line](terminal, text)
            except Failed as e: sys.exit(f"{line.split('  ')[0]}: {e}")
            print(f"{time.monotonic() - start:6.0f} s  {line.split('  ')[0]}", flush=True)


if __name__ == "__main__":
    main()
