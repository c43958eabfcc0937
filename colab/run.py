"""Run the numbered notebooks and then those of this folder, headless and in order, with papermill.

    python colab/run.py [--workers 2] [nbs/01_data.ipynb ...]      default: all of nbs/ that are numbered, then all of colab/

Works in Colab and without, with and without a network. A notebook whose parameters cell has a `folder` is given
runs/colab/work, so that it finds what the ones before it left there, and one with `small` is given true: a trial on few real cells, without
a download; --full leaves that out. The executed notebooks stay in runs/colab/. The first
failing cell stops the run. Notebooks of nbs/ hand nothing over, so several workers may share them; those of colab/ come one by one.
"""
import argparse
import os
import re
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "runs" / "colab"
ANSI = re.compile(r"\x1b\[[0-9;]*m")
# What nbdev's own test runner leaves out: papermill knows nothing of these directives.
SKIPPED = re.compile(r"^#\|\s*(eval:\s*false|notest)\b", re.M | re.I)


class Stopped(Exception):
    "Say which notebook, which cell, and why."


def all_notebooks(root=ROOT):
    "Return the notebooks in the order in which they are run."
    numbered = sorted(p for p in (root / "nbs").glob("*.ipynb") if p.name[0].isdigit())
    return numbered + sorted((root / "colab").glob("*.ipynb"))


def parameters_cell(nb):
    "Return number and source of the cell tagged `parameters`; behind the last cell and '' if there is none."
    return next(((i, c.source) for i, c in enumerate(nb.cells) if "parameters" in c.metadata.get("tags", [])), (len(nb.cells), ""))


def without_skipped(nb):
    "Turn code cells that are not to be run into raw ones: they stay to be read, and the cells keep their numbers."
    for cell in nb.cells:
        if cell.cell_type != "code" or not SKIPPED.search(cell.source): continue
        cell.cell_type = "raw"
        for key in ("outputs", "execution_count"): cell.pop(key, None)
    return nb


def run(path, out, work, cwd, small=True):
    """Execute one notebook.

    Parameters
    ----------
    path : Path
        The notebook.
    out : Path
        Folder for the executed copy.
    work : Path
        Folder that notebooks hand things over in.
    cwd : Path
        Where the notebook's kernel works.
    small : bool
        Whether notebooks that can take few cells do so.

    Raises
    ------
    Stopped
        At the first failing cell.
    """
    nb = without_skipped(nbformat.read(path, as_version=4))
    place, source = parameters_cell(nb)
    given = {k: v for k, v in dict(folder=str(work), small=small).items() if re.search(rf"^{k}\s*=", source, re.M)}
    for folder in (out, work): folder.mkdir(parents=True, exist_ok=True)
    try: papermill.execute_notebook(nb, str(out / path.name), given, kernel_name="python3", language="python", cwd=str(cwd), progress_bar=False)
    except PapermillExecutionError as e:
        # papermill counts the cell that it put in behind the parameters, readers of the notebook do not.
        cell = e.cell_index - (bool(given) and e.cell_index > place)
        raise Stopped(ANSI.sub("", "\n".join(e.traceback)) + f"\n\n{path.name}, cell {cell}: {e.ename}: {e.evalue}") from None
    except Exception as e: raise Stopped(f"{path.name}: {type(e).__name__}: {e}") from None


def _timed(path, out, small):
    "Run one notebook; returns its seconds, and what stopped it or ''."
    start = time.time()
    try: run(path, out, out / "work", path.parent if path.parent.name == "nbs" else ROOT, small)
    except Stopped as e: return time.time() - start, str(e)
    return time.time() - start, ""


def _in_order(paths, out, workers, small):
    "Yield notebooks with their seconds and what stopped them, in the order given."
    together = [p for p in paths if p.parent.name == "nbs"] if workers > 1 else []
    with ProcessPoolExecutor(workers) as pool:
        running = [(p, pool.submit(_timed, p, out, small)) for p in together]
        try:
            for p, f in running: yield p, *f.result()
        finally:
            for _, f in running: f.cancel()
    for p in paths:
        if p not in together: yield p, *_timed(p, out, small)


def run_all(paths, out=OUT, workers=1, small=True):
    "Run notebooks in order, print the seconds of each, and return an exit code."
    # IN_TEST is nbdev's word for a run without a reader; progress bars are noise in a kept notebook.
    os.environ |= {"IN_TEST": "1", "SCIMLORA_PROGRESS": "0"}
    begin = time.time()
    shutil.rmtree(out / "work", ignore_errors=True)
    for path, seconds, stopped in _in_order(paths, out, workers, small):
        if stopped:
            print(f"{stopped}\n\nstopped after {seconds:.0f} s; the notebook as far as it came is {out / path.name}", flush=True)
            return 1
        print(f"{path.parent.name}/{path.name}: {seconds:.0f} s", flush=True)
    print(f"{len(paths)} notebooks: {time.time() - begin:.0f} s, kept in {out}", flush=True)
    return 0


def main(args):
    parser = argparse.ArgumentParser(description="Run notebooks headless.")
    parser.add_argument("--workers", type=int, default=1, help="notebooks of nbs/ at a time")
    parser.add_argument("--full", action="store_true", help="notebooks that can take few cells take all")
    parser.add_argument("names", nargs="*")
    args = parser.parse_args(args)
    paths = [Path(n).resolve() for n in args.names] or all_notebooks()
    if missing := [str(p) for p in paths if not p.is_file()]: sys.exit(f"no such notebook: {', '.join(missing)}")
    sys.exit(run_all(paths, workers=args.workers, small=not args.full))


if __name__ == "__main__":
    main(sys.argv[1:])
