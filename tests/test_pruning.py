"""Masks: who is hidden, what survives training, copies and files, and every refusal."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.utils.prune as theirs
from torch import nn

from gptbook.checkpoints import load_model, save_model
from gptbook.core import TRANSFORMS, GPTConfig, LossModel
from gptbook.pruning import (
    GradualPruning, Mask, all_but_smallest, cubic_sparsity, finalize, mask_of, prune, set_mask,
    sparsity, two_of_four,
)
from gptbook.qat import convert, prepare_qat
from gptbook.runs import TrainConfig
from gptbook.structured_pruning import prune_heads, prune_neurons
from gptbook.training import train
from pruning_examples import (
    BAD_AMOUNTS, RECIPES, SIZES, V, a_gpt, assert_refused, block_linears, everything, quantized,
    some_ids, unchanged,
)
from tiny_runs import DATA, HELD_OUT, a_model

pytestmark = pytest.mark.usefixtures("one_thread")


def zeros_are_kept(model):
    """Whether every hidden weight reads as exactly zero."""
    masks = [(m, mask_of(m)) for m in block_linears(model)]
    return all(bool((m.weight[~mask.kept] == 0).all()) for m, mask in masks)


# Masks -------------------------------------------------------------------------------
@pytest.mark.parametrize("amount", [0, 0.1, 1 / 3, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("shape", [(7,), (5, 12), (3, 4, 5)])
def test_the_smallest_go(shape, amount):
    weight = torch.randn(shape)
    kept = all_but_smallest(weight, amount)
    assert kept.shape == weight.shape and kept.dtype == torch.bool
    assert (~kept).sum() == round(amount * weight.numel())
    if 0 < (~kept).sum() < weight.numel():
        assert weight[~kept].abs().max() < weight[kept].abs().min()


def test_views_are_pruned_like_copies():
    weight = torch.randn(6, 8).T
    assert torch.equal(all_but_smallest(weight, 0.4), all_but_smallest(weight.clone(), 0.4))
    assert torch.equal(two_of_four(weight.T.T[:, :4]), two_of_four(weight[:, :4].clone()))


def test_equal_weights_go_by_number():
    assert (~all_but_smallest(torch.ones(10, 10), 0.3)).sum() == 30


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.9])
def test_masks_are_those_of_torch(amount):
    ours, model = a_gpt(), a_gpt()
    prune(ours, amount, scope="layer")
    for mine, other in zip(block_linears(ours), block_linears(model)):
        theirs.l1_unstructured(other, "weight", amount)
        assert torch.equal(mask_of(mine).kept, other.weight_mask.bool())
    ours, model = a_gpt(), a_gpt()
    prune(ours, amount)
    pairs = [(m, "weight") for m in block_linears(model)]
    theirs.global_unstructured(pairs, theirs.L1Unstructured, amount=amount)
    for mine, (other, _) in zip(block_linears(ours), pairs):
        assert torch.equal(mask_of(mine).kept, other.weight_mask.bool())
        assert torch.equal(mine.weight, other.weight)


@pytest.mark.parametrize("shape", [(1, 4), (6, 8), (3, 5, 12)])
def test_two_of_every_four(shape):
    weight = torch.randn(shape)
    fours = two_of_four(weight).unflatten(-1, (-1, 4))
    assert (fours.sum(-1) == 2).all()
    size = weight.abs().unflatten(-1, (-1, 4))
    lost, stays = size.masked_fill(fours, 0).amax(-1), size.masked_fill(~fours, 9).amin(-1)
    assert (lost <= stays).all()
    assert (two_of_four(torch.zeros(2, 8)).sum(-1) == 4).all(), "ties: still two"


def test_global_and_layer_differ_and_add_up():
    for scope in ("global", "layer"):
        model = a_gpt()
        with torch.no_grad():
            model.blocks[0].attn.W_query.weight.mul_(0.01)
        names = prune(model, 0.3, scope=scope)
        assert len(names) == len(block_linears(model)) == 18
        assert abs(sparsity(model) - 0.3) < 1e-3
        small = (model.blocks[0].attn.W_query.weight == 0).float().mean()
        assert (small == 1) if scope == "global" else (abs(small - 0.3) < 1e-2)


def test_the_router_stays_whole_unless_asked():
    config = replace(SIZES, recipe="mixtral", bias=False, options={"n_experts": 4})
    names = prune(a_gpt(config), 0.5)
    assert not any("router" in name for name in names)
    assert any("experts.3.fc_gate" in name for name in names)
    assert any("router" in name for name in prune(a_gpt(config), 0.5, keep=()))


def test_table_and_head_are_left_alone():
    model = a_gpt()
    table = model.tok_emb.weight.clone()
    prune(model, 0.9)
    assert model.head.weight is model.tok_emb.weight and torch.equal(table, model.head.weight)


# Training ----------------------------------------------------------------------------
@pytest.mark.parametrize("amount", [0.5, "2:4"])
def test_zeros_stay_zero_through_any_step(amount):
    model, ids = a_gpt(), some_ids()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3)
    for _ in range(3):  # momentum of every weight, then the masks
        LossModel(model)(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step(), optimizer.zero_grad()
    held = {id(p) for p in model.parameters()}
    prune(model, amount)
    assert {id(p) for p in model.parameters()} == held, "the optimiser holds the same"
    before, zeros = model.blocks[0].mlp.fc_in.weight.detach().clone(), sparsity(model)
    for turn in range(4):
        if turn % 2:  # otherwise a step without gradients
            LossModel(model)(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step(), optimizer.zero_grad()
        assert zeros_are_kept(model) and sparsity(model) == zeros
    assert not torch.equal(before, model.blocks[0].mlp.fc_in.weight), "it did train"


def test_hidden_weights_get_no_gradient():
    model, ids = a_gpt(), some_ids()
    prune(model, 0.5)
    LossModel(model)(ids[:, :-1], ids[:, 1:]).backward()
    for linear in block_linears(model):
        kept, grad = mask_of(linear).kept, linear.parametrizations.weight.original.grad
        assert not grad[~kept].any() and grad[kept].any()


def test_not_even_nan_shows_through_a_mask():
    model = a_gpt()
    prune(model, 0.5)
    linear = model.blocks[0].mlp.fc_in
    with torch.no_grad():
        linear.parametrizations.weight.original[~mask_of(linear).kept] = torch.nan
    assert model(some_ids()).isfinite().all() and zeros_are_kept(model)


def test_copies_are_masked_too():
    model = a_gpt()
    prune(model, 0.5)
    other, ids = copy.deepcopy(model), some_ids()
    assert torch.equal(model(ids), other(ids))
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    LossModel(other)(ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step()
    assert zeros_are_kept(other) and not torch.equal(model(ids), other(ids))


def test_more_can_be_pruned_and_nothing_comes_back():
    model = a_gpt()
    prune(model, 0.5)
    first = [mask_of(m).kept.clone() for m in block_linears(model)]
    prune(model, 0.2)
    assert abs(sparsity(model) - 0.5) < 1e-3, "a smaller amount revives nobody"
    prune(model, 0.8)
    assert abs(sparsity(model) - 0.8) < 1e-3 and len(model.transforms) == 1
    assert all((mask_of(m).kept <= old).all() for m, old in zip(block_linears(model), first))


def test_finalize_and_what_one_step_then_does():
    model, ids = a_gpt(), some_ids()
    names = prune(model, 0.5)
    logits, held = model(ids), {id(p) for p in model.parameters()}
    assert finalize(model) == names
    assert torch.equal(model(ids), logits) and not model.transforms
    assert {id(p) for p in model.parameters()} == held
    assert all(type(m) is nn.Linear for m in block_linears(model))
    assert list(model.state_dict()) == list(a_gpt().state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    LossModel(model)(ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step()
    assert sparsity(model) < 0.01, "zeros without a mask are weights like any other"


def test_finalize_keeps_structured_transforms_and_frozen_weights():
    model = a_gpt().requires_grad_(False)
    prune_neurons(model, 0.25)
    prune(model, 0.5)
    finalize(model)
    assert [name for name, _ in model.transforms] == ["prune_neurons"]
    assert not any(p.requires_grad for p in model.parameters())


def test_no_gradual_pruning_beyond_its_curve():
    assert cubic_sparsity(0, 10, 20, 0.8) == 0 and cubic_sparsity(99, 10, 20, 0.8) == 0.8
    assert cubic_sparsity(15, 10, 20, 0.8) == pytest.approx(0.8 * 7 / 8)
    steps = [cubic_sparsity(i, 10, 20, 0.8) for i in range(30)]
    assert steps == sorted(steps)


def test_gradual_pruning_reaches_the_amount_and_resumes_bit_for_bit(tmp_path):
    config = TrainConfig(12, 1e-3, save_every=4, validate_every=6)

    def run(out, steps=None, resume=False):
        model = a_model()
        prune(model, 0.0)
        gradual, seen = GradualPruning(0.7, 1, 9, every=2), []

        def stop(run):
            seen.append(round(sparsity(run.model), 3))
            run.stopping = run.stopping or run.step == steps
        train(model, DATA, HELD_OUT, config, out=out, callbacks=(gradual, stop),
              resume=resume, progress=False)
        return model, seen

    whole, seen = run(tmp_path / "a")
    assert seen == sorted(seen) and abs(seen[-1] - 0.7) < 1e-3 and seen[0] < 0.01
    run(tmp_path / "b", steps=4)
    again, _ = run(tmp_path / "b", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(),
                                                 again.state_dict().values()))


def test_a_copy_finalized_leaves_the_other_masked():
    """`remove_parametrizations` would delete `weight` from the class that both share."""
    model, ids = a_gpt(), some_ids()
    prune(model, 0.5)
    other, logits = copy.deepcopy(model), model(ids)
    finalize(other)
    assert torch.equal(other(ids), logits) and torch.equal(model(ids), logits)
    assert zeros_are_kept(model) and len(finalize(model)) == 18
    assert list(model.state_dict()) == list(a_gpt().state_dict()), "the old order"


@pytest.mark.parametrize("bias", [True, False])
def test_finalize_keeps_hooks_and_parameters(bias):
    model = a_gpt(replace(SIZES, bias=bias))
    linear, calls = model.blocks[0].mlp.fc_in, []
    linear.register_forward_hook(lambda *_: calls.append(1))
    held = linear.weight
    prune(model, 0.5), finalize(model), model(some_ids())
    assert calls == [1] and model.blocks[0].mlp.fc_in is linear and linear.weight is held
    assert (linear.bias is None) is not bias
# Files -------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("order", ["weights last", "weights first", "finalized"])
def test_a_file_gives_the_model_back(tmp_path, name, order):
    if order == "weights first":
        model = a_gpt(RECIPES[name])
        prune(model, 0.4)
    else:
        model = a_gpt(RECIPES[name])
        prune_heads(model, 0.5), prune_neurons(model, {1: [0, 7]}), prune_neurons(model, 0.25)
        prune(model, 0.4)
        if order == "finalized":
            finalize(model)
    save_model(tmp_path / "m.safetensors", model)
    again, ids = load_model(tmp_path / "m.safetensors").model, some_ids()
    assert torch.equal(model(ids), again(ids)) and again.transforms == model.transforms
    assert again.config == model.config
    ours, its = model.state_dict(), again.state_dict()
    assert list(ours) == list(its) and all(torch.equal(ours[n], its[n]) for n in ours)
    assert sparsity(again) == sparsity(model)
    save_model(tmp_path / "n.safetensors", again)
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "n.safetensors").read_bytes()


def test_a_loaded_model_can_be_pruned_and_finalized_further(tmp_path):
    model = a_gpt()
    prune(model, 0.3)
    save_model(tmp_path / "m.safetensors", model)
    again = load_model(tmp_path / "m.safetensors").model
    prune(again, 0.6), finalize(again), prune_heads(again, 0.25)
    save_model(tmp_path / "m.safetensors", again)
    assert torch.equal(load_model(tmp_path / "m.safetensors").model(some_ids()),
                       again(some_ids()))


@pytest.mark.parametrize("transform", [
    ["prune", {"modules": ["blocks.9.mlp.fc_in"]}], ["prune", {"modules": ["head"]}],
])
def test_a_hostile_file_is_refused(tmp_path, transform):
    assert_refused(transform, tmp_path / "m.safetensors")


# Refusals ----------------------------------------------------------------------------

@pytest.mark.parametrize("amount", BAD_AMOUNTS)
def test_amounts_outside_are_refused(amount):
    model = a_gpt()
    before = everything(model)
    with pytest.raises(ValueError, match=r"amount=.*outside \[0, 1\)"):
        prune(model, amount)
    unchanged(model, before, [])


REFUSALS = {
    "scope": (partial(prune, amount=0.5, scope="world"), "scope='world'"),
    "no masks": (finalize, "no linear carries a mask"),
    "a word to keep": (partial(prune, amount=0.5, keep="fc_in"), "keep='fc_in': a tuple of"),
    "no such linear": (partial(prune, amount=0.5, keep=("fc_inn",)), "keep='fc_inn'.*fc_in"),
}


@pytest.mark.parametrize("kept", [
    torch.ones(3, 3, dtype=torch.bool), torch.ones(64, 64), torch.ones(64, dtype=torch.bool)])
def test_what_is_no_mask_leaves_the_linear_as_it_was(kept):
    linear = nn.Linear(64, 64)
    with pytest.raises(ValueError, match=r"a mask of \(64, 64\) must be bool"):
        set_mask(linear, kept)
    assert type(linear) is nn.Linear and mask_of(linear) is None


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_leave_the_model_as_it_was(name):
    change, message = REFUSALS[name]
    model = a_gpt()
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        change(model)
    unchanged(model, before, [])


def test_two_of_four_needs_fours():
    model = a_gpt(GPTConfig(V, 16, 30, 2, 5))
    before = everything(model)
    with pytest.raises(ValueError, match="K=30"):
        prune(model, "2:4")
    unchanged(model, before, [])
    with pytest.raises(ValueError, match="K=6"):
        two_of_four(torch.ones(2, 6))
    with pytest.raises(ValueError, match="K=1"):
        two_of_four(torch.tensor(1.0))


def test_quantized_models_are_refused():
    model = a_gpt()
    quantized(model, ("W_query", "fc_out"))
    model.transforms.append(["quantize", {}])
    before = everything(model)
    with pytest.raises(ValueError, match="quantized: prune first"):
        prune(model, 0.5)
    unchanged(model, before, [["quantize", {}]])


@pytest.mark.parametrize("scheme", ["int8", "int4", "int8_static"])
def test_whatever_the_scheme(scheme):
    model = a_gpt()
    prepare_qat(model, scheme)
    model.train()(some_ids())  # an observer must have seen something
    convert(model)
    for change in (lambda: prune(model, 0.5), lambda: sparsity(model)):
        with pytest.raises(ValueError, match="quantized: prune first"):
            change()


def test_a_share_may_come_from_numpy():
    model, twin = a_gpt(), a_gpt()
    prune(model, np.float64(0.5))
    prune(twin, 0.5)
    assert everything(model).keys() == everything(twin).keys() and sparsity(model) == 0.5


def test_nothing_to_prune_is_said():
    model = a_gpt()
    names = ("W_query", "W_key", "W_value", "out_proj", "fc_in", "fc_out")
    with pytest.raises(ValueError, match="nothing to prune"):
        prune(model, 0.5, keep=names)
    unchanged(model, everything(a_gpt()), [])


def test_amount_zero_hides_nothing():
    model, ids = a_gpt(), some_ids()
    logits = model(ids)
    prune(model, 0)
    assert sparsity(model) == 0 and torch.equal(model(ids), logits)


@pytest.mark.parametrize("begin, end, every", [
    (5, 5, 1), (-1, 5, 1), (0, 5, 0), (0, 5.5, 1), (0, 5, 0.5), (0, None, 1)])
def test_a_gradual_pruning_needs_time(begin, end, every):
    with pytest.raises(ValueError, match="begin="):
        GradualPruning(0.5, begin, end, every)
    for late in (5, 6):
        with pytest.raises(ValueError, match=f"begin={late} and end=5"):
            cubic_sparsity(3, late, 5, 0.5)
    with pytest.raises(ValueError, match="outside"):
        GradualPruning(1.0, 0, 5)


def test_the_transform_is_registered():
    assert "prune" in TRANSFORMS and issubclass(Mask, nn.Module)
