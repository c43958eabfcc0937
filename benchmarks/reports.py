"""Write the Design Analysis Reports of three public tasks with the commands that a user has: brain, pancreas, blood.

    make reports

Cells are written to files, and then `scimlora tune`, `evaluate`, `errors` and `report` run on them, as the pages' last section shows. Training and test
cells are those of science.py (full training sets), but cells of types that were never taught stay in the test file. The base is pretrained without
the task's studies and without a quarter of the other studies' cells, which tell what was forgotten, as in forgetting.py. Runs are kept under
runs/reports; each page goes with its figures and its tables of errors to benchmarks/reports.
"""
import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("SCIMLORA_PROGRESS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # with another number of threads a base or a fit is another one

from PIL import Image  # noqa: E402

from forgetting import Bases  # noqa: E402
from scimlora.core import atomic_dir, write_json  # noqa: E402
from scimlora.report import NAME  # noqa: E402
from suite.tasks import LABEL, TASKS, load_task  # noqa: E402

HERE = Path(__file__).parent
REPORTS = {"brain": ("Darmanis", "brain, Darmanis, donors AB_S7 and FB_S3 held out"), "pancreas": ("Baron → Enge", "pancreas, Baron's cells to Enge's laboratory"),
           "blood": ("Kang, donor 1244", "blood, Kang, donor 1244 held out")}


def cells(name, task):
    "Training cells as in the benchmark; all test cells that have a label."
    _, _, test, _ = TASKS[name][0]()
    train = task.train.adata.copy()
    train.obs["cell_type"] = train.obs[LABEL].astype(str)
    return train, test[test.obs.cell_type.notna().to_numpy()].copy()


def how_split(train, test):
    "What `scimlora prepare` would have left beside the files: what was held out."
    column = "donor" if len(set(train.obs.donor.astype(str)) | set(test.obs.donor.astype(str))) > 2 else "dataset"
    groups = {side: sorted(set(a.obs[column].astype(str))) for side, a in (("train", train), ("test", test))}
    return dict(kind="donor" if column == "donor" else "study", column=column, groups=groups, cells=dict(train=train.n_obs, val=0, test=test.n_obs), notes=[])


def commands(base, donor, title):
    "The user's commands, in the run's folder."
    return [["tune", "train.h5ad", "--label", "cell_type", "--donor", donor, "--base", base, "--retention", "others.h5ad", "--title", title, "--out", "bundle"],
            ["evaluate", "bundle", "test.h5ad", "--out", ".", "--retention", "others_test.h5ad"],
            ["errors", "bundle", "test.h5ad", "--out", ".", "--donor", "donor"], ["report", "."]]


def make(name, title, bases, run):
    "Run the commands on one task."
    task = load_task(name, lambda without: bases(without)[0])
    base, to_choose, to_measure = bases(task.without)
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    folder = f"base-without-{'-'.join(task.without)}"
    shutil.copytree(base.path, run / folder)
    train, test = cells(name, task)
    for file, a in {"train": train, "test": test, "others": to_choose, "others_test": to_measure}.items(): a.write_h5ad(run / f"{file}.h5ad")
    write_json(run / "prepare.json", dict(split=how_split(train, test)))
    for c in commands(folder, task.donor, title): subprocess.run([sys.executable, "-c", "from scimlora.cli import main; main()", *c], cwd=run, check=True)


def publish(run, out):
    "Copy the page and its figures, these in 256 colours: a third of the size, and no difference to the eye."
    with atomic_dir(out) as tmp:
        text = (run / f"{NAME}.md").read_text(encoding="utf-8")
        (tmp / "README.md").write_text(text, encoding="utf-8")
        for png in sorted(run.glob("*.png")):
            if f"({png.name})" not in text: continue
            with Image.open(png) as image: image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(tmp / png.name, optimize=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("names", nargs="*", default=[*REPORTS], metavar="NAME", help="one or more of: " + ", ".join(REPORTS))
    p.add_argument("--bases", type=Path, default=HERE.parent / "runs" / "forgetting" / "bases", help="where bases are kept, as for forgetting.py")
    p.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "reports", help="where the runs are kept")
    p.add_argument("--out", type=Path, default=HERE / "reports")
    args = p.parse_args(argv)
    bases = Bases(args.bases)
    for name in args.names:
        make(*REPORTS[name], bases, args.runs / name)
        publish(args.runs / name, args.out / name)


if __name__ == "__main__": sys.exit(main())
