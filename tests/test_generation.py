"""Generation row by row: batches, seeds, ends, the context."""
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from sampling_oracle import oracle_draw, oracle_kept
from torch import nn

from gptbook.core import GPTConfig, GPTModel, set_seed
from gptbook.generation import Tokens, generate_steps, generate_text, sample



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
                   [np.int64(1), 2, 3]):
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
