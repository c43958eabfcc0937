"""Ask the service with a model of SCimilarity v1.1's shape, the load generator beside it, and write benchmarks/SERVICE.md.

    python benchmarks/serve_load.py [--seconds 10] [--workers 1 2]

The weights are random: what is measured is time and memory. All traffic stays on 127.0.0.1.
"""
import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
FEW = {"CD19": 8.5, "MS4A1": 9.2, "CD79A": 7.8, "CD79B": 7.5}
GENES = 28_231


def make_model(folder):
    "A base of v1.1's shape with random weights, and a bundle tuned on it for a moment; made once."
    import pandas as pd
    import torch

    from scimlora.base import BASES, Base, save_base
    from scimlora.encoder import Encoder
    from scimlora.classifier import Classifier
    from scimlora.examples import baron

    if (folder / "bundle/manifest.json").exists(): return folder / "bundle"
    cells, table = baron(), pd.read_csv(BASES / "genes/genes.tsv.gz", sep="\t", dtype=str)
    names = list(dict.fromkeys([*Base.load("mini").genes, *cells.var_names, *table.symbol.dropna()]))[:GENES]
    torch.manual_seed(0)
    base = save_base(Base(Encoder(GENES).eval(), names, {0: "none"}, "v1.1 shape"), folder / "base")
    Classifier.tune(cells[::4], "cell_type", "library", base, epochs=1, min_cells=5, baselines=False, title="v1.1's shape").save(folder / "bundle")
    return folder / "bundle"


def whole_cells(n):
    "Real cells with all their expressed genes."
    from scimlora.examples import baron

    cells = baron()[:n]
    X, genes = cells.X.tocsr(), cells.var_names.to_numpy(str)
    return [dict(zip(genes[X.indices[a:b]].tolist(), X.data[a:b].astype(int).tolist())) for a, b in zip(X.indptr[:-1], X.indptr[1:])]


def bodies():
    "Name → path, cells a request, clients, body."
    line = lambda cells: json.dumps({"cells": [{"expression": c} for c in cells]}, separators=(",", ":")).encode()
    whole = whole_cells(100)
    return {"one cell of 4 genes": ("/predict", 1, 32, json.dumps({"expression": FEW}).encode()),
            f"one whole cell ({np.mean([len(c) for c in whole]):,.0f} genes)": ("/predict", 1, 32, json.dumps({"expression": whole[0]}).encode()),
            "1,000 cells of 4 genes": ("/predict_batch", 1000, 4, line([FEW] * 1000)), "100 whole cells": ("/predict_batch", 100, 4, line(whole))}


class Service:
    "The service in processes of its own."

    def __init__(self, bundle, workers):
        with socket.create_server(("127.0.0.1", 0)) as s: self.port = s.getsockname()[1]
        command = [sys.executable, "-c", "from scimlora.cli import main; main()", "serve", str(bundle), "--base", str(Path(bundle).parent / "base"), "--port", str(self.port), "--workers", str(workers)]
        start = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=2): break
            except OSError:
                assert self.process.poll() is None, "the service ended"
                time.sleep(0.05)
        self.started = time.perf_counter() - start

    def memory(self):
        "MB of all its processes; what they share counts once."
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True).stdout.split()
        read = lambda pid: next(int(line.split()[1]) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
        return sum(map(read, [self.process.pid, *listed])) / 1e3

    def ask(self, path, clients, body, seconds):
        "The load generator's figures, from a process of its own."
        file = Path("runs/serve/body.json")
        file.write_bytes(body)
        command = [sys.executable, str(HERE / "loadgen.py"), "--port", str(self.port), "--clients", str(clients), "--seconds", str(seconds), "--path", path, "--body", str(file)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def measure(bundle, workers, seconds, asked):
    "Rows of the table for a number of workers, and the service's memory."
    s, rows = Service(bundle, workers), []
    try:
        for name, (path, cells, clients, body) in asked.items():
            s.ask(path, clients, body, 2)
            r = s.ask(path, clients, body, seconds)
            other = {k: v for k, v in r["statuses"].items() if k != "200"}
            rows.append(f"| {workers} | {name} | {clients} | {r['per_second']:,.0f} | {r['per_second'] * cells:,.0f} | {r['p50_ms']:,.0f} | {r['p99_ms']:,.0f} | {other or 'none'} |")
            print(rows[-1], flush=True)
        before = s.memory()
        path, _, _, body = next(iter(asked.values()))
        r = s.ask(path, 64, body, 6 * seconds)
        flat = f"{workers} worker{'s' * (workers > 1)}: started in {s.started:.1f} s; {before:,.0f} MB before and {s.memory():,.0f} MB after {r['seconds']:.0f} s of 64 clients, " \
               f"{r['answers']:,} answers, statuses {r['statuses']}, {r['lost']} lost."
        print(flat, flush=True)
    finally: s.end()
    return rows, flat


def bundle_megabytes(bundle):
    "MB that one more bundle takes beside its base."
    from scimlora.models import Models

    return Models({"one": bundle}, bundle.parent / "base").loaded["one"] / 1e6


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seconds", type=float, default=10)
    p.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    p.add_argument("--model", type=Path, default=Path("runs/serve"))
    a = p.parse_args()
    a.model.mkdir(parents=True, exist_ok=True)
    Path("runs/serve").mkdir(parents=True, exist_ok=True)
    bundle, asked = make_model(a.model), bodies()
    measured = [measure(bundle, n, a.seconds, asked) for n in a.workers]
    text = "\n".join([
        "# The service under load", "", f"Written by `make bench-serve`: a model of SCimilarity v1.1's shape ({GENES:,} genes, three layers of 1,024, embedding 128, random weights), "
        f"{os.cpu_count()} cores ({platform.machine()}), one thread of linear algebra a worker, the load generator in a process beside it, {a.seconds:g} s a row.", "",
        "| workers | a request | clients | requests/s | cells/s | 50 % (ms) | 99 % (ms) | statuses but 200 |", "| --- | --- | --- | --- | --- | --- | --- | --- |", *[r for rows, _ in measured for r in rows], "",
        *[f"- {flat}" for _, flat in measured], f"- A further bundle on the same base takes {bundle_megabytes(bundle):.1f} MB.", ""])
    (HERE / "SERVICE.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__": main()
