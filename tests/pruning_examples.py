"""Models that the tests of pruning share: every recipe, small, with nothing at zero."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from gptbook.checkpoints import CheckpointError, load_model, save_model
from gptbook.core import GPTConfig, GPTModel, replace_modules, set_seed

V, T = 61, 20
BAD_AMOUNTS = [-0.1, 1, 1.0, 1.5, float("nan"), float("inf"), True, "half", None]
SIZES = GPTConfig(V, 32, 32, 3, 8)
RECIPES = {
    "gpt2": SIZES, "gpt2 without biases": replace(SIZES, bias=False),
    "untied": replace(SIZES, tied=False), "grouped": replace(SIZES, n_kv_heads=4),
    "one key head": replace(SIZES, n_kv_heads=1),
    "llama": replace(SIZES, recipe="llama", bias=False, n_kv_heads=2),
    "qwen": replace(SIZES, recipe="llama", bias=False, options={"qkv_bias": True}),
    "alibi": replace(SIZES, recipe="alibi"),
    "alibi grouped": replace(SIZES, recipe="alibi", n_kv_heads=2),
    "mistral": replace(SIZES, recipe="mistral", bias=False, options={"window": 5}),
}


def a_gpt(config=SIZES, seed=0):
    set_seed(seed)
    model = GPTModel(config).eval()
    for p in model.parameters():  # biases and norms too, so that none hides behind zero
        p.data += 0.05 * torch.randn_like(p)
    return model


def some_ids(n=2, length=T, seed=0):
    return torch.randint(V, (n, length), generator=torch.Generator().manual_seed(seed))


def everything(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before, transforms):
    now = model.state_dict()
    assert list(now) == list(before) and model.transforms == transforms
    assert all(torch.equal(now[name], before[name]) for name in now)


def block_linears(model):
    return [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]


class Quantized(nn.Module):
    """What a transform may put in a linear's place."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("weight_q", linear.weight.detach().to(torch.int8))


def quantized(model, names=("W_query",)):
    replace_modules(model, lambda name, m: name.rpartition(".")[2] in names,
                    lambda name, m: Quantized(m))


def assert_refused(transform, path):
    """A checkpoint is loaded, and is not with this transform in it."""
    save_model(path, model := a_gpt())
    assert load_model(path)
    model.transforms.append(transform)
    save_model(path, model)
    with pytest.raises(CheckpointError):
        load_model(path)
