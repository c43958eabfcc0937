"""How long the six products of a step take on matrix units, by the registers in use: why `scimlora.tiles` uses three.

A step is 16 rows, 32 columns and 32 values of each, in two parts (see nbs/01ab_tiles.ipynb). What is read lies in the first cache. On a shared machine
the units have two states, and change within seconds: run it some times. Prints a table, for the machine that it runs on.
"""

import random
import time

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from scimlora.loops import _data
from scimlora.reorder import _njit
from scimlora.tiles import _aligned, _begin, _BYTE, _call, _end, _LAYOUT, _LONG, _PLACE, _TILE, _tile, ready

ROWS, WEIGHTS = "rows", "weights"  # what a load is of: (which, register, tile); a product is (sums, rows, weights), of registers
ONE = [(ROWS, 1, 0), (WEIGHTS, 2, 2), (0, 1, 2), (WEIGHTS, 2, 0), (0, 1, 2), (ROWS, 1, 1), (0, 1, 2)]
TWO = [(ROWS, 2, 0), (WEIGHTS, 4, 2), (0, 2, 4), (WEIGHTS, 4, 3), (1, 2, 4), (ROWS, 3, 1), (WEIGHTS, 4, 0), (0, 2, 4), (0, 3, 4), (WEIGHTS, 4, 1), (1, 2, 4), (1, 3, 4)]
FOUR = [(ROWS, 4, 1), (ROWS, 5, 3), (WEIGHTS, 6, 0), (0, 4, 6), (2, 5, 6), (WEIGHTS, 7, 1), (1, 4, 7), (3, 5, 7), (ROWS, 4, 0), (0, 4, 6), (1, 4, 7),
        (ROWS, 5, 2), (2, 5, 6), (3, 5, 7), (WEIGHTS, 6, 2), (0, 4, 6), (2, 5, 6), (WEIGHTS, 7, 3), (1, 4, 7), (3, 5, 7)]
# Sums → what is done, and how many steps' products that is.
WAYS = {1: (ONE + ONE, 1), 2: (TWO, 1), 4: (FOUR, 2)}


def compiled(orders):
    "A loop over some loads and products."
    @intrinsic
    def once(typing, rows, weights, n):
        def build(context, builder, signature, args):
            starts = {kind: builder.bitcast(_data(context, builder, signature, args, k), _PLACE) for k, kind in enumerate((ROWS, WEIGHTS))}
            with cgutils.for_range_slice(builder, _LONG(0), args[2], _LONG(1), _LONG):
                for what, a, b in orders:
                    if what in starts: _tile(builder, "tileloadd64", a, builder.gep(starts[what], [_LONG(b * _TILE)]), _LONG(64))
                    else: _call(builder, "tdpbf16ps", *map(_BYTE, (what, a, b)))
            return context.get_dummy_value()
        return types.void(rows, weights, types.int64), build

    @_njit
    def loop(rows, weights, n, layout):
        _begin(layout)
        once(rows, weights, np.int64(n))
        _end()

    return loop


def main(rounds=200, n=2000):
    if not ready(): raise SystemExit("there are no matrix units here")
    rows, weights = (_aligned(np.uint16, 4, _TILE // 2) for _ in range(2))
    rows[:] = weights[:] = 0x3F80  # ones
    loops, took = {k: compiled(orders) for k, (orders, _) in WAYS.items()}, {k: [] for k in WAYS}
    for loop in loops.values(): loop(rows, weights, 10, _LAYOUT)
    order = random.Random(0)
    for _ in range(rounds):
        for k in order.sample(list(loops), len(loops)):
            start = time.perf_counter()
            loops[k](rows, weights, n, _LAYOUT)
            took[k].append((time.perf_counter() - start) / n / WAYS[k][1] * 1e9)
    print("| tiles of sums | registers | loads a step | ns a step, median | quarters |\n| ---: | ---: | ---: | ---: | ---: |")
    for k, (orders, steps) in WAYS.items():
        loads = [o for o in orders if isinstance(o[0], str)]
        used = {o[1] for o in loads} | {o[0] for o in orders if not isinstance(o[0], str)}
        low, middle, high = np.percentile(took[k], [25, 50, 75])
        print(f"| {k} | {len(used)} | {len(loads) / steps:.0f} | {middle:.0f} | {low:.0f} to {high:.0f} |")


if __name__ == "__main__": main()
