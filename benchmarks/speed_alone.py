"""Embed a file of aligned cells with one package and end: for `speed.py`, which looks at the peak memory of this process.

    python benchmarks/speed_alone.py scimlora base/ cells.npz    # or: upstream, nothing

It imports what embedding imports, and nothing more.
"""
import sys

import scipy.sparse as sp


def main(package, folder, cells):
    if package == "upstream":
        from scimilarity.cell_embedding import CellEmbedding

        CellEmbedding(folder).get_embeddings(sp.load_npz(cells))
    else:
        from scimlora.base import load_base

        if package == "scimlora": load_base(folder).embed(sp.load_npz(cells))


if __name__ == "__main__": main(*sys.argv[1:])
