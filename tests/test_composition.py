"""Every part with every other part: the invariants that no combination may break."""

from dataclasses import dataclass
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gptbook.checkpoints import load_model, save_model
from gptbook.core import (
    RECIPES, TRANSFORMS, FeedForward, GPTConfig, GPTModel, LearnedPositions, LossModel,
    MultiHeadAttention, Positions, naive_attention, replace_modules, sdpa, set_seed,
)
from gptbook.inference import KVCache
from outside_parts import NoPositions, Rotary, SlidingWindow

V, T = 61, 20


class Gated(nn.Module):
    """A gated feed-forward, as a part from outside."""

    def __init__(self, config, layer):
        super().__init__()
        self.gate, self.fc_in = (nn.Linear(config.emb_dim, 40, bias=False) for _ in "gi")
        self.fc_out = nn.Linear(40, config.emb_dim, bias=False)

    def forward(self, x, positions):
        return self.fc_out(F.silu(self.gate(x)) * self.fc_in(x))


def alternating(config, layer, **kwargs):
    """Windowed and full layers in turn, so that rings and plain buffers meet."""
    mask = {} if layer % 2 else {"mask": SlidingWindow(5)}
    return MultiHeadAttention(config, layer, **mask, **kwargs)


def nearer_is_stronger(q_pos, k_pos):
    return -0.1 * (q_pos - k_pos)


ATTENTION = {
    "full": MultiHeadAttention,
    "naive": partial(MultiHeadAttention, kernel=naive_attention),
    "window": partial(MultiHeadAttention, mask=SlidingWindow(5)),
    "alternating": alternating,
    "rotary": partial(MultiHeadAttention, rotary=Rotary),
    "alternating rotary": partial(alternating, rotary=Rotary),
    "bias": partial(MultiHeadAttention, bias=nearer_is_stronger),
}
MLP = {"gelu": FeedForward, "gated": Gated}
NORM = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
POSITIONS = {"learned": LearnedPositions, "none": NoPositions}
HEADS = {"all heads": None, "grouped": 2, "one": 1}


class Wrapped(nn.Module):
    """A transform's wrapper with an update that starts at zero, like LoRA's."""

    def __init__(self, base):
        super().__init__()
        self.base, self.update = base, nn.Parameter(torch.zeros_like(base.weight))

    def forward(self, x):
        return self.base(x) + F.linear(x, self.update)


def wrap(model, target="W_query"):
    replace_modules(model, lambda n, m: n.endswith(target) and isinstance(m, nn.Linear),
                    lambda n, m: Wrapped(m))
    model.transforms.append(["wrap", {"target": target}])


GRID = list(product(ATTENTION, MLP, NORM, POSITIONS, HEADS))


def make(attention, mlp, norm, position, heads, n_layers=3):
    set_seed(3)
    config = GPTConfig(V, 32, 24, n_layers, 4, HEADS[heads])
    slots = dict(attention=ATTENTION[attention], mlp=MLP[mlp], norm=NORM[norm],
                 position_embedding=POSITIONS[position])
    model = GPTModel(config, **slots).eval()
    with torch.no_grad():  # weights large enough that a mistake shows
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    return model, slots


@pytest.fixture(scope="module")
def ids():
    set_seed(4)
    return torch.randint(V, (3, T))


@pytest.mark.parametrize("parts", GRID, ids="-".join)
@torch.no_grad()
def test_causal_bit_for_bit(parts, ids):
    model, _ = make(*parts)
    other = ids.clone()
    other[:, 9] = (ids[:, 9] + 1) % V
    a, b = model(ids), model(other)
    assert torch.equal(a[:, :9], b[:, :9]) and not torch.equal(a[:, 9:], b[:, 9:])


@pytest.mark.parametrize("parts", GRID, ids="-".join)
@torch.no_grad()
def test_cached_equals_full(parts, ids):
    model, _ = make(*parts)
    full = model(ids)
    scale = full.abs().max().item()
    for chunk in (1, 3, T):
        cache = KVCache(model, max_length=32)
        steps = [model(ids[:, t:t + chunk], cache=cache) for t in range(0, T, chunk)]
        torch.testing.assert_close(torch.cat(steps, 1), full, atol=1e-5 * max(1, scale), rtol=0)


@pytest.mark.parametrize("parts", GRID, ids="-".join)
@torch.no_grad()
def test_padded_rows_equal_rows_alone(parts, ids):
    model, _ = make(*parts)
    lengths = [T, 13, 4]
    where = torch.stack([torch.arange(T) - (T - n) for n in lengths]).clamp(min=-1)
    batch = torch.stack([ids[b].roll(T - n) for b, n in enumerate(lengths)])
    out, cache = model(batch, positions=where), KVCache(model, max_length=32)
    cached = model(batch, positions=where, cache=cache)
    for b, n in enumerate(lengths):
        alone = model(ids[b:b + 1, :n])[0]
        for got in (out, cached):
            torch.testing.assert_close(got[b, T - n:], alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("parts", GRID, ids="-".join)
def test_every_parameter_gets_a_gradient(parts, ids):
    model, _ = make(*parts)
    LossModel(model.train())(ids[:, :-1], ids[:, 1:]).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # a key bias shifts all scores of a row alike: softmax cannot see it
    assert [n for n in dead if not n.endswith("W_key.bias")] == []


@pytest.mark.parametrize("parts", GRID[::7], ids="-".join)
@torch.no_grad()
def test_checkpoint_round_trip_with_parts_by_hand_and_a_transform(parts, ids, tmp_path, monkeypatch):
    monkeypatch.setitem(TRANSFORMS, "wrap", wrap)
    model, slots = make(*parts)
    before = model(ids)
    wrap(model)
    assert torch.equal(model(ids), before), "a transform that starts at zero is a no-op"
    for p in model.parameters():
        p.add_(0.01)
    save_model(tmp_path / "m.safetensors", model)
    again = load_model(tmp_path / "m.safetensors", **slots).model.eval()
    assert again.transforms == model.transforms and again.custom == model.custom
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("recipe", list(RECIPES))
@torch.no_grad()
def test_recipes_round_trip_without_any_slot(recipe, ids, tmp_path):
    model = GPTModel(GPTConfig(V, 32, 24, 2, 4, recipe=recipe)).eval()
    save_model(tmp_path / "m.safetensors", model)
    assert torch.equal(load_model(tmp_path / "m.safetensors").model.eval()(ids), model(ids))


@torch.no_grad()
def test_the_grid_notices_a_wrong_part(ids):
    """Negative control: a kernel that forgets the mask breaks causality and the cache."""
    def no_mask(q, k, v, *, q_pos, k_pos, mask, bias=None, dropout=0.0):
        return sdpa(q, k, v, q_pos=Positions(q_pos.index), k_pos=Positions(k_pos.index),
                    mask=lambda a, b: (a >= -1) & (b >= -1))

    model = GPTModel(GPTConfig(V, 32, 24, 2, 4),
                     attention=partial(MultiHeadAttention, kernel=no_mask)).eval()
    other = ids.clone()
    other[:, 9] = (ids[:, 9] + 1) % V
    assert not torch.equal(model(ids)[:, :9], model(other)[:, :9])
    cache = KVCache(model)
    steps = [model(ids[:, t:t + 1], cache=cache) for t in range(T)]
    assert (torch.cat(steps, 1) - model(ids)).abs().max() > 1e-3
