"""Heads taken away and transplanted: against smaller matrices, sums by hand, and what must not change."""
import copy

import pytest
import torch

import gptbook  # noqa: F401, registers all recipes
from gptbook.core import RECIPES, GPTConfig, GPTModel, sdpa, set_seed
from gptbook.effects import (
    WAYS, edit_heads, losses_at, mean_of_heads, patch_effects, record_heads, without_heads)
from gptbook.structured_pruning import prune_heads
from gptbook.training import evaluating

pytestmark = pytest.mark.usefixtures("one_thread")
V = 53


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def made(recipe="gpt2", n_kv_heads=None):
    set_seed(2)
    model = GPTModel(GPTConfig(V, 64, 32, 3, 4, n_kv_heads, recipe=recipe)).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.mul_(4)
    return model


def texts(B=3, T=12, seed=0):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("heads", [[(0, 1)], [(0, 0), (0, 3), (2, 2)]])
def test_zeros_equal_smaller_matrices(heads):
    model, ids = made(), texts()
    with without_heads(model, heads, "zero"):
        found = model(ids)
    pruned = copy.deepcopy(model)
    by_layer = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    prune_heads(pruned, by_layer)
    torch.testing.assert_close(found, pruned(ids), atol=1e-4, rtol=1e-5)
    assert (found - model(ids)).abs().max() > 0.1


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_nothing_changes_before_and_after(recipe):
    model, ids = made(recipe), texts()
    plain, kernels = model(ids), [block.attn.kernel for block in model.blocks]
    with edit_heads(model, lambda layer, out: out):
        assert torch.equal(model(ids), plain)
    with record_heads(model) as found:
        assert torch.equal(model(ids), plain)
    assert {layer: out.shape for layer, out in found.items()} == dict.fromkeys(range(3), (3, 4, 12, 8))
    with without_heads(model, [(1, 2)], "zero"):
        assert not torch.equal(model(ids), plain)
    with pytest.raises(RuntimeError, match="stop"), without_heads(model, [(1, 2)], "zero"):
        raise RuntimeError("stop")
    assert [block.attn.kernel for block in model.blocks] == kernels
    assert torch.equal(model(ids), plain)


def test_what_is_put_in_place_of_a_head():
    model, ids = made(), texts()
    means = mean_of_heads(model, [texts(seed=1), texts(5, 9, seed=2)])
    seen = {}

    def look(way):
        kept, kernel = {}, model.blocks[0].attn.kernel
        with without_heads(model, [(0, 1), (0, 3)], way, means):
            inner = model.blocks[0].attn.kernel

            def watch(*args, **options):
                kept["out"] = inner(*args, **options)
                return kept["out"]

            model.blocks[0].attn.kernel = watch
            model(ids)
        assert model.blocks[0].attn.kernel is kernel
        return kept["out"]

    with record_heads(model) as plain:
        model(ids)
    for way in WAYS:
        seen[way] = look(way)
        assert torch.equal(seen[way][:, [0, 2]], plain[0][:, [0, 2]]), "the others stay"
    assert not seen["zero"][:, [1, 3]].any()
    wanted = means[0][[1, 3]][None, :, None].expand(3, 2, 12, 8)
    assert torch.equal(seen["mean"][:, [1, 3]], wanted)
    assert torch.equal(seen["resample"][:, [1, 3]], plain[0][:, [1, 3]][[2, 0, 1]])


def test_means_are_means_over_all_tokens():
    model = made("llama", n_kv_heads=2)
    a, b = texts(2, 10), texts(4, 7, seed=1)
    parts = []
    for ids in (a, b):
        with record_heads(model) as found:
            model(ids)
        parts.append(found[1].transpose(1, 2).flatten(0, 1))  # (B T, H, D)
    torch.testing.assert_close(mean_of_heads(model, [a, b])[1], torch.cat(parts).mean(0))


def test_losses_stand_where_the_token_is_predicted():
    model, ids = made(), texts()
    found = losses_at(model, ids)
    assert found.shape == (3, 11)
    for b, t in ((0, 1), (2, 7), (1, 11)):
        log_p = model(ids[b : b + 1, :t])[0, -1].log_softmax(-1)
        assert found[b, t - 1].item() == pytest.approx(-log_p[ids[b, t]].item(), abs=1e-4)


def test_transplants_one_by_one():
    """Each share by hand: record, replace, run."""
    model, ids, other = made(), texts(), texts(seed=5)
    measure = lambda logits: logits[:, 3] - logits[:, 7]
    shares = patch_effects(model, ids, other, measure, position=-2)
    assert shares.shape == (3, 4)
    here, there = measure(model(ids)[:, -1]), measure(model(other)[:, -1])
    with record_heads(model) as borrowed:
        model(other)
    for layer, head in ((0, 0), (1, 3), (2, 1)):
        def edit(i, out):
            if i == layer:
                out = out.clone()
                out[:, head, -2] = borrowed[layer][:, head, -2]
            return out

        with edit_heads(model, edit):
            now = measure(model(ids)[:, -1])
        wanted = (now - here).mean() / (there - here).mean()
        assert shares[layer, head].item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-6)
    last = patch_effects(model, ids, other, measure)
    assert not torch.allclose(last, shares), "the position matters"
    assert all(block.attn.kernel is sdpa for block in model.blocks)


def test_a_transplant_into_itself_and_of_a_copy():
    model, ids = made(), texts()
    twin = ids.clone()
    twin[:, 4] = (twin[:, 4] + 1) % V
    shares = patch_effects(model, ids, twin, lambda logits: logits[:, 0], position=2)
    assert shares.abs().max() < 1e-5, "token 2 comes before the difference"


@pytest.mark.parametrize("heads, said", [
    ([(0, 4)], "layer 0 has 4 heads"), ([(0, -1)], "head -1"), ([(3, 0)], "layers with attention"),
    ([(0, "1")], "head '1'"), ([(-1, 0)], "layer -1"),
])
def test_heads_that_are_not_there(heads, said):
    model = made()
    with pytest.raises(ValueError, match=said), without_heads(model, heads, "zero"):
        pass
    assert all(block.attn.kernel is sdpa for block in model.blocks)


def test_other_mistakes():
    model, ids = made(), texts()
    with pytest.raises(ValueError, match="zero, mean, resample"), without_heads(model, [(0, 0)], "one"):
        pass
    with pytest.raises(ValueError, match="mean_of_heads"), without_heads(model, [(0, 0)]):
        pass
    means = {0: mean_of_heads(model, [ids])[0]}
    with pytest.raises(ValueError, match="each layer"), without_heads(model, [(0, 0), (1, 0)], "mean", means):
        pass
    with pytest.raises(ValueError, match="no text"):
        mean_of_heads(model, [])
    with pytest.raises(ValueError, match="answer the same"):
        patch_effects(model, ids, ids, lambda logits: logits[:, 0])
    with pytest.raises(ValueError, match="two texts"), without_heads(model, [(0, 0)], "resample"):
        model(ids[:1])
    with pytest.raises(ValueError, match="as many tokens"):
        patch_effects(model, ids, ids[:, :5], lambda logits: logits[:, 0])


def test_the_mode_of_each_part_is_back():
    model, ids = made(), texts()
    set_seed(0)
    dropping = GPTModel(GPTConfig(V, 64, 32, 3, 4, drop_rate=0.5))
    dropping.load_state_dict(model.state_dict())
    dropping.train().blocks[1].eval()  # one part stands otherwise
    modes = [part.training for part in dropping.modules()]
    assert {*modes} == {True, False}
    measure = lambda logits: logits[:, 0]
    for work in (lambda m: losses_at(m, ids), lambda m: mean_of_heads(m, [ids])[2],
                 lambda m: patch_effects(m, ids, ids.flip(1), measure)):
        torch.testing.assert_close(work(dropping), work(model))  # nothing is dropped
        assert [part.training for part in dropping.modules()] == modes
    with pytest.raises(RuntimeError, match="stop"), evaluating(dropping):
        assert not any(part.training for part in dropping.modules())
        raise RuntimeError("stop")
    assert [part.training for part in dropping.modules()] == modes


def test_patches_of_layers_with_different_numbers_of_heads():
    """Never a table whose rows mix the heads of two layers."""
    model, ids, other = made(), texts(), texts().flip(1)
    whole = patch_effects(model, ids, other, lambda logits: logits[:, 0])
    prune_heads(model, {1: [0, 2]})
    with pytest.raises(ValueError, match=r"numbers of heads, \[4, 2, 4\]"):
        patch_effects(model, ids, other, lambda logits: logits[:, 0])
    some = patch_effects(model, ids, other, lambda logits: logits[:, 0], layers=[0, 2])
    assert some.shape == (2, 4) and whole.shape == (3, 4)
    assert patch_effects(model, ids, other, lambda logits: logits[:, 0], layers=[1]).shape == (1, 2)
