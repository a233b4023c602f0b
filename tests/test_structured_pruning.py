"""Smaller matrices: removed equals silenced, for every recipe; scores, files, refusals."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.utils.prune as theirs
from torch import nn

from gptbook.checkpoints import load_demo, load_model, save_model
from gptbook.core import TRANSFORMS, GPTModel, LossModel, set_seed
from gptbook.generation import generate_text
from gptbook.inference import KVCache
from gptbook.pruning import Mask, finalize, prune
from gptbook.structured_pruning import (
    HeadBias, head_counts, head_scores, narrowed, neuron_scores, prune_heads, prune_neurons,
)
from pruning_examples import (
    BAD_AMOUNTS, RECIPES, SIZES, T, V, a_gpt, assert_refused, everything, quantized, some_ids,
    unchanged,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# Smaller matrices --------------------------------------------------------------------
def silence_heads(model, removed):
    """The oracle: the same heads write nothing, all shapes as they were."""
    for layer, heads in removed.items():
        attn = model.blocks[layer].attn
        for head in heads:
            columns = slice(head * attn.head_dim, (head + 1) * attn.head_dim)
            attn.out_proj.weight.data[:, columns] = 0


def silence_neurons(model, removed):
    for name, neurons in removed.items():
        model.get_submodule(name).fc_out.weight.data[:, neurons] = 0


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("amount", [0.3, 0.6])
def test_the_smaller_model_says_what_the_silenced_one_says(name, amount):
    model, silent, ids = a_gpt(RECIPES[name]), a_gpt(RECIPES[name]), some_ids()
    full = model(ids)
    heads, neurons = prune_heads(model, amount), prune_neurons(model, amount)
    silence_heads(silent, heads), silence_neurons(silent, neurons)
    torch.testing.assert_close(model(ids), silent(ids), rtol=1e-5, atol=1e-5)
    assert (model(ids) - full).abs().max() > 1e-3, "and not what the whole one says"
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(model) < count(silent)
    for block in model.blocks:
        H, K = head_counts(block.attn)
        assert H % K == 0 and H == (8 - len(heads[block.attn.layer]))


@pytest.mark.parametrize("name", RECIPES)
def test_cached_is_full_and_the_cache_shrinks(name):
    model, ids = a_gpt(RECIPES[name]), some_ids()
    prune_heads(model, 0.5), prune_neurons(model, 0.5)
    with torch.no_grad():
        cache, full = KVCache(model, T), model(ids)
        steps = [model(chunk, cache=cache) for chunk in ids.split(3, dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-5, atol=1e-5)
    K = RECIPES[name].kv_heads
    assert all(held[0].shape[1] == max(1, K // 2) for held in cache.buffers)


def test_the_count_of_parameters_is_the_formula():
    model = a_gpt()
    count = lambda: sum(p.numel() for p in model.parameters())
    before, C, D, L = count(), 32, 4, 3
    prune_heads(model, {1: [0, 5]})
    assert before - count() == 2 * (4 * C * D + 3 * D)
    before = count()
    prune_neurons(model, {0: [3], 2: range(10)})
    assert before - count() == 11 * (2 * C + 1)


@pytest.mark.parametrize("kv, removed, groups", [
    (4, [0, 1], 3), (4, [0, 2, 4, 6], 4), (4, [0, 1, 2, 4, 6], 3), (2, [0, 4], 2), (1, [7], 1)])
def test_groups_stay_equal(kv, removed, groups):
    config = replace(SIZES, n_kv_heads=kv)
    model, silent, ids = a_gpt(config), a_gpt(config), some_ids()
    assert prune_heads(model, {1: removed}) == {1: removed}
    silence_heads(silent, {1: removed})
    torch.testing.assert_close(model(ids), silent(ids), rtol=1e-5, atol=1e-5)
    assert head_counts(model.blocks[1].attn) == (8 - len(removed), groups)


def test_a_wrong_head_is_seen():
    """The comparison above can fail: it does for heads that are off by one."""
    model, silent, ids = a_gpt(), a_gpt(), some_ids()
    prune_heads(model, {1: [2]})
    silence_heads(silent, {1: [3]})
    assert (model(ids) - silent(ids)).abs().max() > 1e-3


def test_pruned_twice_counts_anew():
    model, silent, ids = a_gpt(), a_gpt(), some_ids()
    prune_heads(model, {0: [0, 3]})
    prune_heads(model, {0: [0, 5]})  # of those that stayed: 1 and 7
    silence_heads(silent, {0: [0, 1, 3, 7]})
    torch.testing.assert_close(model(ids), silent(ids), rtol=1e-5, atol=1e-5)


def test_alibi_keeps_the_slopes_of_those_who_stay():
    config = RECIPES["alibi"]
    model, ids = a_gpt(config), some_ids()
    slopes = model.blocks[0].attn.bias.slopes
    prune_heads(model, {0: [0, 1, 6]})
    prune_heads(model, {0: [0]})
    bias = model.blocks[0].attn.bias(torch.tensor([[[[1]]]]), torch.tensor([[[[0]]]]))
    assert torch.equal(bias.flatten(), -slopes[[3, 4, 5, 7]])
    one = HeadBias(lambda q, k: (q - k).float(), [1, 2])
    assert one(torch.ones(1, 1, 4, 1), torch.ones(1, 1, 1, 4)).shape == (1, 1, 4, 4)


def test_experts_lose_neurons_too():
    config = replace(SIZES, recipe="mixtral", bias=False, options={"n_experts": 4})
    model, silent, ids = a_gpt(config), a_gpt(config), some_ids()
    neurons = prune_neurons(model, 0.25)
    assert len(neurons) == 3 * 4
    silence_neurons(silent, neurons)
    torch.testing.assert_close(model(ids), silent(ids), rtol=1e-5, atol=1e-5)


def test_global_ranking_takes_that_many_and_leaves_one():
    model = a_gpt()
    scores = {layer: torch.full((8,), float(layer)) for layer in range(3)}
    removed = prune_heads(model, 0.5, scores, scope="global")
    assert {layer: len(heads) for layer, heads in removed.items()} == {0: 7, 1: 5}
    assert [head_counts(b.attn)[0] for b in model.blocks] == [1, 3, 8]
    assert len(model(some_ids())) == 2


def test_text_is_written_on(tmp_path):
    model, tokenizer = load_demo()
    prune_heads(model, 0.25), prune_neurons(model, 0.25)
    ids = tokenizer.encode("Once upon a time")
    text = generate_text(model, ids, 20, temperature=0)
    save_model(tmp_path / "small.safetensors", model, tokenizer)
    again = load_model(tmp_path / "small.safetensors").model
    assert text == generate_text(again, ids, 20, temperature=0) and len(text[0]) == len(ids) + 20


def test_modes_and_dtypes_stay():
    model = a_gpt().to(torch.bfloat16).train()
    prune_heads(model, 0.25), prune_neurons(model, 0.25), prune(model, 0.5)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(m.training for m in model.modules() if not isinstance(m, Mask))


def test_no_random_number_is_drawn():
    model = a_gpt()
    state = torch.get_rng_state()
    prune_heads(model, 0.25), prune_neurons(model, 0.25), prune(model, 0.5), finalize(model)
    assert torch.equal(state, torch.get_rng_state())


def test_neurons_are_those_of_torch():
    """By the length of a neuron's row, `ln_structured` hides the same."""
    model = a_gpt()
    linear = model.blocks[0].mlp.fc_in
    scores = {f"blocks.{i}.mlp": block.mlp.fc_in.weight.detach().norm(dim=1)
              for i, block in enumerate(model.blocks)}
    other = copy.deepcopy(linear)
    theirs.ln_structured(other, "weight", amount=0.25, n=2, dim=0)
    hidden = (other.weight_mask == 0).all(1).nonzero()[:, 0].tolist()
    assert prune_neurons(model, 0.25, scores)["blocks.0.mlp"] == hidden
    assert torch.equal(model.blocks[0].mlp.fc_in.weight, other.weight[other.weight_mask[:, 0] > 0])


# Scores ------------------------------------------------------------------------------
def gates(model, ids, targets):
    """The loss with gates on each head and neuron, at 1; their gradients are the oracle."""
    hooks, made = [], {}
    for layer, block in enumerate(model.blocks):
        heads = torch.ones(8, requires_grad=True)
        neurons = torch.ones(block.mlp.fc_out.in_features, requires_grad=True)
        made[layer] = heads, neurons
        D = block.attn.head_dim
        hooks.append(block.attn.out_proj.register_forward_pre_hook(
            lambda m, x, g=heads: (x[0] * g.repeat_interleave(D),)))
        hooks.append(block.mlp.fc_out.register_forward_pre_hook(
            lambda m, x, g=neurons: (x[0] * g,)))
    LossModel(model)(ids, targets).backward()
    for hook in hooks:
        hook.remove()
    return made


@pytest.mark.parametrize("frozen", [False, True])
def test_effects_are_gradients_of_gates(frozen):
    model, ids = a_gpt().requires_grad_(not frozen), some_ids(1)
    batch = ids[:, :-1], ids[:, 1:]
    heads, neurons = head_scores(model, [batch]), neuron_scores(model, [batch])
    assert all(p.grad is None for p in model.parameters()), "no gradient is left behind"
    for layer, (of_heads, of_neurons) in gates(model, *batch).items():
        torch.testing.assert_close(heads[layer], of_heads.grad.abs())
        torch.testing.assert_close(neurons[f"blocks.{layer}.mlp"], of_neurons.grad.abs())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_effects_add_over_rows_and_batches():
    model = a_gpt()
    ids = some_ids(4)
    rows = [(row[None, :-1], row[None, 1:]) for row in ids]
    one = head_scores(model, rows)
    whole = head_scores(model, [(ids[:, :-1], ids[:, 1:])])  # mean over four times the tokens
    for layer in one:
        torch.testing.assert_close(one[layer], 4 * whole[layer], rtol=1e-4, atol=1e-6)


def test_no_hook_survives_an_error():
    model = a_gpt()
    with pytest.raises(ValueError):
        head_scores(model, [(torch.full((1, 3), V), torch.zeros(1, 3).long())])
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_sizes_by_hand():
    model = a_gpt(replace(SIZES, n_kv_heads=4))
    attn, mlp = model.blocks[1].attn, model.blocks[1].mlp
    want = (attn.out_proj.weight[:, 12:16].norm() * attn.W_value.weight[4:8].norm())
    torch.testing.assert_close(head_scores(model)[1][3], want.detach())
    want = mlp.fc_in.weight[5].norm() * mlp.fc_out.weight[:, 5].norm()
    torch.testing.assert_close(neuron_scores(model)["blocks.1.mlp"][5], want.detach())


# Files -------------------------------------------------------------------------------
@pytest.mark.parametrize("transform", [
    ["prune_heads", {"kept": {"0": [0, 9]}}], ["prune_heads", {"kept": {"7": [0]}}],
    ["prune_heads", {"kept": {"0": []}}], ["prune_heads", {"kept": {"0": [3, 1]}}],
    ["prune_heads", {"kept": {"0": [1, 1]}}], ["prune_heads", {"kept": {"0": [0.5]}}],
    ["prune_heads", {"kept": {"x": [0]}}], ["prune_heads", {"kept": [1]}],
    ["prune_neurons", {"kept": {"blocks.0.mlp": 0}}],
    ["prune_neurons", {"kept": {"blocks.0.mlp": 4096}}],
    ["prune_neurons", {"kept": {"blocks.0.mlp": 2**31}}],  # no list of that length
    ["prune_neurons", {"kept": {"blocks.0.mlp": -3}}],
    ["prune_neurons", {"kept": {"blocks.0.attn": 3}}],
    ["prune_neurons", {"surprise": 1}],
])
def test_a_hostile_file_is_refused(tmp_path, transform):
    assert_refused(transform, tmp_path / "m.safetensors")


# Refusals ----------------------------------------------------------------------------

@pytest.mark.parametrize("change", [prune_heads, prune_neurons])
@pytest.mark.parametrize("amount", BAD_AMOUNTS)
def test_amounts_outside_are_refused(change, amount):
    model = a_gpt()
    before = everything(model)
    with pytest.raises(ValueError, match=r"amount=.*outside \[0, 1\)"):
        change(model, amount)
    unchanged(model, before, [])


REFUSALS = {
    "scope of heads": (partial(prune_heads, remove=0.5, scope="world"), "scope='world'"),
    "no such head": (partial(prune_heads, remove={0: [1], 2: [3, 8]}),
                     r"layer 2 has no head 8: it has 8 \(0 to 7\)"),
    "negative head": (partial(prune_heads, remove={1: [-1]}), "layer 1 has no head -1"),
    "half a head": (partial(prune_heads, remove={1: [0.5]}), "no head 0.5"),
    "no such layer": (partial(prune_heads, remove={0: [1], 3: [0]}), "no layer 3: .* has 3"),
    "all heads": (partial(prune_heads, remove={0: [1], 1: range(8)}),
                  "layer 1 would lose all of its 8 heads"),
    "less than a head": (partial(prune_heads, remove=0.05), "less than one"),
    "no such neuron": (partial(prune_neurons, remove={0: [1], 2: [128]}), "has no neuron 128"),
    "all neurons": (partial(prune_neurons, remove={1: range(128)}), "lose all of its 128"),
    "no such feed-forward": (partial(prune_neurons, remove={9: [0]}), "blocks.9.mlp"),
    "less than a neuron": (partial(prune_neurons, remove=0.001), "less than one"),
    "a head, not a list": (partial(prune_heads, remove={0: 2}), "layer 0: 2 is no list of heads"),
    "scores of no layer": (partial(prune_heads, remove=0.5, scores={7: torch.ones(8)}),
                           r"scores for 7: the model has \[0, 1, 2\]"),
    "too few scores": (partial(prune_heads, remove=0.5, scores={1: torch.ones(7)}),
                       r"\(7,\) scores for 1: expected 8"),
    "NaN in scores": (partial(prune_heads, remove=0.5, scores={1: torch.full((8,), torch.nan)}),
                      "a score of 1 is NaN"),
    "scores of no neurons": (partial(prune_neurons, remove=0.5, scores={"x": torch.ones(8)}),
                             "scores for 'x'"),
    "too many scores": (partial(prune_neurons, remove=0.5,
                                scores={"blocks.1.mlp": torch.ones(129)}), "expected 128"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_leave_the_model_as_it_was(name):
    change, message = REFUSALS[name]
    model = a_gpt()
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        change(model)
    unchanged(model, before, [])


def test_layers_without_scores_are_left_alone():
    model = a_gpt()
    assert prune_heads(model, 0.25, {1: torch.arange(8.0)}) == {1: [0, 1]}
    assert prune_neurons(model, 0.5, {"blocks.2.mlp": -torch.arange(128.0)}, "global") == {
        "blocks.2.mlp": [*range(64, 128)]}


def test_unequal_groups_are_refused():
    model = a_gpt(replace(SIZES, n_kv_heads=4))
    before = everything(model)
    with pytest.raises(ValueError, match=r"layer 1 would keep \[1, 2, 2, 2\] query heads"):
        prune_heads(model, {0: [0, 1], 1: [0]})
    unchanged(model, before, [])


def test_quantized_models_are_refused():
    model = a_gpt()
    quantized(model, ("W_query", "fc_out"))
    model.transforms.append(["quantize", {}])
    before = everything(model)
    for change in (prune_heads, prune_neurons):
        with pytest.raises(ValueError, match="Quantized, no plain Linear"):
            change(model, 0.5)
    unchanged(model, before, [["quantize", {}]])


def test_nothing_to_prune_is_said():
    class Nothing(nn.Module):
        def forward(self, x, positions):
            return 0 * x

    model = GPTModel(SIZES, mlp=lambda config, layer: Nothing())
    with pytest.raises(ValueError, match="nothing to prune"):
        prune_neurons(model, 0.5)


def test_masks_come_off_before_heads_do():
    model = a_gpt()
    prune(model, 0.5)
    before, transforms = everything(model), copy.deepcopy(model.transforms)
    for change in (prune_heads, prune_neurons):
        with pytest.raises(ValueError, match="call finalize first"):
            change(model, 0.5)
    unchanged(model, before, transforms)


def test_amount_zero_changes_nothing():
    model = a_gpt()
    before = everything(model)
    assert not any(prune_heads(model, 0).values()) and not any(prune_neurons(model, 0.0).values())
    assert prune_heads(model, {}) == {} == prune_neurons(model, {1: []})
    unchanged(model, before, [])


def test_narrowed_is_a_part_of_the_linear():
    linear = nn.Linear(6, 5).requires_grad_(False)
    small = narrowed(linear, [4, 0], [1, 2, 5])
    assert torch.equal(small.weight, linear.weight[[4, 0]][:, [1, 2, 5]])
    assert torch.equal(small.bias, linear.bias[[4, 0]]) and not small.weight.requires_grad
    assert (small.in_features, small.out_features) == (3, 2)
    small.weight.data.zero_()
    assert linear.weight.abs().sum() > 0, "its own memory"


def test_transforms_are_registered():
    assert {"prune_heads", "prune_neurons"} <= set(TRANSFORMS)


def test_other_feed_forwards_by_their_shapes():
    """A gate of any name is found: it fills as many neurons as `fc_out` reads."""
    class Gated(nn.Module):
        def __init__(self, config, layer):
            super().__init__()
            self.gate, self.fc_in = nn.Linear(32, 40), nn.Linear(32, 40)
            self.fc_out = nn.Linear(40, 32)

        def forward(self, x, positions):
            return self.fc_out(self.gate(x).sigmoid() * self.fc_in(x))

    set_seed(0)
    model, ids = GPTModel(SIZES, mlp=Gated).eval(), some_ids()
    silent = copy.deepcopy(model)
    silence_neurons(silent, prune_neurons(model, 0.5))
    torch.testing.assert_close(model(ids), silent(ids), rtol=1e-5, atol=1e-5)
    assert model.blocks[0].mlp.gate.out_features == 20
