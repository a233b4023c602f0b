"""Generation row by row: batches, seeds, ends, the context; stop strings and streams."""
import json
import math
import random
import re
from copy import deepcopy

import numpy as np
import pytest
import torch
from sampling_oracle import oracle_draw, oracle_kept
from torch import nn

from gptbook.checkpoints import load_demo
from gptbook.core import GPTConfig, GPTModel, set_seed
from gptbook.decoder import Decoder
from gptbook.generation import (
    TextStream, Tokens, generate_steps, generate_text, new_text, prompt_ids, sample, stream_text,
)
from gptbook.quantization import quantize
from gptbook.quantized_cache import Int8Cache
from gptbook.sampler import Sampler
from gptbook.sampling import candidates, draw


def loud(vocab=61, context=40, **kwargs):
    """A random model whose next token depends on what it reads."""
    set_seed(1)
    model = GPTModel(GPTConfig(vocab, context, 24, 2, 4), **kwargs).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    return model


@pytest.fixture(scope="module")
def writer():
    return loud()


PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8], [9, 7, 9, 3, 2]]


@torch.no_grad()
def by_hand(model, prompt, length, choose, end=None):
    """One row, no cache, no batch: what generation means."""
    text = list(prompt)
    for step in range(length):
        text.append(choose(model(torch.tensor([text]))[0, -1], step))
        if text[-1] == end:
            break
    return text


@pytest.mark.parametrize("options", [
    dict(temperature=0), dict(), dict(temperature=0.8, top_k=7), dict(top_p=0.8),
])
def test_a_batch_equals_rows_by_hand(writer, options):
    end = 17
    texts = generate_text(writer, PROMPTS, 25, **options, end_of_text=end, seed=4)
    for b, prompt in enumerate(PROMPTS):
        luck = torch.rand(25, generator=torch.Generator().manual_seed(4 + b), dtype=torch.double)

        def choose(logits, step):
            return oracle_draw(oracle_kept(logits.double().numpy(), **options), luck[step].item())

        assert texts[b] == by_hand(writer, prompt, 25, choose, end)


def test_greedy_equals_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=61, n_positions=64, n_embd=24, n_layer=2, n_head=4,
        bos_token_id=0, eos_token_id=0)).eval()
    model = GPTModel(GPTConfig(61, 64, 24, 2, 4)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(5)
        core = theirs.transformer
        model.tok_emb.weight.copy_(core.wte.weight)
        model.position_embedding.table.weight.copy_(core.wpe.weight)
        model.norm.load_state_dict(core.ln_f.state_dict())
        for ours, block in zip(model.blocks, core.h):
            weights, biases = block.attn.c_attn.weight.chunk(3, 1), block.attn.c_attn.bias.chunk(3)
            for name, w, b in zip(("W_query", "W_key", "W_value"), weights, biases):
                getattr(ours.attn, name).weight.copy_(w.T)
                getattr(ours.attn, name).bias.copy_(b)
            for linear, conv in ((ours.attn.out_proj, block.attn.c_proj),
                                 (ours.mlp.fc_in, block.mlp.c_fc), (ours.mlp.fc_out, block.mlp.c_proj)):
                linear.weight.copy_(conv.weight.T)
                linear.bias.copy_(conv.bias)
            ours.norm1.load_state_dict(block.ln_1.state_dict())
            ours.norm2.load_state_dict(block.ln_2.state_dict())
    for prompt in PROMPTS:
        want = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False,
                               eos_token_id=None, pad_token_id=0)
        assert generate_text(model, prompt, 40, temperature=0) == want.tolist()


@pytest.mark.parametrize("n_rows", [1, 2, 7, 32])
@pytest.mark.parametrize("padding", [0, 1, 13])
def test_batch_invariance(writer, n_rows, padding):
    """R6: the same ids in any batch, however far the row is padded."""
    options = dict(length=16, top_p=0.9, end_of_text=17)
    alone = generate_text(writer, PROMPTS[0][:4], seed=99, **options)[0]
    g = torch.Generator().manual_seed(n_rows)
    others = [torch.randint(61, (4 + padding,), generator=g).tolist() for _ in range(n_rows - 1)]
    if n_rows == 1:
        assert generate_text(writer, PROMPTS[0][:4], seed=99, **options)[0] == alone
    for place in {0, n_rows // 2, n_rows - 1}:
        prompts, seeds = list(others), list(range(n_rows - 1))
        prompts.insert(place, PROMPTS[0][:4])
        seeds.insert(place, 99)
        assert generate_text(writer, prompts, seed=seeds, **options)[place] == alone


def test_a_shared_generator_would_make_rows_depend_on_neighbours():
    """Negative control: one stream of numbers for all rows fails the test above."""
    logits = torch.zeros(3, 50)
    draws = [sample(logits[:n], generator=torch.Generator().manual_seed(0)).tolist() for n in (1, 3)]
    again = [sample(logits[:n], generator=torch.Generator().manual_seed(0)).tolist() for n in (1, 3)]
    assert draws == again and len(set(draws[1])) > 1


def test_the_seed_decides_and_a_longer_text_begins_like_a_shorter_one(writer):
    short, long = (generate_text(writer, PROMPTS, n, seed=7) for n in (9, 30))
    assert [t[: len(p) + 9] for t, p in zip(long, PROMPTS)] == short
    assert generate_text(writer, PROMPTS, 9, seed=8) != short
    assert generate_text(writer, PROMPTS, 9, seed=[7, 8, 9, 10]) == short
    set_seed(3)
    free = [generate_text(writer, PROMPTS, 9) for _ in range(2)]
    set_seed(3)
    assert free[0] != free[1] and [generate_text(writer, PROMPTS, 9) for _ in range(2)] == free


def test_each_row_ends_by_itself(writer):
    plain = generate_text(writer, PROMPTS * 4, 30, seed=1)
    end = plain[0][len(PROMPTS[0]) + 2]  # some rows draw it early, some never
    texts = generate_text(writer, PROMPTS * 4, 30, seed=1, end_of_text=end)
    lengths = set()
    for text, whole, prompt in zip(texts, plain, PROMPTS * 4):
        new = whole[len(prompt):]
        want = new[: new.index(end) + 1] if end in new else new
        assert text == prompt + want
        lengths.add(len(want))
    assert len(lengths) > 2


def test_steps_give_one_column_at_a_time(writer):
    texts, told = generate_text(writer, PROMPTS, 20, seed=2, end_of_text=17, log_probs=True)
    rows = [list(p) for p in PROMPTS]
    for tokens in generate_steps(writer, PROMPTS, 20, seed=2, end_of_text=17):
        assert isinstance(tokens, Tokens) and len(tokens.ids) == len(rows)
        for row, new in zip(rows, tokens.ids):
            if new is not None:
                row.append(new)
    assert rows == texts
    for text, prompt, scores in zip(texts, PROMPTS, told):
        with torch.no_grad():
            full = writer(torch.tensor([text[:-1]]))[0].log_softmax(-1)
        want = full.gather(1, torch.tensor(text[1:])[:, None])[len(prompt) - 1 :, 0]
        torch.testing.assert_close(torch.tensor(scores), want, atol=1e-4, rtol=0)


def test_past_the_context_it_says_so_or_slides(writer):
    with pytest.raises(ValueError, match="8 tokens of prompt and 33 new .* 40"):
        generate_text(writer, PROMPTS, 33)
    with pytest.raises(ValueError, match="41 tokens.*40"):
        generate_text(writer, [[1] * 41], 1, slide=True)
    assert len(generate_text(writer, PROMPTS, 32, seed=0)[0]) == 40
    texts = generate_text(writer, PROMPTS, 90, temperature=0, slide=True)
    for prompt, text in zip(PROMPTS, texts):
        context = list(prompt)
        for new in text[len(prompt):]:
            if len(context) > 40:
                context = context[-20:]
            with torch.no_grad():
                assert writer(torch.tensor([context]))[0, -1].argmax() == new
            context.append(new)


def test_a_model_without_a_table_has_no_limit():
    class NoPositions(nn.Module):
        def forward(self, x, positions):
            return x

    model = loud(context=8, position_embedding=lambda config: NoPositions())
    assert model.max_positions is None
    assert len(generate_text(model, [1, 2], 50)[0]) == 52


def test_prompts_come_in_many_forms(writer):
    want = generate_text(writer, [[1, 2, 3]], 5, seed=0)
    for prompt in ([1, 2, 3], (1, 2, 3), torch.tensor([1, 2, 3]), torch.tensor([[1, 2, 3]]),
                   [torch.tensor([1, 2, 3])], np.array([1, 2, 3]), [np.array([1, 2, 3])],
                   [np.int64(1), 2, 3], [[np.int64(1), 2, 3]], [[torch.tensor(1), 2, 3]]):
        assert generate_text(writer, prompt, 5, seed=0) == want
    assert generate_text(writer, PROMPTS, 0) == PROMPTS
    kept = [list(p) for p in PROMPTS]
    generate_text(writer, kept, 3)
    assert kept == PROMPTS, "the caller's lists were changed"


@pytest.mark.parametrize("prompt", [[], [[]], [[1], []], [61], [-1], [[1, 2], [1.5]], "abc", 3.0,
                                    None, [True], torch.tensor([0.5]), [[[1]]], torch.ones(1, 2, 2).long()])
def test_bad_prompts_are_value_errors(writer, prompt):
    with pytest.raises(ValueError):
        generate_text(writer, prompt, 3)


@pytest.mark.parametrize("options", [
    dict(length=-1), dict(length=2.5), dict(temperature=-1), dict(top_k=0), dict(top_p=0),
    dict(seed=[1]), dict(seed="a"), dict(seed=1.5), dict(temperature=None), dict(end_of_text="x"),
    dict(seed=True), dict(seed={1, 2, 3, 4}), dict(stop=5), dict(stop=False),
])
def test_bad_settings_are_refused_at_the_call(writer, options):
    with pytest.raises(ValueError):
        generate_steps(writer, PROMPTS, **{"length": 3, **options})


def test_modes_and_gradients_come_back():
    model = loud().train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    steps = generate_steps(model, [1, 2], 5, seed=0)
    next(steps)
    assert [m.training for m in model.modules()] == modes, "the caller's model changes mode"
    assert torch.is_grad_enabled(), "no_grad leaks out of the iterator"
    del steps
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()
    generate_text(model, [1, 2], 5)
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()


def test_a_wrapped_embedding_writes_the_same(writer, wrap_embedding):
    expected = generate_text(writer, [[1, 2, 3]], 6, seed=0)
    other = deepcopy(writer)
    wrap_embedding(other)
    assert generate_text(other, [[1, 2, 3]], 6, seed=0) == expected


def test_dropout_is_off_while_writing():
    set_seed(0)
    model = GPTModel(GPTConfig(61, 40, 24, 2, 4, drop_rate=0.5)).train()
    assert len({tuple(generate_text(model, [1, 2], 20, seed=0)[0]) for _ in range(3)}) == 1


def test_a_model_of_nan_is_a_value_error():
    model = loud()
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="nan"):
        generate_text(model, [1, 2], 3)


def test_half_precision(writer):
    model = loud().to(torch.bfloat16)
    assert len(generate_text(model, PROMPTS, 5, top_p=0.9)[0]) == 13


# --- found by a second reading --------------------------------------------------------------


def test_numbers_of_numpy_are_whole_numbers_too(writer):
    want = generate_text(writer, PROMPTS[:2], 6, top_k=5, end_of_text=3, seed=[4, 5])
    for seed in (np.int64(4), np.array([4, 5]), [np.int64(4), 5], torch.tensor([4, 5])):
        assert generate_text(writer, PROMPTS[:2], np.int64(6), top_k=np.int64(5),
                             end_of_text=np.int64(3), seed=seed) == want
    for bad in (dict(length=True), dict(seed=np.float64(4)), dict(end_of_text=True),
                dict(seed=torch.tensor([0.5, 1.5]))):
        with pytest.raises(ValueError):
            generate_text(writer, PROMPTS[:2], **{"length": 3, **bad})


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="a Mac's GPU")
def test_a_device_without_float64(writer):
    logits = torch.tensor([[0.0, 9, 1]], device="mps")
    for options in (dict(temperature=0), dict(), dict(top_k=2), dict(top_p=0.9)):
        assert sample(logits, **options).device.type == "mps"
    model = loud().to("mps")
    assert generate_text(model, PROMPTS, 5, temperature=0) == generate_text(
        writer, PROMPTS, 5, temperature=0)


# --- any model that the book can make ------------------------------------------------------

RECIPES = {
    "gpt2": {}, "llama": {}, "mistral": dict(window=6), "mixtral": dict(n_experts=4, window=7),
    "switch": dict(n_experts=4), "strided": dict(stride=4), "longformer": dict(window=6),
    "bigbird": dict(window=6, block=4), "alibi": {},
}


def made(recipe, vocab=61):
    set_seed(1)
    config = GPTConfig(vocab, 48, 32, 2, 4, recipe=recipe, options=RECIPES[recipe])
    model = GPTModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model


def test_all_recipes_are_here():
    from gptbook.core import RECIPES as known

    assert set(RECIPES) == set(known)


@pytest.mark.parametrize("recipe", RECIPES)
def test_any_recipe_equals_the_loop_by_hand(recipe):
    model = made(recipe)
    sampler = Sampler(0.8, top_k=20, repetition_penalty=1.2, frequency_penalty=0.3)
    texts = generate_text(model, PROMPTS, 14, sampler=sampler, seed=5, end_of_text=17, min_length=2)
    assert texts == rows_by_hand(model, PROMPTS, 14, sampler, 5, 17, 2)
    greedy = generate_text(model, PROMPTS[:2], 14, temperature=0)
    assert greedy == [by_hand(model, p, 14, lambda z, step: z.argmax().item())
                      for p in PROMPTS[:2]]


@torch.no_grad()
def rows_by_hand(model, prompts, length, sampler, seed, end=None, min_length=0):
    """Each row alone and without a cache; penalties look at its own text."""
    rows = []
    for b, prompt in enumerate(prompts):
        g, text = torch.Generator().manual_seed(seed + b), list(prompt)
        luck = torch.rand(length, generator=g, dtype=torch.double)
        for step in range(length):
            logits = model(torch.tensor([text]))[:, -1].clone()
            if end is not None and step < min_length:
                logits[:, end] = -math.inf
            text += sampler(logits, luck[step : step + 1], [text], step).tolist()
            if text[-1] == end:
                break
        rows.append(text)
    return rows


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_models_too(scheme):
    model = made("llama")
    quantize(model, scheme)
    sampler = Sampler(0.8, presence_penalty=0.5)
    assert generate_text(model, PROMPTS, 16, sampler=sampler, seed=2) == rows_by_hand(
        model, PROMPTS, 16, sampler, 2)


DECODERS = {"bf16": dict(dtype=torch.bfloat16), "int8": dict(quantize="int8"),
            "int4": dict(quantize="int4"), "int8_dynamic": dict(quantize="int8_dynamic"),
            "Int8Cache": dict(cache=Int8Cache), "deterministic": dict(deterministic=True)}


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_of_any_form(name):
    model, options = made("llama"), DECODERS[name]
    decoder, single = Decoder(model, 8, **options), Decoder(model, 1, **options)
    again = [generate_text(decoder, PROMPTS, 12, 0.8, n=2, seed=3, end_of_text=17) for _ in "ab"]
    assert again[0] == again[1], "what was written before shows"
    for b, text in enumerate(again[0]):  # the same form, a row alone, a token at a time
        g, row = torch.Generator().manual_seed(3 + b), list(PROMPTS[b // 2])
        luck = torch.rand(12, generator=g, dtype=torch.double)
        logits = single.start([row])
        for step in range(12):
            row += draw(*candidates(logits, 0.8), luck[step : step + 1]).tolist()
            if row[-1] == 17:
                break
            logits = single.step(torch.tensor(row[-1:]))
        assert text == row


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_pretrained_models_as_transformers(family, tmp_path):
    from gptbook.pretrained import load_pretrained

    transformers = pytest.importorskip("transformers")
    set_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2,
                                         n_head=4, bos_token_id=0, eos_token_id=0)
    else:
        config = transformers.LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            bos_token_id=0, eos_token_id=0, pad_token_id=None)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(5)
    theirs.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path, tokenizer=False).model
    for prompt in PROMPTS[1:3]:
        def want(**options):
            return theirs.generate(torch.tensor([prompt]), do_sample=False, pad_token_id=0,
                                   max_new_tokens=20, **options).tolist()

        plain = want(eos_token_id=None)
        assert generate_text(model, prompt, 20, temperature=0) == plain
        end = plain[0][len(prompt) + 3]
        for least in (0, 5, 20):
            got = generate_text(model, prompt, 20, temperature=0, end_of_text=end, min_length=least)
            assert got == want(eos_token_id=end, min_new_tokens=least)
        penalty = Sampler(0, repetition_penalty=1.4, no_repeat_ngram=3)
        assert generate_text(model, prompt, 20, sampler=penalty) == want(
            eos_token_id=None, repetition_penalty=1.4, no_repeat_ngram_size=3)


# --- rows do not see each other ------------------------------------------------------------

PENALTIES = Sampler(0.9, top_p=0.95, repetition_penalty=1.3, presence_penalty=0.4,
                    frequency_penalty=0.2, no_repeat_ngram=2)


def ragged(n, seed=0, vocab=61, longest=16):
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, longest + 1, (n,), generator=g).tolist()
    return [torch.randint(vocab, (T,), generator=g).tolist() for T in sizes]


@pytest.mark.parametrize("options", [
    dict(sampler=PENALTIES), dict(sampler=PENALTIES, min_length=4), dict(top_k=9, top_p=0.8),
    dict(sampler=Sampler(min_p=0.05, typical_p=0.9, banned=[3, 4], forced={2: 7})),
    dict(sampler=PENALTIES, slide=True, length=27),
], ids=["penalties", "min_length", "top_k, top_p", "filters, bans, forced", "slide"])
def test_32_ragged_prompts_with_sampler_options(writer, options):
    options = {"length": 10, "end_of_text": 17, **options}
    prompts = ragged(32)
    together, told = generate_text(writer, prompts, seed=3, log_probs=True, **options)
    for b, prompt in enumerate(prompts):
        alone, numbers = generate_text(writer, prompt, seed=3 + b, log_probs=True, **options)
        assert alone == [together[b]]
        torch.testing.assert_close(torch.tensor(numbers[0]), torch.tensor(told[b]),
                                   atol=1e-4, rtol=0)


def test_penalties_of_a_neighbour_would_show(writer):
    """Negative control of the test above."""
    def wrong(logits, uniform, texts, step):
        return PENALTIES(logits, uniform, texts[1:] + texts[:1], step)

    prompts = ragged(32)
    texts = generate_text(writer, prompts, 16, sampler=wrong, seed=3, end_of_text=17)
    alone = [generate_text(writer, p, 16, sampler=PENALTIES, seed=3 + b, end_of_text=17)[0]
             for b, p in enumerate(prompts)]
    assert sum(a == b for a, b in zip(texts, alone)) < 10


def test_adjust_sees_rows_texts_and_steps_and_nobody_who_has_ended(writer):
    seen = []

    def watch(logits, rows, texts, step):
        assert logits.shape == (len(rows), 61) and len(texts) == 8
        assert all(17 not in texts[b][len(PROMPTS[b % 4]) :] for b in rows), "row has ended"
        assert all(len(texts[b]) == len(PROMPTS[b % 4]) + step for b in rows)
        seen.append(list(rows))
        logits[:] = math.nan  # it is a copy: nothing happens
        return torch.stack([favourite(b) for b in rows])

    def favourite(b):  # rows end at different times
        row = torch.full((61,), -math.inf)
        row[17 if len(seen) > 2 * b else b] = 0
        return row

    texts, told = generate_text(writer, PROMPTS * 2, 30, adjust=watch, end_of_text=17,
                                log_probs=True)
    assert seen[0] == list(range(8)) and seen[-1] == [7]
    assert [text[len(p) :] for text, p in zip(texts, PROMPTS * 2)] == [
        [b] * (2 * b) + [17] for b in range(8)]
    with torch.no_grad():  # log-probabilities are the model's own
        logits = writer(torch.tensor([texts[2][:-1]]))[0].log_softmax(-1)
    want = logits.gather(1, torch.tensor(texts[2][1:])[:, None])[len(PROMPTS[2]) - 1 :, 0]
    torch.testing.assert_close(torch.tensor(told[2]), want, atol=1e-4, rtol=0)


# --- several texts of a prompt -------------------------------------------------------------


@pytest.mark.parametrize("n, slide", [(1, False), (3, False), (2, True)])
def test_n_texts_are_n_rows(writer, n, slide):
    options = dict(length=36 if slide else 12, slide=slide, end_of_text=17, log_probs=True)
    texts, told = generate_text(writer, PROMPTS, n=n, seed=7, **options)
    assert len(texts) == 4 * n
    for b, text in enumerate(texts):
        alone, numbers = generate_text(writer, PROMPTS[b // n], seed=7 + b, **options)
        assert alone == [text]
        torch.testing.assert_close(torch.tensor(told[b]), torch.tensor(numbers[0]),
                                   atol=1e-4, rtol=0)
    seeds = list(range(100, 100 + 4 * n))
    assert generate_text(writer, PROMPTS, n=n, seed=seeds, **options) == generate_text(
        writer, [p for p in PROMPTS for _ in range(n)], seed=seeds, **options)


def test_n_texts_are_n_rows_to_the_last_bit(writer):
    options = dict(length=9, log_probs=True, deterministic=True)
    texts, told = generate_text(writer, PROMPTS, n=2, seed=7, **options)
    for b, (text, numbers) in enumerate(zip(texts, told)):
        assert generate_text(writer, PROMPTS[b // 2], seed=7 + b, **options) == (
            [text], [numbers])


class Counting(Decoder):
    """A decoder that notes what it was asked."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.started, self.stepped = [], []

    def start(self, prompts):
        self.started.append([list(p) for p in prompts])
        return super().start(prompts)

    def step(self, ids):
        self.stepped.append(len(ids))
        return super().step(ids)


def test_equal_prompts_are_read_once(writer):
    decoder = Counting(writer, 12)
    generate_text(decoder, PROMPTS, 5, n=3)
    assert decoder.started == [PROMPTS] and decoder.stepped == [12] * 4
    generate_text(decoder, [PROMPTS[1], PROMPTS[0]] * 3, 2)
    assert decoder.started[1:] == [[PROMPTS[1], PROMPTS[0]]] and decoder.stepped[4:] == [6]


def test_rows_leave_when_half_have_ended(writer):
    def hurry(logits, rows, texts, step):
        logits[:, 17] = logits.amax(1) - 1
        return logits

    decoder = Counting(writer, 16)
    texts = generate_text(decoder, PROMPTS * 4, 30, seed=1, end_of_text=17, adjust=hurry)
    new = [len(t) - len(p) for t, p in zip(texts, PROMPTS * 4)]
    writing = [sum(m > step for m in new) for step in range(1, max(new))]
    assert all(a <= b < 2 * a or a == b for a, b in zip(writing, decoder.stepped))
    assert sum(decoder.stepped) < 16 * len(decoder.stepped)
    assert len(decoder.stepped) == len(writing)


# --- where a text ends ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    return load_demo()


def cut_by_character(text, stop):
    """The definition: at the first character with which a stop string is complete."""
    for n in range(1, len(text) + 1):
        if found := [s for s in stop if text[:n].endswith(s)]:
            return text[: n - max(map(len, found))]
    return text


class Chopped:
    """A tokenizer whose token k is the k-th piece."""

    end_of_text = None

    def __init__(self, pieces):
        self.pieces = pieces

    def stream(self, ids):
        return (self.pieces[i] for i in ids)


def test_stop_strings_mean_the_same_however_the_text_is_chopped():
    draw_ = random.Random(0)
    for _ in range(4000):
        text = "".join(draw_.choices("abc", k=draw_.randint(0, 14)))
        stop = ["".join(draw_.choices("abc", k=draw_.randint(1, 5)))
                for _ in range(draw_.randint(0, 4))]
        cuts = sorted(draw_.choices(range(len(text) + 1), k=draw_.randint(0, 8)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        stream, want = TextStream(Chopped(pieces), stop=stop), cut_by_character(text, stop)
        given = ""
        for i in range(len(pieces)):
            given += stream.push(i)
            assert want.startswith(given), "text that a stop string takes back"
            read = "".join(pieces[: i + 1])
            if not stream.stopped:  # not more is held than could become one
                held = read[len(given) :]
                assert not held or any(s.startswith(held) for s in stop)
        given += stream.finish()
        assert given == want and stream.push(0) == stream.finish() == ""


def test_streams_of_any_bytes(demo):
    tokenizer, draw_ = demo[1], random.Random(1)
    for _ in range(300):
        ids = draw_.choices(range(tokenizer.n_vocab), k=12)
        stream = TextStream(tokenizer)
        given = [stream.push(i) for i in ids]
        text = "".join(given) + stream.finish()
        assert text == tokenizer.decode(i for i in ids if i != tokenizer.end_of_text)


def test_a_character_may_begin_in_the_prompt(demo):
    tokenizer = demo[1]
    ids = tokenizer.encode("a🍎é")
    for n in range(len(ids)):
        stream = TextStream(tokenizer, ids[:n])
        new = "".join([stream.push(i) for i in ids[n:]]) + stream.finish()
        before = tokenizer.decode(ids[:n]).rstrip("\ufffd")
        assert before + new == "a🍎é"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tokenizers_of_the_library(kind, tmp_path):
    """A space that the family's decoder strips from the front of a text stays inside one."""
    rust = pytest.importorskip("tokenizers")
    from gptbook.tokenizer_files import LibraryTokenizer

    words = "Once upon a time there was a cat . Lily was fluffy".split()
    if kind == "llama":
        inner = rust.Tokenizer(rust.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        inner.pre_tokenizer = rust.pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        inner.decoder = rust.decoders.Sequence([
            rust.decoders.Replace("▁", " "), rust.decoders.ByteFallback(),
            rust.decoders.Fuse(), rust.decoders.Strip(" ", 1, 0)])
        special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
        alphabet = []
    else:
        inner = rust.Tokenizer(rust.models.BPE())
        inner.pre_tokenizer = rust.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = rust.decoders.ByteLevel()
        special, alphabet = ["</s>"], rust.pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator([" ".join(words)] * 50, rust.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    content = json.loads(inner.to_str())
    content["added_tokens"] = content["added_tokens"][: 3 if kind == "llama" else 1]
    tokenizer = LibraryTokenizer(json.dumps(content), kind)
    whole = "Once upon a time there was 🍎 a cat."
    ids = tokenizer.encode(whole)
    for n in range(1, len(ids)):
        before = tokenizer.decode(ids[:n])
        if "\ufffd" not in before:
            assert before + new_text(tokenizer, ids, n) == whole
    assert new_text(tokenizer, ids, 2, stop="a cat").endswith("🍎 ")
    end = tokenizer.end_of_text
    assert new_text(tokenizer, [*ids, end], 2) == new_text(tokenizer, ids, 2)


def story_of(demo, prompt, **options):
    model, tokenizer = demo
    ids = prompt_ids(tokenizer, prompt)
    options = dict(length=60, temperature=0.9, end_of_text=tokenizer.end_of_text) | options
    return ids, generate_text(model, ids, **options)[0]


STOPS = [["."], "!", ["hiccup", "picnic"], [" the lake"], ["ly"], ["e", "the"], [". The", "\n"],
         ["zzz"], [" "], ["ily and"], ["nothing like it", "soon"], ['"'], ["t the p"]]


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_a_row_ends_with_the_token_that_completes_a_stop_string(demo, stop):
    model, tokenizer = demo
    prompts = ["Once upon a time", "The cat sat on the mat. Lily", ""]
    rows = [prompt_ids(tokenizer, p) for p in prompts]
    options = dict(length=40, temperature=0.9, seed=11, end_of_text=tokenizer.end_of_text)
    whole = generate_text(model, rows, **options)
    texts = generate_text(model, rows, stop=stop, tokenizer=tokenizer, **options)
    strings = [stop] if isinstance(stop, str) else stop
    for prompt, row, text in zip(rows, whole, texts):
        new, k = row[len(prompt) :], 0
        while k < len(new) and not any(s in tokenizer.decode(new[:k]) for s in strings):
            k += 1
        assert text == prompt + new[:k]
        said = tokenizer.decode(i for i in new if i != tokenizer.end_of_text)
        assert new_text(tokenizer, text, len(prompt), stop=stop) == cut_by_character(said, strings)


def test_stop_strings_as_transformers(demo, tmp_path):
    from gptbook.pretrained import export_transformers

    transformers = pytest.importorskip("transformers")
    model, tokenizer = demo
    export_transformers(model, tmp_path, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = prompt_ids(tokenizer, "The cat sat on the mat. It was fluffy. Soon, Lily")
    lengths = set()
    for stop in ([" the"], ["hiccup", "park"], ["de an"], [".", "!"], ["as "]):
        want = theirs.generate(
            torch.tensor([ids]), max_new_tokens=50, do_sample=False, stop_strings=stop,
            tokenizer=words, pad_token_id=0, eos_token_id=tokenizer.end_of_text)[0].tolist()
        got = generate_text(model, ids, 50, temperature=0, stop=stop, tokenizer=tokenizer,
                            end_of_text=tokenizer.end_of_text)[0]
        assert got == want
        lengths.add(len(got))
    assert len(lengths) > 2


def test_stop_strings_by_ids_would_miss_some(demo):
    """Negative control: what stands before a stop string changes its tokens."""
    tokenizer = demo[1]
    ids = tokenizer.encode("she heard a hiccup and left")
    wanted = tokenizer.encode("hiccup")
    assert not any(ids[i : i + len(wanted)] == wanted for i in range(len(ids)))
    assert new_text(tokenizer, ids, stop=["hiccup"]) == "she heard a "


def test_stop_strings_are_not_looked_for_in_the_prompt(demo):
    ids, row = story_of(demo, "The end. The", seed=0, stop=["The", " end"], tokenizer=demo[1])
    assert len(row) > len(ids) + 1


def test_a_stop_string_may_end_in_the_middle_of_a_token():
    stream = TextStream(Chopped(["ab", "cde", "f"]), stop=["bc"])
    assert [stream.push(i) for i in range(3)] == ["a", "", ""] and stream.stopped
    stream = TextStream(Chopped(["xabcx"]), stop=["b", "abc"])
    assert stream.push(0) == "xa", "b is complete first"
    stream = TextStream(Chopped(["xabx"]), stop=["b", "ab"])
    assert stream.push(0) == "x", "both are: the longer one is cut"


def test_min_length_bans_the_end_and_nothing_else(writer):
    plain = generate_text(writer, PROMPTS * 3, 20, seed=1)
    end = plain[0][len(PROMPTS[0])]  # drawn at once
    short = generate_text(writer, PROMPTS * 3, 20, seed=1, end_of_text=end)
    texts = generate_text(writer, PROMPTS * 3, 20, seed=1, end_of_text=end, min_length=9)
    new = [len(t) - len(p) for t, p in zip(texts, PROMPTS * 3)]
    assert min(new) > 9 - 1 and any(n < 20 for n in new)
    assert min(len(t) - len(p) for t, p in zip(short, PROMPTS * 3)) == 1
    for text, before, prompt in zip(texts, short, PROMPTS * 3):
        if len(before) - len(prompt) > 9:
            assert text == before
    for nobody in (None, 61, -1):  # an end that no model can draw
        assert generate_text(writer, PROMPTS, 9, seed=1, end_of_text=nobody, min_length=9) == [
            t[: len(p) + 9] for t, p in zip(plain, PROMPTS)]


# --- callbacks and streams -----------------------------------------------------------------


def test_a_callback_sees_each_step_and_may_stop(writer):
    seen = []
    options = dict(seed=2, end_of_text=17, log_probs=True)
    texts, told = generate_text(writer, PROMPTS, 20, callback=seen.append, **options)
    assert seen == list(generate_steps(writer, PROMPTS, 20, seed=2, end_of_text=17))
    assert (texts, told) == generate_text(writer, PROMPTS, 20, **options)
    few = []
    stopped, _ = generate_text(writer, PROMPTS, 20, **options,
                               callback=lambda t: few.append(t) or len(few) == 4)
    assert few == seen[:4] and stopped == [
        t[: len(p) + 4] for t, p in zip(texts, PROMPTS)]
    with pytest.raises(ZeroDivisionError):
        generate_text(writer, PROMPTS, 20, callback=lambda t: 1 / 0)


@pytest.mark.parametrize("stop", [(), *STOPS], ids=str)
def test_a_stream_is_the_text(demo, stop):
    model, tokenizer = demo
    for seed, prompt in enumerate(["Naïve Zoë", ""]):
        ids, row = story_of(demo, prompt, seed=seed, stop=stop, tokenizer=tokenizer)
        given = list(stream_text(model, tokenizer, prompt, 60, 0.9, seed=seed, stop=stop))
        assert "".join(given) == new_text(tokenizer, row, len(ids), stop=stop) and all(given)


def test_a_stream_never_cuts_a_character(demo):
    model, tokenizer = demo
    script = tokenizer.encode("é🍎ü漢字 “Zoë”")

    def dictate(logits, rows, texts, step):
        return torch.nn.functional.one_hot(torch.tensor([script[step]]), logits.shape[1]) * 99.0

    given = list(stream_text(model, tokenizer, "Say", len(script), adjust=dictate))
    assert "".join(given) == "é🍎ü漢字 “Zoë”" and "\ufffd" not in given
    alone = [tokenizer.decode([i]) for i in script]
    assert "".join(alone).count("\ufffd") > 5, "otherwise no character was in danger"
    half = list(stream_text(model, tokenizer, "Say", 1, adjust=dictate))
    assert half == ["\ufffd"], "what is not finished at the end is shown as such"


def test_pieces_come_while_the_text_is_written(demo):
    decoder = Counting(demo[0], 1)
    story = stream_text(decoder, demo[1], "Once upon a time", 100, seed=1)
    assert not decoder.started, "nothing runs before the first piece is asked for"
    next(story)
    assert len(decoder.started) == 1 and len(decoder.stepped) <= 1
    next(story)
    assert len(decoder.stepped) <= 3


def test_prompts_of_a_stream(demo):
    model, tokenizer = demo
    end, ids = tokenizer.end_of_text, tokenizer.encode("Tim")
    assert prompt_ids(tokenizer, "Tim") == [end, *ids]
    assert prompt_ids(tokenizer, "Tim", documents=False) == ids
    assert prompt_ids(tokenizer, "") == [end]
    assert prompt_ids(tokenizer, "", documents=False) == tokenizer.encode("\n")

    class Foreign(Chopped):
        begin, encode = [1], lambda self, text: [5, 6]

    assert prompt_ids(Foreign([]), "x") == [1, 5, 6]
    said = lambda prompt, length=20, **options: "".join(
        stream_text(model, tokenizer, prompt, length, seed=4, **options))
    assert said("Tim") == said([end, *ids]) == said(torch.tensor([end, *ids])) == said([[end, *ids]])
    assert said("Tim", documents=False) == said(ids) != said("Tim")
    longer = said("Tim", end_of_text=None, length=150)
    assert said("Tim", length=150) in longer and "<|" not in longer


@pytest.mark.parametrize("options, words", [
    (dict(n=0), "n=0"), (dict(n=True), "n=True"), (dict(n=1.5), "n=1.5"),
    (dict(min_length=-1), "min_length=-1"), (dict(min_length=4), "length=3"),
    (dict(min_length=None), "min_length=None"),
    (dict(stop=["x"]), "tokenizer="), (dict(stop=[""], tokenizer=1), "stop=''"),
    (dict(stop=[3], tokenizer=1), "stop=3"), (dict(stop="", tokenizer=1), "stop=''"),
    (dict(sampler=0.7), "sampler=0.7"), (dict(adjust=[1]), "adjust="),
    (dict(sampler=Sampler(), temperature=0.5), "belong to the sampler"),
    (dict(sampler=Sampler(), top_k=5), "belong to the sampler"),
    (dict(sampler=Sampler(banned=[61])), "61"), (dict(sampler=Sampler(forced={0: 99})), "99"),
    (dict(n=2, seed=[1, 2, 3, 4]), "8 rows"),
])
def test_more_settings_that_are_refused_at_the_call(writer, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        generate_steps(writer, PROMPTS, **{"length": 3, **options})


@pytest.mark.parametrize("wrong", [lambda x, *_: None, lambda x, *_: x[:1], lambda x, *_: x[0],
                                   lambda x, *_: x[:, :5], lambda x, *_: 3.0])
def test_logits_of_another_shape_are_refused(writer, wrong):
    with pytest.raises(ValueError, match="adjust returned"):
        generate_text(writer, PROMPTS, 3, adjust=wrong)


def test_streams_refuse_at_the_call(demo):
    model, tokenizer = demo
    for bad in (dict(prompt=[[1], [2]]), dict(prompt=[]), dict(n=2), dict(stop=[""]),
                dict(length=1000), dict(temperature=-1), dict(prompt=[99999]), dict(top_k=0)):
        with pytest.raises(ValueError):
            stream_text(model, tokenizer, **{"prompt": "Tim", **bad})
    with pytest.raises(ValueError, match="callback=3"):
        generate_text(model, [1], 2, callback=3)
    with pytest.raises(ValueError, match="do not fit"):
        generate_text(Decoder(model, 3), [1], 2, n=4)
