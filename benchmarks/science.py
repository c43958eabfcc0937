"""Compare scimlora and its parts with tuned peers on held-out donors and laboratories.

    make benchmark-science

Tasks: the four public ones of the shared data, and others that no setting was chosen on (`suite/tasks.py`). Each in full and with 5, 10
and 25 training cells a class, three draws each. Every base is pretrained without the studies of its task. Peers (`suite/methods.py`)
see all genes that training and test file share; their settings are chosen by inner cross-validation on training cells, grouped by donor
where there are three or more; nothing is tuned on test cells. CellTypist, gradient boosting and scANVI run in an environment of their
own, `.venv-peers`, which the make target builds.

Every fit is kept under runs/science (`--cache`) with its predictions, under a key of its code, packages, cells and base; the same command
goes on where it was stopped, and `--fresh` starts over. Writes SCIENCE.csv (every run), SCIENCE.md (means, targets, differences to the
best peer with their intervals) and SCIENCE.png.
"""
import argparse
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("SCIMLORA_PROGRESS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # with another number of threads a base or a fit is another one

import matplotlib  # noqa: E402

from suite.methods import METHODS  # noqa: E402
from suite.report import write  # noqa: E402
from suite.store import Peers, Store, fill  # noqa: E402
from suite.tasks import TASKS, Bases, Draw, load_task  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parent


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tasks", nargs="*", default=[*TASKS], metavar="TASK", help="one or more of: " + "; ".join(TASKS))
    p.add_argument("--shots", nargs="*", type=int, default=[5, 10, 25, 0], help="cells a class; 0: all cells")
    p.add_argument("--seeds", type=int, default=3, help="draws of training cells")
    p.add_argument("--methods", nargs="*", default=[*METHODS], metavar="METHOD", help="one or more of: " + "; ".join(METHODS))
    p.add_argument("--only", choices=("peer", "ours"), help="peers alone, which need no base, or ours alone")
    p.add_argument("--cache", type=Path, default=ROOT / "runs" / "science", help="where fits are kept")
    p.add_argument("--bases", type=Path, help="folder of bases pretrained elsewhere, named by the studies they lack: kang, zheng-3k")
    p.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python", help="Python of the peers' environment")
    p.add_argument("--out", type=Path, default=HERE, help="where SCIENCE.* go")
    p.add_argument("--fresh", action="store_true", help="forget what is kept")
    p.add_argument("--report", action="store_true", help="fit nothing, write the report from what is kept")
    return p.parse_args(argv)


def main(argv=None):
    warnings.filterwarnings("ignore")
    matplotlib.use("agg")
    args = arguments(argv)
    for what, given, known in (("task", args.tasks, TASKS), ("method", args.methods, METHODS)):
        for g in given:
            if g not in known: sys.exit(f"no {what} '{g}'; choose from: {'; '.join(known)}")
    store, peers, failed = Store(args.cache, args.fresh), Peers(args.peers_python), []
    methods = [METHODS[m] for m in args.methods if args.only in (None, METHODS[m].kind) or METHODS[m].kind == "floor"]
    if not args.report and not peers.there():
        failed += [f"{m.name}: there is no environment for peers at {args.peers_python}; make benchmark-science builds it" for m in methods if m.worker]
        methods = [m for m in methods if not m.worker]
    bases = Bases(args.cache / "bases", args.bases)
    for name in [] if args.report else args.tasks:
        task = load_task(name, bases)
        store.note_task(task)
        draws = [Draw(task, shots, seed) for shots in args.shots for seed in range(args.seeds if shots else 1)]
        failed += fill(store, draws, methods, peers)
    peers.close()
    write(store, args.out)
    for f in failed: print(f"failed: {f}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__": sys.exit(main())
