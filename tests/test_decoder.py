"""The decoder: the plain model in the same form is its oracle, token by token."""

from copy import deepcopy
from itertools import product

import pytest
import torch
from torch import nn

from gptbook import decoder as module
from gptbook.core import (
    RECIPES, FeedForward, GPTConfig, GPTModel, MultiHeadAttention, replace_modules, set_seed,
)
from gptbook.decoder import Decoder, native_form, prepared
from gptbook.generation import generate_text
from gptbook.native import library, weight_of
from gptbook.quantized_cache import Int8Cache, seeing_rounded
from gptbook.structured_pruning import prune_heads, prune_neurons

V = 61
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1], [4]]
SIZES = dict(vocab_size=V, context_length=64, emb_dim=96, n_layers=3, n_heads=4)
RECIPE = {
    "gpt2": {}, "llama": {}, "alibi": {}, "strided": {}, "switch": {}, "mixtral": {},
    "mistral": {"window": 8}, "longformer": {"window": 8}, "bigbird": {"window": 4},
}
FORMS = {"32": {}, "16": dict(dtype=torch.bfloat16), "8": dict(quantize="int8"),
         "8 dynamic": dict(quantize="int8_dynamic"), "4": dict(quantize="int4")}
needs_compiler = pytest.mark.skipif(library() is None, reason="no C compiler here")


def make(recipe="gpt2", **sizes):
    set_seed(1)
    config = GPTConfig(**{**SIZES, **sizes}, recipe=recipe, options=RECIPE[recipe])
    model = GPTModel(config).eval()
    for p in model.parameters():
        p.data.mul_(3 if p.dim() > 1 else 1)  # so that a wrong key shows
    return model


@torch.no_grad()
def check(decoder, prompts=PROMPTS, steps=12, tolerance=1e-5):
    """Each step's logits against the whole text in one pass of the same model."""
    texts, logits = [list(p) for p in prompts], decoder.start(prompts)
    for _ in range(steps):
        for b, text in enumerate(texts):
            full = decoder.model(torch.tensor([text]))[0, -1]
            assert (full - logits[b]).abs().max() <= tolerance * full.abs().max(), (b, len(text))
            text.append(int(full.argmax()))
        logits = decoder.step(torch.tensor([text[-1] for text in texts]))
    return texts


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recipe", RECIPE)
def test_every_recipe_in_every_form(recipe, form):
    model = make(recipe, n_kv_heads=2 if recipe in ("llama", "mistral") else None)
    # rounded inputs amplify: where a number lies on an edge, float noise moves it by a step
    check(Decoder(model, 3, 40, **FORMS[form]), tolerance=0.05 if "dynamic" in form else 1e-5)


def test_all_recipes_are_here():
    assert set(RECIPE) == set(RECIPES), "a recipe without a test of its decoder"


@needs_compiler
@pytest.mark.parametrize("recipe", ["gpt2", "llama", "mistral"])
def test_these_are_native_throughout(recipe):
    for form in ("32", "16", "8", "4"):
        native = Decoder(make(recipe), 2, **FORMS[form]).native
        assert native is not None and native.all_native, form


@needs_compiler
def test_the_check_sees_a_wrong_cache(monkeypatch):
    """The control: a step that says one key too few."""
    place = module.NativeModel.place

    def short(self, row, position):
        place(self, row, position)
        for slot, count in self.slots.values():
            count.sub_(1).clamp_(min=1)

    monkeypatch.setattr(module.NativeModel, "place", short)
    with pytest.raises(AssertionError):
        check(Decoder(make(), 3, 40))


def test_without_the_library_it_writes_the_same(monkeypatch):
    models = [make(recipe) for recipe in ("gpt2", "llama", "mistral")]
    want = [check(Decoder(model, 3, 40)) for model in models]
    monkeypatch.setattr(module, "library", lambda: None)
    for model, texts in zip(models, want):
        decoder = Decoder(model, 3, 40)
        assert decoder.native is None and check(decoder) == texts


@pytest.mark.parametrize("recipe", ["gpt2", "mistral", "llama"])
@pytest.mark.parametrize("chunks", [[1] * 20, [20], [3, 1, 7, 9], [17, 2, 1]])
def test_chunks_of_any_size(recipe, chunks):
    model, decoder = make(recipe), Decoder(make(recipe), 2, 40)
    ids = torch.randint(V, (2, sum(chunks)))
    for part in ids.split(chunks, 1):
        logits = decoder.read(part)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids)[:, -1], atol=1e-5, rtol=1e-5)


# Rows ---------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe, form", [
    *product(["gpt2", "llama", "mistral"], ["32", "16", "8", "4"]), ("gpt2", "8 dynamic"),
    ("mixtral", "32"), ("alibi", "8"), ("longformer", "32"), ("strided", "16"),
])
@torch.no_grad()
def test_a_row_alone_and_in_a_batch_to_the_last_bit(recipe, form):
    model = make(recipe)
    prompts = [[1, 2, 3, 4], list(range(30)), [7], [9] * 12, [5, 4]]
    options = dict(deterministic=True, **FORMS[form])
    alone = Decoder(model, 1, 50, **options)
    for B in (2, 3, 5):
        many = Decoder(model, B, 50, **options)
        texts = [list(p) for p in prompts[:B]]
        batch = many.start(texts).clone()
        for _ in range(6):
            for b, text in enumerate(texts):
                assert torch.equal(alone.start([text])[0], batch[b]), (B, b)
                text.append(int(batch[b].argmax()))
            batch = many.step(torch.tensor([text[-1] for text in texts])).clone()


def test_deterministic_is_refused_where_it_cannot_be_kept():
    class Bare(nn.Module):
        def __init__(self, config, layer):
            super().__init__()

        def forward(self, x, positions, cache=None):
            return x

    with pytest.raises(ValueError, match="Bare"):
        Decoder(GPTModel(GPTConfig(**SIZES), attention=Bare), deterministic=True)


@torch.no_grad()
def test_rows_are_sorted_taken_back_and_gone_on_with():
    model, decoder = make(), Decoder(make(), 4, 40)
    decoder.start(PROMPTS)
    decoder.reorder([2, 0, 0, 1])
    texts = [PROMPTS[i] + [11 + n] for n, i in enumerate([2, 0, 0, 1])]
    got = decoder.step(torch.tensor([11, 12, 13, 14])).clone()
    for row, text in zip(got, texts):
        torch.testing.assert_close(row, model(torch.tensor([text]))[0, -1], atol=1e-5, rtol=1e-5)
    decoder.truncate([1, 2, 3, 5])
    got = decoder.step(torch.tensor([20, 21, 22, 23]))
    for row, text, n, new in zip(got, texts, [1, 2, 3, 5], [20, 21, 22, 23]):
        want = model(torch.tensor([[*text[:n], new]]))[0, -1]
        torch.testing.assert_close(row, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_finished_rows_are_left_out():
    model, decoder = make(), Decoder(make(), 3, 40)
    decoder.start(PROMPTS)
    where = torch.tensor([[3], [-1], [1]])
    got = decoder.read(torch.tensor([[8], [0], [9]]), where)
    for b, text in ((0, [*PROMPTS[0], 8]), (2, [*PROMPTS[2], 9])):
        want = model(torch.tensor([text]))[0, -1]
        torch.testing.assert_close(got[b], want, atol=1e-5, rtol=1e-5)
    assert decoder.cache.length.tolist() == [4, 9, 2]


@needs_compiler
@pytest.mark.parametrize("recipe", ["gpt2", "mistral"])
@torch.no_grad()
def test_an_interrupted_step_can_be_repeated(recipe):
    model, decoder = make(recipe), Decoder(make(recipe), 2, 60)
    texts = [[1, 2, 3], [4, 5, 6]]
    decoder.start(texts)
    body = decoder.native.body

    def fails():
        raise KeyboardInterrupt

    for step in range(20):  # past the window
        new = torch.tensor([step, step + 9])
        decoder.native.body = [*body[: 3 + step], fails]
        with pytest.raises(KeyboardInterrupt):
            decoder.step(torch.tensor([40, 41]))
        decoder.native.body = body
        got = decoder.step(new)
        texts = [[*text, i] for text, i in zip(texts, new.tolist())]
        torch.testing.assert_close(got, model(torch.tensor(texts))[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
@torch.no_grad()
def test_a_bad_id_is_found_before_anything_is_read(deterministic):
    decoder = Decoder(make(), 1, 64, deterministic=deterministic)
    with pytest.raises(ValueError, match="token id"):
        decoder.start([[1] * 60 + [V]])
    assert decoder.cache.length == 0


@pytest.mark.parametrize("recipe", ["gpt2", "llama", "mistral"])
@torch.no_grad()
def test_a_cache_in_eight_bits(recipe):
    """Its oracle: attention that sees rounded keys and values, in one pass."""
    model = make(recipe)
    plain = deepcopy(model)
    for block in plain.blocks:
        block.attn.kernel = seeing_rounded(block.attn.kernel)
    decoder = Decoder(model, 3, 40, cache=Int8Cache)
    texts, logits = [list(p) for p in PROMPTS], decoder.start(PROMPTS)
    assert decoder.cache.buffers[0][0].dtype == torch.int8
    for _ in range(8):
        for b, text in enumerate(texts):
            full = plain(torch.tensor([text]))[0, -1]
            assert (full - logits[b]).abs().max() <= 0.05 * full.abs().max()
            text.append(int(full.argmax()))
        logits = decoder.step(torch.tensor([text[-1] for text in texts]))


# The model stays as it is ---------------------------------------------------------------
@pytest.mark.parametrize("form", ["16", "8", "8 dynamic", "4"])
def test_the_given_model_is_not_changed(form):
    model = make().train()
    before, kinds = deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    decoder = Decoder(model, **FORMS[form])
    decoder.start([[1, 2, 3]])
    assert [type(m) for m in model.modules()] == kinds and model.transforms == []
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert all(m.training for m in model.modules())


@torch.no_grad()
def test_weights_that_change_in_place_are_seen():
    model = make()
    decoder = Decoder(model)
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    check(decoder, PROMPTS[:1])


@needs_compiler
def test_sixteen_bits_are_two_bytes():
    """The control of all comparisons in 16 bits: a cast back would make them true for nothing."""
    decoder = Decoder(make(), dtype=torch.bfloat16)
    linears = [m for m in decoder.model.modules() if isinstance(m, nn.Linear)]
    assert {m.weight.dtype for m in linears} == {torch.bfloat16} and len(linears) == 19
    assert {weight_of(m).form for m in linears} == {1}
    assert decoder.model.head.weight is decoder.model.tok_emb.weight


def test_dropout_is_off():
    model = make(drop_rate=0.5).train()
    decoder = Decoder(model)
    assert torch.equal(decoder.start([[1, 2, 3]]).clone(), decoder.start([[1, 2, 3]]))
    check(decoder, PROMPTS[:1])


def test_a_hook_sees_each_step():
    model, seen = make(), []
    model.blocks[1].attn.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    assert len(generate_text(model, [1, 2, 3], 4, temperature=0)[0]) == 7
    assert seen == [3, 1, 1, 1]


# Parts from elsewhere ---------------------------------------------------------------------
class Wrapped(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.out_features = base, base.out_features

    def forward(self, x):
        return self.base(x) + 0.5 * x.mean(-1, keepdim=True)


class OddNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


class OddFeedForward(FeedForward):
    def forward(self, x, positions):
        return super().forward(x, positions).tanh()


class OddAttention(MultiHeadAttention):
    def project(self, x):
        return tuple(y.roll(1, -1) for y in super().project(x))


@pytest.mark.parametrize("target", ["W_query", "out_proj", "fc_in", "fc_out", "head"])
def test_a_wrapped_linear_counts(target):
    model = make(tied=False)
    replace_modules(model, lambda n, m: n.endswith(target) and isinstance(m, nn.Linear),
                    lambda n, m: Wrapped(m))
    check(Decoder(model, 3, 40))


@pytest.mark.parametrize("slots", [
    dict(norm=OddNorm), dict(mlp=OddFeedForward), dict(attention=OddAttention),
    dict(norm=lambda dim: nn.LayerNorm(dim, elementwise_affine=False)),
    dict(norm=lambda dim: nn.LayerNorm(dim, bias=False)), dict(norm=nn.Identity),
])
def test_parts_given_by_hand(slots):
    set_seed(0)
    model = GPTModel(GPTConfig(**SIZES), **slots).eval()
    check(Decoder(model, 3, 40))


def test_what_says_nothing_has_no_form():
    config = GPTConfig(**SIZES)
    for part in (OddFeedForward(config, 0), OddNorm(4), OddAttention(config, 0), nn.ReLU(), max):
        assert native_form(part) is None
    assert native_form(FeedForward(config, 0)) == "gelu"


@needs_compiler
def test_a_pruned_model_is_smaller_and_right():
    model = make(n_kv_heads=2)
    prune_heads(model, {0: [0, 1], 2: [2, 3]})
    prune_neurons(model, 0.3)
    for form in ("32", "8"):
        decoder = Decoder(model, 3, 40, **FORMS[form])
        assert decoder.native.all_native or form == "8"
        check(decoder)


@needs_compiler
def test_a_patched_kernel_is_not_passed_by():
    model = make()
    kernel = model.blocks[0].attn.kernel
    model.blocks[0].attn.kernel = lambda *args, **kwargs: 2 * kernel(*args, **kwargs)
    decoder = Decoder(model, 3, 40)
    assert decoder.native is None
    check(decoder)


def test_a_model_in_bf16_goes_its_own_way():
    model = make().bfloat16()
    decoder = Decoder(model, 1, 40)
    assert decoder.native is None
    with torch.no_grad():
        torch.testing.assert_close(decoder.start([[1, 2, 3]]), model(torch.tensor([[1, 2, 3]]))[:, -1])


# Errors ---------------------------------------------------------------------------------
@pytest.mark.parametrize("options, what", [
    (dict(max_batch=0), "max_batch=0"), (dict(max_batch=True), "max_batch"),
    (dict(max_length=65), "max_length=65"), (dict(max_length=0), "max_length=0"),
    (dict(quantize="int3"), "int3.*int8"), (dict(dtype=torch.int8), "floating"),
    (dict(dtype="bf16"), "bf16"), (dict(dtype=torch.bfloat16, quantize="int8"), "choose one"),
    (dict(spare=-1), "spare=-1"),
])
def test_bad_options(options, what):
    with pytest.raises(ValueError, match=what):
        Decoder(make(), **options)


def test_a_quantized_model_is_not_quantized_again():
    with pytest.raises(ValueError, match="already"):
        Decoder(prepared(make(), None, "int8"), quantize="int8")


def test_too_many_rows_and_too_long_texts():
    decoder = Decoder(make(), 2, 10)
    with pytest.raises(ValueError, match="3 rows.*max_batch=2"):
        decoder.start(PROMPTS)
    with pytest.raises(ValueError, match="max_length=10"):
        decoder.start([[1] * 11])
    decoder.start([[1] * 10])
    with pytest.raises(ValueError, match="max_length=10"):
        decoder.step(torch.tensor([1]))
    with pytest.raises(ValueError, match="rows"):
        decoder.step(torch.tensor([1, 2]))
    assert decoder.cache.length == 10
    with pytest.raises(ValueError, match="token id"):
        decoder.start([[V]])


def test_generation_takes_a_decoder():
    model = make()
    decoder = Decoder(model, 3, 30)
    for options in (dict(temperature=0), dict(temperature=1.2, top_k=9, seed=3)):
        assert generate_text(decoder, PROMPTS, 8, **options) == generate_text(
            model, PROMPTS, 8, **options)
    with pytest.raises(ValueError, match="max_batch=3"):
        generate_text(decoder, [[1]] * 4, 3)
    with pytest.raises(ValueError, match="context of 30"):
        generate_text(decoder, [[1]], 30)
    slid = generate_text(decoder, [[1, 2]], 50, temperature=0, slide=True)
    assert len(slid[0]) == 52
    with pytest.raises(ValueError, match="deterministic"):
        generate_text(decoder, [[1]], 3, deterministic=True)


@needs_compiler
def test_generation_can_be_deterministic():
    model = make("llama")
    together = generate_text(model, PROMPTS, 20, temperature=0, deterministic=True, log_probs=True)
    for b, prompt in enumerate(PROMPTS):
        alone = generate_text(model, [prompt], 20, temperature=0, deterministic=True,
                              log_probs=True)
        assert (together[0][b], together[1][b]) == (alone[0][0], alone[1][0])


# Buffers that stay, steps that are replayed -----------------------------------------------
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("recipe", ["gpt2", "llama", "mistral", "alibi"])
@torch.no_grad()
def test_a_new_text_in_old_buffers(recipe, native, monkeypatch):
    if not native:
        monkeypatch.setattr(module, "library", lambda: None)
    decoder = Decoder(make(recipe), 3, 40)
    check(decoder, PROMPTS)
    places = [x.data_ptr() for held in decoder.cache.buffers for x in held]
    for held in decoder.cache.buffers:  # whatever the last text left must not be seen
        for x in held:
            x[:, :, : decoder.used] = float("nan")
    check(decoder, [[1], [2, 3], [4, 5, 6, 7]])
    if recipe != "mistral":  # a chunk that wraps a ring makes another one
        assert [x.data_ptr() for held in decoder.cache.buffers for x in held] == places
    check(decoder, PROMPTS[:2], 4)  # another batch: other buffers
    check(decoder, PROMPTS, 4)


@torch.no_grad()
def test_nothing_is_left_after_truncation_reordering_and_a_failed_step():
    decoder = Decoder(make(), 3, 40)
    check(decoder, PROMPTS)
    decoder.truncate(2)
    decoder.reorder([0, 0, 1])
    decoder.step(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="token id"):
        decoder.step(torch.tensor([1, 2, V]))
    decoder.forget()
    assert decoder.cache.length == 0 and decoder.cache.batch is None
    assert not any(x.any() for held in decoder.cache.buffers for x in held)
    check(decoder, PROMPTS, 4)


@pytest.mark.parametrize("recipe", ["gpt2", "mistral"])
def test_a_text_under_inference_mode_and_one_outside(recipe, monkeypatch):
    monkeypatch.setattr(module, "library", lambda: None)
    decoder = Decoder(make(recipe), 1, 40)
    for _ in range(2):
        with torch.inference_mode():
            decoder.start([[1, 2, 3]])
            decoder.read(torch.arange(20)[None])  # wraps the ring of a window of 8
        check(decoder, PROMPTS[:1])


def test_prompts_must_say_something():
    decoder = Decoder(make(), 2, 40)
    decoder.start([[1, 2]])
    for prompts in ([], [[]], [[1, 2], []]):
        with pytest.raises(ValueError, match="nothing to go on"):
            decoder.start(prompts)
    assert decoder.cache.length == 2, "a refused start changes nothing"


def replaying(recipe, monkeypatch, **options):
    """A decoder as on a GPU, with the tape in the graph's place."""
    monkeypatch.setattr(module, "library", lambda: None)
    decoder = Decoder(make(recipe), 3, 40, **options)
    assert decoder.native is None and decoder.replays is None  # a CPU has no graphs
    decoder.replays = module.Replays(decoder.model)
    return decoder


@pytest.mark.parametrize("form", ["32", "8", "4"])
@pytest.mark.parametrize("recipe", ["gpt2", "llama", "alibi", "strided"])
def test_a_decoder_that_replays(recipe, form, monkeypatch):
    decoder = replaying(recipe, monkeypatch, **FORMS[form])
    check(decoder)
    recorded = decoder.replays.recorded
    assert recorded is not None, decoder.replays.refused
    check(decoder, [[1], [2, 3], [4, 5, 6]])
    assert decoder.replays.recorded is recorded, "the next text uses the same recording"
    check(decoder, PROMPTS[:1])
    assert decoder.replays.recorded is not recorded


@pytest.mark.parametrize("recipe", ["mistral", "mixtral", "switch"])
def test_what_cannot_be_replayed_is_written_as_ever(recipe, monkeypatch):
    decoder = replaying(recipe, monkeypatch)
    check(decoder)
    assert decoder.replays.recorded is None and decoder.replays.refused


@torch.no_grad()
def test_rows_that_wait_are_not_replayed(monkeypatch):
    model, decoder = make(), replaying("gpt2", monkeypatch)
    decoder.start(PROMPTS)
    for token in (11, 12):
        decoder.step(torch.tensor([token] * 3))
    got = decoder.read(torch.tensor([[8], [0], [9]]), torch.tensor([[5], [-1], [3]]))
    for b, text in ((0, [*PROMPTS[0], 11, 12, 8]), (2, [*PROMPTS[2], 11, 12, 9])):
        want = model(torch.tensor([text]))[0, -1]
        torch.testing.assert_close(got[b], want, atol=1e-5, rtol=1e-5)
    got = decoder.step(torch.tensor([7, 7, 7]))
    want = model(torch.tensor([[*PROMPTS[1], 11, 12, 7]]))[0, -1]
    torch.testing.assert_close(got[1], want, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_steps_are_replayed():
    decoder = Decoder(make().cuda(), 3, 40)
    got, logits = [], decoder.start(PROMPTS)
    for _ in range(12):
        got.append(logits.argmax(-1).tolist())
        logits = decoder.step(logits.argmax(-1))
    assert decoder.replays.recorded is not None, decoder.replays.refused
    texts = check(Decoder(make(), 3, 40), steps=12)
    assert [list(row) for row in zip(*got)] == [t[len(p):] for t, p in zip(texts, PROMPTS)]

# All logits at once -------------------------------------------------------------------
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("recipe, form", [
    *product(["gpt2", "llama", "mistral"], ["32", "16", "8", "4"]), ("alibi", "32"),
    ("strided", "32"), ("mixtral", "32"), ("longformer", "32"), ("bigbird", "32"),
])
def test_all_logits_are_those_of_single_steps(recipe, form, deterministic):
    model = make(recipe)
    options = dict(deterministic=deterministic, spare=30, **FORMS[form])
    one, many = Decoder(model, 2, 50, **options), Decoder(model, 2, 50, **options)
    ids = torch.randint(V, (2, 40))
    one.read(ids[:, :1]), many.read(ids[:, :1])
    steps = torch.stack([one.step(x).clone() for x in ids[:, 1:].T], 1)
    for a, b in [(1, 2), (2, 6), (6, 11), (11, 12), (12, 40)]:  # the last is past `rows`
        got = many.read_all(ids[:, a:b])
        assert got.shape == (2, b - a, V)
        due = steps[:, a - 1 : b - 1]
        far = (got - due).abs().max() / due.abs().max()
        assert far == 0 if deterministic else far <= 1e-5, (a, b, far)


@pytest.mark.parametrize("recipe", ["gpt2", "llama", "mistral", "alibi"])
def test_what_is_refused_is_taken_back_row_by_row(recipe):
    """Drafts are checked, some are refused, other tokens follow: as if never read."""
    model = make(recipe)
    decoder, texts = Decoder(model, 2, 60, spare=6), torch.randint(V, (2, 48)).tolist()
    n = [9, 9]
    decoder.start([text[:9] for text in texts])
    for kept in [(1, 5), (3, 3), (6, 1), (2, 4), (5, 5), (1, 6)]:  # tokens that were right
        drafts = [text[i : i + k] + [(text[i + k] + 1) % V] * (6 - k)
                  for text, i, k in zip(texts, n, kept)]
        logits = decoder.read_all(torch.tensor(drafts))
        n = [i + k for i, k in zip(n, kept)]
        decoder.truncate(torch.tensor(n))
        for b, (text, i, k) in enumerate(zip(texts, n, kept)):
            with torch.no_grad():
                full = model(torch.tensor([text[:i]]))[0, -k:]
            assert (logits[b, :k] - full).abs().max() <= 1e-5 * full.abs().max(), (b, i)


def test_all_logits_of_too_much():
    decoder = Decoder(make(), 1, 12)
    decoder.start([[1, 2, 3]])
    with pytest.raises(ValueError, match="13 tokens do not fit"):
        decoder.read_all(torch.zeros(1, 10, dtype=torch.long))
    with pytest.raises(ValueError, match="max_batch=1"):
        decoder.read_all(torch.zeros(2, 1, dtype=torch.long))
    assert decoder.cache.length == 3, "nothing was read"
