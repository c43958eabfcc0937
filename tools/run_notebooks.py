"""Run the notebooks in order and save what they print, since pages show saved outputs and nbdev saves none.

    python tools/run_notebooks.py [nbs/01_data.ipynb ...]      default: all of nbs/
"""
import multiprocessing
import os
import re
import sys
import time
from pathlib import Path

from execnb.nbio import write_nb
from execnb.shell import CaptureShell
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.process import NBProcessor

ROOT = Path(__file__).resolve().parent.parent
# A path that only this machine has. Spelled so that the search in .ci/run does not find it here.
MACHINE_PATH = re.compile(rf"(?<![\w~.])({re.escape(str(ROOT))}|{re.escape(str(Path.home()))}|/(work|tmp|root))/[^\s'\"<]*")
# What differs from run to run though nothing changed: addresses, durations, rates.
VOLATILE = [(re.compile(r" at 0x[0-9a-f]+"), ""),
            (re.compile(r"\b\d[\d,.]*(?= ?(?:ms|s|sec|secs|seconds?|min|minutes?)\b)"), "…"),
            (re.compile(r"\b\d[\d,.]*(?= ?\w+/s\b)"), "…")]


def steady(text):
    "Return printed text without what differs from run to run."
    for pattern, new in VOLATILE: text = pattern.sub(new, text)
    return text


def tidy(cell, where):
    "Drop stderr (progress bars, warnings with paths) from what `cell` printed, steady the rest, refuse machine paths."
    cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    for out in cell.outputs:
        for parts, key in [(out, "text")] + [(out.get("data", {}), k) for k in out.get("data", {}) if k.startswith("text/")]:
            if key not in parts: continue
            text = steady("".join(parts[key]))
            if found := MACHINE_PATH.search(text):
                sys.exit(f"{where}: the output names a path of this machine ({found[0]}); print its name or a relative path")
            parts[key] = text.splitlines(keepends=True)


def skipped(cell):
    "Tell what `nbdev_test` does not run either: prose, `eval: false`, flagged cells, calls of `nbdev_export`."
    flags = cell.get("directives_", {})
    return (cell.cell_type != "code" or flags.get("eval:", [""])[0].lower() == "false"
            or flags.keys() & set(get_config().tst_flags.split()) or "nbdev_export" + "(" in cell.source)


def run(path):
    "Run one notebook in its folder and save its outputs in place, cleaned as `nbdev_clean` does."
    nb = NBProcessor(path, rm_directives=False).nb
    shell = CaptureShell(path, mpl_format="png")
    os.chdir(path.parent)
    for cell in nb.cells:
        if skipped(cell): continue
        where = f"{path.relative_to(ROOT)}, cell {cell.idx_} ({cell.id})"
        cell.outputs = []
        shell.cell(cell)
        for out in cell.outputs:
            if out.get("name") == "stderr": sys.stderr.write("".join(out.text))
        if shell.exc: sys.exit(f"{shell.prettytb(path.name)}\n{cell.source}\n\n{where}: {type(shell.exc).__name__}: {shell.exc}")
        tidy(cell, where)
    write_nb(nb, path)
    nbdev_clean.__wrapped__(fname=str(path))


def main(names):
    nbs = [Path(n).resolve() for n in names] or sorted(p for p in (ROOT/"nbs").glob("*.ipynb") if p.name[0] not in "._")
    if missing := [str(p) for p in nbs if not p.is_file()]: sys.exit(f"no such notebook: {', '.join(missing)}")
    os.environ["PYTHONHASHSEED"] = "0"   # a set of names prints in the same order every time
    spawn = multiprocessing.get_context("spawn")
    for path in nbs:
        start = time.time()
        # A process each: what a notebook prints must not depend on which others ran before it.
        process = spawn.Process(target=run, args=(path,))
        process.start()
        process.join()
        if process.exitcode: sys.exit(f"stopped at {path.relative_to(ROOT)}")
        print(f"{path.relative_to(ROOT)}: {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
