"""Every method of fine-tuning: what is saved is what was trained, off is the base, and every loss is one that training lowers.

On a few hundred real pancreas cells (Baron et al. 2016) and a random encoder as small as can be.
"""
import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from scimlora import InputError
from scimlora.adapters import METHODS, adapted_layers, check_adapter
from scimlora.base import Base, run_layers
from scimlora.cached import CachedEncoder
from scimlora.encoder import Encoder
from scimlora.data import align_cells
from scimlora.lora import TuneConfig, add_lora, parameter_counts, recalibrate_batchnorm, train_lora
from scimlora.losses import class_loss, distillation, donor_triplet, mask_genes, supervised_contrast

SAME = 1e-5
KINDS = {"LoRA": {}, "no first layer": dict(targets="no-first"), "rsLoRA": dict(variant="rslora"), "DoRA": dict(variant="dora"),
         "PiSSA": dict(variant="pissa"), "LoRA+": dict(lora_plus=8.0), "BatchNorm": dict(method="bn"), "full": dict(method="full", lr=1e-3),
         "linear": dict(method="linear"), "prototype": dict(method="prototype"), "cosine head": dict(head="cosine")}
MOVES = [k for k in KINDS if k not in ("linear", "prototype")]
ADAPTERS = [k for k in MOVES if k not in ("BatchNorm", "full")]


def far(a, b):
    "Largest difference between two arrays."
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def embed(module, X):
    with torch.no_grad(): return module.eval()(torch.from_numpy(X.toarray())).numpy()


@pytest.fixture(scope="module")
def cells(baron_cells):
    "Aligned cells over the 400 genes that vary most, classes as integers, and libraries."
    base = Base.load("mini")
    X = align_cells(baron_cells, base.genes).X
    spread = np.asarray(X.multiply(X).mean(0)).ravel() - np.asarray(X.mean(0)).ravel() ** 2
    y = np.unique(baron_cells.obs.cell_type.to_numpy(str), return_inverse=True)[1]
    return X[:, np.argsort(-spread)[:400]].tocsr(), y, baron_cells.obs.library.to_numpy(str)


@pytest.fixture(scope="module")
def base():
    "A random encoder whose BatchNorm and PReLU are not what they begin as."
    torch.manual_seed(0)
    encoder = Encoder(400, (24, 20), 16)
    for name, t in encoder.state_dict().items():
        if t.is_floating_point() and ("0.2." in name or "1.2." in name): t.copy_(0.5 + torch.rand_like(t))
    return Base(encoder.eval().requires_grad_(False), [f"G{i}" for i in range(400)])


@pytest.fixture(scope="module")
def tuned(base, cells):
    "A fine-tune of every kind, and the base's weights from before."
    X, y, _ = cells
    before = {k: v.clone() for k, v in base.encoder.state_dict().items()}
    return {k: train_lora(base, X, y, 6, TuneConfig(**{"lr": 0.01, "epochs": 2, "steps": 20, **kw})) for k, kw in KINDS.items()}, before


def layers(base, t, strength=1.0): return adapted_layers(base.weights, t.adapter_config, t.adapter, strength)


# What is saved is what was trained ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_served_is_in_memory(kind, base, cells, tuned, tmp_path):
    "Through the two files, as a bundle writes and reads them."
    t = tuned[0][kind]
    (tmp_path / "c.json").write_text(json.dumps(t.adapter_config))
    save_file({k: v.contiguous() for k, v in t.adapter.items()}, tmp_path / "a.safetensors")
    served = adapted_layers(base.weights, json.loads((tmp_path / "c.json").read_text()), load_file(tmp_path / "a.safetensors"))
    assert far(run_layers(served, cells[0]), embed(t.model, cells[0])) < SAME


@pytest.mark.parametrize("kind", MOVES)
def test_training_moved_the_embedding(kind, base, cells, tuned):
    "Without this, all the rest would be easy."
    assert far(run_layers(layers(base, tuned[0][kind]), cells[0]), base.embed(cells[0])) > 0.02


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merged_is_unmerged(kind, base, cells, tuned):
    model = tuned[0][kind].model
    merged = copy.deepcopy(model).merge_and_unload()
    assert far(embed(merged, cells[0]), embed(model, cells[0])) < SAME


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_trained_module_may_be_merged_in_place(kind, base, cells):
    "In training its frozen weights lie where the base's do; whoever asks for the module gets weights of its own."
    X, y, _ = cells
    before = {k: v.clone() for k, v in base.encoder.state_dict().items()}
    t = train_lora(base, X, y, 6, TuneConfig(**{"lr": 0.01, "epochs": 1, "steps": 5, **KINDS[kind]}))
    places = lambda m: {p.data_ptr() for p in m.parameters()}
    assert bool(places(t.live) & places(base.encoder)) == ("pissa" not in kind.lower())  # PiSSA's is opened anew on a copy
    want = embed(t.live, X)
    assert not places(t.model) & places(base.encoder)
    assert far(embed(t.model.merge_and_unload(), X), want) < SAME
    assert all(torch.equal(v, before[k]) for k, v in base.encoder.state_dict().items())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_peft_opens_the_files(kind, base, cells, tuned, tmp_path):
    "On the base as it is, PiSSA too: what it took out of the base went back when it was saved."
    from peft import PeftModel

    t = tuned[0][kind]
    (tmp_path / "adapter_config.json").write_text(json.dumps(t.adapter_config))
    save_file(t.adapter, tmp_path / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(copy.deepcopy(base.encoder), str(tmp_path))
    assert far(embed(model, cells[0]), run_layers(layers(base, t), cells[0])) < SAME


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter_off_is_the_base_exactly(kind, base, cells, tuned):
    with tuned[0][kind].model.disable_adapter(): assert np.array_equal(embed(tuned[0][kind].model, cells[0]), embed(base.encoder, cells[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_strength_0_is_the_base_and_half_is_between(kind, base, cells, tuned):
    t, frozen = tuned[0][kind], base.embed(cells[0])
    assert np.array_equal(run_layers(layers(base, t, 0.0), cells[0]), frozen)
    if kind in MOVES:
        whole, half = (((run_layers(layers(base, t, s), cells[0]) - frozen) ** 2).sum() for s in (1.0, 0.5))
        assert 0 < half < whole


def test_the_base_stays_bit_for_bit(base, tuned):
    after = base.encoder.state_dict()
    assert [k for k, v in tuned[1].items() if not torch.equal(v, after[k])] == []
    assert not any(p.requires_grad for p in base.encoder.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_result(kind, base, cells, tuned):
    t = tuned[0][kind]
    again = train_lora(base, *cells[:2], 6, t.config)
    assert again.history == t.history and again.adapter.keys() == t.adapter.keys()
    assert all(torch.equal(v, again.adapter[k]) for k, v in t.adapter.items())
    assert all(torch.equal(v, again.head.state_dict()[k]) for k, v in t.head.state_dict().items())


# What trains ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa"])
def test_every_adapter_has_gradients(variant, base, cells):
    torch.manual_seed(0)
    model, head = add_lora(base.encoder, TuneConfig(variant=variant)), nn.Linear(16, 6)
    nn.functional.cross_entropy(head(model(torch.from_numpy(cells[0].toarray()))), torch.from_numpy(cells[1])).backward()
    grads = {n: p.grad.abs().max().item() for n, p in model.named_parameters() if "lora_B" in n or "magnitude" in n}
    assert len(grads) == 3 * (2 if variant == "dora" else 1) and min(grads.values()) > 0
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa"])
def test_a_fresh_adapter_is_the_base(variant, base, cells):
    assert far(embed(add_lora(base.encoder, TuneConfig(variant=variant)), cells[0]), embed(base.encoder, cells[0])) < SAME


def test_dora_needs_no_unit_matrix_of_genes(base):
    "peft's way takes genes × genes numbers at each step: 3 GB for SCimilarity's 28,231."
    model = add_lora(base.encoder, TuneConfig(variant="dora"))
    made, eye = [], torch.eye
    torch.eye = lambda *a, **k: made.append(a) or eye(*a, **k)
    try: model(torch.zeros(2, 400))
    finally: torch.eye = eye
    assert made == []


def test_batchnorm_changes_batchnorm_alone(base, cells, tuned):
    "Its statistics are those of the training cells, and all of it is in the file."
    t, now = tuned[0]["BatchNorm"], recalibrate_batchnorm(base.encoder, cells[0])
    assert set(t.adapter) == {f"network.{i}.2.{p}" for i in (0, 1) for p in ("weight", "bias", "running_mean", "running_var")}
    assert torch.allclose(t.adapter["network.0.2.running_mean"], now.network[0][2].running_mean, atol=1e-6)
    assert not torch.allclose(t.adapter["network.0.2.weight"], base.encoder.network[0][2].weight, atol=1e-3)


def test_full_trains_everything_but_the_statistics(base, tuned):
    t = tuned[0]["full"]
    assert set(t.adapter) == {n for n, _ in base.encoder.named_parameters()}
    assert all(not torch.equal(v, base.encoder.state_dict()[n]) for n, v in t.adapter.items() if n.endswith("weight"))
    assert torch.equal(t.model.network[0][2].running_mean, base.encoder.network[0][2].running_mean)


def test_full_has_a_smaller_rate_of_its_own():
    assert TuneConfig(method="full").rate < TuneConfig().rate / 10 and TuneConfig(method="full", lr=0.01).rate == 0.01
    assert replace(TuneConfig(), method="full").rate == TuneConfig(method="full").rate


def test_linear_and_prototype_leave_the_embedding(base, cells, tuned):
    for kind in ("linear", "prototype"):
        t = tuned[0][kind]
        assert t.adapter == {} and t.counts["adapter"] == 0 and t.adapter_config == {"scimlora_method": kind}
        assert np.array_equal(run_layers(layers(base, t), cells[0]), base.embed(cells[0]))


def test_the_prototype_head_names_the_nearest_centroid(base, cells, tuned):
    z, y = base.embed(cells[0]), cells[1]
    mu = np.stack([z[y == c].mean(0) for c in range(6)])
    with torch.no_grad(): said = tuned[0]["prototype"].head(torch.from_numpy(z)).argmax(1).numpy()
    assert np.array_equal(said, ((z[:, None] - mu[None]) ** 2).sum(2).argmin(1))


def test_a_cosine_head_is_served_as_a_linear_one(tuned):
    head = tuned[0]["cosine head"].head
    assert type(head).__name__ == "Head" and head.linear.bias.abs().max() == 0
    assert torch.allclose(head.linear.weight.norm(dim=1), head.linear.weight.norm(dim=1)[:1].expand(6), rtol=1e-5)


def test_lora_plus_moves_b_farther(base, cells):
    def size(plus):
        t = train_lora(base, *cells[:2], 6, TuneConfig(lr=1e-4, lora_plus=plus, epochs=1, steps=5))
        return sum(v.norm().item() for k, v in t.adapter.items() if "lora_B" in k)

    assert size(16.0) > 4 * size(1.0)


def test_defaults_train_less_than_two_percent():
    n = parameter_counts(add_lora(Base.load("mini").encoder), nn.Linear(128, 14))
    assert n["fraction"] < 0.02


# Losses -----------------------------------------------------------------------------------------------------------------


TERMS = {"supcon": 1.0, "triplet": 10.0, "reconstruction": 10.0, "distill": 30.0}


@pytest.mark.parametrize("term", TERMS)
def test_every_term_lowers_itself(term, base, cells):
    "Measured on the trained embedding, against training without it."
    X, y, donors = cells

    def value(weight):
        torch.manual_seed(0)
        c = TuneConfig(lr=0.01, epochs=2, steps=120, **{term: weight})
        z = torch.from_numpy(run_layers(layers(base, train_lora(base, X, y, 6, c, donors=donors)), X))
        if term == "supcon": return supervised_contrast(z, torch.from_numpy(y)).item()
        if term == "triplet": return donor_triplet(z, torch.from_numpy(y), torch.from_numpy(np.unique(donors, return_inverse=True)[1])).item()
        if term == "distill": return distillation(z, torch.from_numpy(base.embed(X))).item()
        Z = np.c_[z.double().numpy(), np.ones(len(z))]  # what a line reads of the genes from the embedding
        return float(np.linalg.lstsq(Z, X.toarray(), rcond=None)[1].mean())

    assert value(TERMS[term]) < value(0.0) * 0.99


@pytest.mark.parametrize("loss", ["ce", "balanced", "logit-adjusted"])
def test_every_class_loss_goes_down(loss, base, cells):
    t = train_lora(base, *cells[:2], 6, TuneConfig(lr=0.01, epochs=4, steps=60, loss=loss, head_init="random"))
    assert t.history[-1]["loss"] < t.history[0]["loss"] * 0.7


def test_adjusting_takes_the_prejudice_out():
    "Nothing to go by and nine of ten cells in class 0: cross-entropy says class 0, the adjusted logits are even."
    y, share = torch.tensor([0] * 9 + [1]), torch.tensor([0.9, 0.1])
    for kind, even in (("ce", False), ("balanced", True), ("logit-adjusted", True)):
        b = torch.zeros(2, requires_grad=True)
        opt = torch.optim.LBFGS([b], max_iter=50)

        def closure():
            opt.zero_grad()
            loss = class_loss(b.expand(10, 2), y, share, kind)
            loss.backward()
            return loss

        opt.step(closure)
        assert (abs(b[0] - b[1]).item() < 0.05) == even


def test_masking_keeps_the_expectation():
    x = torch.rand(400, 300)
    torch.manual_seed(0)
    masked = mask_genes(x, 0.7)
    assert abs((masked == 0).float().mean().item() - 0.7) < 0.01 and abs((masked.mean() / x.mean()).item() - 1) < 0.02
    assert mask_genes(x, 0.0) is x


def test_masked_training_serves_whole_cells(base, cells):
    t = train_lora(base, *cells[:2], 6, TuneConfig(lr=0.01, epochs=2, steps=20, mask_genes=0.7))
    assert np.array_equal(run_layers(layers(base, t), cells[0]), run_layers(layers(base, t), cells[0]))
    assert far(run_layers(layers(base, t), cells[0]), embed(t.model, cells[0])) < SAME


# The fast steps are the plain loop's ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, dict(head="cosine"), dict(loss="balanced", supcon=0.1), dict(distill=1.0, triplet=1.0), dict(reconstruction=0.1), dict(a_rate=0.3, schedule="cosine")], ids=str)
@pytest.mark.parametrize("kind", ["LoRA", "no first layer", "rsLoRA", "PiSSA", "LoRA+"])
def test_the_cached_steps_have_the_losses_of_dense_ones(kind, extra, base, cells, monkeypatch):
    "Encoder, validation and optimiser: with peft's module on dense cells, and AdamW over peft's own tensors, every epoch says the same."
    import scimlora.lora as module

    X, y, donors = cells
    # AdamW divides by the size of a gradient, so rounding grows with every step at a high rate.
    config = TuneConfig(**{"lr": 0.002, "epochs": 4, "steps": 40, **KINDS[kind], **extra})

    def run(): return train_lora(base, X, y, 6, config, (X[:50], y[:50]), donors)

    fast = run()
    monkeypatch.setattr(module, "_encode", lambda base, model, X, config: module._Plain(model, X))
    monkeypatch.setattr(module, "flatten", lambda groups: groups)
    plain = run()
    for name in ("loss", "val_loss", "val_macro_f1"): assert [h[name] for h in fast.history] == pytest.approx([h[name] for h in plain.history], rel=1e-3, abs=1e-4), name
    assert far(embed(fast.model, X), embed(plain.model, X)) < 1e-3
    assert fast.history[0]["loss"] > fast.history[-1]["loss"]


@pytest.fixture
def wide(cells, monkeypatch):
    "A base whose layers are wide enough for tiles, and limits that take them and the compiled loops for whatever size."
    from scimlora import kernels

    pytest.importorskip("numba")
    for name in ("_WIDE", "_LARGE"): monkeypatch.setattr(kernels, name, 0)
    torch.manual_seed(0)
    return Base(Encoder(cells[0].shape[1], (64, 96), 32).eval().requires_grad_(False), [f"G{i}" for i in range(cells[0].shape[1])])


@pytest.mark.parametrize("kind", ["LoRA", "no first layer", "PiSSA"])
@pytest.mark.parametrize("r", [3, 4, 8])
def test_compiled_steps_have_the_losses_of_dense_ones(kind, r, wide, cells, monkeypatch):
    "As above, with compiled loops and, where the processor has them, products in tiles."
    import scimlora.lora as module

    X, y, donors = cells
    # At twice this rate the rounding of a neuron that is nearly at its bend grew to 1e-4 in forty steps, with two threads and PiSSA of rank 8.
    config = TuneConfig(**{"lr": 0.001, "epochs": 4, "steps": 40, "r": r, **KINDS[kind]})
    fast = train_lora(wide, X, y, 6, config, (X[:50], y[:50]), donors)
    monkeypatch.setattr(module, "_encode", lambda base, model, X, config: module._Plain(model, X))
    plain = train_lora(wide, X, y, 6, config, (X[:50], y[:50]), donors)
    for name in ("loss", "val_loss"): assert [h[name] for h in fast.history] == pytest.approx([h[name] for h in plain.history], rel=1e-3, abs=1e-4), name
    assert fast.history[0]["loss"] > fast.history[-1]["loss"]


@pytest.mark.parametrize("extra", [dict(dropout=0.3), dict(mask_genes=0.3), dict(batch=5), dict(batch=40, dropout=0.1, variant="pissa"), dict(targets="network.1.1"), dict(targets="network.0.1,network.2")])
def test_a_compiled_chain_draws_and_steps_as_the_plain_one(extra, wide, cells, monkeypatch):
    "What is hidden and dropped is drawn in the same order, whatever is compiled."
    from scimlora import kernels

    if kernels._tiles() is None: pytest.skip("no products in tiles here: there is one chain only")
    X, y, _ = cells
    compiled = []
    for tiles in (kernels._tiles, lambda: None):
        monkeypatch.setattr(kernels, "_tiles", tiles)
        # At twice this rate the rounding of a neuron nearly at its bend grows, as above.
        compiled.append(train_lora(wide, X, y, 6, TuneConfig(lr=0.001, epochs=3, steps=30, **extra), (X[:50], y[:50])))
    for name in ("loss", "val_loss"): assert [h[name] for h in compiled[0].history] == pytest.approx([h[name] for h in compiled[1].history], rel=1e-3, abs=1e-4), name


def test_a_compiled_chain_keeps_batches_apart_and_goes_back_once(wide, cells):
    "Two batches under way at once have room of their own, gradients add up, and a second way back is refused."
    from scimlora import kernels

    if kernels._tiles() is None: pytest.skip("no products in tiles here")
    X = cells[0]
    config = TuneConfig(r=4)
    model = add_lora(wide.encoder, config)
    for n, p in model.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p.data, std=0.05)
    encode = CachedEncoder(wide, model, X)
    assert encode.chain is not None

    def gradients(*batches):
        model.zero_grad()
        sum((encode(b) * torch.linspace(-1, 1, wide.latent)).pow(3).sum() for b in batches).backward()
        return [p.grad.clone() for p in encode.adapters]

    one, two = np.arange(20), np.arange(20, 55)
    for a, b, both in zip(gradients(one), gradients(two), gradients(one, two)): assert far(a + b, both) < 1e-4 * both.abs().max()
    total = encode(one).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="embed it again"): total.backward()


@pytest.mark.parametrize("tiles", [True, False])
def test_training_in_bfloat16_ends_near(tiles, wide, cells, monkeypatch):
    from scimlora import kernels

    X, y, _ = cells
    if not tiles: monkeypatch.setattr(kernels, "_tiles", lambda: None)
    full, half = (train_lora(wide, X, y, 6, TuneConfig(lr=0.002, epochs=4, steps=40, precision=p)) for p in ("float32", "bfloat16"))
    losses = [[h["loss"] for h in t.history] for t in (full, half)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.03)
    agree = lambda a, b: np.mean(embed(a.model, X).argmax(1) == embed(b.model, X).argmax(1))
    assert agree(full, half) > 0.9


def test_a_first_layer_that_does_not_fit_in_memory_lies_in_a_file(base, cells, monkeypatch):
    import scimlora.cached as module

    X, y, _ = cells
    config = TuneConfig(lr=0.005, epochs=2, steps=10)
    inside = train_lora(base, X, y, 6, config)
    monkeypatch.setattr(module, "_LIMIT", 0)
    monkeypatch.setattr(module.CachedEncoder.__init__, "__defaults__", (True, 0, "float32"))
    outside = train_lora(base, X, y, 6, config)
    assert inside.history == outside.history


def test_a_full_disk_is_said_before_training(base, cells, tmp_path):
    from scimlora.cached import _mapped

    with pytest.raises(InputError, match="TMPDIR"): _mapped(tmp_path / "first", (10**12, 1024))
    assert not list(tmp_path.iterdir())


TWO = """
import json, os
import numpy as np, scipy.sparse as sp, torch
from scimlora.base import Base
from scimlora.encoder import Encoder
from scimlora.core import leads
from scimlora.lora import TuneConfig, train_lora
from scimlora.processes import leave_processes

encoder = Encoder(400, (24, 20), 16)
encoder.load_state_dict(torch.load("base.pt", weights_only=True))
base = Base(encoder.eval().requires_grad_(False), [f"G{i}" for i in range(400)])
X, y = sp.load_npz("X.npz"), np.load("y.npy")
t = [train_lora(base, X, y, 6, TuneConfig(**c), (X[:50], y[:50])) for c in json.load(open("configs.json"))]
said = [int(leads()), [r.history for r in t], [sum(v.abs().sum().item() for v in r.adapter.values()) for r in t]]
with open(f"said-{os.environ['RANK']}.json", "w") as f: f.write(json.dumps(said))
leave_processes()
"""


def test_two_processes_train_as_one_does(base, cells, tmp_path):
    "torchrun, two processes on the CPU: the same losses and scores, with a loss that compares all cells of a batch, cached steps and dense ones."
    import scipy.sparse as sp

    X, y, _ = cells
    configs = [dict(lr=0.002, epochs=3, steps=30, batch=33, supcon=0.1), dict(lr=0.002, epochs=2, steps=10, variant="dora"), dict(lr=1e-3, epochs=1, steps=5, method="full")]
    sp.save_npz(tmp_path / "X.npz", X), np.save(tmp_path / "y.npy", y)
    torch.save(base.encoder.state_dict(), tmp_path / "base.pt")
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    (tmp_path / "two.py").write_text(TWO)
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "two.py"], cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "PYTHONFAULTHANDLER": "1"})
    assert not run.returncode, run.stderr
    said = sorted(json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in (0, 1))
    assert [s[0] for s in said] == [0, 1]  # one of the two writes and speaks
    for config, *both in zip(configs, *(s[1] for s in said)):
        alone = train_lora(base, X, y, 6, TuneConfig(**config), (X[:50], y[:50])).history
        for history in both:
            for name in alone[0]: assert [h[name] for h in history] == pytest.approx([h[name] for h in alone], rel=1e-3, abs=1e-4), (config, name)
    assert said[0][2] == said[1][2]


# Epochs and steps ---------------------------------------------------------------------------------------------------------


def test_patience_stops(base, cells):
    "Validation labels that cannot be learned: after the best epoch, so many more and no others."
    X, y, _ = cells
    val = X, np.random.default_rng(0).permutation(y)
    h = train_lora(base, X, y, 6, TuneConfig(lr=0.02, epochs=40, steps=0, patience=3), val).history
    rank = [(r["val_macro_f1"], -r["val_loss"]) for r in h]
    assert len(h) < 40 and len(h) - 1 - rank.index(max(rank)) == 3
    assert len(train_lora(base, X, y, 6, TuneConfig(lr=0.02, epochs=8, steps=0), val).history) == 8


def test_the_best_epoch_is_kept(base, cells):
    X, y, _ = cells
    val = X, np.random.default_rng(0).permutation(y)
    t = train_lora(base, X, y, 6, TuneConfig(lr=0.02, epochs=8, steps=0), val)
    with torch.no_grad(): loss = nn.functional.cross_entropy(t.head(torch.from_numpy(embed(t.model, X))), torch.from_numpy(val[1])).item()
    best = max(t.history, key=lambda r: (r["val_macro_f1"], -r["val_loss"]))
    assert abs(best["val_loss"] - loss) < 1e-4


@pytest.mark.parametrize("steps, want", [(0, 3), (50, 50)])
def test_few_cells_get_their_steps(steps, want, base, cells, monkeypatch):
    import scimlora.lora as module

    seen, plain = [], module.class_loss
    monkeypatch.setattr(module, "class_loss", lambda *a: seen.append(1) or plain(*a))
    train_lora(base, cells[0], cells[1], 6, TuneConfig(epochs=1, steps=steps))
    assert len(seen) == want


# What is refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong, said", [
    (dict(method="adapters"), "method"), (dict(variant="vera"), "variant"), (dict(head="mlp"), "head"), (dict(head_init="zeros"), "head_init"),
    (dict(loss="focal"), "loss"), (dict(schedule="step"), "schedule"), (dict(precision="int8"), "precision"), (dict(mask_genes=1.0), "mask_genes"), (dict(patience=-1), "patience"),
    (dict(steps=-1), "steps"), (dict(supcon=-1.0), "supcon"), (dict(distill=float("nan")), "distill"), (dict(lora_plus=0.0), "lora_plus"),
    (dict(method="bn", variant="dora"), "variant"), (dict(method="full", lora_plus=4.0), "lora_plus")])
def test_settings_are_checked(wrong, said):
    with pytest.raises(InputError, match=f"^{said}="): TuneConfig(**wrong)


@pytest.mark.parametrize("change, said", [
    (dict(peft_type="VERA"), "VERA"), (dict(peft_type="OFT"), "OFT"), (dict(peft_type="IA3"), "IA3"), (dict(rank_pattern={"network.2": 8}), "rank_pattern"),
    (dict(alpha_pattern={"network.2": 8}), "alpha_pattern"), (dict(lora_bias=True), "lora_bias"), (dict(modules_to_save=["network.2"]), "modules_to_save"),
    (dict(bias="all"), "bias"), (dict(init_lora_weights="pissa"), "pissa"), (dict(init_lora_weights="olora"), "olora"), (dict(use_dora=True), "magnitude")])
def test_adapters_that_would_be_served_wrongly_are_refused(change, said, tuned):
    t = tuned[0]["LoRA"]
    with pytest.raises(InputError, match=f"adapter_.*{said}"): check_adapter(t.adapter_config | change, t.adapter)


def test_damaged_weights_are_refused(base, tuned):
    t = tuned[0]["BatchNorm"]
    first = next(iter(t.adapter))
    damaged = {"lacks": {k: v for k, v in t.adapter.items() if k != first}, "does not fit": t.adapter | {first: t.adapter[first][:-1]},
               "no such layer": t.adapter | {"network.9.weight": torch.zeros(2)}, "NaN": t.adapter | {first: t.adapter[first] * float("nan")}}
    for said, tensors in damaged.items():
        with pytest.raises(InputError, match=said): adapted_layers(base.weights, t.adapter_config, tensors)
    with pytest.raises(InputError, match="update scimlora"): check_adapter({"scimlora_method": "prompt"}, {})
    assert [check_adapter(t.adapter_config, t.adapter) for t in (tuned[0][k] for k in ("LoRA", "BatchNorm", "full", "linear", "prototype"))] == list(METHODS)


# Bundles ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["DoRA", "BatchNorm", "full", "linear"])
def test_a_bundle_of_every_kind(kind, baron_cells, other_cells, tmp_path):
    from scimlora import Classifier

    clf = Classifier.tune(baron_cells, "cell_type", epochs=1, steps=0, baselines=False, **KINDS[kind])
    clf.save(tmp_path / "b")
    again = Classifier.load(tmp_path / "b")
    assert far(again.predict_proba(other_cells), clf.predict_proba(other_cells)) < SAME
    assert again.bundle.manifest["config"]["method"] == KINDS[kind].get("method", "lora")
