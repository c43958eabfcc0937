"""What every public attempt at this got wrong: genes by name, one normalisation, a base that stays, a result that lasts.

All on real pancreas cells (Baron et al. 2016) and the embedded base.
"""
import copy
import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from torch import nn

from scimlora import Base, Classifier, InputError, Predictor
from scimlora.adapters import adapted_layers
from scimlora.base import run_layers
from scimlora.core import read_json, sha256, write_json
from scimlora.data import NORMALISATION, align_cells
from scimlora.genes import place_genes
from scimlora.lora import Head, TuneConfig, add_lora, set_train_mode, train_lora

SAME = 1e-5


def far(a, b):
    "Largest difference between two arrays."
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


@pytest.fixture(scope="module")
def mini(): return Base.load("mini")


@pytest.fixture(scope="module")
def want(classifier, other_cells):
    "What the classifier says of the cells as they come: counts, genes in the file's order."
    return classifier.predict_proba(other_cells)


# Genes are matched by name, never by position ---------------------------------------------------------------------


def test_the_order_of_columns_does_not_matter(classifier, other_cells, want):
    shuffled = other_cells[:, np.random.default_rng(0).permutation(other_cells.n_vars)]
    assert far(classifier.predict_proba(shuffled.copy()), want) < SAME


def test_names_matter_and_not_places(classifier, other_cells, want):
    "The counter-test: the same values under other genes' names are other cells."
    renamed = other_cells.copy()
    renamed.var_names = np.random.default_rng(0).permutation(renamed.var_names.to_numpy(str))
    assert far(classifier.predict_proba(renamed), want) > 0.2


def test_genes_the_model_does_not_know_change_nothing(classifier, other_cells, want):
    n, rng = other_cells.n_obs, np.random.default_rng(0)
    strange = ad.AnnData(sp.csr_matrix(rng.poisson(5, (n, 400)).astype(np.float32)), obs=other_cells.obs,
                         var=pd.DataFrame(index=[f"NOSUCHGENE{i}" for i in range(400)]))
    more = ad.concat([strange, other_cells], axis=1, merge="same")
    assert far(classifier.predict_proba(more), want) < SAME
    known = other_cells[:, place_genes(other_cells.var_names, classifier.predictor.genes) >= 0]
    assert 1000 < known.n_vars < other_cells.n_vars
    assert far(classifier.predict_proba(known.copy()), want) < SAME


def test_a_gene_that_is_left_out_is_a_gene_without_counts(classifier, other_cells):
    "A missing column must not move its neighbours into its place."
    lacking = np.random.default_rng(1).random(other_cells.n_vars) < 0.3
    zeroed = other_cells.copy()
    zeroed.X = sp.csr_matrix(zeroed.X @ sp.diags((~lacking).astype(np.float32)))
    subset = other_cells[:, ~lacking].copy()
    assert far(classifier.predictor.embed(subset), classifier.predictor.embed(zeroed)) < SAME
    known = align_cells(zeroed, classifier.predictor.genes)
    known.measured = align_cells(subset, classifier.predictor.genes).measured  # the gene path asks which genes were looked for
    assert far(classifier.predict_proba(subset), classifier.predictor.predict(known).proba) < SAME


def test_columns_of_one_gene_are_added_up(classifier, other_cells, want):
    "The counts of INS and GCG, cell by cell in one of two columns of the same name."
    genes, odd = ["INS", "GCG"], np.arange(other_cells.n_obs) % 2 == 1
    second = other_cells[:, genes].copy()
    second.X = sp.csr_matrix(second.X.toarray() * odd[:, None])
    first = other_cells.copy()
    dense = first[:, genes].X.toarray() * ~odd[:, None]
    keep = ~first.var_names.isin(genes)
    first = ad.concat([first[:, keep], ad.AnnData(sp.csr_matrix(dense), obs=first.obs, var=pd.DataFrame(index=genes))], axis=1, merge="same")
    with pytest.warns(UserWarning, match="not unique"): both = ad.concat([first, second], axis=1, merge="same")
    assert (both.var_names == "INS").sum() == 2
    assert far(classifier.predict_proba(both), want) < SAME
    cells = align_cells(both, classifier.predictor.genes)
    assert cells.report["duplicated_genes"] == 2 + align_cells(other_cells, classifier.predictor.genes).report["duplicated_genes"]
    assert any("several columns" in n for n in cells.notes)


def test_case_does_not_matter(classifier, other_cells, want):
    cells = other_cells.copy()
    cells.var_names = [g.lower() for g in cells.var_names]
    assert not {"INS", "GCG"} & set(cells.var_names)
    assert far(classifier.predict_proba(cells), want) < SAME


def test_mouse_genes_are_not_taken_for_human_ones(classifier, other_cells):
    cells = other_cells.copy()
    cells.var_names = [g.capitalize() for g in cells.var_names]
    with pytest.raises(InputError, match="mouse.*orthologs"): classifier.predict_proba(cells)


# One normalisation, recorded and re-applied -----------------------------------------------------------------------


def scaled(cells, total, log):
    "The same cells scaled to one total over the file's genes, and logged or not."
    out = cells.copy()
    X = sp.diags(total / np.asarray(cells.X.sum(1)).ravel()) @ cells.X
    out.X = sp.csr_matrix(X.log1p() if log else X).astype(np.float32)
    return out


@pytest.mark.parametrize("total, log, kind", [(1e6, False, "cpm"), (1e4, False, "cpm"), (1e4, True, "log1p_cp10k"), (1e6, True, "log1p_cpm"),
                                              (3e3, True, "log1p_total")], ids=["CPM", "CP10K", "log1p CP10K", "log1p CPM", "log1p CP3K"])
def test_the_unit_of_the_file_does_not_matter(classifier, other_cells, want, total, log, kind):
    cells = scaled(other_cells, total, log)
    assert align_cells(cells, classifier.predictor.genes).report["values_kind"] == kind
    assert far(classifier.predict_proba(cells), want) < SAME


def test_the_cells_that_the_model_reads_have_one_total(classifier, other_cells):
    X = align_cells(other_cells, classifier.predictor.genes).X
    assert np.abs(np.asarray(X.astype(np.float64).expm1().sum(1)).ravel() - 1e4).max() < 0.1


def test_the_normalisation_is_in_the_manifest(bundle_dir):
    assert read_json(bundle_dir / "manifest.json")["normalisation"] == NORMALISATION


def test_a_bundle_with_another_normalisation_is_refused(bundle_dir, tmp_path):
    "Else its adapter would silently be fed values that it was not trained on."
    shutil.copytree(bundle_dir, tmp_path / "b")
    manifest = read_json(tmp_path / "b" / "manifest.json")
    write_json(tmp_path / "b" / "manifest.json", manifest | {"normalisation": "scale to 2,629 per cell, log2"})
    with pytest.raises(InputError, match="normalisation"): Classifier.load(tmp_path / "b")


# Adapter off = base, saved = in memory, merged = unmerged -----------------------------------------------------------


@pytest.fixture(scope="module")
def training(mini, baron_cells):
    "Aligned training cells and their classes as integers."
    X = align_cells(baron_cells, mini.genes).X
    classes, y = np.unique(baron_cells.obs.cell_type.to_numpy(str), return_inverse=True)
    return X, y, len(classes)


@pytest.fixture(scope="module")
def tuned(mini, training):
    "A fine-tune whose PeftModel is still in memory."
    return train_lora(mini, *training, TuneConfig(epochs=2, dropout=0.05))


def embed(module, X):
    with torch.no_grad(): return module.eval()(torch.from_numpy(X.toarray())).numpy()


def test_training_changed_the_embedding(mini, tuned, training):
    "Without this, all that follows would be easy."
    assert far(embed(tuned.model, training[0]), mini.embed(training[0])) > 0.05


def test_adapter_off_is_the_base_exactly(mini, tuned, training):
    with tuned.model.disable_adapter(): off = embed(tuned.model, training[0])
    assert np.array_equal(off, embed(mini.encoder, training[0]))
    assert far(off, mini.embed(training[0])) < SAME


def test_a_fresh_adapter_is_the_base_exactly(mini, training):
    assert np.array_equal(embed(add_lora(mini.encoder), training[0]), embed(mini.encoder, training[0]))


def test_what_is_saved_is_what_was_trained(mini, tuned, training):
    "The files that peft writes, folded into plain layers, against the PeftModel that is still in memory."
    folded = adapted_layers(mini.weights, tuned.adapter_config, tuned.adapter)
    assert far(run_layers(folded, training[0]), embed(tuned.model, training[0])) < SAME


def test_saved_and_reloaded_is_in_memory(classifier, bundle_dir, other_cells, want):
    again = Classifier.load(bundle_dir)
    assert again.classes_ == classifier.classes_
    assert far(again.predict_proba(other_cells), want) < SAME
    mine, theirs = classifier.predictor.predict(other_cells), again.predictor.predict(other_cells)
    assert far(mine.embedding, theirs.embedding) < SAME
    assert list(mine.reason) == list(theirs.reason)


def test_merged_is_unmerged_is_the_predictor(mini, bundle_dir, other_cells):
    "peft opens the bundle folder as it is; its model, its merged model and our predictor embed alike."
    from peft import PeftModel

    model = PeftModel.from_pretrained(copy.deepcopy(mini.encoder), str(bundle_dir))
    X = align_cells(other_cells, mini.genes).X
    unmerged = embed(model, X)
    merged = embed(model.merge_and_unload(), X)
    ours = Predictor(bundle_dir).embed(other_cells)
    assert far(unmerged, mini.embed(X)) > 0.05
    assert far(merged, unmerged) < SAME
    assert far(ours, unmerged) < SAME


# The base stays as it was -------------------------------------------------------------------------------------------


def files_of(folder): return {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_training_changes_no_weight_and_no_file_of_the_base(baron_cells, tmp_path):
    base = Base.load("mini").save(tmp_path / "base")
    files, weights = files_of(base.path), {k: v.clone() for k, v in base.encoder.state_dict().items()}
    embedded = files_of(Base.load("mini").path)
    clf = Classifier.tune(baron_cells, "cell_type", base=base, epochs=1, steps=0, lr=0.01, baselines=True)
    clf.save(tmp_path / "bundle")
    after = base.encoder.state_dict()
    assert after.keys() == weights.keys()
    assert [k for k in weights if not torch.equal(weights[k], after[k])] == []
    assert files_of(base.path) == files
    assert files_of(Base.load("mini").path) == embedded
    assert clf.bundle.manifest["base"]["sha256"] == {k: files[k] for k in ("encoder.ckpt", "gene_order.tsv")}


def test_training_does_not_move_batchnorm(mini, tuned):
    "Running statistics that move are saved nowhere: adapter off is no longer the base, and reloaded is no longer in memory."
    before = {n: m for n, m in mini.encoder.named_modules() if isinstance(m, nn.BatchNorm1d)}
    after = {n.removeprefix("base_model.model."): m for n, m in tuned.model.named_modules() if isinstance(m, nn.BatchNorm1d)}
    assert before and before.keys() == after.keys()
    for name in before:
        old, new = before[name].state_dict(), after[name].state_dict()
        assert [k for k in old if not torch.equal(old[k], new[k])] == [], name
    set_train_mode(tuned.model)
    assert not any(m.training for m in tuned.model.modules() if isinstance(m, nn.BatchNorm1d))


# Adapters learn, in every layer -------------------------------------------------------------------------------------


def test_gradients_reach_the_adapters_of_every_layer(mini, training):
    "A loop that trains through numpy embeddings reaches the head alone, in silence."
    X, y, n = training
    torch.manual_seed(0)
    model, head = add_lora(mini.encoder), Head(mini.latent, n)
    nn.functional.cross_entropy(head(model(torch.from_numpy(X.toarray()))), torch.from_numpy(y)).backward()
    grads = {k: p.grad.abs().max().item() for k, p in model.named_parameters() if p.requires_grad and "lora_B" in k}
    linear = [k for k, m in mini.encoder.named_modules() if isinstance(m, nn.Linear)]
    assert len(grads) == len(linear) == len(mini.layers)
    assert min(grads.values()) > 0
    assert head.linear.weight.grad.abs().max() > 0
    assert all(p.grad is None for k, p in model.named_parameters() if "lora_" not in k)


def test_adapters_of_every_layer_move(mini, tuned):
    "B starts at zero, A at random: after training both have moved in every layer."
    torch.manual_seed(0)
    fresh = add_lora(mini.encoder, tuned.config).state_dict()
    B = {k: v for k, v in tuned.adapter.items() if ".lora_B." in k}
    A = {k: v for k, v in tuned.adapter.items() if ".lora_A." in k}
    assert len(A) == len(B) == len(mini.layers)
    assert min(v.abs().max().item() for v in B.values()) > 1e-3
    assert min((v - fresh[k.replace(".weight", ".default.weight")]).abs().max().item() for k, v in A.items()) > 1e-3


def test_only_adapters_and_head_train(mini, tuned):
    names = [n for n, p in tuned.model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in n for n in names)
    adapter, head = sum(v.numel() for v in tuned.adapter.values()), sum(p.numel() for p in tuned.head.parameters())
    assert tuned.counts["adapter"] == adapter and tuned.counts["head"] == head and tuned.counts["trainable"] == adapter + head
    base = sum(p.numel() for p in mini.encoder.parameters())
    assert tuned.counts["total"] == base + adapter + head


# Seeds ----------------------------------------------------------------------------------------------------------------


def test_same_seed_same_result_other_seed_another(mini, training):
    def run(seed): return train_lora(mini, *training, TuneConfig(epochs=1, seed=seed, dropout=0.05))

    def tensors(t): return {**t.adapter, **{f"head.{k}": v for k, v in t.head.state_dict().items()}}

    one, again, other = (tensors(run(s)) for s in (7, 7, 8))
    assert one.keys() == again.keys()
    assert [k for k in one if not torch.equal(one[k], again[k])] == []
    assert all(not torch.equal(one[k], other[k]) for k in one)


def test_same_seed_same_bundle(baron_cells, other_cells):
    "From split to probabilities, the head's start included."
    def run(seed): return Classifier.tune(baron_cells, "cell_type", "library", epochs=1, steps=0, seed=seed, baselines=False).predict_proba(other_cells)

    one, again, other = run(3), run(3), run(4)
    assert np.array_equal(one, again)
    assert far(one, other) > 1e-3


# Upstream opens our bases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [None, False, True], ids=["mini as shipped", "saved again", "saved in half precision"])
def test_scimilarity_embeds_real_cells_alike(mini, other_cells, tmp_path, half):
    "test_base.py does this on made-up values."
    upstream = pytest.importorskip("scimilarity.cell_embedding")
    base = mini if half is None else mini.save(tmp_path / "base", half=half)
    X = align_cells(other_cells, base.genes).X
    theirs = upstream.CellEmbedding(str(base.path))
    assert theirs.gene_order == base.genes
    assert far(theirs.get_embeddings(X), base.embed(X)) < SAME
