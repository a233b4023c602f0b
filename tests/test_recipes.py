"""The recipes: what they choose, what they refuse, and the promises that all keep."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config)

import gptbook.recipes as recipes
from gptbook.checkpoints import load_model, save_model
from gptbook.architecture import NoPositions
from gptbook.core import (
    RECIPES, Causal, GPTConfig, GPTModel, LossModel, auxiliary_loss, naive_attention, replace_modules,
    set_seed)
from gptbook.inference import KVCache
from gptbook.moe import MixtureOfExperts
from gptbook.sparse import blocked_attention

V, T = 61, 24
OPTIONS = {  # small enough that patterns, rings and experts matter within T tokens
    "gpt2": {}, "llama": {}, "alibi": {},
    "llama, qkv_bias": {"qkv_bias": True},
    "llama, yarn": {"rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "mistral": {"window": 5},
    "mixtral": {"n_experts": 4},
    "mixtral, window": {"n_experts": 4, "window": 6},
    "switch": {"n_experts": 4, "every": 2},
    "strided": {"stride": 4},
    "longformer": {"window": 4, "global_tokens": 2},
    "bigbird": {"window": 3, "draws": 1, "block": 4},
}


def make(name, kv_heads=None, layers=2, **sizes):
    set_seed(3)
    recipe = name.split(",")[0]
    config = GPTConfig(V, 32, 32, layers, 4, kv_heads, recipe=recipe, options=OPTIONS[name],
                       **sizes)
    model = GPTModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() > 1 else 1)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(V, (3, T), generator=torch.manual_seed(4))


every = pytest.mark.parametrize("name", OPTIONS)
heads = pytest.mark.parametrize("kv_heads", [None, 2, 1])


def test_the_nine_are_registered_by_a_plain_import():
    import gptbook  # noqa: F401
    assert {"gpt2", "llama", "mistral", "mixtral", "switch", "strided", "longformer",
            "bigbird", "alibi"} <= set(RECIPES)
    assert {name.split(",")[0] for name in OPTIONS} == set(RECIPES)


@every
@heads
@torch.no_grad()
def test_causal(name, kv_heads, ids):
    """To the bit; with experts to rounding, since their products get other row counts."""
    model, experts = make(name, kv_heads), name.startswith(("mixtral", "switch"))
    for t in (0, 9, T - 1):
        other = ids.clone()
        other[:, t] = (ids[:, t] + 1) % V
        a, b = model(ids), model(other)
        torch.testing.assert_close(a[:, :t], b[:, :t], rtol=0, atol=1e-5 if experts else 0)
        assert not torch.allclose(a[:, t:], b[:, t:], atol=1e-3)


@every
@heads
@torch.no_grad()
def test_cached_equals_full(name, kv_heads, ids):
    model = make(name, kv_heads)
    full = model(ids)
    for chunk in (1, 2, 5, T):
        cache = KVCache(model, max_length=32)
        steps = [model(part, cache=cache) for part in ids.split(chunk, 1)]
        torch.testing.assert_close(torch.cat(steps, 1), full, rtol=0,
                                   atol=1e-5 * max(1, full.abs().max().item()))


@every
@torch.no_grad()
def test_rows_with_padding_equal_rows_alone(name, ids):
    model, lengths = make(name, 2), (T, 13, 4)
    where = torch.stack([torch.arange(T) - (T - n) for n in lengths]).clamp(min=-1)
    out = model(ids, positions=where)
    cached = model(ids, positions=where, cache=KVCache(model, max_length=32))
    for b, n in enumerate(lengths):
        alone = model(ids[b:b + 1, T - n:])[0]
        for got in (out, cached):
            torch.testing.assert_close(got[b, T - n:], alone, atol=2e-5, rtol=1e-5)


@every
@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours(name, ids):
    model = make(name)
    many = torch.cat([ids] * 6)
    torch.testing.assert_close(model(many)[:3], model(ids), atol=1e-5, rtol=1e-5)


@every
@torch.no_grad()
def test_saved_and_loaded(name, ids, tmp_path):
    model = make(name)
    save_model(tmp_path / "m.safetensors", model)
    again = load_model(tmp_path / "m.safetensors").model.eval()
    assert again.config == model.config and again.custom == ()
    assert torch.equal(again(ids), model(ids))


@every
def test_pickled_copied_and_in_other_dtypes(name, ids):
    model = make(name).train()
    model(ids)  # leaves what a copy must not take along
    with torch.no_grad():
        expected = model.eval()(ids)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(ids), expected)
        wide = copy.deepcopy(model).double()(ids)
        assert wide.dtype == torch.float64
        torch.testing.assert_close(wide.float(), expected, atol=2e-5, rtol=1e-5)
        assert copy.deepcopy(model).bfloat16()(ids[:, :1]).isfinite().all()


@every
def test_every_parameter_gets_a_gradient(name, ids):
    model = make(name).train()
    (LossModel(model)(ids[:, :-1], ids[:, 1:]) + auxiliary_loss(model)).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    rotated = "llama" in name or "mi" in name  # a rotation makes a bias of keys visible
    assert [n for n in dead if rotated or not n.endswith("W_key.bias")] == []


class Wrapped(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.update = base, nn.Parameter(torch.zeros_like(base.weight))

    def forward(self, x):
        return self.base(x) + F.linear(x, self.update)


@every
@torch.no_grad()
def test_linears_can_be_wrapped_by_name(name, ids):
    model = make(name)
    before = model(ids)
    last = ("W_query", "W_value", "fc_in", "fc_out")
    names = replace_modules(model, lambda n, m: n.endswith(last), lambda n, m: Wrapped(m))
    assert all(any(n.endswith(part) for n in names) for part in last)
    assert torch.equal(model(ids), before)
    for n in names:
        model.get_submodule(n).update.add_(0.1)
    assert not torch.allclose(model(ids), before), "the wrappers are really called"


@every
def test_matrices_are_linears_that_int8_can_replace(name):
    model = make(name)
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    left = [n for n, p in model.named_parameters() if p.dim() == 2 and id(p) not in linear]
    assert set(left) <= {"position_embedding.table.weight"}  # the tied head is a linear


# Sizes against transformers ------------------------------------------------------------

def count(model):
    return sum(p.numel() for p in model.parameters())


SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config, recipe, options", [
    (LlamaConfig, "llama", {}), (Qwen2Config, "llama", {"qkv_bias": True}),
    (MistralConfig, "mistral", {}), (MixtralConfig, "mixtral", {"n_experts": 3}),
])
def test_as_many_parameters_as_in_transformers(config, recipe, options, tied):
    experts = dict(num_local_experts=3) if recipe == "mixtral" else {}
    theirs = AutoModelForCausalLM.from_config(config(
        **SMALL, **experts, tie_word_embeddings=tied))
    sizes = GPTConfig(97, 64, 32, 3, 4, 2, bias=False, tied=tied, recipe=recipe,
                      options={"hidden_dim": 40, **options})
    assert count(GPTModel(sizes)) == count(theirs)
    assert count(GPTModel(replace(sizes, bias=True))) != count(theirs)


def test_published_sizes():
    with torch.device("meta"):
        gpt2 = AutoModelForCausalLM.from_config(GPT2Config())
        assert count(GPTModel(GPTConfig())) == count(gpt2) == 124_439_808
        llama = GPTConfig(32_000, 4096, 4096, 32, 32, bias=False, tied=False,
                          recipe="llama", options={"hidden_dim": 11_008})
        assert count(GPTModel(llama)) == 6_738_415_616


# What they choose ------------------------------------------------------------------------

def test_masks_and_windows():
    assert {b.attn.mask.window for b in make("mistral").blocks} == {5}
    model = GPTModel(GPTConfig(V, 32, 32, 1, 4, recipe="mistral", options={"window": None}))
    assert model.blocks[0].attn.mask == Causal()
    for name in ("longformer", "bigbird", "strided"):
        assert getattr(make(name).blocks[0].attn.mask, "window", None) is None


def test_a_window_keeps_a_ring_and_global_tokens_do_not(ids):
    kept = {}
    for name in ("mistral", "longformer"):
        model = make(name, layers=1)
        cache = KVCache(model, max_length=32)
        with torch.no_grad():
            model(ids, cache=cache)
        assert cache.length == T
        kept[name] = cache.buffers[0][0].shape[2]
    assert kept["mistral"] < T <= kept["longformer"] <= 32


def test_switch_puts_experts_into_every_second_layer():
    model = make("switch", layers=4)
    kinds = [isinstance(block.mlp, MixtureOfExperts) for block in model.blocks]
    assert kinds == [False, True, False, True]
    experts = model.blocks[1].mlp
    assert experts.top_k == 1 and experts.capacity_factor == 1.25


def test_dropping_happens_in_training_alone(ids):
    set_seed(0)
    options = {"n_experts": 4, "capacity_factor": 0.3, "every": 1}
    model = GPTModel(GPTConfig(V, 32, 32, 1, 4, recipe="switch", options=options))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
        full = model.eval()(ids)
        torch.testing.assert_close(
            torch.cat([model(ids[b:b + 1]) for b in range(3)]), full, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model.train()(ids), full, atol=1e-3)


def test_qkv_bias_is_on_three_linears():
    model = make("llama, qkv_bias", bias=False)
    with_bias = {n.split(".")[-2] for n, _ in model.named_parameters() if n.endswith("bias")}
    assert with_bias == {"W_query", "W_key", "W_value"}


def test_rope_options_reach_the_rotation():
    with_scaling, plain = make("llama, yarn"), make("llama")
    a, b = (m.blocks[0].attn.rotary for m in (with_scaling, plain))
    assert a.factor != 1 and not torch.equal(a.frequencies, b.frequencies)
    config = replace(plain.config, options={"rope_base": 5e5})
    assert GPTModel(config).blocks[0].attn.rotary.frequencies[-1] < b.frequencies[-1]


@pytest.mark.parametrize("name", ["mistral", "longformer", "bigbird"])
def test_long_rows_skip_what_is_hidden_and_change_nothing(name):
    model, x = make(name, 2), torch.randint(V, (2, 150), generator=torch.manual_seed(5))
    other = make(name, 2)
    for block in other.blocks:
        assert block.attn.kernel is blocked_attention
        block.attn.kernel = naive_attention
    for m in (model, other):
        m.position_embedding = NoPositions(m.config)  # the table ends at 32
        m.max_positions = None
        LossModel(m)(x[:, :-1], x[:, 1:]).backward()
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x), atol=2e-5, rtol=1e-5)
    for (n, p), q in zip(model.named_parameters(), other.parameters()):
        if p.grad is not None and "W_key.bias" not in n:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4, msg=n)


# What they refuse ------------------------------------------------------------------------

@pytest.mark.parametrize("recipe, options, words", [
    ("lama", {}, "unknown recipe.*llama"),
    ("llama", {"rope_bse": 1}, "no option 'rope_bse'.*rope_base"),
    ("gpt2", {"window": 3}, "it has: none"),
    ("mistral", {"window": 0}, "window=0"),
    ("mixtral", {"n_experts": 2, "top_k": 3}, "top_k=3"),
    ("switch", {"every": 0}, "every=0"),
    ("strided", {"stride": -1}, "stride=-1"),
    ("longformer", {"window": 4, "global_tokens": 0}, "0"),
    ("bigbird", {"seed": -1}, "seed=-1"),
    ("llama", {"rope_scaling": {"rope_type": "magic", "factor": 2.0}}, "magic"),
    ("llama", {"hidden_dim": -3}, "hidden_dim"),
    ("llama", {"rope_base": -1.0}, "base"),
    ("llama", {"rope_base": "x"}, "rope_base='x'"),
    ("llama", {"hidden_dim": 2.5}, "hidden_dim=2.5"),
    ("llama", {"hidden_dim": True}, "hidden_dim=True"),
    ("llama", {"norm_eps": -1e-5}, "norm_eps=-1e-05"),
    ("llama", {"qkv_bias": "no"}, "qkv_bias='no'"),
    ("mixtral", {"balance": -1}, "balance=-1"),
    ("switch", {"every": 3}, "every=3.*2 layers"),
])
def test_refused_with_a_reason(recipe, options, words):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        GPTModel(GPTConfig(V, 32, 32, 2, 4, recipe=recipe, options=options))


def test_options_travel_as_json():
    for name, options in OPTIONS.items():
        assert json.loads(json.dumps(options)) == make(name).config.options


def test_docstrings_name_their_source():
    for name in RECIPES:
        assert "20" in RECIPES[name].__doc__, name
    assert recipes.llama.__doc__.startswith("Llama")
