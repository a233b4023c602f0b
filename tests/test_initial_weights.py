"""The start that copies: closed forms over shapes, and what it must leave alone."""

import math

import pytest
import torch
import torch.nn.functional as F

from gptbook.core import GPTConfig, GPTModel, init_weights, set_seed
from gptbook.initial_weights import init_copying

SHAPES = [(64, 4, None), (96, 4, 2), (128, 8, 1), (192, 3, 3)]


def new_model(width=192, heads=4, kv_heads=None, seed=0, **kwargs):
    set_seed(seed)
    model = GPTModel(GPTConfig(300, 32, width, 2, heads, n_kv_heads=kv_heads, **kwargs))
    init_weights(model, width**-0.5)
    return model


def products(model, layer=1):
    """(QK, OV) summed over the heads, each (C, C), by a loop over heads."""
    attn, D = model.blocks[layer].attn, model.config.head_dim
    group = model.config.n_heads // model.config.kv_heads
    qk = ov = 0
    for h in range(model.config.n_heads):
        k = h // group
        q, key, value = (w.weight[i * D:(i + 1) * D].double() for w, i in (
            (attn.W_query, h), (attn.W_key, k), (attn.W_value, k)))
        qk = qk + q.T @ key
        ov = ov + attn.out_proj.weight[:, h * D:(h + 1) * D].double() @ value
    return qk, ov


@pytest.mark.parametrize("width, heads, kv_heads", SHAPES)
@pytest.mark.parametrize("likeness, gain", [(0.5, 0.7), (0.9, 1.0)])
def test_both_products_are_near_the_identity(width, heads, kv_heads, likeness, gain):
    many = []
    for seed in range(12):
        init_copying(model := new_model(width, heads, kv_heads, seed), likeness, gain)
        many.append([x.detach() for x in products(model)])
    qk, ov = (torch.stack(x).mean(0) for x in zip(*many))
    share = (kv_heads or heads) / heads  # one query head of each group resembles its key
    # each entry of the diagonal sums `width` squares of variance 1 / width
    for product, expected in ((qk, likeness * share), (ov, gain)):
        noise = 4 * math.sqrt(2 / width / 12 * heads / (kv_heads or heads))
        assert abs(product.diagonal().mean() - expected) < noise * expected / 4
        assert (product.diagonal() - expected).abs().max() < 2 * noise
        rest = product - product.diagonal().diag()
        assert abs(rest.mean()) < 0.01 and rest.std() < noise


def test_without_the_transpose_it_does_not_copy():
    """The negative control: the shapes fit, the direction does not."""
    init_copying(model := new_model())
    attn, x = model.blocks[0].attn, model.tok_emb.weight
    right = F.cosine_similarity(attn.out_proj(attn.W_value(x)), x, dim=-1).mean()
    with torch.no_grad():
        attn.out_proj.weight.copy_(0.7 * attn.W_value.weight)
    wrong = F.cosine_similarity(attn.out_proj(attn.W_value(x)), x, dim=-1).mean()
    assert right > 0.6 and abs(wrong) < 0.1


@pytest.mark.parametrize("likeness", [0.0, 0.5, 1.0])
def test_keys_keep_their_size(likeness):
    before, after = new_model(), new_model()
    init_copying(after, likeness)
    sizes = [m.blocks[0].attn.W_key.weight.std().item() for m in (before, after)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.02


def test_it_changes_keys_outputs_and_positions_alone():
    before, after = new_model(), new_model()
    init_copying(after)
    changed = {name for name, p in after.named_parameters()
               if not torch.equal(p, dict(before.named_parameters())[name])}
    expected = {f"blocks.{i}.attn.{w}.weight" for i in (0, 1) for w in ("W_key", "out_proj")}
    assert changed == expected | {"position_embedding.table.weight"}
    assert abs(after.position_embedding.table.weight.std().item() / 0.01 - 1) < 0.05
    assert after.head.weight is after.tok_emb.weight


@pytest.mark.parametrize("likeness", [-0.1, 1.5, math.nan])
def test_a_likeness_outside_its_range_is_refused(likeness):
    with pytest.raises(ValueError, match="outside"):
        init_copying(new_model(), likeness)
