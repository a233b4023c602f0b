"""Bytes and operations against what a real model does, roofs, and speeds that can be real."""
import math
import time
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gptbook.core import (
    GPTConfig, GPTModel, MultiHeadAttention, naive_attention, replace_modules,
)
from gptbook.inference import KVCache
from gptbook.quantization import quantize
from gptbook.roofline import (
    TokenCost, attention_sizes, bandwidth, cache_bytes_read, decode_roof, expert_shares,
    fastest, keys_seen, own_tensors, step_operations, token_cost, weight_bytes,
)
from gptbook.sparse import SlidingWindow
from gptbook.structured_pruning import prune_heads, prune_neurons

aten = torch.ops.aten
SIZES = dict(vocab_size=211, context_length=64, emb_dim=32, n_layers=2, n_heads=4)
STEPS = [(0, 1, 1), (7, 1, 1), (30, 1, 1), (7, 3, 1), (0, 1, 9), (5, 2, 4), (0, 4, 12)]


def address(x):
    return x.untyped_storage().data_ptr()


class Watch(TorchDispatchMode):
    """Bytes of a model's tensors, and of the cache, that operations are given."""

    def __init__(self, model):
        super().__init__()
        held = [*model.parameters(), *model.buffers()]
        self.model = {address(x) for x in held if x.numel()}
        self.whole, self.rows = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is aten.embedding.default:
            self.rows += args[1].numel() * args[0][:1].nbytes
        else:
            flat = [y for x in args for y in (x if isinstance(x, (list, tuple)) else [x])]
            for x in flat:
                if isinstance(x, Tensor) and address(x) in self.model:
                    self.whole[address(x)] = x.untyped_storage().nbytes()
        return function(*args, **(kwargs or {}))

    @property
    def bytes(self):
        return self.rows + sum(self.whole.values())


@torch.no_grad()
def observed(model, n_before, batch, n_tokens):
    """(bytes of weights, bytes of keys and values, operations) of a step that runs."""
    ids = torch.randint(model.config.vocab_size, (batch, n_before + n_tokens))
    cache, seen = KVCache(model), []
    if n_before:
        model.features(ids[:, :n_before], cache=cache)
    update = cache.update
    cache.update = lambda *args: seen.append(update(*args)) or seen[-1]
    with FlopCounterMode(display=False) as counter, Watch(model) as watch:
        model(ids[:, n_before:], cache=cache)
    read = sum(k.nbytes + v.nbytes for k, v, _ in seen)
    return watch.bytes, read, counter.get_total_flops()


def naive(config, layer):
    return MultiHeadAttention(config, layer, kernel=naive_attention)


def a_model(attention=naive, **options):
    torch.manual_seed(0)
    return GPTModel(GPTConfig(**{**SIZES, **options}), attention=attention).eval()


@pytest.mark.parametrize("options", [
    dict(), dict(n_kv_heads=2), dict(n_kv_heads=1), dict(tied=False), dict(bias=False),
    dict(vocab_size=77, n_layers=3, emb_dim=48, n_heads=6, n_kv_heads=3, tied=False),
], ids=str)
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_cost_is_what_a_model_does(options, step):
    model = a_model(**options)
    assert tuple(token_cost(model, *step))[:3] == observed(model, *step)
    assert token_cost(model, *step).tokens == step[1] * step[2]


def test_a_wrong_count_would_be_noticed():
    seen = observed(a_model(n_kv_heads=2), 7, 3, 1)
    for n_before, batch, heads in ((6, 3, 2), (7, 2, 2), (7, 3, 4)):
        wrong = tuple(token_cost(a_model(n_kv_heads=heads), n_before, batch))[:3]
        assert all(a != b for a, b in zip(wrong[1:], seen[1:]))
    assert token_cost(a_model(), 7, 3).weight_bytes != seen[0]


@pytest.mark.parametrize("recipe", ["llama", "mistral", "alibi"])
@pytest.mark.parametrize("step", STEPS[:4], ids=str)
def test_cost_of_other_recipes(recipe, step):
    options = dict(window=8) if recipe == "mistral" else {}
    model = GPTModel(GPTConfig(**SIZES, recipe=recipe, options=options)).eval()
    for block in model.blocks:
        block.attn.kernel = naive_attention
    weights, cache, operations = observed(model, *step)
    cost = token_cost(model, *step)
    assert cost.weight_bytes == weights and cost.cache_bytes == cache
    assert cost.operations == operations


@pytest.mark.parametrize("step", [(0, 1, 1), (40, 1, 1), (40, 3, 1), (7, 1, 1)], ids=str)
def test_a_window_ends_the_past(step):
    attention = partial(MultiHeadAttention, mask=SlidingWindow(8), kernel=naive_attention)
    model = a_model(attention)
    assert tuple(token_cost(model, *step))[:3] == observed(model, *step)
    assert token_cost(model, 7).cache_bytes == token_cost(model, 40).cache_bytes
    assert token_cost(a_model(), 7).cache_bytes < token_cost(a_model(), 40).cache_bytes


def test_keys_of_a_chunk_in_a_window():
    assert keys_seen(100, 1, None) == 101 and keys_seen(100, 1, 8) == 8
    assert keys_seen(100, 4, 8) == 11  # the first of the chunk sees 7 before it
    assert keys_seen(2, 4, 8) == 6


@pytest.mark.parametrize("dtype, size", [(torch.bfloat16, 2), (torch.float64, 8)])
def test_bytes_follow_the_dtype(dtype, size):
    plain, other = token_cost(a_model(), 9, 2), token_cost(a_model().to(dtype), 9, 2)
    assert other.weight_bytes == plain.weight_bytes * size / 4
    assert other.cache_bytes == plain.cache_bytes * size / 4
    assert other.operations == plain.operations


def test_the_cache_can_have_numbers_of_its_own():
    model = a_model(n_kv_heads=2)
    assert cache_bytes_read(model, 9, itemsize=1) == 2 * 10 * 2 * 2 * 8
    assert token_cost(model, 9, itemsize=1).cache_bytes == 2 * 10 * 2 * 2 * 8
    assert token_cost(model, 9).cache_bytes == 4 * 2 * 10 * 2 * 2 * 8


def test_a_tied_tensor_counts_once_and_a_table_by_its_rows():
    tied, untied = a_model(), a_model(tied=False)
    assert weight_bytes(tied) == weight_bytes(untied)
    total = sum(p.nbytes for p in untied.parameters())
    assert total - weight_bytes(untied) == (211 + 64 - 2) * 32 * 4
    bigger = a_model(tied=False, context_length=128)
    assert weight_bytes(bigger) == weight_bytes(untied)


@pytest.mark.parametrize("options", [dict(), dict(tied=False)], ids=str)
def test_shapes_alone_are_enough(options):
    with torch.device("meta"):
        empty = GPTModel(GPTConfig(**SIZES, **options))
    assert token_cost(empty, 5, 3) == token_cost(a_model(**options), 5, 3)


def test_only_the_last_logits():
    model = a_model()
    whole, last = (step_operations(model, 0, 9, 2, n) for n in (None, 1))
    assert whole - last == 2 * 2 * 8 * 211 * 32
    assert token_cost(model, 0, 2, 9, n_logits=1).operations == last


def test_gpt2_in_figures():
    with torch.device("meta"):
        model = GPTModel(GPTConfig())
    cost = token_cost(model, 0)
    assert cost.cache_bytes == 73_728
    assert cost.weight_bytes == 4 * (124_439_808 - 1024 * 768 + 2 * 768)
    linears = 12 * 12 * 768**2 + 50257 * 768
    assert cost.operations == 2 * linears + 4 * 12 * 768
    assert cost.intensity == pytest.approx(0.5, rel=0.01)
    assert cost.bytes == cost.weight_bytes + cost.cache_bytes


class Rounded(nn.Module):
    """An int8 linear by its shapes."""

    def __init__(self, old):
        super().__init__()
        self.in_features, self.out_features = old.in_features, old.out_features
        self.register_buffer("weight_q", old.weight.to(torch.int8))
        self.register_buffer("scale", old.weight[:, :1].detach().clone())
        self.bias = old.bias


def test_rounded_linears_are_seen_as_they_are():
    model, plain = a_model(), a_model()
    replace_modules(model.blocks, lambda name, m: isinstance(m, nn.Linear),
                    lambda name, m: Rounded(m))
    linears = [m for m in plain.blocks.modules() if isinstance(m, nn.Linear)]
    saved = sum(3 * m.weight.numel() - 4 * m.out_features for m in linears)
    assert weight_bytes(plain) - weight_bytes(model) == saved
    assert step_operations(model, 3) == step_operations(plain, 3)
    assert token_cost(model, 3).cache_bytes == token_cost(plain, 3).cache_bytes


def test_a_smaller_layer_is_seen_as_it_is():
    """Heads that were taken out: the widths of the linears count, not the config."""
    model = a_model()
    attn = model.blocks[1].attn
    for name in ("W_query", "W_key", "W_value"):
        setattr(attn, name, nn.Linear(32, 16))
    attn.out_proj = nn.Linear(16, 32)
    assert attention_sizes(model) == [(32, 32, None), (16, 16, None)]
    assert tuple(token_cost(model, 9))[:3] == observed(model, 9, 1, 1)


def test_a_wrapper_counts_its_linear_once():
    class Wrapped(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.in_features, self.out_features = base.in_features, base.out_features

    model, plain = a_model(), a_model()
    replace_modules(model, lambda name, m: isinstance(m, nn.Linear),
                    lambda name, m: Wrapped(m))
    assert token_cost(model, 9, 2, 3, 1) == token_cost(plain, 9, 2, 3, 1)


def test_masks_of_a_layer_are_no_weights_and_its_buffers_are():
    layer = nn.Linear(3, 2)
    layer.register_buffer("kept", torch.ones(2, 3, dtype=torch.bool))
    layer.register_buffer("table", torch.ones(100), persistent=False)
    assert sum(x.nbytes for x in own_tensors(layer)) == 4 * 8 + 6


@pytest.mark.parametrize("scheme", ["int8", "int8_dynamic", "int4"])
@pytest.mark.parametrize("options", [dict(), dict(tied=False)], ids=str)
def test_quantized_models_are_seen_as_they_are(scheme, options):
    model, plain = a_model(emb_dim=64, **options), a_model(emb_dim=64, **options)
    quantize(model, scheme)
    held = {id(x): x.nbytes for x in [*model.parameters(), *model.buffers()]}
    tables = [m for m in model.modules() if hasattr(m, "num_embeddings")]
    head = {id(x) for x in [*model.head.parameters(), *model.head.buffers()]}
    looked_up = sum(x.nbytes for m in tables for x in own_tensors(m) if id(x) not in head)
    rows = sum(x[:1].nbytes for m in tables for x in own_tensors(m))
    cost = token_cost(model, 9)
    assert cost.weight_bytes == sum(held.values()) - looked_up + rows
    assert cost.weight_bytes < 0.3 * weight_bytes(plain)
    assert cost.operations == step_operations(plain, 9)


def test_pruned_models_are_seen_as_they_are():
    model, plain = a_model(n_heads=8), a_model(n_heads=8)
    prune_heads(model, {0: [1, 3, 4]})
    prune_neurons(model, 0.25)
    cost, before = token_cost(model, 9, 2), token_cost(plain, 9, 2)
    assert tuple(cost)[:3] == observed(model, 9, 2, 1)
    assert all(a < b for a, b in zip(cost[:3], before[:3]))


def test_weights_that_are_hidden_are_not_free():
    class Packed(nn.Module):
        def __init__(self, old):
            super().__init__()
            self.in_features, self.out_features = old.in_features, old.out_features

    model = a_model()
    replace_modules(model, lambda name, m: name.endswith("fc_in"),
                    lambda name, m: Packed(m))
    with pytest.raises(ValueError, match="blocks.0.mlp.fc_in, a Packed, hides"):
        weight_bytes(model)


def test_a_parametrized_linear_is_seen():
    import torch.nn.utils.parametrize as parametrize

    class Kept(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.register_buffer("kept", torch.ones_like(weight, dtype=torch.bool))

        def forward(self, weight):
            return weight * self.kept

    model, plain = a_model(bias=False), a_model(bias=False)
    linear = model.blocks[0].mlp.fc_in
    parametrize.register_parametrization(linear, "weight", Kept(linear.weight))
    assert weight_bytes(model) - weight_bytes(plain) == 32 * 128
    assert step_operations(model, 3) == step_operations(plain, 3)


def test_experts_that_a_token_does_not_reach():
    options = dict(n_experts=8, top_k=2)
    model = GPTModel(GPTConfig(**SIZES, recipe="mixtral", options=options)).eval()
    expert = model.blocks[0].mlp.experts[0]
    one = sum(p.nbytes for p in expert.parameters())
    total = sum(p.nbytes for p in model.parameters())
    rest = total - 2 * 8 * one - (211 - 1) * 32 * 4 * (not model.config.tied)
    tables = sum(m.weight[:1].nbytes for m in model.modules()
                 if isinstance(m, nn.Embedding))
    assert weight_bytes(model) == pytest.approx(rest + 2 * 2 * one + tables)
    assert set(expert_shares(model).values()) == {0.25}
    assert weight_bytes(model, batch=500) - 500 * 128 == pytest.approx(rest + 16 * one)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for block in model.blocks:
            block.attn.kernel = naive_attention
        model(torch.zeros(1, 1, dtype=torch.long))
    assert step_operations(model, 0) == counter.get_total_flops()
    assert not expert_shares(a_model())


@pytest.mark.parametrize("counts", [
    dict(batch=0), dict(batch=-1), dict(batch=1.0), dict(n_tokens=0), dict(batch=True),
    dict(n_tokens_before=-1), dict(n_tokens_before=2.5), dict(n_logits=-1),
    dict(n_logits=2)], ids=str)
def test_counts_that_no_step_has(counts):
    name, value = next(iter(counts.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        token_cost(a_model(), **{**dict(n_tokens_before=0), **counts})


def test_a_roof_is_the_slower_wall():
    cost = TokenCost(80.0, 20.0, 300.0, tokens=4)
    assert cost.intensity == 3
    assert decode_roof(cost, bandwidth=100) == 4
    assert decode_roof(cost, bandwidth=100, peak=300) == 4  # at the ridge
    assert decode_roof(cost, bandwidth=100, peak=150) == 2
    assert decode_roof(cost, bandwidth=1e9, peak=math.inf) == 4e7
    assert decode_roof(TokenCost(80, 20, 300), 100) == 1


@pytest.mark.parametrize("machine", [(0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, 0)])
def test_a_machine_that_does_nothing_has_no_roof(machine):
    with pytest.raises(ValueError, match="must be above 0"):
        decode_roof(TokenCost(80.0, 20.0, 300.0), *machine)


def test_tensors_that_share_one_block_of_memory_are_all_counted():
    """A file that is mapped, or weights laid side by side: views of one storage."""
    model = a_model()
    before, total = weight_bytes(model), sum(p.numel() for p in model.parameters())
    block, at = torch.zeros(total), 0
    for p in model.parameters():
        p.data = block[at : at + p.numel()].view_as(p)
        at += p.numel()
    assert weight_bytes(model) == before


def test_rows_are_free_until_the_ridge():
    model = a_model()
    memory, peak = 1e9, 16e9  # a ridge of 16, 32 rows in float32
    seconds = [token_cost(model, 0, b).tokens / decode_roof(
        token_cost(model, 0, b)._replace(cache_bytes=0), memory, peak) for b in (1, 8, 128)]
    assert seconds[1] < 1.2 * seconds[0] < seconds[2] / 2


def test_fastest_is_the_time_of_the_work():
    waits = iter([0.05, 0.03, 0.01, 0.02] + [0.02] * 100)
    took = fastest(lambda: time.sleep(next(waits)), seconds=0)
    assert 0.01 <= took < 0.02
    calls = []
    fastest(lambda: calls.append(1), seconds=0)
    assert len(calls) == 4  # one to warm up, three that count


def test_bandwidth_is_a_speed(one_thread):
    found = bandwidth(megabytes=16, seconds=0.05)
    assert 1e7 < found < 1e13
    slow = bandwidth(megabytes=1, seconds=0)
    assert slow > 0
    for bad in (0, -1, 0.5, 1.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="megabytes"):
            bandwidth(megabytes=bad)


def test_bandwidth_keeps_no_gradient_and_no_memory():
    with torch.enable_grad():
        bandwidth(megabytes=1, seconds=0)
        assert torch.is_grad_enabled()
