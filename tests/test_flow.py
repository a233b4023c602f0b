"""Rollout, flow, gradients, occlusion and the lens, against other programs and by hand."""
import networkx
import pytest
import torch
import transformers

import gptbook  # noqa: F401, registers all recipes
from gptbook.core import RECIPES, GPTConfig, GPTModel, set_seed
from gptbook.flow import (
    attention_flow, flow_network, gradient_times_input, logit_lens, max_flow, mixing_steps, occlusion,
    rollout)
from gptbook.pretrained import load_pretrained

pytestmark = pytest.mark.usefixtures("one_thread")
V = 47


def attention(L, H, T, seed=0):
    source = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(L, H, T, T, generator=source)
    hidden = ~torch.ones(T, T).tril().bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def made(recipe="gpt2", scale=3):
    set_seed(4)
    model = GPTModel(GPTConfig(V, 64, 32, 3, 4, recipe=recipe)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(scale)
    return model


def ways(table, start, end, layer=0):
    """All ways from a token of the text to one after the last layer, by recursion."""
    if layer == len(table):
        return float(start == end)
    return sum(table[layer][q][start] * ways(table, q, end, layer + 1)
               for q in range(len(table[layer])))


@pytest.mark.parametrize("L, H, T", [(1, 1, 2), (2, 3, 4), (4, 2, 3)])
def test_rollout_adds_up_all_ways(L, H, T):
    weights = attention(L, H, T)
    steps = ((weights.mean(1) + torch.eye(T)) / 2).tolist()
    found = rollout(weights)
    for q in range(T):
        for k in range(T):
            assert found[q, k].item() == pytest.approx(ways(steps, k, q), abs=1e-6)


def test_rollout_of_what_is_no_mixture():
    eye = torch.eye(5).expand(3, 2, 5, 5)
    assert torch.equal(rollout(eye), torch.eye(5))
    padded = attention(2, 1, 4)
    padded[:, :, 0] = 0  # a row that sees nothing keeps itself
    found = rollout(padded)
    assert found[0].tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(found.sum(-1), torch.ones(4))
    torch.testing.assert_close(rollout(attention(3, 1, 6).double()[:, 0]),
                               rollout(attention(3, 1, 6).double()))


@pytest.mark.parametrize("seed", range(6))
def test_flow_equals_networkx(seed):
    L, T = 1 + seed % 4, 3 + seed
    weights = attention(L, 2, T, seed)
    pipes = flow_network(weights)
    graph = networkx.DiGraph()
    for a, out in enumerate(pipes):
        graph.add_weighted_edges_from(((a, b, w) for b, w in out.items()), weight="capacity")
    wanted = torch.tensor([networkx.maximum_flow_value(graph, k, L * T + T - 1)
                           if graph.has_node(k) else 0.0 for k in range(T)])
    torch.testing.assert_close(attention_flow(weights, T - 1), wanted / wanted.sum(), atol=1e-6, rtol=0)


def test_flow_on_graphs_that_need_taking_back():
    """The first way found blocks the best one, unless it can be taken back."""
    pipes = [{1: 1.0, 2: 1.0}, {3: 1.0, 2: 1.0}, {3: 1.0}, {}]
    assert max_flow(pipes, 0, 3) == 2
    classic = [{1: 10, 2: 10}, {3: 4, 4: 8, 2: 2}, {4: 9}, {5: 10}, {3: 6, 5: 10}, {}]
    assert max_flow(classic, 0, 5) == 19
    assert max_flow([{}, {}], 0, 1) == 0 and classic[0] == {1: 10, 2: 10}, "pipes stay"


@pytest.mark.parametrize("recipe", ["gpt2", "llama"])
def test_gradients_against_small_steps(recipe):
    model = made(recipe, 2).double()
    ids = list(range(1, 12))
    found = gradient_times_input(model, ids, target=5)
    x = model.tok_emb(torch.tensor([ids])).detach()
    for t in range(len(ids)):
        up, down = x.clone(), x.clone()
        up[0, t] *= 1 + 1e-5
        down[0, t] *= 1 - 1e-5
        with torch.no_grad():
            slope = (model(up) - model(down))[0, -1, 5].item() / 2e-5
        assert found[t].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)
    assert all(p.grad is None for p in model.parameters()), "gradients of weights stay"


def test_gradients_of_the_likeliest_word():
    model = made()
    with torch.no_grad():
        best = int(model(torch.tensor([[1, 2, 3]]))[0, -1].argmax())
    torch.testing.assert_close(gradient_times_input(model, [1, 2, 3]),
                               gradient_times_input(model, [1, 2, 3], best))


def test_occlusion_by_hand():
    model, ids, target = made(), [3, 1, 4, 1, 5], 7
    found = occlusion(model, ids, target, draws=3, seed=5)
    source = torch.Generator().manual_seed(5)
    draws = [torch.randint(V, (5,), generator=source).tolist() for _ in range(3)]

    @torch.no_grad()
    def log_p(text):
        return model(torch.tensor([text]))[0, -1].log_softmax(-1)[target].item()

    for t in range(5):
        wanted = sum(log_p(ids) - log_p(ids[:t] + [d[t]] + ids[t + 1 :]) for d in draws) / 3
        assert found[t].item() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_the_lens_ends_with_the_model(recipe):
    model, ids = made(recipe), torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(0))
    lens = logit_lens(model, ids)
    assert lens.shape == (4, 2, 9, V)
    with torch.no_grad():
        torch.testing.assert_close(lens[-1], model(ids).log_softmax(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lens.exp().sum(-1), torch.ones(4, 2, 9))
    assert not torch.allclose(lens[-2], lens[-1])


def test_the_lens_equals_transformers(tmp_path):
    set_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=V, n_positions=64, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None)).eval()
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(0))
    lens = logit_lens(load_pretrained(tmp_path).model.eval(), ids)
    with torch.no_grad():
        hidden = theirs(ids, output_hidden_states=True).hidden_states
        for i, x in enumerate(hidden):  # its last one has passed the norm already
            x = x if i == 3 else theirs.transformer.ln_f(x)
            torch.testing.assert_close(lens[i], theirs.lm_head(x).log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_flow_counts_tokens_from_either_end():
    weights = attention(2, 2, 5)
    torch.testing.assert_close(attention_flow(weights, -1), attention_flow(weights, 4))
    assert not torch.allclose(attention_flow(weights, -2), attention_flow(weights, 4))
    for token in (5, -6):
        with pytest.raises(IndexError):
            attention_flow(weights, token)


@pytest.mark.parametrize("follow", [mixing_steps, rollout, flow_network])
def test_one_table_is_not_taken_for_layers(follow):
    for shape in ((5, 5), (1, 2, 2, 5, 5)):
        with pytest.raises(ValueError, match="expected"):
            follow(torch.ones(shape))


@pytest.mark.parametrize("ask", [
    lambda model, ids: gradient_times_input(model, ids), lambda model, ids: occlusion(model, ids),
    lambda model, ids: logit_lens(model, torch.tensor([ids], dtype=torch.long)),
])
def test_modes_stay_and_bad_texts_are_named(ask):
    model = made()
    set_seed(0)
    dropping = GPTModel(GPTConfig(V, 64, 32, 3, 4, drop_rate=0.5))
    dropping.load_state_dict(model.state_dict())
    dropping.train().blocks[1].eval()
    modes = [part.training for part in dropping.modules()]
    torch.testing.assert_close(ask(dropping, [3, 1, 4]), ask(model, [3, 1, 4]))
    assert [part.training for part in dropping.modules()] == modes
    assert ask(model, [3]).shape[-1] in (1, V), "a text of one token"
    with pytest.raises(ValueError, match="T >= 1"):
        ask(model, [])
    with pytest.raises(ValueError, match="token id 99"):
        ask(model, [3, 99])


def test_ids_may_be_a_tensor_and_no_draw_is_no_answer():
    model, ids = made(), [3, 1, 4]
    for ask in (gradient_times_input, occlusion):
        torch.testing.assert_close(ask(model, torch.tensor(ids)), ask(model, ids))
    with pytest.raises(ValueError, match="draws=0"):
        occlusion(model, ids, draws=0)
