"""The benchmark suite on a tiny task: runs are kept and taken up again, and what is reported is what was predicted."""
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.metrics import f1_score

from scimlora.pretrain import Study

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TASK, QUICK = "Baron, library 3", ("nearest centroid, genes", "frozen base + prototypes")


@pytest.fixture(scope="module")
def suite():
    "The modules of benchmarks/, which are no package."
    sys.path.insert(0, str(BENCHMARKS))
    import forgetting
    import panels
    import science
    from suite import code, methods, peers_worker, report, store, tasks

    yield dict(science=science, panels=panels, forgetting=forgetting, code=code, methods=methods, report=report, store=store, tasks=tasks, worker=peers_worker)
    sys.path.remove(str(BENCHMARKS))


def run(suite, folder, *more):
    return suite["science"].main(["--tasks", TASK, "--shots", "5", "--seeds", "2", "--methods", *QUICK, "--cache", str(folder / "cache"), "--out", str(folder), *more])


@pytest.fixture(scope="module")
def done(suite, tmp_path_factory):
    "A folder with a finished run of two methods, two draws."
    folder = tmp_path_factory.mktemp("science")
    assert run(suite, folder) == 0
    return folder


def files(folder): return sorted((folder / "cache" / "rows").rglob("*.npz"))


def test_every_run_is_kept_with_its_predictions(done):
    assert len(files(done)) == 4
    for path in files(done):
        with np.load(path, allow_pickle=False) as f:
            meta = json.loads(str(f["meta"]))
            assert f["proba"].shape == (len(f["y"]), f["proba"].shape[1]) and (f["proba"].argmax(1) == f["said"]).mean() > 0.99
            assert meta["task"] == TASK and meta["seconds"] > 0 and "numpy" in meta["machine"]


def test_the_table_is_what_the_stored_predictions_say(done):
    t = pd.read_csv(done / "SCIENCE.csv").set_index(["method", "seed"])
    assert len(t) == 4 and set(t.index.get_level_values("method")) == set(QUICK)
    for path in files(done):
        with np.load(path, allow_pickle=False) as f: meta, y, said = json.loads(str(f["meta"])), f["y"], f["said"]
        row = t.loc[(meta["method"], meta["seed"])]
        assert row.macro_f1 == pytest.approx(f1_score(y, said, average="macro"), abs=1e-4) and row.accuracy == pytest.approx((y == said).mean(), abs=1e-4)
    ours, peer = t.loc[QUICK[1]], t.loc[QUICK[0]]
    assert np.allclose(ours.difference, ours.macro_f1 - peer.macro_f1, atol=1e-4) and (ours.low <= ours.difference).all() and (ours.difference <= ours.high).all()


def test_a_run_that_is_kept_is_not_made_again(suite, done, monkeypatch):
    before = {p: p.read_bytes() for p in files(done)}

    def never(*a): raise AssertionError("a kept run was made again")

    monkeypatch.setattr(suite["store"].Store, "add", never)
    assert run(suite, done) == 0
    assert {p: p.read_bytes() for p in files(done)} == before


def test_a_run_that_stopped_goes_on_where_it_was(suite, done):
    gone, *stay = files(done)
    stamps, truth = {p: p.read_bytes() for p in stay}, np.load(gone)["proba"]
    gone.unlink()
    assert run(suite, done) == 0
    assert all(p.read_bytes() == b for p, b in stamps.items())
    assert np.allclose(np.load(gone)["proba"], truth, atol=1e-6), "the same draw and seed give the same predictions"


def test_other_code_has_another_key_and_comments_have_not(suite, tmp_path):
    def digest(text, **kw):
        path = tmp_path / f"{abs(hash(text))}.py"
        path.write_text(text)
        return suite["code"].code_of(str(path), **kw)

    plain = digest("def f(x):\n    return x + 1\n", names=("f",))
    assert plain == digest('def f(x):\n    "Adds."\n    return x + 1  # one\n\n\ndef g(): pass\n', names=("f",))
    assert plain != digest("def f(x):\n    return x + 2\n", names=("f",))


def test_the_product_hangs_on_every_module_that_it_imports(suite):
    assert {"lora", "genepath", "predict", "data", "genes", "base", "core"} <= set(suite["code"].with_imports("classifier"))


def test_every_method_names_code_that_exists(suite):
    codes = {m.name: m.code() for m in suite["methods"].METHODS.values()}
    assert len(set(codes.values())) == len(codes)


def test_a_failure_is_told_and_costs_only_itself(suite, tmp_path, monkeypatch, capsys):
    def broken(d): raise ValueError("no such luck")

    methods = suite["methods"].METHODS
    monkeypatch.setitem(methods, QUICK[0], suite["methods"].Method(QUICK[0], "peer", broken, packages=()))
    monkeypatch.setattr(suite["methods"].Method, "code", lambda self: self.name)
    assert run(suite, tmp_path) == 1
    assert "no such luck" in capsys.readouterr().err
    t = pd.read_csv(tmp_path / "SCIENCE.csv")
    assert set(t.method) == {QUICK[1]} and t.difference.isna().all()
    assert f"{QUICK[0]}, {TASK}: not computed" in (tmp_path / "SCIENCE.md").read_text()


def test_what_is_not_counts_is_left_out_and_said(suite):
    m = suite["methods"].METHODS["scANVI"]
    assert m.left_out(("counts", "counts")) == "" and "test" in m.left_out(("counts", "cpm"))


def test_an_unknown_task_is_refused(suite, tmp_path):
    with pytest.raises(SystemExit, match="no task 'Baren'"): suite["science"].main(["--tasks", "Baren", "--cache", str(tmp_path)])


def test_the_page_says_what_the_table_says(done):
    t, text = pd.read_csv(done / "SCIENCE.csv"), (done / "SCIENCE.md").read_text()
    for method, g in t.groupby("method"):
        assert f"| 5 | {method} | {g.macro_f1.mean() * 100:.1f} ± {g.macro_f1.std() * 100:.1f} |" in text
    assert (done / "SCIENCE.png").stat().st_size > 10_000


def test_what_is_behind_is_said_with_what_explains_it(suite):
    report, row = suite["report"], suite["store"].Row
    line = lambda method, kind, f1, accuracy, **more: dict(task="A", shots="full", seed=0, method=method, kind=kind, macro_f1=f1, accuracy=accuracy, best_peer="logistic regression, genes", **more)
    t = pd.DataFrame([line("logistic regression, genes", "peer", .9, .9), line("frozen base + linear", "ours", .6, .7), line("LoRA", "ours", .7, .8),
                      line("scimlora", "ours", .8, .95, difference=-.1, low=-.12, high=-.08)])
    y = np.repeat([0, 1], [95, 5])
    rows = [row("A", 0, 0, "scimlora", 9, 1.0, 1.0, y, np.eye(2)[y], y, {})]
    assert [(b[0], b[3]) for b in report.behind(t)] == [("scimlora, best peer", "scimlora")]
    assert report.behind_lines(t, rows)[2] == "| scimlora, best peer | A, full | -10.0 | +5.0 | -30.0 | 5 | 10.0 |"
    assert report.behind_lines(t[t.method != "scimlora"], rows) == ["Nothing."]


def test_bases_made_elsewhere_win_and_others_are_kept_under_their_code(suite, tmp_path, monkeypatch):
    T, made = suite["tasks"], []
    monkeypatch.setattr(T, "load_base", lambda path: path)
    monkeypatch.setattr(T, "pretrain", lambda path, without, index: made.append(without) or path)
    (tmp_path / "given" / "kang").mkdir(parents=True)
    bases = T.Bases(tmp_path / "own", tmp_path / "given")
    assert bases(("kang",)) == tmp_path / "given" / "kang" and bases(()) == "mini" and not made
    path = bases(("zheng", "3k"))
    assert path.parent == tmp_path / "own" and path.name.startswith("zheng-3k-") and made == [("zheng", "3k")]
    path.mkdir(parents=True)
    assert T.Bases(tmp_path / "own")(("zheng", "3k")) == path and len(made) == 1


# Neighbours and folds ---------------------------------------------------------------------------------------------------

def test_neighbours_never_exceed_the_smallest_inner_fold(suite):
    m = suite["methods"]
    y = np.repeat(np.arange(4), 5)
    ks = m.neighbours(y, None)
    assert ks[0] == 1 and max(ks) <= min(len(a) for a, _ in m.folds(y, None))


def test_every_class_stays_in_every_training_fold(suite):
    y, groups = np.repeat(np.arange(3), 6), np.tile(list("abcdef"), 3)
    for a, b in suite["methods"].folds(y, groups):
        assert set(y[a]) == {0, 1, 2} and not set(groups[a]) & set(groups[b])


# Panels -----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def task(suite):
    "The tiny task itself, on `mini`."
    return suite["tasks"].load_task(TASK, suite["tasks"].Bases(Path("nowhere")))


def test_missing_genes_are_zero_and_the_rest_is_scaled_anew(task):
    kept = task.genes[::50]
    few, whole = (s.on(task.genes) for s in (task.test.only(kept), task.test))
    inside = np.isin(task.genes, kept)
    assert few[:, ~inside].nnz == 0 and few[:, inside].nnz == whole[:, inside].nnz
    total = np.asarray(few.expm1().sum(1)).ravel()
    assert np.allclose(total[total > 0], 1e4, rtol=1e-4)


def test_markers_in_turn_give_every_type_its_best_first(suite):
    ranked = {"a": ["A1", "A2", "S"], "b": ["B1", "S", "B2"]}
    assert suite["panels"].in_turn(ranked, 4) == ["A1", "B1", "A2", "S"]


def test_the_study_without_markers_lacks_them_and_most_of_the_rest(suite):
    genes = [*suite["panels"].MISSING, *(f"G{i}" for i in range(100))]
    left = suite["panels"].without_markers(genes, np.random.default_rng(0))
    assert len(left) == 40 and not set(left) & set(suite["panels"].MISSING)


def test_retrained_sees_the_genes_of_the_panel_only(suite, task):
    panel = suite["panels"].Panel("random", 50, 0, tuple(np.random.default_rng(0).permutation(task.genes)[:50]))
    small = suite["panels"].reduced(task, panel)
    assert set(small.genes) == set(panel.genes) and small.train.adata.n_vars == small.test.adata.n_vars == 50
    assert small.content != task.content


def test_panels_are_kept_and_reported(suite, tmp_path, monkeypatch, capsys):
    P = suite["panels"]
    monkeypatch.setattr(P, "SIZES", (100, 10))
    monkeypatch.setattr(P, "PUBLIC", {TASK: None})
    monkeypatch.setattr(P, "BLOOD", (TASK,))
    args = ["--tasks", TASK, "--methods", "frozen base + linear", "--cache", str(tmp_path), "--out", str(tmp_path)]
    assert P.main(args) == 0
    t = pd.read_csv(tmp_path / "PANELS.csv")
    assert t.groupby("panel").size().to_dict() == {"all": 1, "markers": 2, "markers missing": 3, "random": 6, "variance": 2}
    assert t[t.panel == "all"].macro_f1.item() > t[t.asked == 10].macro_f1.max()
    capsys.readouterr()
    assert P.main(args) == 0 and not capsys.readouterr().out, "all is kept: nothing is fitted again"
    assert pd.read_csv(tmp_path / "PANELS.csv").equals(t)


def test_cells_held_out_of_pretraining_are_in_no_pretraining_cells(suite):
    n, F = 400, suite["forgetting"]
    ids = sp.csr_matrix(np.arange(1, n + 1, dtype=np.float32)[:, None])
    study = Study("one", ids, ids, pd.DataFrame(index=["CD3D"]), np.array(["T cell"] * n, object), pd.DataFrame(index=range(n)))
    (seen,), (held,) = F.cut([study])
    assert set(seen.X.data).isdisjoint(held.X.data) and len(seen.sets) + len(held.sets) == n and 0.15 < len(held.sets) / n < 0.35
    assert np.array_equal(F.cut([study])[1][0].X.data, held.X.data), "the same cells every time: a stored base stays honest"


def test_what_was_forgotten_is_told_at_the_chosen_strength(suite, tmp_path):
    F, about = suite["forgetting"], dict(task=TASK, cells_a_class=25, draw=0, chosen=0.5, encoder_weight=0.2, retention_cells=100, retention_labels=4)
    rows = [about | dict(strength=s, knn=0.9 - 0.04 * s, linear=0.9 - 0.02 * s, cosine=1 - s / 10, neighbour_overlap=1 - s / 10, macro_f1=0.8 + s / 10, adapter_macro_f1=0.7 + s / 5) for s in F.STRENGTHS]
    F.write(rows, tmp_path)
    text = (tmp_path / "FORGETTING.md").read_text()
    assert "The worst setting: +1.5 (" in text and "**missed** by 0.5 points" in text and "1 of 1 at the chosen strength, 1 at full strength" in text
    assert "| 90.0 | 0.5 | 3.0 | 1.5 | 90.0 | 85.0 | 90.0 | 80.0 |" in text and len(pd.read_csv(tmp_path / "FORGETTING.csv")) == len(F.STRENGTHS)
    F.write([r | dict(chosen=0.25) for r in rows], tmp_path)
    assert "**reached**" in (tmp_path / "FORGETTING.md").read_text()
