"""A step that is replayed: the growing cache and the whole text are its oracles."""

import pytest
import torch
from torch import nn

from gptbook import cuda_graphs as module
from gptbook.core import GPTConfig, GPTModel, set_seed
from gptbook.cuda_graphs import FixedStep, GraphStep, Replays, Tape, record
from gptbook.inference import KVCache
from gptbook.quantization import quantize
from gptbook.quantized_cache import Int8Cache

V = 61
SIZES = dict(vocab_size=V, context_length=64, emb_dim=96, n_layers=3, n_heads=4)
STRAIGHT = {"gpt2": {}, "llama": {}, "alibi": {}, "strided": {"stride": 4}, "longformer":
            {"window": 4}, "bigbird": {"window": 4, "block": 2}, "mistral": {"window": None}}
EXPERTS = {"mixtral": {}, "switch": {}}
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1], [4]]
CPU = torch.device("cpu")


def make(recipe="gpt2", options=None, **sizes):
    set_seed(1)
    options = {**STRAIGHT, **EXPERTS}.get(recipe, {}) if options is None else options
    config = GPTConfig(**{**SIZES, **sizes}, recipe=recipe, options=options)
    model = GPTModel(config).eval()
    for p in model.parameters():
        p.data.mul_(3 if p.dim() > 1 else 1)  # so that a wrong key shows
    return model


def padded(prompts):
    n = max(map(len, prompts))
    return (torch.tensor([[0] * (n - len(p)) + p for p in prompts]),
            torch.tensor([[-1] * (n - len(p)) + list(range(len(p))) for p in prompts]))


@torch.no_grad()
def filled(model, prompts=PROMPTS, kind=KVCache, max_length=40):
    cache = kind(model, max_length)
    ids, where = padded(prompts)
    even = len({len(p) for p in prompts}) == 1
    model(ids, positions=None if even else where, cache=cache)
    return cache


@torch.no_grad()
def check(model, read, prompts=PROMPTS, steps=15, tolerance=1e-5):
    """Each step's logits against the whole texts in one pass."""
    texts = [list(p) for p in prompts]
    for step in range(steps):
        new = torch.tensor([[7 * step % V], [(step + 9) % V], [3]][: len(texts)])
        at = torch.tensor([[len(text)] for text in texts])
        got = read(new, at)
        for row, text, i in zip(got, texts, new[:, 0].tolist()):
            text.append(i)
            full = model(torch.tensor([text]))[0, -1]
            assert (full - row).abs().max() <= tolerance * full.abs().max(), (step, len(text))


def plain_steps(model, cache):
    fixed = FixedStep(cache)

    def read(new, at):
        fixed.position.copy_(at)
        return model(new, cache=fixed)[:, -1]

    return read


# The fixed step ---------------------------------------------------------------------------
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], [[1, 2]] * 3])
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("recipe", [*STRAIGHT, *EXPERTS])
def test_a_fixed_step_is_the_step(recipe, heads, prompts):
    model = make(recipe, n_kv_heads=heads)
    check(model, plain_steps(model, filled(model, prompts)), prompts, 8)


@torch.no_grad()
def test_the_check_sees_a_key_too_many_and_one_too_few():
    """The controls: stale slots that are shown, and a new key that is hidden."""
    for shift in (1, -1):
        model = make()
        cache = filled(model)
        for held in cache.buffers:
            for x in held:
                x[:, :, 20:] = x[:, :, 20:].normal_()
        fixed = FixedStep(cache)
        slots = fixed.slots

        def read(new, at):
            fixed.position.copy_(at)
            fixed.slots = slots - shift
            return model(new, cache=fixed)[:, -1]

        with pytest.raises(AssertionError):
            check(model, read)


@torch.no_grad()
def test_it_fills_the_cache_to_its_last_slot():
    model = make()
    cache = filled(model, [[1, 2, 3]], max_length=8)
    check(model, plain_steps(model, cache), [[1, 2, 3]], 5)
    assert all(x.abs().sum((0, 1, 3)).ne(0).all() for held in cache.buffers for x in held)
    with pytest.raises((RuntimeError, IndexError)):
        plain_steps(model, cache)(torch.tensor([[1]]), torch.tensor([[8]]))


@pytest.mark.parametrize("recipe", ["gpt2", "llama", "alibi"])
@torch.no_grad()
def test_a_cache_in_8_bits(recipe):
    model = make(recipe, n_kv_heads=2)
    growing, cache = (filled(model, kind=Int8Cache) for _ in range(2))
    fixed = FixedStep(cache)
    for step in range(8):
        new = torch.tensor([[step], [step + 9], [3]])
        fixed.position.copy_(growing.length[:, None])
        torch.testing.assert_close(
            model(new, cache=fixed), model(new, cache=growing), atol=1e-4, rtol=1e-4)
    assert cache.buffers[0][0].dtype == torch.int8
    for ours, theirs in zip(cache.buffers, growing.buffers):
        assert torch.equal(ours[0][0, :, :11].ne(0), theirs[0][0, :, :11].ne(0))


@pytest.mark.parametrize("recipe, options", [
    ("mistral", {"window": 8}), ("mixtral", {"window": 8})])
def test_rings_are_refused(recipe, options):
    model = make(recipe, options)
    with pytest.raises(ValueError, match="ring"):
        FixedStep(filled(model))
    with pytest.raises(ValueError, match="ring"):
        FixedStep(filled(model, max_length=None))


def test_a_window_as_long_as_the_cache_is_no_ring():
    model = make("mistral", {"window": 40})
    check(model, plain_steps(model, filled(model)))


def test_an_empty_cache_and_other_steps_are_refused():
    model = make()
    with pytest.raises(ValueError, match="empty"):
        FixedStep(KVCache(model, 40))
    fixed = FixedStep(filled(model))
    for B, T, positions in ((2, 1, None), (3, 2, None), (3, 1, torch.zeros(3, 1))):
        with pytest.raises(ValueError, match="3 rows and 1"):
            fixed.begin(B, T, positions)


# The tape ---------------------------------------------------------------------------------
@torch.no_grad()
def test_a_tape_computes_anew():
    x, y = torch.randn(4, 6), torch.zeros(4)
    with Tape() as tape:
        part = x[1:, ::2].t()
        z = (part @ part.t()).softmax(-1)
        y.add_(x.sum(1))
        top, at = z.topk(2)
        out = torch.cat([top, z.gather(1, at)], 1)
    for _ in range(3):
        x.normal_()
        before = y.clone()
        tape.replay()
        want = (x[1:, ::2].t() @ x[1:, ::2]).softmax(-1)
        best = want.topk(2)
        torch.testing.assert_close(out, torch.cat([best.values, best.values], 1))
        torch.testing.assert_close(y, before + x.sum(1))
        assert torch.equal(at, best.indices)


@pytest.mark.parametrize("step", [
    lambda x: x.sum().item(), lambda x: float(x[0]), lambda x: bool((x > 0).all()),
    lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.masked_select(x > 0),
    lambda x: x.long().bincount(minlength=9), lambda x: torch.equal(x, x + 1),
    lambda x: x.unique(), lambda x: x.index_put_((x > 0,), torch.zeros(())),
    lambda x: x.repeat_interleave(x.long()), lambda x: x if x.sum() > 0 else -x,
])
def test_what_looks_at_numbers_is_refused(step):
    with pytest.raises(ValueError, match="cannot be recorded"):
        with Tape():
            step(torch.tensor([1.0, 2.0, 0.0, 3.0]))


def test_a_copy_to_another_device_is_refused():
    with pytest.raises(ValueError, match="between devices"):
        with Tape():
            torch.ones(3).to("meta")


@pytest.mark.parametrize("step", [
    lambda x: x[torch.arange(2)], lambda x: torch.where(x > 0, x, 0), lambda x: x.topk(2),
    lambda x: x.index_put_((torch.arange(2),), torch.zeros(2)), lambda x: x * 3 + 1,
    lambda x: x.masked_fill(x > 0, 1.0), lambda x: x.index_select(0, torch.arange(2)),
])
def test_what_does_not_look_is_taken(step):
    with Tape() as tape:
        step(torch.tensor([1.0, 2.0, 0.0, 3.0]))
    assert tape.calls


@torch.no_grad()
def test_a_plain_cache_on_a_tape_writes_one_slot():
    """What the page breaks, for all recipes: the control of the tape itself."""
    for recipe in STRAIGHT:
        model = make(recipe)
        cache = filled(model, [[1, 2, 3]])
        x = model.tok_emb(torch.tensor([[4]])).clone()
        with Tape() as tape:
            model(x, cache=cache)
        for token in (5, 6, 7):
            x.copy_(model.tok_emb(torch.tensor([[token]])))
            tape.replay()
        assert (cache.buffers[0][0].abs().sum((0, 1, 3)) > 0).sum() == 4


# The recorded step ------------------------------------------------------------------------
@pytest.mark.parametrize("form", [None, "int8", "int4"])
@pytest.mark.parametrize("recipe", STRAIGHT)
def test_a_recorded_step_in_every_form(recipe, form):
    model = make(recipe, n_kv_heads=2)
    if form:
        quantize(model, form)
    cache, step = filled(model), None

    def read(new, at):
        nonlocal step
        step = step or GraphStep(model, cache, new, at)
        return step.read(new, at)

    check(model, read)


@pytest.mark.parametrize("recipe", EXPERTS)
def test_experts_are_refused(recipe):
    model = make(recipe)
    with pytest.raises(ValueError, match="cannot be recorded.*depends on the numbers"):
        GraphStep(model, filled(model), torch.ones(3, 1).long(), torch.tensor([[3], [9], [1]]))


def test_hooks_are_refused():
    model = make()
    cache = filled(model)
    for register in (model.blocks[0].register_forward_hook,
                     model.head.register_forward_pre_hook):
        handle = register(lambda *args: None)
        with pytest.raises(ValueError, match="hook"):
            GraphStep(model, cache, torch.ones(3, 1).long(), torch.tensor([[3], [9], [1]]))
        handle.remove()
    GraphStep(model, cache, torch.ones(3, 1).long(), torch.tensor([[3], [9], [1]]))


@torch.no_grad()
def test_weights_that_change_in_place_are_seen():
    model = make()
    cache = filled(model, [[1, 2, 3]])
    step = GraphStep(model, cache, torch.tensor([[4]]), torch.tensor([[3]]))
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    cache = filled(model, [[1, 2, 3]])
    for ours, theirs in zip(step.fixed.buffers, cache.buffers):
        for a, b in zip(ours, theirs):
            a.copy_(b)
    want = model(torch.tensor([[1, 2, 3, 4]]))[:, -1]
    got = step.read(torch.tensor([[4]]), torch.tensor([[3]]))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_recorded_under_inference_mode_it_is_read_outside():
    model = make()
    with torch.no_grad():
        want = model(torch.tensor([[1, 2, 3, 4, 5]]))[:, 3:]
    with torch.inference_mode():
        cache = filled(model, [[1, 2, 3]])
        step = GraphStep(model, cache, torch.tensor([[4]]), torch.tensor([[3]]))
        first = step.read(torch.tensor([[4]]), torch.tensor([[3]])).clone()
    second = step.read(torch.tensor([[5]]), torch.tensor([[4]]))
    torch.testing.assert_close(torch.stack([first, second], 1), want, atol=1e-5, rtol=1e-5)
    assert not second.requires_grad


# When to record ---------------------------------------------------------------------------
@torch.no_grad()
def run(replays, model, cache, new):
    where = cache.begin(len(new), 1)
    logits = replays.read(cache, new, where)
    return logits is not None, model(new, cache=cache)[:, -1] if logits is None else logits


@pytest.mark.parametrize("prompts", [PROMPTS, [[1, 2, 3]]])
@torch.no_grad()
def test_replays_begin_at_the_second_step_and_write_the_text(prompts):
    model = make("llama")
    replays, cache, ways = Replays(model), filled(model, prompts), []

    def read(new, at):
        way, logits = run(replays, model, cache, new)
        ways.append(way)
        return logits

    check(model, read, prompts)
    assert ways == [False] + [True] * 14
    assert torch.equal(torch.as_tensor(cache.length),
                       torch.tensor([len(p) + 15 for p in prompts]).squeeze())


@torch.no_grad()
def test_new_buffers_and_another_batch_are_recorded_anew():
    model, new = make(), torch.tensor([[1], [2], [3]])
    replays, cache = Replays(model), filled(model)
    assert [run(replays, model, cache, new)[0] for _ in range(3)] == [False, True, True]
    old = replays.recorded
    cache.reorder([2, 0, 1])
    texts = [[4, 3, 3, 3], [5, 6, 7, 1, 1, 1], [9, 8, 7, 6, 5, 4, 3, 2, 1, 2, 2, 2]]
    for way in (False, True, True):
        got = run(replays, model, cache, new)
        texts = [[*text, int(i)] for text, i in zip(texts, new)]
        assert got[0] is way
        for row, text in zip(got[1], texts):
            full = model(torch.tensor([text]))[0, -1]
            torch.testing.assert_close(row, full, atol=1e-4, rtol=1e-5)
    assert replays.recorded is not old
    small = filled(model, PROMPTS[:2])
    assert [run(replays, model, small, new[:2])[0] for _ in range(2)] == [False, True]
    assert run(replays, model, small, new[:2])[1].shape == (2, V)


@torch.no_grad()
def test_rows_sorted_in_each_step_are_never_recorded():
    model, new = make(), torch.tensor([[1], [2], [3]])
    replays, cache = Replays(model), filled(model)
    for _ in range(6):
        assert not run(replays, model, cache, new)[0]
        cache.reorder([0, 1, 2])
    assert replays.recorded is None and replays.refused is None


@torch.no_grad()
def test_truncation_keeps_the_recording():
    model = make()
    replays, cache = Replays(model), filled(model, [[1, 2, 3]])
    for token in (4, 5, 6, 7):
        run(replays, model, cache, torch.tensor([[token]]))
    recorded = replays.recorded
    cache.truncate(4)
    way, got = run(replays, model, cache, torch.tensor([[9]]))
    assert way and replays.recorded is recorded is not None
    want = model(torch.tensor([[1, 2, 3, 4, 9]]))[:, -1]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_is_refused_is_asked_once(monkeypatch):
    model, asked = make("mixtral"), []
    replays, cache = Replays(model), filled(model)
    kept = module.GraphStep
    monkeypatch.setattr(module, "GraphStep", lambda *a: asked.append(1) or kept(*a))
    for _ in range(5):
        assert not run(replays, model, cache, torch.tensor([[1], [2], [3]]))[0]
    assert len(asked) == 1 and "cannot be recorded" in replays.refused


@torch.no_grad()
def test_the_cache_still_says_when_it_is_full():
    model = make()
    replays, cache = Replays(model), filled(model, [[1, 2, 3]], max_length=6)
    for _ in range(3):
        run(replays, model, cache, torch.tensor([[1]]))
    with pytest.raises(ValueError, match="max_length=6"):
        run(replays, model, cache, torch.tensor([[1]]))
    assert cache.length == 6


# On a GPU -----------------------------------------------------------------------------------
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
@pytest.mark.parametrize("recipe", STRAIGHT)
@torch.no_grad()
def test_a_graph_gives_the_logits_of_the_started_step(recipe, prompts):
    oracle = make(recipe, n_kv_heads=2)
    model = make(recipe, n_kv_heads=2).cuda()
    cache = KVCache(model, 40)
    ids, where = padded(prompts)
    model(ids.cuda(), positions=where.cuda(), cache=cache)
    replays, ways = Replays(model), []

    def read(new, at):
        way, logits = run(replays, model, cache, new.cuda())
        ways.append(way)
        return logits.cpu()

    check(oracle, read, prompts, tolerance=1e-3)
    assert ways == [False] + [True] * 14, replays.refused


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_graph_is_what_is_replayed():
    x = torch.ones(3, device="cuda")
    output, replay = record(lambda: 2 * x, x.device)
    assert isinstance(replay.__self__, torch.cuda.CUDAGraph)
    x.fill_(5)
    replay()
    assert output.tolist() == [10.0] * 3


def test_without_a_gpu_the_tape_is_replayed():
    x = torch.ones(3)
    output, replay = record(lambda: 2 * x, CPU)
    assert isinstance(replay.__self__, Tape)
    x.fill_(5)
    replay()
    assert output.tolist() == [10.0] * 3


class FakeGraph:
    """As much of CUDA's interface as `record` uses; it writes down the order."""

    def __init__(self, log):
        self.log = log

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.log.append((name, args, kwargs))


def test_the_order_of_calls_on_a_gpu(monkeypatch):
    """No GPU here: at least the words are said in the order that PyTorch asks for."""
    from contextlib import contextmanager

    log, steps = [], []

    class Stream:
        def __init__(self, device, name="side"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def on(stream):
        log.append(f"on {stream.name}")
        yield
        log.append(f"off {stream.name}")

    @contextmanager
    def graph(graph, stream):
        log.append(f"capture on {stream.name}")
        yield
        log.append("captured")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: Stream(d, "main"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(log))

    def step():
        log.append("step")
        steps.append(torch.ones(2) * len(steps))
        return steps[-1]

    output, _ = record(step, torch.device("cuda"))
    assert log == ["step", "side waits for main", "on side", "step", "step", "off side",
                   "main waits for side", "capture on side", "step", "captured"]
    assert output is steps[-1], "the output of the captured run is the one that is replayed"
