"""Patterns, what they promise to a kernel, and the blocked kernel, over many shapes."""
import pickle
from functools import partial

import pytest
import torch

from gptbook.core import (Causal, GPTConfig, GPTModel, MultiHeadAttention, Positions,
                          naive_attention, sdpa, set_seed)
from gptbook.inference import KVCache
from gptbook.sparse import (BigBird, Global, Intersection, Longformer, Pattern, Pick, RandomBlocks,
                            SlidingWindow, Strided, Union, blocked_attention, merged, plan_blocks,
                            ranges_of, reach, rounded, scramble)

PATTERNS = [
    SlidingWindow(1), SlidingWindow(5), SlidingWindow(16), SlidingWindow(200), Strided(1),
    Strided(6), Global(1), Global(3), RandomBlocks(2, 4, 7), RandomBlocks(1, 3), Longformer(6, 2),
    BigBird(5, 2, 2, 4, 3), SlidingWindow(9) & Strided(3), SlidingWindow(3) | SlidingWindow(7),
    SlidingWindow(4) | Causal(), Global(2) & SlidingWindow(4)]
N = 61


def square(mask, n=N):
    index = torch.arange(n)
    return mask(index[:, None], index)


def inputs(n, heads=4, groups=2, rows=2, dim=8, dtype=torch.float64, seed=0):
    set_seed(seed)
    tensors = tuple(torch.randn(rows, h, n, dim, dtype=dtype, requires_grad=True)
                    for h in (heads, groups, groups))
    where = Positions(torch.arange(n)[None], aligned=True)
    return tensors, dict(q_pos=where, k_pos=where)


def by_definition(mask, i, j):
    """The rule in plain Python."""
    if j > i:
        return False
    if isinstance(mask, SlidingWindow):
        return i - j < mask.window
    if isinstance(mask, Strided):
        return i - j < mask.stride or (i - j) % mask.stride == 0
    if isinstance(mask, Global):
        return j < mask.tokens
    if isinstance(mask, RandomBlocks):
        own = i // mask.block
        return j // mask.block in (own, *mask.drawn(own))
    if isinstance(mask, Causal):
        return True
    combine = any if isinstance(mask, Union) else all
    return combine(by_definition(part, i, j) for part in mask.parts)


@pytest.mark.parametrize("mask", PATTERNS, ids=repr)
def test_rule(mask):
    due = torch.tensor([[by_definition(mask, i, j) for j in range(N)] for i in range(N)])
    assert torch.equal(square(mask), due)


@pytest.mark.parametrize("mask", PATTERNS, ids=repr)
def test_promises(mask):
    seen = square(mask)
    for n in range(1, N + 1):
        assert not mask.is_causal(n) or seen[:n, :n].equal(torch.ones(n, n).tril().bool())
    for first in range(0, N, 3):
        for last in range(first, min(first + 9, N)):
            offered = {j for r in mask.ranges(first, last) for j in r}
            assert offered >= {*seen[first : last + 1].any(0).nonzero().flatten().tolist()}
            assert max(offered) <= last


@pytest.mark.parametrize("mask", PATTERNS, ids=repr)
def test_a_window_promises_that_older_keys_are_hidden(mask):
    window = getattr(mask, "window", None)
    i, j = torch.arange(N)[:, None], torch.arange(N)
    if window is not None:
        assert not (square(mask) & (j <= i - window)).any()


@pytest.mark.parametrize("mask", PATTERNS, ids=repr)
def test_pickle_and_hash(mask):
    again = pickle.loads(pickle.dumps(mask))
    assert again == mask and hash(again) == hash(mask) and type(again) is type(mask)
    with pytest.raises(AttributeError):
        mask.window = mask.tokens = 3


def test_windows_of_combinations():
    assert (SlidingWindow(3) | SlidingWindow(7)).window == 7
    assert (SlidingWindow(3) & SlidingWindow(7)).window == 3
    assert (SlidingWindow(3) & Global(2)).window == 3
    for mask in (Longformer(4), BigBird(4), SlidingWindow(4) | Causal(), Global(1) & Strided(2)):
        assert mask.window is None
    assert Longformer(4) != Longformer(5) and Longformer(4, 1) == Longformer(4)
    assert isinstance(SlidingWindow(2) & Causal(), Intersection)


def test_random_blocks_are_fixed_by_the_seed():
    known = [n.tolist() for n in RandomBlocks(3, 1, 5).drawn(torch.arange(12))]
    assert known == [n.tolist() for n in RandomBlocks(3, 1, 5).drawn(torch.arange(12))]
    assert known == [[RandomBlocks(3, 1, 5).drawn(i)[k] for i in range(12)] for k in range(3)]
    others = [[n.tolist() for n in RandomBlocks(3, 1, s).drawn(torch.arange(12))] for s in range(5)]
    assert all(other != known for other in others)
    long, short = square(RandomBlocks(2, 4), 200), square(RandomBlocks(2, 4), 60)
    assert torch.equal(long[:60, :60], short)


def test_scramble_spreads_and_stays_small():
    x = torch.cat([torch.arange(50_000), 2**32 - 1 - torch.arange(50_000)])
    y = scramble(x)
    assert y.min() >= 0 and y.max() < 2**32 and len(y.unique()) == len(x)
    assert (y[::2] % 64).bincount(minlength=64).float().std() < 3 * (50_000 / 64) ** 0.5
    assert [scramble(int(i)) for i in x[:50]] == y[:50].tolist()


@pytest.mark.parametrize("make", [
    lambda: SlidingWindow(0), lambda: SlidingWindow(2.0), lambda: SlidingWindow(True),
    lambda: Strided(-1), lambda: Global(0), lambda: RandomBlocks(0), lambda: RandomBlocks(1, 0),
    lambda: RandomBlocks(1, 4, -1), lambda: RandomBlocks(1, 4, 0.5), lambda: RandomBlocks(1, 4, 2**32),
    lambda: Longformer(0), lambda: BigBird(4, 1, 1, None)])
def test_bad_sizes(make):
    with pytest.raises(ValueError, match="must be a whole number"):
        make()


def test_parts_may_be_any_masks():
    mask = SlidingWindow(3) | (lambda q, k: k < 2)
    assert square(mask)[20].nonzero().flatten().tolist() == [0, 1, 18, 19, 20]
    assert square(SlidingWindow(3) & (lambda q, k: q // 8 == k // 8))[8].sum() == 1


def test_random_blocks_with_short_integers():
    index = torch.arange(N, dtype=torch.int32)
    mask = RandomBlocks(2, 4, 9)
    assert torch.equal(mask(index[:, None], index), square(mask))


def test_merged_and_rounded():
    assert merged([range(5, 9), range(0, 3), range(2, 4), range(9, 11)]) == [
        slice(0, 4), slice(5, 11)]
    assert merged([]) == merged([range(3, 3)]) == [slice(0, 1)]
    assert rounded([slice(0, 2), slice(41, 64)]) == [slice(0, 2), slice(34, 64)]
    assert rounded([slice(0, 2), slice(4, 6)]) == [slice(0, 2), slice(2, 6)]
    assert rounded([slice(3, 5)]) == [slice(0, 5)] and rounded([slice(0, 16)]) == [slice(0, 16)]


def two_of_three(q, k):
    return (q >= k) & (q % 3 != 0)


@pytest.mark.parametrize("mask", [*PATTERNS, Causal(), two_of_three],
                         ids=lambda mask: getattr(mask, "__name__", repr(mask)))
@pytest.mark.parametrize("n, block, heads, groups, rows", [
    (61, 16, 4, 2, 2), (37, 8, 2, 2, 1), (64, 32, 4, 1, 2), (17, 16, 3, 3, 1), (9, 16, 2, 1, 2)])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_naive(mask, n, block, heads, groups, rows, biased):
    tensors, where = inputs(n, heads, groups, rows)
    bias = (lambda q, k: -0.1 * (q - k).abs()) if biased else None
    rest = dict(mask=mask, bias=bias, **where)
    ours, naive = blocked_attention(*tensors, block=block, **rest), naive_attention(*tensors, **rest)
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)
    upstream = torch.randn_like(naive)
    for a, b in zip(*(torch.autograd.grad(out, tensors, upstream) for out in (ours, naive))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_float32_to_its_tolerance():
    tensors, where = inputs(300, 4, 2, 1, 16, torch.float32)
    for mask in (SlidingWindow(64), BigBird(40, 3, 2, 16)):
        pair = [kernel(*tensors, mask=mask, **where) for kernel in (blocked_attention, naive_attention)]
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)


def test_it_really_skips(monkeypatch):
    tensors, where = inputs(200)
    asked = []

    def counting(q, k, v, **rest):
        asked.append(q.shape[2] * k.shape[2])
        return sdpa(q, k, v, **rest)

    monkeypatch.setattr("gptbook.sparse.sdpa", counting)
    blocked_attention(*tensors, mask=SlidingWindow(16), block=16, **where)
    assert len(asked) == 13 and sum(asked) <= 200 * 32
    asked.clear()
    blocked_attention(*tensors, mask=Causal(), block=16, **where)
    assert asked == [200 * 200]


def test_pick_adds_all_gradients_in_float32():
    x = torch.zeros(1, 1, 300, 2, dtype=torch.bfloat16, requires_grad=True)
    parts = Pick.apply(x, [[slice(0, 1)]] * 300)
    torch.cat(parts, 2).sum().backward()
    assert x.grad[0, 0, 0].tolist() == [300, 300]
    summed = torch.zeros(2, dtype=torch.bfloat16)
    for _ in range(300):
        summed += 1
    assert summed.tolist() != [300, 300]  # what bfloat16 sums would give


def test_rows_that_see_nothing_are_zero():
    tensors, where = inputs(40)
    out = blocked_attention(*tensors, mask=lambda q, k: (k <= q) & (k >= 20), block=8, **where)
    assert (out[:, :, :20] == 0).all() and (out[:, :, 20:] != 0).all()
    grads = torch.autograd.grad(out.sum(), tensors)
    assert all(torch.isfinite(g).all() for g in grads)


def test_a_pattern_that_offers_nothing():
    class Nothing(Pattern):
        def __call__(self, q_pos, k_pos):
            return (k_pos <= q_pos) & (k_pos < 0)

        def ranges(self, first, last):
            return []

    tensors, where = inputs(40)
    assert (blocked_attention(*tensors, mask=Nothing(), block=8, **where) == 0).all()


@pytest.mark.parametrize("mask", [SlidingWindow(5), BigBird(5, 2, 1, 4)], ids=repr)
def test_ragged_rows_fall_back(mask):
    tensors, _ = inputs(40)
    index = torch.stack([torch.arange(40), torch.arange(40) - 7]).clamp(min=-1)
    where = dict(q_pos=Positions(index), k_pos=Positions(index))
    ours, naive = (kernel(*tensors, mask=mask, **where)
                   for kernel in (partial(blocked_attention, block=8), naive_attention))
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)
    assert (ours[1, :, :7] == 0).all()


def test_dropout_keeps_the_mean():
    tensors, where = inputs(48, rows=1)
    with torch.no_grad():
        rest = dict(mask=SlidingWindow(20), block=16, **where)
        mean = sum(blocked_attention(*tensors, dropout=0.3, **rest) for _ in range(400)) / 400
        exact = blocked_attention(*tensors, **rest)
        once = blocked_attention(*tensors, dropout=0.3, **rest)
    assert (mean - exact).abs().mean() < 0.05 < (once - exact).abs().mean()


@pytest.mark.parametrize("mask", PATTERNS[:12], ids=repr)
def test_no_leak_bit_for_bit(mask):
    (q, k, v), where = inputs(60)
    with torch.no_grad():
        first = blocked_attention(q, k, v, mask=mask, block=16, **where)
        k[:, :, 33], v[:, :, 33] = 9.0, -9.0
        second = blocked_attention(q, k, v, mask=mask, block=16, **where)
    assert torch.equal(first[:, :, :33], second[:, :, :33])
    assert not torch.equal(first[:, :, 33:], second[:, :, 33:]) or isinstance(mask, Global)


@pytest.mark.parametrize("mask", PATTERNS[:12], ids=repr)
def test_model_and_cache_agree(mask):
    set_seed(0)
    attention = partial(MultiHeadAttention, mask=mask, kernel=partial(blocked_attention, block=8))
    model = GPTModel(GPTConfig(64, 64, 32, 2, 4, 2), attention=attention).eval()
    ids = torch.randint(64, (2, 40))
    with torch.no_grad():
        full, cache = model(ids), KVCache(model)
        parts = [model(ids[:, a:b], cache=cache) for a, b in ((0, 17), (17, 18), (18, 25), (25, 40))]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-5, atol=1e-5)


def test_a_false_window_is_noticed():
    """The negative control of the test above."""
    class Promising(Longformer):
        window = 8

    set_seed(0)
    attention = partial(MultiHeadAttention, mask=Promising(8, 2))
    model = GPTModel(GPTConfig(64, 64, 32, 2, 4), attention=attention).eval()
    ids = torch.randint(64, (1, 30))
    with torch.no_grad():
        full, cache = model(ids), KVCache(model)
        parts = [model(ids[:, t : t + 1], cache=cache) for t in range(30)]
    assert (torch.cat(parts, 1) - full).abs().max() > 1e-4


@pytest.mark.parametrize("masks", [[SlidingWindow(4)] * 3, [RandomBlocks(1, 4, s) for s in (0, 1)],
                                   [Global(2), SlidingWindow(3)], [SlidingWindow(3), Strided(5)]],
                         ids=repr)
def test_reach_is_a_search(masks):
    got = reach(masks, 30)
    for query in range(30):
        known = {query}
        for mask in reversed(masks):
            known |= {j for i in known for j in range(30) if by_definition(mask, i, j)}
        assert got[query].nonzero().flatten().tolist() == sorted(known)


def test_reach_minds_the_order_of_layers():
    one, other = RandomBlocks(1, 4), SlidingWindow(4)
    assert not reach([one, other], 30).equal(reach([other, one], 30))


def test_plans_cover_every_row_once():
    for n, block in ((61, 16), (64, 16), (5, 8)):
        rows = [r for r, _ in plan_blocks(SlidingWindow(4), n, block)]
        assert [i for r in rows for i in range(r.start, r.stop)] == list(range(n))
    assert ranges_of(lambda q, k: q >= k, 3, 9) == [range(10)]


def test_autocast_and_bfloat16():
    tensors, where = inputs(80, dtype=torch.bfloat16, dim=16)
    out = blocked_attention(*tensors, mask=SlidingWindow(9), block=16, **where)
    exact = naive_attention(*(x.double() for x in tensors), mask=SlidingWindow(9), **where)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=3e-2, atol=3e-2)
    out.sum().backward()
    assert all(x.grad.dtype == torch.bfloat16 for x in tensors)


@pytest.mark.parametrize("block", [0, -5, 2.5, True, None])
@pytest.mark.parametrize("n", [3, 40])
def test_bad_blocks(n, block):
    tensors, where = inputs(n)
    with pytest.raises(ValueError, match="block=.* must be a whole number"):
        blocked_attention(*tensors, mask=SlidingWindow(4), block=block, **where)


def test_ranges_may_reach_beyond_the_text():
    class Wide(SlidingWindow):
        def ranges(self, first, last):
            return [range(first - 2 * self.window, 10**9), range(10**8, 10**9)]

    tensors, where = inputs(40)
    ours, naive = (kernel(*tensors, mask=Wide(5), **where)
                   for kernel in (partial(blocked_attention, block=8), naive_attention))
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)


def test_a_plain_mask_may_stand_on_the_left():
    either, both = Causal() | SlidingWindow(3), (lambda q, k: k > 1) & SlidingWindow(3)
    assert isinstance(either, Union) and square(either).equal(square(Causal()))
    assert square(both)[2].nonzero().flatten().tolist() == [2] and both.window == 3


def test_scramble_of_numbers_that_overflow():
    x = torch.tensor([2**32 - 1, 2**32, 2**32 + 5, 2**33 - 1])
    assert scramble(x).equal(scramble(x % 2**32))
    assert scramble(x).tolist() == [scramble(n) for n in x.tolist()]
