"""What the measurements of speed share."""
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp


def tiled(X, n):
    return sp.vstack([X] * -(-n // X.shape[0]), format="csr")[:n]


REST = 0.3  # seconds between two jobs: threads of the last one's libraries go on for a while looking for work, and take time from the next


def in_turns(jobs, rounds):
    "Median seconds of each job, run in turns after one call each that is not counted."
    for f in jobs.values(): f()
    seconds = {k: [] for k in jobs}
    for _ in range(rounds):
        for k, f in jobs.items():
            time.sleep(REST)
            start = time.perf_counter()
            f()
            seconds[k].append(time.perf_counter() - start)
    return {k: float(np.median(v)) for k, v in seconds.items()}


def _peak(pid, found):
    "Follow a process's peak resident memory until it ends. Linux counts what its parent held before it among what is reported at its end."
    while True:
        try: lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError: return
        kb = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
        if not kb: return
        found[:] = kb
        time.sleep(0.05)


def child(*args):
    "Run Python with the given arguments in a process of its own: seconds, peak resident bytes (NaN without /proc), output."
    start, found = time.perf_counter(), []
    p = subprocess.Popen([sys.executable, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watch = threading.Thread(target=_peak, args=(p.pid, found))
    watch.start()
    out = p.communicate()[0]
    seconds = time.perf_counter() - start
    watch.join()
    if p.returncode: raise SystemExit(f"{' '.join(map(str, args))} failed: {out.strip()[-500:]}")
    return seconds, found[0] * 1024 if found else float("nan"), out
