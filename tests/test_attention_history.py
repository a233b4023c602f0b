"""Diaries of a run: when they are written, what they leave alone, and what they measure."""
from functools import partial

import pytest
import torch

from gptbook.attention import capture_attention
from gptbook.attention_history import (
    AttentionDiary, birth, by_distance, cost_by_distance, due, told_twice, twice,
)
from gptbook.core import GPTConfig, GPTModel, MultiHeadAttention, set_seed
from gptbook.data import TokenDataset
from gptbook.head_patterns import induction_scores
from gptbook.runs import TrainConfig
from gptbook.structured_pruning import prune_heads
from gptbook.training import train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_due_often_at_first_and_a_fixed_number_of_times_a_doubling():
    assert all(due(step) for step in range(1, 11))
    for per in (4, 8):
        for n in (64, 100, 777):
            assert sum(due(step, per) for step in range(n, 2 * n)) == per
    assert sum(due(step) for step in range(1, 100_001)) < 130


def test_a_diary_leaves_the_run_as_it_is():
    """The same weights with and without it, to the last bit; modes come back."""
    def run(callbacks):
        set_seed(0)
        model = GPTModel(GPTConfig(40, 32, 16, 2, 2, drop_rate=0.1))
        data = TokenDataset(torch.randint(40, (2000,)), 32, 4)
        train(model, data, None, TrainConfig(14, 1e-3), callbacks=callbacks, progress=False)
        return model

    diary = AttentionDiary(lambda model: {"second": told_twice(model, 8)[1],
                                          "training": model.training})
    watched, plain = run((diary,)), run(())
    assert all(torch.equal(a, b) for a, b in zip(watched.state_dict().values(),
                                                 plain.state_dict().values()))
    assert [entry["step"] for entry in diary.entries] == [s for s in range(1, 15) if due(s)]
    assert all(entry["training"] is False and entry["loss"] > 0 for entry in diary.entries)
    model = GPTModel(GPTConfig(40, 32, 16, 2, 2)).train()
    model.blocks[0].eval()
    before = [m.training for m in model.modules()]
    diary.write(model, 0)
    assert [m.training for m in model.modules()] == before and diary.entries[-1]["loss"] is None


def test_modes_come_back_after_an_error():
    model = GPTModel(GPTConfig(40, 32, 16, 2, 2)).train()
    diary = AttentionDiary(lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        diary.write(model, 0)
    assert all(m.training for m in model.modules()) and not diary.entries


def test_dropout_is_off_and_modes_come_back():
    """Asked in the middle of training, every measure is that of the model at rest."""
    set_seed(0)
    model = GPTModel(GPTConfig(40, 32, 16, 2, 2, drop_rate=0.5))
    def measure():
        return [torch.tensor(told_twice(model, 6)), by_distance(model, 6), cost_by_distance(model, 6)]
    rest = measure() if not model.eval().training else None
    model.train().blocks[0].eval()
    before = [m.training for m in model.modules()]
    for a, b in zip(measure(), rest):
        assert torch.equal(a, b)
    assert [m.training for m in model.modules()] == before


def at_distance(d, q_pos, k_pos):
    return 100.0 * (q_pos - k_pos == d)


@pytest.mark.parametrize("start", [None, 39])
@pytest.mark.parametrize("d", [0, 1, 7, 11, 12])
def test_attention_by_distance_of_a_head_that_looks_there(d, start):
    model = GPTModel(GPTConfig(40, 32, 16, 2, 2), attention=partial(
        MultiHeadAttention, bias=partial(at_distance, d))).eval()
    found = by_distance(model, 12, start=start)
    assert found.shape == (2, 2, 13) and found[..., d].min() > 0.99
    others = [k for k in range(13) if k != d]
    assert found[..., others].max() < 0.01


def test_distances_hold_the_induction_score():
    set_seed(1)
    model = GPTModel(GPTConfig(40, 64, 16, 2, 2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    torch.testing.assert_close(by_distance(model, 9, rows=5, seed=3)[..., 8],
                               induction_scores(model, 9, 5, seed=3))


def test_layers_with_different_numbers_of_heads():
    set_seed(0)
    model = GPTModel(GPTConfig(40, 64, 16, 2, 4)).eval()
    whole = by_distance(model, 7)
    prune_heads(model, {1: [0, 3]})
    with pytest.raises(ValueError, match=r"different numbers of heads, \[4, 2\]: name some"):
        by_distance(model, 7)
    torch.testing.assert_close(by_distance(model, 7, layers=[0]), whole[:1])
    assert by_distance(model, 7, layers=[1], start=39).shape == (1, 2, 8)
    assert len(cost_by_distance(model, 7)) == 8 and len(told_twice(model, 7)) == 2


def test_rows_that_cannot_be_told():
    model = GPTModel(GPTConfig(40, 64, 16, 2, 2)).eval()
    for measure in (told_twice, by_distance, cost_by_distance):
        for n in (0, 1):
            with pytest.raises(ValueError, match=f"rows of {n} tokens"):
                measure(model, n)
        for start in (0, 1):  # nothing stands below it, or one token only
            with pytest.raises(ValueError, match=f"out of {start}: both must be at least 2"):
                measure(model, 5, start=start)
        for start in (-1, 40):
            with pytest.raises(ValueError, match=f"start token {start} is outside the vocabulary of 40"):
                measure(model, 5, start=start)
        with pytest.raises(ValueError, match="64 positions"):
            measure(model, 33)
    with pytest.raises(ValueError, match="rows of 2 tokens have no place to ask"):
        cost_by_distance(model, 2)
    assert cost_by_distance(model, 3, start=2).shape == (4,)


@pytest.mark.parametrize("start", [None, 39])
def test_what_a_token_costs_in_both_copies(start):
    set_seed(1)
    model = GPTModel(GPTConfig(40, 64, 16, 2, 2)).eval()
    ids = twice(model, 6, rows=3, seed=4, start=start)
    first = int(start is not None)
    assert ids.shape == (3, 12 + first) and torch.equal(ids[:, first : 6 + first], ids[:, 6 + first :])
    assert start is None or (ids[:, 0] == start).all() and ids[:, 1:].max() < 39
    costs = [[], []]
    for row in ids.tolist():
        for t in range(1, 12):  # token t of the row
            if t == 6:
                continue  # the first of the second copy cannot be known
            with torch.no_grad():
                log_p = model(torch.tensor([row[: t + first]]))[0, -1].log_softmax(-1)
            costs[t > 6].append(-log_p[row[t + first]].item())
    wanted = [sum(x) / len(x) for x in costs]
    assert told_twice(model, 6, rows=3, seed=4, start=start) == pytest.approx(wanted, abs=1e-4)


def copies_from(d):
    """A model that says again what stood d back: values carry the token, the head reads it out."""
    with torch.no_grad():
        model = GPTModel(GPTConfig(30, 64, 32, 1, 1, tied=True), attention=partial(
            MultiHeadAttention, bias=partial(at_distance, d)))
        for p in model.parameters():
            p.zero_()
        model.tok_emb.weight.copy_(torch.eye(30, 32))
        attn = model.blocks[0].attn
        attn.W_value.weight.copy_(100 * torch.eye(32))
        attn.out_proj.weight.copy_(torch.eye(32))
        for norm in (model.blocks[0].norm1, model.blocks[0].norm2, model.norm):
            norm.weight.fill_(3)
    return model.eval()


def test_a_model_that_copies_pays_little_for_the_second_copy():
    first, second = told_twice(copies_from(9), 10)
    assert second < 0.1 < 2 < first


@pytest.mark.parametrize("start", [None, 29])
def test_a_change_costs_where_the_token_comes_from(start):
    found = cost_by_distance(copies_from(9), 10, start=start)
    assert found.shape == (11,) and found[9] > 5 and found[[*range(9), 10]].abs().max() < 0.05


def test_a_change_costs_what_it_costs():
    """One query and one distance, written out."""
    set_seed(1)
    model = GPTModel(GPTConfig(40, 64, 16, 2, 2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
        ids = twice(model, 3, rows=5, seed=4)  # of three tokens told twice only q = 4 is asked
        changed = ids.clone()
        changed[:, 2] = (ids[:, 2] + 1) % 40
        lost = [-model(x)[:, 4].log_softmax(-1)[range(5), ids[:, 5]].mean() for x in (ids, changed)]
    found = cost_by_distance(model, 3, rows=5, seed=4)
    assert abs(found[2] - (lost[1] - lost[0])) < 1e-4 < abs(found[2])


def test_births():
    assert birth([0, 5, 9], [0.0, 0.0, 0.0]) is None
    assert birth([0, 5, 9], [0.0, 0.9, 0.9]) == 5
    assert birth([0, 5, 9, 12], [0.0, 0.9, 0.1, 0.9]) == 12
    assert birth([0, 5], [0.6, 1.0]) is None
    assert birth([], []) is None


def test_attention_is_not_left_hooked():
    model = GPTModel(GPTConfig(40, 64, 16, 2, 2)).eval()
    kernel = model.blocks[0].attn.kernel
    by_distance(model, 5)
    with capture_attention(model) as captured:
        model(torch.zeros(1, 4, dtype=torch.long))
    assert len(captured.passes) == 1 and model.blocks[0].attn.kernel is kernel
