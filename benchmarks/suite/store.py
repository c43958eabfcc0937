"""Runs that are kept: each fit's predictions in a file of its own, so that a run that was stopped goes on where it was."""
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from scimlora.core import atomic_path, read_json, versions, write_json
from suite.methods import METHODS, PINS
from suite.tasks import slug

WORKER = Path(__file__).parent / "peers_worker.py"


def machine():
    "What the seconds were measured on."
    return f"{os.cpu_count()} cores, {platform.machine()}, " + ", ".join(f"{k} {v}" for k, v in versions("scimlora", "torch", "scikit-learn", "numpy").items())


class Peers:
    "Fit methods in the peers' environment: one process, started at the first call, that reads and writes plain files."

    def __init__(self, python): self.python, self.process = Path(python), None

    def there(self): return self.python.exists()

    def _start(self):
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # this environment's packages are not theirs
        self.process = subprocess.Popen([self.python, WORKER], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def fit(self, method, draw):
        "Return probabilities, labels and seconds of one method on one draw."
        if self.process is None or self.process.poll() is not None: self._start()
        with tempfile.TemporaryDirectory() as tmp:
            cells, out = Path(tmp) / "cells.npz", Path(tmp) / "out.npz"
            np.savez(cells, **self._cells(draw, method.counts))
            print(json.dumps(dict(method=method.worker, cells=str(cells), out=str(out))), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
            if not line: raise RuntimeError(f"the peers' process ended with code {self.process.wait()}")
            answer = json.loads(line)
            if "error" in answer: raise RuntimeError(answer["error"])
            with np.load(out, allow_pickle=False) as f: return f["proba"], f["said"], answer["seconds"]

    def _cells(self, d, counts):
        t = d.task
        donors = d.adata.obs[t.donor].astype(str).to_numpy(str)
        out = dict(y=d.y, yt=np.zeros_like(t.yt), groups=donors if t.groups is not None else np.zeros(len(d.y), int), batch=donors, genes=np.array(t.genes, str), seed=d.seed)
        parts = dict(G=d.on(t.genes), Gt=t.test.on(t.genes))
        if counts: parts |= dict(counts=t.train.counts(t.genes)[d.rows], counts_test=t.test.counts(t.genes))
        for name, M in parts.items(): out |= {f"{name}.data": M.data, f"{name}.indices": M.indices, f"{name}.indptr": M.indptr, f"{name}.shape": M.shape}
        return out

    def close(self):
        if self.process is not None and self.process.poll() is None: self.process.stdin.close(); self.process.wait()


@dataclass
class Row:
    "Hold one stored fit."
    task: str
    shots: int
    seed: int
    method: str
    cells: int
    share: float
    seconds: float
    y: np.ndarray  # true class of each test cell
    proba: np.ndarray
    said: np.ndarray  # predicted class; kept beside `proba`, whose rounding may make ties
    meta: dict


class Store:
    """Keep fits in a folder: `rows/TASK/SHOTS-SEED/METHOD-KEY.npz`, tasks in `tasks/`, bases in `bases/`.

    The key changes with the method's code, its packages' versions, the task's cells and, for methods on a base, the base.
    """

    def __init__(self, folder, fresh=False, part="rows"):
        self.folder, self.part = Path(folder), part
        if fresh: shutil.rmtree(self.folder / part, ignore_errors=True)

    def _path(self, method, draw, what=""):
        base = "".join(draw.task.base.sha256.values()) if method.kind == "ours" else ""
        key = sha256(f"{method.code()}{draw.task.content}{base}{what}".encode()).hexdigest()[:12]
        return self.folder / self.part / slug(draw.task.name) / f"{draw.shots}-{draw.seed}" / f"{slug(method.name)}-{key}.npz"

    def has(self, method, draw, what=""):
        "Whether the fit is kept; marks it as the one in use. `what` tells several predictions of one fit apart."
        path = self._path(method, draw, what)
        if path.exists(): path.touch()
        return path.exists()

    def keep(self, method, draw, proba, said, share, seconds, what="", **more):
        "Keep predictions for the task's test cells."
        meta = dict(task=draw.task.name, shots=draw.shots, seed=draw.seed, method=method.name, cells=len(draw.rows), share=float(share), seconds=float(seconds), what=what, **more,
                    code=sha256(method.code().encode()).hexdigest()[:12], base=draw.task.base.sha256 if method.kind == "ours" else {}, machine=machine(), pins=PINS if method.worker else {})
        with atomic_path(self._path(method, draw, what)) as tmp:
            np.savez_compressed(tmp, proba=proba.astype(np.float32), said=said.astype(np.int16), y=draw.task.yt.astype(np.int16), meta=json.dumps(meta))

    def add(self, method, draw, peers):
        "Fit, predict and keep; seconds are processor time, which other work on the machine does not lengthen."
        if method.worker: proba, said, seconds, share = *peers.fit(method, draw), 1.0
        else:
            start = time.process_time()
            predict, share = method.fit(draw)
            proba = np.asarray(predict(draw.task.test))
            seconds, said = time.process_time() - start, proba.argmax(1)
        self.keep(method, draw, proba, said, share, seconds)

    def note_task(self, task):
        "Keep what a report says of a task."
        write_json(self.folder / "tasks" / f"{slug(task.name)}.json", dict(name=task.name, classes=task.classes, train=len(task.y), test=len(task.yt), genes=len(task.genes),
                   kinds=[task.train.kind, task.test.kind], donors=0 if task.groups is None else len(set(task.groups))))

    def tasks(self):
        "What is known of each task, by name."
        found = [read_json(p) for p in sorted((self.folder / "tasks").glob("*.json"))]
        return {t["name"]: t for t in found}

    def rows(self):
        "The kept fits, of each the one that was made or asked for last."
        newest = {}
        for p in sorted((self.folder / self.part).glob("*/*/*.npz"), key=lambda p: p.stat().st_mtime_ns):
            with np.load(p, allow_pickle=False) as f: meta, arrays = json.loads(str(f["meta"])), (f["y"].astype(int), f["proba"].astype(float), f["said"].astype(int))
            newest[meta["task"], meta["shots"], meta["seed"], meta["method"], meta.get("what", "")] = Row(*(meta[k] for k in ("task", "shots", "seed", "method", "cells", "share", "seconds")), *arrays, meta)
        return [r for r in newest.values() if r.method in METHODS]


def fill(store, draws, methods, peers, say=print):
    "Make the fits that are not kept yet; return what could not be made and why."
    failed = []
    for d in draws:
        for m in methods:
            if m.left_out((d.task.train.kind, d.task.test.kind)) or store.has(m, d): continue
            line = f"{d.task.name}, {d.shots or 'full'}, draw {d.seed}, {m.name}"
            try: store.add(m, d, peers)
            # One method's failure must not cost hours of others' work; it is told at once and at the end, and nothing of it is kept.
            except Exception as e: line = f"{line}: {type(e).__name__}: {e}"; failed.append(line)
            say(line, flush=True)
    return failed
