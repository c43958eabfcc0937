"""What the measurements of speed share."""
import time

import numpy as np
import scipy.sparse as sp


def tiled(X, n):
    return sp.vstack([X] * -(-n // X.shape[0]), format="csr")[:n]


def in_turns(jobs, rounds):
    "Median seconds of each job, run in turns after one call each that is not counted."
    for f in jobs.values(): f()
    seconds = {k: [] for k in jobs}
    for _ in range(rounds):
        for k, f in jobs.items():
            start = time.perf_counter()
            f()
            seconds[k].append(time.perf_counter() - start)
    return {k: float(np.median(v)) for k, v in seconds.items()}
