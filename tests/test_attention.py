"""Captured weights against the formula, other kernels and transformers; what is left behind."""
import math
from functools import partial

import pytest
import torch
from torch import nn

import gptbook  # noqa: F401, registers all recipes
from gptbook.architecture import NoPositions, Rotary
from gptbook.attention import (
    AttentionHook, attention_weights, by_position, capture_attention)
from gptbook.core import (
    RECIPES, Causal, GPTConfig, GPTModel, MultiHeadAttention, Positions, naive_attention, sdpa,
    set_seed)
from gptbook.decoder import Decoder
from gptbook.generation import generate_text
from gptbook.inference import KVCache
from gptbook.pretrained import load_pretrained
from gptbook.quantization import quantize
from gptbook.sparse import SlidingWindow
from gptbook.structured_pruning import prune_heads

pytestmark = pytest.mark.usefixtures("one_thread")
V, T = 61, 40
OPTIONS = {"mistral": {"window": 8}, "mixtral": {"window": 8}}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def made(recipe="gpt2", options=None, n_kv_heads=2, **slots):
    set_seed(3)
    model = GPTModel(GPTConfig(V, 64, 32, 2, 4, n_kv_heads, recipe=recipe, options=options or {}),
                     **slots)
    for p in model.parameters():
        if p.dim() > 1:
            p.mul_(4)  # sharp attention
    return model.eval()


def of_recipe(recipe):
    try:
        return made(recipe, OPTIONS.get(recipe))
    except ValueError:  # one that has no shared keys
        return made(recipe, OPTIONS.get(recipe), n_kv_heads=None)


IDS = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[-1] * 9 + list(range(T - 9)), list(range(T))])


def formula(q, k, q_pos, k_pos, mask, bias):
    """The definition, pair by pair, in float64."""
    (B, H, n, D), K = q.shape, k.shape[1]
    table = torch.zeros(B, H, n, k.shape[2], dtype=torch.float64)
    for b in range(B):
        q_at, k_at = (p.index[b if len(p.index) > 1 else 0] for p in (q_pos, k_pos))
        for h in range(H):
            for i in range(n):
                where = torch.stack([q_at[i].expand_as(k_at), k_at])
                seen = mask(*where).expand_as(k_at) & (k_at >= 0) & (q_at[i] >= 0)
                if not seen.any():
                    continue
                s = k[b, h * K // H].double() @ q[b, h, i].double() / math.sqrt(D)
                if bias is not None:
                    added = bias(where[0].view(1, 1, 1, -1), where[1].view(1, 1, 1, -1))
                    s = s + added.double().expand(1, H, 1, len(k_at))[0, h, 0]
                table[b, h, i] = s.masked_fill(~seen, -math.inf).softmax(0)
    return table


class Watch:
    """A kernel that holds its arguments."""

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, []

    def __call__(self, q, k, v, **options):
        out = self.kernel(q, k, v, **options)
        self.calls.append((q, k, v, options, out))
        return out


def watched(model):
    for block in model.blocks:
        block.attn.kernel = Watch(block.attn.kernel)
    return [block.attn.kernel for block in model.blocks]


def check(weights, call):
    """Weights equal the formula and give what the kernel returned."""
    q, k, v, options, out = call
    wanted = formula(q, k, options["q_pos"], options["k_pos"], options["mask"], options["bias"])
    torch.testing.assert_close(weights.double(), wanted, atol=2e-6, rtol=0)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    torch.testing.assert_close(weights @ values, out, atol=2e-5, rtol=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe(recipe, padded):
    model = of_recipe(recipe)
    positions = PADDED if padded else None
    plain = model(IDS, positions=positions)
    kernels = watched(model)
    with capture_attention(model) as captured:
        logits = model(IDS, positions=positions)
    assert torch.equal(logits, plain), "capturing changed a logit"
    assert [block.attn.kernel for block in model.blocks] == kernels, "a hook was left behind"
    assert sorted(captured.weights) == [0, 1] and len(captured.passes) == 1
    for layer, kernel in enumerate(kernels):
        weights = captured.weights[layer]
        assert weights.shape == (2, 4, T, T) and weights.dtype == torch.float32
        assert not weights.triu(1).any(), "a token looks into the future"
        check(weights, kernel.calls[0])
        sums = weights.sum(-1)
        due = (positions >= 0).float()[:, None].expand_as(sums) if padded else torch.ones_like(sums)
        torch.testing.assert_close(sums, due, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lost", ["mask", "scale", "rotation"])
def test_the_check_notices_what_the_popular_hook_forgets(lost):
    """Negative control of `check`."""
    model = made("llama")
    (kernel, *_) = watched(model)
    model(IDS)
    q, k, v, options, out = kernel.calls[0]
    q_pos, k_pos = options["q_pos"], options["k_pos"]
    if lost == "mask":
        wrong = attention_weights(q, k, q_pos=q_pos, k_pos=k_pos,
                                  mask=lambda i, j: torch.ones_like(i + j, dtype=torch.bool))
    elif lost == "scale":
        wrong = attention_weights(q * 8**0.5, k, q_pos=q_pos, k_pos=k_pos, mask=options["mask"])
    else:
        block = model.blocks[0]
        q0, k0, _ = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in block.attn.project(
            block.norm1(model.tok_emb(IDS))))
        wrong = attention_weights(q0, k0, q_pos=q_pos, k_pos=k_pos, mask=options["mask"])
    with pytest.raises(AssertionError):
        check(wrong, kernel.calls[0])


def eager(kind):
    import transformers

    set_seed(1)
    common = dict(vocab_size=V, attn_implementation="eager", initializer_range=0.3,
                  bos_token_id=None, eos_token_id=None)
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_positions=64, n_embd=32, n_layer=3, n_head=4, **common)).eval()
    llama = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=64, **common)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama)).eval()
    return transformers.MistralForCausalLM(transformers.MistralConfig(
        sliding_window=7, head_dim=8, **llama)).eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_transformers(kind, tmp_path):
    theirs = eager(kind)
    theirs.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path).model.eval()
    wanted = theirs(IDS, output_attentions=True).attentions
    with capture_attention(model) as captured:
        model(IDS)
    assert len(wanted) == 3 == len(captured.weights)
    for layer, table in enumerate(wanted):
        torch.testing.assert_close(captured.weights[layer], table, atol=1e-5, rtol=0)
    assert max(table.amax().item() for table in wanted) > 0.9, "sharp enough to tell heads apart"


# --- passes, caches and positions ------------------------------------------------------------


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("chunk", [1, 7])
def test_a_text_that_is_read_with_a_cache(recipe, chunk):
    model = of_recipe(recipe)
    with capture_attention(model) as whole:
        model(IDS)
    cache = KVCache(model)
    with capture_attention(model) as parts:
        for piece in IDS.split(chunk, 1):
            model(piece, cache=cache)
    assert len(parts.passes) == -(-T // chunk)
    for layer in (0, 1):
        for row in (0, 1):
            torch.testing.assert_close(by_position(parts, layer, row), whole.weights[layer][row],
                                       atol=2e-5, rtol=0)


def test_a_padded_row_is_put_in_its_place():
    model = made("llama")
    with capture_attention(model) as padded:
        model(IDS, positions=PADDED)
    with capture_attention(model) as alone:
        model(IDS[:1, 9:])
    torch.testing.assert_close(by_position(padded, 1, 0)[:, :31, :31], alone.weights[1][0],
                               atol=1e-5, rtol=0)


def test_slots_of_a_ring_are_in_another_order():
    """Negative control: without positions the table of a ring would be wrong."""
    model = made(attention=partial(MultiHeadAttention, mask=SlidingWindow(7)))
    cache = KVCache(model)
    with capture_attention(model, [1]) as captured:
        for piece in IDS[:1].split(1, 1):
            model(piece, cache=cache)
    last = captured.weights[1][0, :, 0]  # (H, 7), in the order of the slots
    right = by_position(captured, 1)[:, -1, -7:]
    assert not torch.allclose(last, right) and torch.allclose(last.sort().values,
                                                              right.sort().values)


def test_writing_is_seen_and_stays_the_same():
    model = made("llama")
    alone = generate_text(model, [[1, 2, 3]], 12, seed=0)
    with capture_attention(model) as captured:
        assert generate_text(model, [[1, 2, 3]], 12, seed=0) == alone
    assert len(captured.passes) == 12
    with capture_attention(model) as whole:
        model(torch.tensor(alone)[:, :-1])
    for layer in (0, 1):
        torch.testing.assert_close(by_position(captured, layer), whole.weights[layer][0],
                                   atol=1e-5, rtol=0)


def test_some_layers_and_nested_captures():
    model = made()
    with capture_attention(model, [1]) as outer, capture_attention(model) as inner:
        model(IDS)
    assert list(outer.weights) == [1] and list(inner.weights) == [0, 1]
    assert torch.equal(outer.weights[1], inner.weights[1])
    assert all(block.attn.kernel is sdpa for block in model.blocks)


@pytest.mark.parametrize("change", [
    lambda model: quantize(model, "int8"), lambda model: prune_heads(model, {0: [1], 1: [0, 3]})])
def test_changed_models(change):
    model = made(n_kv_heads=None)
    change(model)
    kernels = watched(model)
    with capture_attention(model) as captured:
        model(IDS)
    for layer, kernel in enumerate(kernels):
        check(captured.weights[layer], kernel.calls[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_of_numbers(dtype):
    model = made("llama").to(dtype)
    (kernel, *_) = watched(model)
    with capture_attention(model) as captured:
        model(IDS)
    q, k, _, options, _ = kernel.calls[0]
    wanted = formula(q, k, options["q_pos"], options["k_pos"], options["mask"], options["bias"])
    torch.testing.assert_close(captured.weights[0].double(), wanted, atol=2e-6, rtol=0)


def test_gradients_pass_through_and_weights_have_none():
    model = made()
    with torch.enable_grad(), capture_attention(model) as captured:
        model(IDS).logsumexp(-1).sum().backward()
    assert model.blocks[0].attn.W_query.weight.grad.abs().sum() > 0
    assert not captured.weights[0].requires_grad


def test_a_query_that_sees_nothing_looks_nowhere():
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8)
    where = Positions(torch.tensor([[-1, 0, 1]]))
    weights = attention_weights(q, k, q_pos=where, k_pos=where, mask=Causal())
    assert weights[0, :, 0].tolist() == [[0, 0, 0]] * 2 and not weights.isnan().any()
    assert weights[0, :, 1].tolist() == [[0, 1, 0]] * 2


def test_huge_scores_are_no_nan():
    q = torch.full((1, 1, 2, 8), 1e18)
    where = Positions(torch.arange(2)[None])
    weights = attention_weights(q, q, q_pos=where, k_pos=where, mask=Causal())
    assert weights.tolist() == [[[[1, 0], [0.5, 0.5]]]]


# --- what goes wrong --------------------------------------------------------------------------


def test_hooks_go_after_an_error():
    model = made()
    with pytest.raises(ValueError, match="outside"), capture_attention(model):
        model(IDS + V)
    with pytest.raises(KeyboardInterrupt), capture_attention(model):
        raise KeyboardInterrupt
    assert all(block.attn.kernel is sdpa for block in model.blocks)
    assert not any(isinstance(m, AttentionHook) for m in model.modules())


def test_the_limit_is_checked_before_anything_is_made():
    model = made()
    size = 4 * 2 * 4 * T * T  # bytes of one layer
    for layers, factor in ((None, 2), ([1], 1)):
        with pytest.raises(MemoryError, match="max_bytes"), capture_attention(
                model, layers, max_bytes=factor * size - 1) as captured:
            model(IDS)
        assert captured.passes == [] and captured.bytes == 0
        with capture_attention(model, layers, max_bytes=factor * size) as captured:
            model(IDS)
        assert captured.bytes == factor * size
    with pytest.raises(MemoryError), capture_attention(model, max_bytes=3 * size) as captured:
        model(IDS), model(IDS)  # the limit is for all passes together
    assert len(captured.passes) == 1
    assert all(block.attn.kernel is sdpa for block in model.blocks)


class NoAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()

    def forward(self, x, positions, cache=None):
        return x


@pytest.mark.parametrize("layers", [[2], [-1], [0, 7], [], ["0"], [1.0], [True]])
def test_layers_that_are_not_there(layers):
    with pytest.raises(ValueError, match="layers with attention are \\[0, 1\\]"):
        with capture_attention(made(), layers):
            pass


def test_models_without_attention():
    with pytest.raises(ValueError, match="no layer"), capture_attention(made(attention=NoAttention)):
        pass
    for wrong in (nn.Linear(2, 2), Decoder(made())):
        with pytest.raises(ValueError, match="give the GPTModel"), capture_attention(wrong):
            pass


def test_nothing_captured():
    with capture_attention(made(), [1]) as captured:
        pass
    with pytest.raises(ValueError, match="nothing was captured"):
        captured.weights
    with pytest.raises(ValueError, match="layer 0 was not captured"):
        by_position(captured, 0)


def test_a_kernel_by_formula_and_the_fused_one_show_the_same():
    tables = []
    for kernel in (naive_attention, sdpa):
        model = made(attention=partial(MultiHeadAttention, kernel=kernel, rotary=Rotary),
                     position_embedding=NoPositions)
        with capture_attention(model) as captured:
            model(IDS)
        tables.append(captured.weights[1])
    torch.testing.assert_close(*tables, atol=1e-5, rtol=0)
