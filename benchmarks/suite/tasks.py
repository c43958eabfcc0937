"""Tasks of the benchmarks: training cells, test cells of other donors or laboratories, and a base that saw neither study."""
import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scimlora.data import align_cells, find_counts, find_values, obs_column
from scimlora.base import load_base
from scimlora.examples import baron, shared
from scimlora.genes import is_gene, match_genes
from scimlora.pretrain import pretrain
from suite.code import code_of

LABEL = "benchmark_label"  # the column of `obs` that every task adds: labels in the words that both studies share
ZHENG = {"CD19+ B": "B", "CD56+ NK": "NK", "CD8+ Cytotoxic T": "CD8 T", "CD4+ T Helper2": "CD4 T", "CD4+/CD45RO+ Memory": "CD4 T",
         "CD8+/CD45RA+ Naive Cytotoxic": "CD8 T", "CD4+/CD25 T Reg": "CD4 T", "CD4+/CD45RA+/CD25- Naive T": "CD4 T", "CD14+ Monocyte": "monocyte"}
PBMC3K = {"CD4 T": "CD4 T", "CD8 T": "CD8 T", "B": "B", "NK": "NK", "CD14 Monocytes": "monocyte", "FCGR3A Monocytes": "monocyte"}


def by_donor(name, held_out):
    "A study split by donor: (cells, label map) of train and of test."
    def get():
        a = shared(name)
        test = a.obs.donor.astype(str).isin(held_out).to_numpy()
        return a[~test], None, a[test], None
    return get


def between(train, test, train_map=None, test_map=None):
    return lambda: (shared(train), train_map, shared(test), test_map)


def libraries():
    a = baron()
    return a[a.obs.library != "lib3"], None, a[a.obs.library == "lib3"], None


# How to get the cells, and the studies that the base must not have seen. `mini` never saw Baron's.
PUBLIC = {"Baron → Enge": (between("pancreas_baron_h1", "pancreas_enge2017_cpm"), ("enge",)),
          "Kang, donor 1244": (by_donor("pbmc_kang2018_ctrl", ["1244"]), ("kang",)),
          "Zheng → 3k": (between("pbmc_facs_zheng2017", "pbmc_3k_10x", ZHENG, PBMC3K), ("zheng", "3k")),
          "Darmanis": (by_donor("brain_darmanis2015", ["AB_S7", "FB_S3"]), ("darmanis",))}
# No setting was chosen on these.
CONFIRM = {"Enge → Baron": (between("pancreas_enge2017_cpm", "pancreas_baron_h1"), ("enge",)), "Baron, library 3": (libraries, ()),
           "Kang, donor 1015": (by_donor("pbmc_kang2018_ctrl", ["1015"]), ("kang",)), "3k → Zheng": (between("pbmc_3k_10x", "pbmc_facs_zheng2017", PBMC3K, ZHENG), ("zheng", "3k"))}
TASKS = PUBLIC | CONFIRM


def slug(text):
    "A name as part of a path."
    return "".join(c if c.isalnum() else "-" for c in text.replace("→", "to").lower())


@dataclass
class CellSet:
    "Hold cells of a file, read for any list of genes; each reading is made once."
    adata: object  # anndata.AnnData as in the file, `obs` with LABEL
    units: str = "auto"
    _read: dict = field(default_factory=dict, repr=False)

    def on(self, genes):
        "log1p CP10K in the order of `genes`, CSR; zero where the file lacks a gene."
        # The list is kept beside its matrix, so that its id stays its own.
        if id(genes) not in self._read: self._read[id(genes)] = genes, align_cells(self.adata, genes, self.units).X
        return self._read[id(genes)][1]

    def counts(self, genes):
        "The file's own values in the order of `genes`, CSR; all of them must be in the file."
        found = find_counts(self.adata)
        return sp.csr_matrix(found.X[:, found.var.index.get_indexer(genes)])

    def measured(self, genes):
        "Which of `genes` the file has."
        return match_genes(list(self.adata.var_names), genes).matrix.getnnz(0) > 0

    @cached_property
    def kind(self):
        "What the values are: 'counts', 'cpm' …"
        return find_values(self.adata).kind

    def only(self, genes):
        "The same cells with some of the genes. Units are those of the whole: few genes do not show them."
        units = self.kind if self.kind in ("counts", "cpm") else self.units
        return CellSet(self.adata[:, self.adata.var_names.isin(set(genes))].copy(), units)


@dataclass
class Task:
    "Hold one benchmark task."
    name: str
    train: CellSet
    test: CellSet
    classes: list  # of str: labels that both sides have
    y: np.ndarray  # (n_train,) int
    yt: np.ndarray  # (n_test,) int
    donor: str  # column of `obs`
    groups: np.ndarray | None  # (n_train,) donors, or None where there are fewer than three
    genes: list  # that both files have
    bases: object  # Bases
    without: tuple

    @cached_property
    def base(self):
        "A base that has not seen the task's studies."
        return self.bases(self.without)

    @cached_property
    def content(self):
        "A digest of all that methods are given, but for the base."
        h = hashlib.sha256("\n".join([*self.classes, *self.genes]).encode())
        for part in (self.y, self.yt, *(v for s in (self.train, self.test) for m in (s.on(self.genes),) for v in (m.data, m.indices, m.indptr))):
            h.update(np.ascontiguousarray(part).tobytes())
        return h.hexdigest()[:16]


@dataclass
class Draw:
    "Hold the training cells of one run: some cells a class, or all."
    task: Task
    shots: int  # 0: all
    seed: int

    @cached_property
    def rows(self):
        rng, y = np.random.default_rng(self.seed), self.task.y
        if not self.shots: return np.arange(len(y))
        return np.sort(np.concatenate([rng.permutation(np.flatnonzero(y == c))[:self.shots] for c in range(len(self.task.classes))]))

    @property
    def y(self): return self.task.y[self.rows]

    @property
    def groups(self): return None if self.task.groups is None else self.task.groups[self.rows]

    def on(self, genes): return self.task.train.on(genes)[self.rows]

    @property
    def adata(self): return self.task.train.adata[self.rows]


class Bases:
    """Open bases that were pretrained without some studies, and pretrain those that are not there yet.

    `given` is a folder of such bases made elsewhere, named by the studies that they lack (`kang`, `zheng-3k`). Otherwise they are kept
    in `folder`, under a name that changes with the code that pretrains.
    """

    def __init__(self, folder, given=None): self.folder, self.given, self._open = folder, given, {}

    def __call__(self, without):
        name = "-".join(without) or "mini"
        if name not in self._open: self._open[name] = load_base("mini") if not without else self._base(name, without)
        return self._open[name]

    def _base(self, name, without):
        if self.given is not None and (self.given / name).is_dir(): return load_base(self.given / name)
        path = self.folder / f"{name}-{code_of('scimlora.pretrain', 'scimlora.base', 'scimlora.data', 'scimlora.genes')[:8]}"
        return load_base(path) if path.is_dir() else pretrain(path, without, index=False)


def _labels(a, names):
    y = obs_column(a.obs, "cell_type")
    return y if names is None else np.array([names.get(v) for v in y], dtype=object)


def make_task(name, train, train_map, test, test_map, bases, without=()):
    "A task from two AnnData and the maps from their labels to common ones; cells of other labels are left out."
    ys = [_labels(train, train_map), _labels(test, test_map)]
    classes = sorted(set(ys[0]) & set(ys[1]) - {None})
    keep = [np.isin(y.astype(str), classes) for y in ys]
    train, test = (a[k].copy() for a, k in zip((train, test), keep))
    for a, y, k in zip((train, test), ys, keep): a.obs[LABEL] = pd.Categorical(y[k], classes)
    y, yt = (np.array([classes.index(v) for v in a.obs[LABEL]]) for a in (train, test))
    donor = "library" if "library" in train.obs else "donor"
    donors = train.obs[donor].astype(str).to_numpy()
    there = set(test.var_names)
    genes = [g for g, real in zip(train.var_names, is_gene(list(train.var_names))) if real and g in there]
    return Task(name, CellSet(train), CellSet(test), classes, y, yt, donor, donors if len(set(donors)) >= 3 else None, genes, bases, without)


def load_task(name, bases):
    "Read one of `TASKS`."
    get, without = TASKS[name]
    train, train_map, test, test_map = get()
    return make_task(name, train, train_map, test, test_map, bases, without)
