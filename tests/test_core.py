"""The model: reference numerics over many shapes, the fast paths, and every error path."""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from gptbook.core import (
    RECIPES, Block, Causal, GPTConfig, GPTModel, LossModel, MultiHeadAttention, Positions,
    auxiliary_loss, clear_auxiliary_loss, naive_attention, pick_device, replace_modules,
    sdpa, set_seed, visible,
)

SMALL = GPTConfig(vocab_size=61, context_length=16, emb_dim=24, n_layers=2, n_heads=4)


def same_weights(sizes: GPTConfig):
    """A transformers GPT-2 with large random weights, and ours with the same ones."""
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=sizes.vocab_size, n_positions=sizes.context_length, n_embd=sizes.emb_dim,
        n_layer=sizes.n_layers, n_head=sizes.n_heads, attn_implementation="eager",
    )).eval()
    state, source = {}, theirs.state_dict()
    for name, p in theirs.named_parameters():
        p.data = torch.randn_like(p) * (0.1 if p.dim() > 1 else 0.3)
    source = {k.removeprefix("transformer."): v for k, v in theirs.state_dict().items()}
    names = {"norm1": "ln_1", "norm2": "ln_2", "attn.out_proj": "attn.c_proj",
             "mlp.fc_in": "mlp.c_fc", "mlp.fc_out": "mlp.c_proj"}
    state["tok_emb.weight"] = state["head.weight"] = source["wte.weight"]
    state["position_embedding.table.weight"] = source["wpe.weight"]
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = source[f"ln_f.{kind}"]
        for i in range(sizes.n_layers):
            for ours, other in names.items():
                state[f"blocks.{i}.{ours}.{kind}"] = source[f"h.{i}.{other}.{kind}"].t()
            for ours, part in zip(("W_query", "W_key", "W_value"),
                                  source[f"h.{i}.attn.c_attn.{kind}"].t().chunk(3)):
                state[f"blocks.{i}.attn.{ours}.{kind}"] = part
    model = GPTModel(sizes).eval()
    model.load_state_dict(state)
    return model, theirs


@pytest.mark.parametrize("emb_dim, n_heads, n_layers, T, B", [
    (24, 4, 2, 16, 3), (32, 1, 1, 7, 1), (48, 6, 4, 33, 2), (64, 8, 3, 64, 2), (8, 8, 2, 1, 5),
])
def test_logits_and_gradients_equal_transformers_gpt2(emb_dim, n_heads, n_layers, T, B):
    set_seed(0)
    sizes = GPTConfig(97, max(T, 8), emb_dim, n_layers, n_heads)
    model, theirs = same_weights(sizes)
    ids = torch.randint(97, (B, T))
    ours, oracle = model(ids), theirs(ids).logits
    torch.testing.assert_close(ours, oracle, atol=1e-5, rtol=1e-5)
    if T > 1:
        loss = LossModel(model)(ids[:, :-1], ids[:, 1:])
        reference = theirs(ids, labels=ids).loss
        torch.testing.assert_close(loss, reference, atol=1e-5, rtol=1e-5)
        loss.backward(), reference.backward()
        torch.testing.assert_close(
            model.tok_emb.weight.grad, theirs.transformer.wte.weight.grad, atol=1e-5, rtol=1e-4)


def test_a_wrong_weight_is_noticed():
    """Negative control of the oracle: one transposed matrix must show."""
    model, theirs = same_weights(SMALL)
    with torch.no_grad():
        w = model.blocks[0].attn.W_key.weight
        w.copy_(w.t().clone())
        ids = torch.randint(61, (2, 9))
        assert (model(ids) - theirs(ids).logits).abs().max() > 1e-3


def test_left_padding_equals_transformers_with_an_attention_mask():
    model, theirs = same_weights(SMALL)
    ids = torch.randint(61, (2, 9))
    positions = torch.stack([torch.arange(9), torch.cat([-torch.ones(4), torch.arange(5)]).long()])
    with torch.no_grad():
        ours = model(ids, positions=positions)
        oracle = theirs(ids, attention_mask=(positions >= 0).long(),
                        position_ids=positions.clamp(min=0)).logits
    torch.testing.assert_close(ours[0], oracle[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1, 4:], oracle[1, 4:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("H, K, Tq, Tk", [
    (4, 4, 7, 7), (6, 2, 7, 7), (4, 1, 1, 9), (6, 3, 3, 9), (1, 1, 1, 1)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_two_kernels_agree_forward_and_backward(H, K, Tq, Tk, with_bias):
    set_seed(1)
    q = torch.randn(2, H, Tq, 8, requires_grad=True)
    k, v = (torch.randn(2, K, Tk, 8, requires_grad=True) for _ in "kv")
    k_pos = torch.arange(Tk).expand(2, -1).clone()
    k_pos[1, : Tk // 2] = -1
    q_pos = Positions(k_pos[:, -Tq:])
    bias = (lambda a, b: -0.3 * (a - b).abs()) if with_bias else None
    grads = []
    for kernel in (naive_attention, sdpa):
        out = kernel(q, k, v, q_pos=q_pos, k_pos=Positions(k_pos), mask=Causal(), bias=bias)
        grads.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_query_that_sees_nothing_is_zero_and_has_finite_gradients():
    for kernel in (naive_attention, sdpa):
        q, k, v = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in "qkv")
        where = Positions(torch.tensor([[-1, -1, 0, 1]]))
        out = kernel(q, k, v, q_pos=where, k_pos=where, mask=Causal())
        assert out[:, :, :2].abs().max() == 0
        out.sum().backward()
        assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("Tq, Tk", [(1, 1), (1, 9), (9, 9), (3, 9)])
def test_fast_paths_equal_the_rule(Tq, Tk):
    q, k, v = torch.randn(2, 4, Tq, 8), torch.randn(2, 2, Tk, 8), torch.randn(2, 2, Tk, 8)
    index = torch.arange(5, 5 + Tk)[None]
    out = [sdpa(q, k, v, q_pos=Positions(index[:, -Tq:], a), k_pos=Positions(index, a),
                mask=Causal()) for a in (True, False)]
    torch.testing.assert_close(*out, atol=1e-6, rtol=1e-5)


def test_fast_path_is_taken_when_aligned_and_only_then(monkeypatch):
    calls, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *a, **kw: calls.append(kw) or real(*a, **kw))
    model, ids = GPTModel(SMALL).eval(), torch.randint(61, (1, 8))
    model(ids)
    assert all(kw.get("is_causal") and "attn_mask" not in kw for kw in calls)
    calls.clear()
    model(ids, positions=torch.arange(8))
    assert all("attn_mask" in kw for kw in calls)


def test_fast_path_survives_full_graph_compilation_and_export():
    model, ids = GPTModel(SMALL).eval(), torch.randint(61, (2, 8))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids), model(ids))
    graph = torch.export.export(model, (ids,)).graph
    attention = [n for n in graph.nodes if "scaled_dot" in str(n.target)]
    assert attention and all(n.kwargs.get("is_causal") or True in n.args for n in attention)


def test_mask_bool_polarity_and_padding():
    where = Positions(torch.tensor([[-1, 0, 1]]))
    seen = visible(where, where, Causal())[0, 0]
    assert seen.tolist() == [[False] * 3, [False, True, False], [False, True, True]]


def test_packed_documents_by_positions():
    """Documents in one row at positions doc * L + i, with a mask on the quotient."""
    @dataclass(frozen=True)
    class Packed:
        stride: int

        def __call__(self, q, k):
            return (q >= k) & (q // self.stride == k // self.stride)

    class NoPositions(nn.Module):
        def forward(self, x, positions):
            return x

    model = GPTModel(SMALL, attention=partial(MultiHeadAttention, mask=Packed(64)),
                     position_embedding=lambda c: NoPositions()).eval()
    ids = torch.randint(61, (1, 12))
    where = torch.cat([torch.arange(5), 64 + torch.arange(7)])
    torch.testing.assert_close(model(ids, positions=where)[:, 5:], model(ids[:, 5:]))
    assert model.custom == ("attention", "position_embedding")


def test_embeddings_as_input():
    model, ids = GPTModel(SMALL).eval(), torch.randint(61, (2, 8))
    torch.testing.assert_close(model(model.tok_emb(ids)), model(ids))
    with pytest.raises(ValueError, match="expected"):
        model(torch.randn(2, 8, 23))


def test_config_equals_its_reload_and_hashes():
    config = replace(SMALL, options={"b": (1, 2), "a": None})
    again = GPTConfig(**json.loads(json.dumps(asdict(config))))
    assert again == config and hash(again) == hash(config) and again.options["b"] == [1, 2]


@pytest.mark.parametrize("changes, words", [
    (dict(emb_dim=30), ("30", "4")), (dict(n_kv_heads=3), ("4", "3")),
    (dict(vocab_size=0), ("vocab_size", "0")), (dict(n_layers=2.0), ("2.0",)),
    (dict(n_layers=True), ("True",)), (dict(drop_rate=1.0), ("1.0",)),
    (dict(drop_rate=float("nan")), ("nan",)), (dict(options={"f": print}), ("JSON",)),
    (dict(options={"x": float("nan")}), ("JSON",)), (dict(options=[1]), ("dict",)),
])
def test_impossible_sizes_name_the_values(changes, words):
    with pytest.raises(ValueError) as error:
        replace(SMALL, **changes)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("changes, words", [
    (dict(recipe="gpt9"), ("gpt9", "gpt2")), (dict(options={"window": 3}), ("window", "none")),
])
def test_unknown_recipe_or_option_lists_the_known(changes, words):
    with pytest.raises(ValueError) as error:
        GPTModel(replace(SMALL, **changes))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("ids, kwargs, words", [
    (torch.tensor([[3, 61]]), {}, ("61", "vocabulary of 61")),
    (torch.tensor([[-1, 3]]), {}, ("-1",)),
    (torch.zeros(1, 17, dtype=torch.long), {}, ("16",)),
    (torch.zeros(1, 2, dtype=torch.long), dict(positions=torch.tensor([15, 16])), ("16",)),
    (torch.zeros(1, 2, dtype=torch.long), dict(positions=torch.arange(3)), ("3", "2")),
    (torch.zeros(4, dtype=torch.long), {}, ("(4,)",)),
    (torch.zeros(1, 0, dtype=torch.long), {}, ("(1, 0)",)),
])
def test_bad_input_is_a_value_error_that_names_it(ids, kwargs, words):
    with pytest.raises(ValueError) as error:
        GPTModel(SMALL)(ids, **kwargs)
    assert all(word in str(error.value) for word in words)


def test_all_masked_batch_gives_zero_loss_and_gradient():
    model, ids = GPTModel(SMALL), torch.randint(61, (2, 8))
    loss = LossModel(model)(ids, torch.full_like(ids, -100))
    loss.backward()
    assert loss == 0 and all(p.grad.abs().max() == 0 for p in model.parameters())


def test_auxiliary_losses_are_summed_and_cleared():
    model = GPTModel(SMALL)
    assert auxiliary_loss(model) == 0
    for block in model.blocks:
        block.mlp.aux_loss = torch.tensor(0.25, requires_grad=True)
    assert auxiliary_loss(model).item() == 0.5
    clear_auxiliary_loss(model)
    assert auxiliary_loss(model) == 0


class Wrapper(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.extra = base, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.base(x) + self.extra


class Other(Wrapper):
    pass


def linears(last):
    return lambda name, m: name.endswith(last) and isinstance(m, nn.Linear)


def test_replace_modules_is_a_no_op_in_the_output_and_keeps_dtype_mode_and_names():
    model = GPTModel(SMALL).eval().double()
    ids = torch.randint(61, (2, 8))
    before = model(ids)
    names = replace_modules(model, linears("W_query"), lambda n, m: Wrapper(m))
    assert names == ["blocks.0.attn.W_query", "blocks.1.attn.W_query"]
    assert torch.equal(model(ids), before)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert not any(m.training for m in model.modules())


def test_replace_modules_all_or_nothing():
    model, made = GPTModel(SMALL), []

    def fail_later(name, module):
        made.append(name)
        if len(made) == 2:
            raise RuntimeError("out of paper")
        return Wrapper(module)

    with pytest.raises(RuntimeError):
        replace_modules(model, linears("W_query"), fail_later)
    assert not any(isinstance(m, Wrapper) for m in model.modules())


def test_replace_modules_refuses_twice_but_allows_another_kind_inside():
    model = GPTModel(SMALL)
    replace_modules(model, linears("W_query"), lambda n, m: Wrapper(m))
    with pytest.raises(ValueError, match="already"):
        replace_modules(model, linears("W_query"), lambda n, m: Wrapper(m))
    names = replace_modules(model, linears("W_query"), lambda n, m: Other(m))
    assert names[0] == "blocks.0.attn.W_query.base"
    with pytest.raises(ValueError, match="already"):
        replace_modules(model, linears("W_query"), lambda n, m: Wrapper(m))


def test_replace_modules_no_match_nested_match_and_shared_modules():
    model = GPTModel(SMALL)
    with pytest.raises(ValueError, match="no module"):
        replace_modules(model, lambda n, m: False, lambda n, m: m)
    with pytest.raises(ValueError, match="nest"):
        replace_modules(model, lambda n, m: isinstance(m, (Block, nn.Linear)), lambda n, m: m)
    model.blocks[1].mlp = model.blocks[0].mlp
    names = replace_modules(model, linears("fc_in"), lambda n, m: Wrapper(m))
    assert names == ["blocks.0.mlp.fc_in", "blocks.1.mlp.fc_in"]
    assert model.blocks[0].mlp.fc_in is model.blocks[1].mlp.fc_in


def test_pick_device():
    assert pick_device("cpu").type == "cpu" and pick_device().type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="abacus"):
        pick_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda"):
            pick_device("cuda:3")


def test_set_seed_covers_torch_numpy_and_python():
    import random

    import numpy as np
    draws = []
    for _ in range(2):
        set_seed(7)
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]


def test_recipes_fill_every_slot():
    for name in RECIPES:
        model = GPTModel(replace(SMALL, recipe=name))
        assert model.custom == () and model(torch.randint(61, (1, 4))).shape == (1, 4, 61)


@settings(max_examples=20, deadline=None)
@given(B=st.integers(1, 3), T=st.integers(1, 16), K=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_changing_a_token_never_moves_an_earlier_logit(B, T, K, seed):
    set_seed(seed)
    model = GPTModel(replace(SMALL, n_kv_heads=K)).eval()
    ids = torch.randint(61, (B, T))
    for t in {0, T // 2, T - 1}:
        other = ids.clone()
        other[:, t] = (ids[:, t] + 1) % 61
        with torch.no_grad():
            assert torch.equal(model(ids)[:, :t], model(other)[:, :t])


@settings(max_examples=20, deadline=None)
@given(value=st.one_of(st.none(), st.floats(), st.text(), st.integers(-3, 5), st.lists(st.integers())),
       name=st.sampled_from(list(asdict(SMALL))))
def test_any_config_value_is_accepted_or_a_value_error(name, value):
    try:
        replace(SMALL, **{name: value})
    except ValueError:
        pass


def test_equal_configs_hash_alike():
    for a, b in ((dict(drop_rate=0), dict(drop_rate=0.0)),
                 (dict(options={"x": 1}), dict(options={"x": 1.0}))):
        a, b = replace(SMALL, **a), replace(SMALL, **b)
        assert a == b and hash(a) == hash(b) and {a: 7}[b] == 7
    assert hash(SMALL) != hash(replace(SMALL, n_layers=3))


@pytest.mark.parametrize("rows, shape", [(1, (3, 4)), (2, (3, 4)), (2, (1, 2, 4)), (2, ())])
def test_positions_of_another_batch_are_refused(rows, shape):
    """One row with the positions of three used to become three rows, silently."""
    ids = torch.randint(61, (rows, 4))
    with pytest.raises(ValueError, match=f"positions .* {rows} rows of 4 tokens"):
        GPTModel(SMALL)(ids, positions=torch.zeros(shape, dtype=torch.long))


def test_empty_embeddings_are_refused():
    with pytest.raises(ValueError, match="T >= 1"):
        GPTModel(SMALL)(torch.zeros(1, 0, 24))


def test_replace_modules_leaves_the_wrapped_module_as_it_is():
    """Norms in fp32 in a bf16 model, and a part that sleeps in a model that trains."""
    model = GPTModel(SMALL).to(torch.bfloat16)
    for block in model.blocks:
        block.norm1.float()
        block.mlp.eval()
    before = {id(m): m.training for m in model.modules()}
    dtypes = [p.dtype for p in model.parameters()]
    replace_modules(model, lambda n, m: isinstance(m, Block), lambda n, m: Wrapper(m))
    assert [p.dtype for n, p in model.named_parameters() if "extra" not in n] == dtypes
    assert all(before.get(id(m), m.training) == m.training for m in model.modules())
    assert model.blocks[0].training


def test_a_wrapper_of_a_module_with_buffers_only_gets_its_device():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.zeros(3, dtype=torch.bfloat16, device="meta"))

    model = nn.Sequential(Table())
    replace_modules(model, lambda n, m: isinstance(m, Table), lambda n, m: Wrapper(m))
    assert model[0].extra.device.type == "meta" and model[0].extra.dtype == torch.bfloat16


def test_tie_reaches_through_wrappers():
    for name in ("head", "tok_emb"):
        model = GPTModel(SMALL)
        replace_modules(model, lambda n, m: n == name, lambda n, m: Wrapper(m))
        keys = list(model.state_dict())
        inner = [part.base if isinstance(part, Wrapper) else part
                 for part in (model.head, model.tok_emb)]
        inner[0].weight = nn.Parameter(inner[1].weight.detach().clone())
        model.tie()
        assert inner[0].weight is inner[1].weight and list(model.state_dict()) == keys


def test_a_device_past_the_last_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cuda").type == pick_device().type == "cuda"
    with pytest.raises(ValueError, match="cuda:2"):
        pick_device("cuda:2")
