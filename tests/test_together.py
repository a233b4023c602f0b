"""Chains of steps on one model: what composes, in which order, and what a file keeps of it."""

import math
import sys
from copy import deepcopy
from itertools import product
from pathlib import Path

import pytest
import torch

from gptbook import together as module
from gptbook.checkpoints import CheckpointError, load_model, save_model
from gptbook.core import GPTConfig, GPTModel, set_seed
from gptbook.data import TokenDataset
from gptbook.decoder import Decoder
from gptbook.generation import generate_text
from gptbook.inference import KVCache
from gptbook.pruning import finalize, prune
from gptbook.qat import convert, prepare_qat
from gptbook.quantization import quantize, quantize_rows
from gptbook.quantized_cache import Int8Cache, seeing_rounded
from gptbook.structured_pruning import prune_heads, prune_neurons
from gptbook.together import (
    Stage, file_bytes, frontier, measure, write_greedily, writing_speed,
)

V = 61
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1], [4]]
RECIPES = {"gpt2": {}, "llama": {}, "mistral": {"window": 8}, "alibi": {}}
SCHEMES = ("int8", "int8_dynamic", "int4")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def make(recipe="gpt2", **sizes):
    set_seed(1)
    config = GPTConfig(**{**dict(vocab_size=V, context_length=64, emb_dim=96, n_layers=2,
                                 n_heads=4), **sizes},
                       recipe=recipe, options=RECIPES[recipe])
    model = GPTModel(config).eval()
    for p in model.parameters():
        p.data.mul_(3 if p.dim() > 1 else 1)  # so that a wrong key shows
    return model


def chained(model, scheme="int8"):
    prune_heads(model, {0: [1], 1: [0, 3]})
    prune_neurons(model, 0.3)
    if scheme:
        quantize(model, scheme)
    return model


@torch.no_grad()
def slowly(model, prompt, length):
    text = [*prompt]
    for _ in range(length):
        text.append(model(torch.tensor([text]))[0, -1].argmax().item())
    return text


# Writing and measuring ---------------------------------------------------------------
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("scheme", (None, "int8", "int4"))
def test_a_chain_writes_what_the_plain_model_says(recipe, scheme):
    model = chained(make(recipe), scheme)
    decoder = Decoder(model, 3, 40)
    texts = write_greedily(decoder, PROMPTS, 12)
    assert texts == [slowly(model, prompt, 12) for prompt in PROMPTS]
    assert texts == generate_text(model, PROMPTS, 12, temperature=0)
    assert write_greedily(decoder, PROMPTS, 12) == texts, "a second time"


def test_writing_nothing_and_not_changing_the_prompt():
    prompts = [[1, 2, 3]]
    decoder = Decoder(make(), 1, 4)
    assert write_greedily(decoder, prompts, 0) == [[1, 2, 3]] == prompts
    assert len(write_greedily(decoder, prompts, 2)[0]) == 5, "the last token needs no room"
    with pytest.raises(ValueError):
        write_greedily(decoder, prompts, 3)
    assert prompts == [[1, 2, 3]]


def test_speed_counts_every_row(monkeypatch):
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "fastest", lambda work, seconds: seen.append(work()) or 2.0)
        assert writing_speed(make(), 3, 10) == 3 * 10 / 2.0
        assert writing_speed(make(), 1, 10) == 10 / 2.0
    assert [len(texts) for texts in seen] == [3, 1] and len(seen[0][0]) == 18
    assert writing_speed(make(), 1, 4, seconds=0.0) > 0


@pytest.mark.parametrize("scheme", (None, *SCHEMES))
def test_file_bytes_is_the_length_of_the_file(tmp_path, scheme):
    model = chained(make(), scheme)
    path = save_model(tmp_path / "m.safetensors", model)
    assert file_bytes(model) == path.stat().st_size
    held = {x.data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers())}
    assert sum(held.values()) < file_bytes(model) < sum(held.values()) + 12_000


def test_a_model_that_cannot_be_saved_has_no_size():
    model = make()
    model.norm.weight.data[0] = math.nan
    with pytest.raises(CheckpointError):
        file_bytes(model)


def test_measure_puts_all_numbers_in_their_place():
    model, ids = make(), torch.arange(200) % V
    data = TokenDataset(ids, 16, 2)
    stage = measure(model, data, length=4, seconds=0.0)
    assert isinstance(stage, Stage) and stage.one > 0 and stage.eight > 0
    assert stage.megabytes == file_bytes(model) / 1e6
    assert stage.perplexity == pytest.approx(math.exp(stage.nats))
    worse = make()
    worse.head.weight.data.mul_(5)
    assert measure(worse, data, length=4, seconds=0.0).nats != stage.nats


# The frontier ------------------------------------------------------------------------
def beaten(p, points):
    return any(q != p and all(a <= b for a, b in zip(q, p)) for q in points)


@pytest.mark.parametrize("seed", range(20))
def test_the_frontier_is_what_brute_force_finds(seed):
    g = torch.Generator().manual_seed(seed)
    points = {str(i): tuple(torch.randint(0, 9, (2,), generator=g).tolist())
              for i in range(12)}
    found = frontier(points)
    assert {points[n] for n in found} == {p for p in points.values()
                                          if not beaten(p, points.values())}
    assert [points[n][0] for n in found] == sorted(points[n][0] for n in found)
    assert len({points[n] for n in found}) == len(found), "of equal points one"


def test_a_frontier_of_nothing_or_one():
    assert frontier({}) == [] and frontier({"a": (1, 2)}) == ["a"]


# The order ---------------------------------------------------------------------------
def test_rows_commute_with_rounding_and_columns_do_not():
    set_seed(3)
    weight = torch.randn(40, 64)
    weight[:, 5] *= 10
    stay = [n for n in range(40) if n % 3]
    q, scale = quantize_rows(weight)
    after, after_scale = quantize_rows(weight[stay])
    assert torch.equal(after, q[stay]) and torch.equal(after_scale, scale[stay])
    kept = [n for n in range(64) if n != 5]
    assert not torch.equal(quantize_rows(weight[:, kept])[0], q[:, kept])
    harmless = [n for n in range(64) if n != weight.abs().argmin(1)[0]]
    assert torch.equal(quantize_rows(weight[:1, harmless])[0], q[:1, harmless])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_is_pruned_after_rounding(scheme):
    model = make()
    quantize(model, scheme)
    state, transforms = deepcopy(model.state_dict()), deepcopy(model.transforms)
    for wrong in (lambda: prune_heads(model, {0: [1]}), lambda: prune_neurons(model, 0.3),
                  lambda: prune(model, 0.5), lambda: quantize(model, "int8"),
                  lambda: prepare_qat(model)):
        with pytest.raises(ValueError):
            wrong()
    assert model.transforms == transforms
    assert all(map(torch.equal, state.values(), model.state_dict().values()))


def test_masks_make_the_file_longer_until_they_are_off():
    model = make()
    before = file_bytes(model)
    prune(model, 0.5)
    linears = sum(p.numel() for p in model.blocks.parameters() if p.dim() > 1)
    assert before + linears <= file_bytes(model) <= before + linears + 6000
    with pytest.raises(ValueError, match="finalize"):
        prune_neurons(model, 0.3)
    finalize(model)
    assert abs(file_bytes(model) - before) < 100


def test_recovery_that_sees_the_rounding_ends_as_the_same_chain():
    trained, plain = chained(make(), None), chained(make(), None)
    prepare_qat(trained, "int4")
    convert(trained)
    quantize(plain, "int4")
    with torch.no_grad():
        assert torch.equal(trained(IDS), plain(IDS))
    assert trained.transforms == plain.transforms


# Files and caches --------------------------------------------------------------------
@pytest.mark.parametrize("recipe, scheme", [*product(RECIPES, (None, *SCHEMES))])
def test_a_file_replays_the_chain_bit_for_bit(tmp_path, recipe, scheme):
    model = chained(make(recipe), scheme)
    path = save_model(tmp_path / "m.safetensors", model)
    loaded = load_model(path).model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS), model(IDS))
        assert not torch.equal(make(recipe)(IDS), model(IDS))
    assert loaded.transforms == model.transforms
    wanted = ["prune_heads", "prune_neurons", "quantize"][:3 if scheme else 2]
    assert [name for name, _ in loaded.transforms] == wanted
    assert file_bytes(loaded) == file_bytes(model)


def test_transforms_in_another_order_do_not_load(tmp_path):
    model = chained(make())
    model.transforms.reverse()
    with pytest.raises((CheckpointError, ValueError)):
        load_model(save_model(tmp_path / "m.safetensors", model))


@pytest.mark.parametrize("recipe", ("gpt2", "llama", "mistral"))
def test_a_chain_reads_from_a_small_cache(recipe):
    model = chained(make(recipe))
    cache, whole = Int8Cache(model, 16), KVCache(make(recipe), 16)
    with torch.no_grad():
        parts = [model(ids, cache=cache) for ids in IDS.split(3, 1)]
        for block in model.blocks:
            block.attn.kernel = seeing_rounded(block.attn.kernel)
        torch.testing.assert_close(torch.cat(parts, 1), model(IDS), atol=1e-4, rtol=1e-4)
        make(recipe)(IDS, cache=whole)
    count = lambda c: sum(x.nbytes for parts in c.buffers for x in parts)
    assert count(cache) < 0.35 * count(whole)


# The stored table --------------------------------------------------------------------
def test_the_stored_table_is_whole():
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from results_file import load
    figures = load("together")["figures"]
    for name, chain in figures["chains"].items():
        steps = chain["steps"]
        trained = any("recovered" in step for step in steps)
        assert len(chain["nats"]) == (figures["seeds"] if trained else 1), name
        removed = next(s for s in steps if s == "whole" or "removed" in s)
        for shape, batch in product(("stories", "gpt2"), ("one", "eight")):
            speed = figures["speeds"][shape][batch][f"{removed}, {steps[-1]}"]
            assert speed["tokens_per_second"] > 0
    small, large = (figures["chains"][f"whole, {form}"]["megabytes"]
                    for form in ("int8", "32 bits"))
    assert small < 0.27 * large
