"""Checkpoints: equal values there and back, and no harm from faults or strangers."""
import json
import os
import random
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import hostile_checkpoints as hostile  # noqa: E402
import reliability_checkpoints as trials  # noqa: E402

from gptbook import atomic_files as af  # noqa: E402
from gptbook import checkpoints as ck  # noqa: E402
from gptbook.atomic_files import CheckpointError, atomic_write  # noqa: E402
from gptbook.checkpoints import (  # noqa: E402
    describe, encode_tensors, export_pt, find_checkpoint, latest_save, load_demo, load_model,
    load_state, load_tensors, save_model, save_state,
)
from gptbook.core import RECIPES, TRANSFORMS, GPTConfig, GPTModel, replace_modules  # noqa: E402
from gptbook.quantization import quantize  # noqa: E402

SIZES = dict(vocab_size=64, context_length=16, emb_dim=32, n_layers=2, n_heads=4)
IDS = torch.arange(16)[None] * 3


def model_of(**changes) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(GPTConfig(**{**SIZES, **changes})).eval()


def same_bits(a, b) -> None:
    """Equal types, order and bits, all the way down."""
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        flat = lambda t: t.detach().contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(flat(a), flat(b))
    elif isinstance(a, dict):
        assert list(a) == list(b) and [type(k) for k in a] == [type(k) for k in b]
        for key in a:
            same_bits(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b):
            same_bits(x, y)
    else:
        assert type(a) is type(b) and repr(a) == repr(b)


# ---------------------------------------------------------------- the weights file

@pytest.mark.parametrize("changes", [
    {}, {"tied": False}, {"bias": False}, {"n_kv_heads": 2}, {"n_kv_heads": 1, "tied": False},
    {"drop_rate": 0.1}, {"n_layers": 1, "emb_dim": 8, "n_heads": 1, "context_length": 16},
])
def test_model_round_trip(tmp_path, changes):
    model = model_of(**changes)
    found = load_model(save_model(tmp_path / "m.safetensors", model, epoch=3))
    assert found.config == model.config and found.info == {"epoch": 3}
    assert torch.equal(found.model(IDS), model(IDS))
    assert not found.model.training
    tied = found.model.head.weight is found.model.tok_emb.weight
    assert tied == model.config.tied


def test_library_reads_ours_and_writes_the_same_bytes(tmp_path):
    model = model_of(tied=False)
    path = save_model(tmp_path / "m.safetensors", model)
    theirs = safetensors.torch.load_file(path)
    same_bits(theirs, {name: model.state_dict()[name] for name in theirs})
    assert set(theirs) == set(model.state_dict())
    every = {name: torch.zeros(3, dtype=dtype) for name, dtype in ck._DTYPES.items()}
    every |= {"empty": torch.zeros(0, 5), "scalar": torch.tensor(2.0)}
    for metadata in (None, {"note": 'a "quoted" line\n'}):
        ours = b"".join(bytes(piece) for piece in encode_tensors(every, metadata))
        assert ours == safetensors.torch.save(every, metadata)


def test_tied_alias_is_not_saved(tmp_path):
    tied, untied = (save_model(tmp_path / f"{t}.safetensors", model_of(tied=t))
                    for t in (True, False))
    assert "head.weight" not in load_tensors(tied)[0]
    assert untied.stat().st_size - tied.stat().st_size >= 64 * 32 * 4


def test_dtypes(tmp_path):
    model = model_of()
    path = save_model(tmp_path / "m.safetensors", model, dtype=torch.bfloat16)
    assert {t.dtype for t in load_tensors(path)[0].values()} == {torch.bfloat16}
    for dtype, expected in ((torch.float32, torch.float32), (None, torch.bfloat16),
                            (torch.float64, torch.float64)):
        found = load_model(path, dtype=dtype).model
        assert {p.dtype for p in found.parameters()} == {expected}
        same_bits(found.tok_emb.weight.bfloat16(), model.tok_emb.weight.bfloat16())
    loaded, scratch = load_model(path).model, model_of()
    assert {p.requires_grad for p in loaded.parameters()} == {True}
    loaded(IDS).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    assert scratch.state_dict().keys() == loaded.state_dict().keys()


def test_loading_draws_no_random_numbers(tmp_path):
    path = save_model(tmp_path / "m.safetensors", model_of())
    state = torch.get_rng_state()
    load_model(path)
    assert torch.equal(state, torch.get_rng_state())


def test_saving_leaves_the_model_alone_and_is_repeatable(tmp_path):
    model = model_of().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    a = save_model(tmp_path / "a.safetensors", model, step=1).read_bytes()
    b = save_model(tmp_path / "b.safetensors", model, step=1).read_bytes()
    assert a == b and model.training
    same_bits(before, dict(model.state_dict()))


def test_compiled_wrapper_adds_nothing_to_the_names(tmp_path):
    model, compiled = model_of(), nn.Module()
    compiled._orig_mod = model  # as torch.compile wraps it, without its slow import
    path = save_model(tmp_path / "m.safetensors", compiled)
    assert not any("_orig_mod" in name for name in load_tensors(path)[0])
    assert torch.equal(load_model(path).model(IDS), model(IDS))


def test_tokenizer_travels(tmp_path):
    tokenizer = hostile.byte_tokenizer()
    model = model_of(vocab_size=300)
    found = load_model(save_model(tmp_path / "m.safetensors", model, tokenizer)).tokenizer
    text = "Once upon a time: ünïcode \U0001f600\x00"
    assert found.encode(text) == tokenizer.encode(text)
    assert found.end_of_text == tokenizer.end_of_text
    assert found.decode(found.encode(text)) == text


def test_recipes_with_options_and_slots_by_hand(tmp_path):
    class Scaled(nn.Module):
        def __init__(self, dim, scale=2.0):
            super().__init__()
            self.scale, self.weight = scale, nn.Parameter(torch.ones(dim))

        def forward(self, x):
            return x * self.weight * self.scale

    def odd(scale=2.0):
        from functools import partial
        return {**RECIPES["gpt2"](), "norm": partial(Scaled, scale=scale)}

    with mock.patch.dict(RECIPES, odd=odd):
        model = model_of(recipe="odd", options={"scale": 0.5})
        path = save_model(tmp_path / "m.safetensors", model)
        assert torch.equal(load_model(path).model(IDS), model(IDS))
    with pytest.raises(CheckpointError, match="unknown recipe 'odd'; known: .*gpt2"):
        load_model(path)
    model = GPTModel(GPTConfig(**SIZES), norm=Scaled).eval()
    path = save_model(tmp_path / "hand.safetensors", model)
    with pytest.raises(CheckpointError, match=r"norm was given by hand.*norm=\.\.\."):
        load_model(path)
    assert torch.equal(load_model(path, norm=Scaled).model(IDS), model(IDS))
    with pytest.raises(CheckpointError, match="mlp comes from the recipe.*Leave out mlp="):
        load_model(path, norm=Scaled, mlp=Scaled)
    with pytest.raises(TypeError, match="unexpected keyword argument 'dropout'"):
        load_model(path, dropout=0.1)


def test_transforms_are_replayed_before_the_weights(tmp_path):
    class Low(nn.Module):
        def __init__(self, base, rank):
            super().__init__()
            self.base = base
            self.a = nn.Parameter(torch.randn(rank, base.in_features))
            self.b = nn.Parameter(torch.randn(base.out_features, rank))

        def forward(self, x):
            return self.base(x) + x @ self.a.T @ self.b.T

    def low(model, rank):
        replace_modules(model, lambda name, m: name.endswith("W_query"),
                        lambda name, m: Low(m, rank))
        model.transforms.append(["low", {"rank": rank}])

    with mock.patch.dict(TRANSFORMS, low=low):
        model = model_of()
        low(model, rank=3)
        path = save_model(tmp_path / "m.safetensors", model)
        found = load_model(path)
        assert torch.equal(found.model(IDS), model(IDS))
        assert found.model.transforms == [["low", {"rank": 3}]]
    with pytest.raises(CheckpointError, match="transform 'low'; known: "):
        load_model(path)


def test_non_persistent_tables_are_made_afresh(tmp_path):
    class Table(nn.Module):
        """Adds a fixed table that is not saved, drawn from its own seed."""

        def __init__(self, config):
            super().__init__()
            rng = torch.Generator().manual_seed(7)
            table = torch.empty(config.context_length, config.emb_dim, device="cpu")
            self.register_buffer("table", table.normal_(generator=rng), persistent=False)

        def forward(self, x, positions):
            return x + self.table[positions.index.clamp(min=0)]

    model = GPTModel(GPTConfig(**SIZES), position_embedding=Table).eval()
    path = save_model(tmp_path / "m.safetensors", model)
    assert not any("table" in name for name in load_tensors(path)[0])
    found = load_model(path, position_embedding=Table).model
    assert torch.equal(found(IDS), model(IDS))


def test_refuses_to_save_what_could_not_be_loaded(tmp_path):
    path, model = tmp_path / "m.safetensors", model_of()
    save_model(path, model, step=1)
    before = path.read_bytes()
    with torch.no_grad():
        model.blocks[1].mlp.fc_in.weight[3, 4] = float("nan")
    with pytest.raises(CheckpointError, match="fc_in.weight' holds NaN.*untouched"):
        save_model(path, model, step=2)
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        save_model(path, model_of(), note=object())
    with pytest.raises(CheckpointError, match="JSON is too large"):
        save_model(path, model_of(), note=[[]] * 200_000)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        save_model(tmp_path / "m.pt", model_of())
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["m.safetensors"]


def test_what_could_not_be_loaded_again_does_not_replace_what_can(tmp_path):
    path = save_model(tmp_path / "m.safetensors", model_of(), step=1)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="tokenizer has 257 tokens, its model 64.*untouched"):
        save_model(path, model_of(), hostile.byte_tokenizer())
    loose = model_of()
    loose.head.weight = nn.Parameter(loose.head.weight.detach().clone())
    save_model(tmp_path / "equal.safetensors", loose)  # untied, but equal: loads, tied again
    again = load_model(tmp_path / "equal.safetensors").model
    assert again.head.weight is again.tok_emb.weight
    with torch.no_grad():
        loose.head.weight += 1
    with pytest.raises(CheckpointError, match="ties the head to the embedding, they differ"):
        save_model(path, loose)
    big = model_of()
    with torch.no_grad():
        big.tok_emb.weight *= 1e9  # infinite in float16
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        save_model(path, big, dtype=torch.float16)
    for dtype in (torch.int32, torch.bool, torch.uint8):
        with pytest.raises(ValueError, match=f"dtype={dtype} must be a floating-point type"):
            save_model(path, model_of(), dtype=dtype)
        with pytest.raises(ValueError, match=f"dtype={dtype} must be a floating-point type"):
            load_model(path, dtype=dtype)
    assert path.read_bytes() == before


def test_files_of_other_versions_and_of_wrappers_say_so(tmp_path):
    path, model = save_model(tmp_path / "m.safetensors", model_of()), model_of()
    header, meta, data = hostile.parts(path.read_bytes())

    def changed(**config):
        path.write_bytes(hostile.whole(header, {**meta, "config": config}, data))
        return path

    known = meta["config"]
    older = {k: v for k, v in known.items() if k not in ("options", "n_kv_heads", "tied")}
    assert load_model(changed(**older)).config == model.config  # defaults fill it up
    with pytest.raises(CheckpointError, match="unknown entry 'softcap'.*newer gptbook.*update"):
        load_model(changed(**known, softcap=30))
    path.write_bytes(hostile.whole(header, {**meta, "format": 2}, data))
    with pytest.raises(CheckpointError, match="not of format 1. It is from a newer gptbook"):
        load_model(path)
    for prefix in ("module.", "_orig_mod."):
        torch.save({"config": known, "model_state_dict": {
            prefix + name: t for name, t in model.state_dict().items()}}, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match=f"lacks .*; it has .* unknown .*'{prefix}"):
            load_model(tmp_path / "w.pt")


def test_foreign_files_are_checked_and_need_a_config(tmp_path):
    model, path = model_of(), tmp_path / "foreign.safetensors"
    state = {name: t.clone() for name, t in model.state_dict().items()}
    safetensors.torch.save_file(state, path)  # holds the alias too
    with pytest.raises(CheckpointError, match=r"Pass load_model\(path, config="):
        load_model(path)
    found = load_model(path, config=model.config)
    assert torch.equal(found.model(IDS), model(IDS))
    for name, change, cause in (
        ("norm.weight", lambda t: t.fill_(float("inf")), "holds NaN or infinite"),
        ("norm.weight", lambda t: t[:5], "has shape"), ("head.weight", lambda t: t + 1, "ties"),
        ("norm.weight", lambda t: t.long(), "is torch.int64, expected torch.float32"),
    ):
        safetensors.torch.save_file({**state, name: change(state[name].clone())}, path)
        with pytest.raises(CheckpointError, match=cause):
            load_model(path, config=model.config)


def test_a_config_beside_the_files_own_is_refused(tmp_path):
    model = model_of()
    path = save_model(tmp_path / "m.safetensors", model)
    assert load_model(path, config=model.config).config == model.config
    with pytest.raises(CheckpointError, match="its own config"):
        load_model(path, config=GPTConfig(**{**SIZES, "n_layers": 3}))


def test_load_tensors(tmp_path):
    every = {name: torch.ones(3).to(dtype) for name, dtype in ck._DTYPES.items()}
    path = tmp_path / "t.safetensors"
    safetensors.torch.save_file(every, path, {"a": "b"})
    found, metadata = load_tensors(path)
    same_bits({name: found[name] for name in every}, every)
    assert metadata == {"a": "b"}
    raw = path.read_bytes()
    at = 8 + int.from_bytes(raw[:8], "little") + json.loads(
        raw[8:8 + int.from_bytes(raw[:8], "little")])["BOOL"]["data_offsets"][0]
    path.write_bytes(raw[:at] + b"\2" + raw[at + 1:])
    with pytest.raises(CheckpointError, match="neither true nor false"):
        load_tensors(path)


# ---------------------------------------------------------------- .pt

def test_pt_there_and_back(tmp_path):
    model, tokenizer = model_of(vocab_size=300), hostile.byte_tokenizer()
    path = save_model(tmp_path / "m.safetensors", model, tokenizer, epoch=2, step=9)
    pt = export_pt(path)
    assert pt == tmp_path / "m.pt" and not list(tmp_path.glob(".*"))
    held = torch.load(pt, weights_only=True)
    assert held["config"] == asdict(model.config) and held["epoch"] == 2
    plain = GPTModel(GPTConfig(**held["config"])).eval()
    plain.load_state_dict(held["model_state_dict"])  # strict: the alias is in it
    found = load_model(pt)
    for other in (plain, found.model):
        assert torch.equal(other(IDS), model(IDS))
    assert found.tokenizer.encode("once") == tokenizer.encode("once")
    assert found.info == {"epoch": 2, "step": 9}
    with pytest.raises(CheckpointError):
        export_pt(tmp_path / "missing.safetensors")
    before = pt.read_bytes()
    for out in (None, pt, tmp_path / "." / "m.pt"):  # it may hold more than we would write
        with pytest.raises(CheckpointError, match="a .pt file already.*path_out"):
            export_pt(pt, out)
    assert pt.read_bytes() == before
    assert export_pt(pt, tmp_path / "copy.pt").exists()


def test_plain_pt_of_others(tmp_path):
    model, pt = model_of(tied=False), tmp_path / "m.pt"
    torch.save({"config": SIZES | {"tied": False}, "model_state_dict": model.state_dict(),
                "optimizer_state_dict": torch.optim.AdamW(model.parameters()).state_dict(),
                "epoch": 4, "loss": 1.5}, pt)
    found = load_model(pt)
    assert torch.equal(found.model(IDS), model(IDS))
    assert found.info == {"epoch": 4, "loss": 1.5} and found.tokenizer is None
    torch.save({"model_state_dict": model.state_dict()}, pt)
    assert torch.equal(load_model(pt, config=model.config).model(IDS), model(IDS))


# ---------------------------------------------------------------- finding and telling

def test_find_checkpoint(tmp_path, capsys):
    path = save_model(tmp_path / "best_model.safetensors", model_of())
    assert find_checkpoint(path) == find_checkpoint(tmp_path) == path
    assert capsys.readouterr().out == ""
    assert find_checkpoint(tmp_path / "best_model.pt") == path
    assert capsys.readouterr().out == (
        f"{tmp_path / 'best_model.pt'} is not there: using {path}\n")
    with pytest.raises(CheckpointError, match="no such file.*best_model.safetensors"):
        find_checkpoint(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="missing is missing"):
        find_checkpoint(tmp_path / "missing" / "other.pt")
    for odd in ("a\0b", "x" * 5000):
        with pytest.raises(CheckpointError):
            find_checkpoint(tmp_path / odd)


def test_describe_says_what_was_rounded(tmp_path):
    model = model_of()
    n = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    quantize(model)
    lines = describe(load_model(save_model(tmp_path / "m.safetensors", model))).split("\n")
    assert f" and {n:,} bytes of integers" in lines[0] and lines[1] == "changed by: quantize"


def test_describe_says_what_matters_and_is_safe_to_print(tmp_path):
    path = save_model(tmp_path / "m.safetensors", model_of(), epoch=3, step=1200,
                      validation_loss=1.23456789, data="stories\x1b[2J\nowned" + "x" * 300)
    lines = describe(load_model(path)).split("\n")
    assert lines[0] == ("gpt2: 28,032 parameters, 2 layers of width 32, context 16, "
                        "vocabulary 64")
    assert lines[1] == "epoch 3 · step 1200 · validation loss 1.23457"
    assert len(lines) == 3 and lines[2].startswith("data: stories?[2J?owned")
    assert len(lines[2]) <= 200
    assert describe(load_model(save_model(path, model_of()))) == lines[0]


def test_load_demo(tmp_path):
    with mock.patch.object(ck, "files", lambda package: tmp_path):
        with pytest.raises(CheckpointError, match="stories.safetensors"):
            load_demo()
        path = tmp_path / "models" / "stories.safetensors"
        save_model(path, model_of(vocab_size=300), hostile.byte_tokenizer(),
                   dtype=torch.bfloat16)
        model, tokenizer = load_demo()
    assert model(IDS).shape == (1, 16, 300) and tokenizer.n_vocab == 257


def test_the_demo_that_travels_is_whole():
    path = Path(ck.__file__).parent / "models" / "stories.safetensors"
    if not path.exists():
        pytest.skip("the trained model is not there yet")
    model, tokenizer = load_demo()
    assert path.stat().st_size <= 6_000_000 and tokenizer.n_vocab <= model.config.vocab_size
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer.decode(tokenizer.encode("Once upon a time")) == "Once upon a time"


# ---------------------------------------------------------------- the state of a run

def everything() -> dict:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    model(IDS).sum().backward()
    optimizer.step()
    return {
        "model": dict(model.state_dict()), "optimizer": optimizer.state_dict(),
        "rng": {"torch": torch.get_rng_state(), "python": random.getstate()},
        "bits": torch.tensor([0x7FC00001, 0x7F800001, -0x80000000, 1], dtype=torch.int32)
        .view(torch.float32), "scalar": torch.tensor(3), "empty": torch.zeros(0, 4),
        "dtypes": [torch.ones(2).to(dtype) for dtype in ck._DTYPES.values()],
        "strided": torch.arange(12.0).view(3, 4).T, "best": float("inf"),
        "odd floats": [float("nan"), -0.0, 5e-324], "long": [0.1] * 1000, "ints": [7] * 50,
        "large": 2**70, "long large": [2**70] * 50, "mixed": [1, 2.0] * 30,
        "flags": [True, False] * 30, "tuple": (1, [2, (3,)], ()), "keys": {1: "a", "1": "b",
        None: "c", 1.5: "d"}, "$tensor": "a plain text", "tagged": {"$list": "w"},
        "nothing": {}, "text": "\ud800 é \x00 \n", "none": None,
    }


def test_state_round_trip(tmp_path):
    state = everything()
    save = save_state(tmp_path, 5, state)
    same_bits(load_state(tmp_path), state)
    same_bits(load_state(save), state)
    assert sorted(os.listdir(save)) == ["manifest.json", "state.json", "tensors.safetensors"]
    assert not any(b"\x80\x02" == p.read_bytes()[:2] for p in save.iterdir())
    assert "head.weight" in load_state(save)["model"]
    assert len(safetensors.torch.load_file(save / "tensors.safetensors")) > 100


def test_aliases_in_a_state_are_stored_once(tmp_path):
    shared = torch.randn(1000)
    one = save_state(tmp_path / "1", 0, {"a": shared})
    two = save_state(tmp_path / "2", 0, {"a": shared, "b": [shared, shared.view(1000)]})
    sizes = [(save / "tensors.safetensors").stat().st_size for save in (one, two)]
    assert sizes[0] == sizes[1]
    same_bits(load_state(two), {"a": shared, "b": [shared, shared]})


def test_a_view_with_other_strides_is_no_alias(tmp_path):
    square = torch.arange(4.0).view(2, 2)
    state = {"a": square, "b": square.T, "c": square.view(torch.int32), "d": square[:1]}
    save_state(tmp_path, 0, state)
    same_bits(load_state(tmp_path), state)


scalars = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5))
tensors = st.builds(
    lambda dtype, shape: (torch.arange(shape[0] * shape[1]).view(shape) % 3).to(dtype),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]),
    st.tuples(st.integers(0, 3), st.integers(0, 3)))
states = st.recursive(scalars | tensors, lambda inner: st.lists(inner, max_size=4)
                      | st.lists(inner, max_size=3).map(tuple)
                      | st.dictionaries(st.text(max_size=4) | st.integers(), inner,
                                        max_size=4), max_leaves=12)


@settings(max_examples=20, deadline=None, database=None)
@given(state=states)
def test_any_state_comes_back(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("state")
    save_state(folder, 0, {"it": state})
    same_bits(load_state(folder)["it"], state)


def test_state_that_cannot_be_kept_is_refused_by_name(tmp_path):
    import numpy as np
    deep = []
    for _ in range(5000):
        deep = [deep]
    for value, cause in ((np.zeros(3), r"state\.a\.1 is a ndarray"), (object(), "a object"),
                         ({(1, 2): 3}, "is a dict"), (torch.zeros(3, dtype=torch.complex64),
                         "complex64"), (torch.empty(2, device="meta"), "on meta"),
                         (torch.eye(2).to_sparse(), "sparse"), (deep, "recursion")):
        with pytest.raises(CheckpointError, match=cause):
            save_state(tmp_path, 0, {"a": [0, value]})
    assert not os.listdir(tmp_path)
    for bad in (dict(step=-1), dict(step=1.5), dict(step=1, keep=0)):
        with pytest.raises(ValueError, match="step="):
            save_state(tmp_path, state={}, **bad)


def test_keeps_the_last_and_latest_points_to_it(tmp_path):
    assert latest_save(tmp_path) is None
    for step in (10, 20, 20, 5):  # a run that began again, too
        save = save_state(tmp_path, step, {"step": step}, keep=2)
        assert latest_save(tmp_path) == save
    names = ["save_000003_step_20", "save_000004_step_5"]
    assert sorted(os.listdir(tmp_path)) == ["latest", *names]
    assert (tmp_path / "latest").read_text() == names[1]
    for step in range(4):
        save_state(tmp_path, step, {}, keep=None)
    assert len(list(tmp_path.glob("save_*"))) == 6


@pytest.mark.parametrize("spoil", [
    lambda p: p.unlink(), lambda p: p.write_text(""), lambda p: p.write_text("../../etc"),
    lambda p: p.write_text("save_000009_step_1"), lambda p: p.write_bytes(b"\xff" * 5000),
    lambda p: (p.unlink(), p.mkdir()), lambda p: (p.unlink(), p.symlink_to("/etc/hostname")),
    lambda p: (p.unlink(), os.mkfifo(p)),
])
def test_without_latest_the_newest_whole_save_is_used(tmp_path, spoil):
    for step in (1, 2):
        save_state(tmp_path, step, {"step": step})
    spoil(tmp_path / "latest")
    assert load_state(tmp_path) == {"step": 2}


def test_a_damaged_save_is_passed_over_and_named(tmp_path, capsys):
    old, new = (save_state(tmp_path, step, {"step": step}) for step in (1, 2))
    (new / "state.json").write_text('{"step": 3}')
    assert load_state(tmp_path) == {"step": 1}
    said = capsys.readouterr().out
    assert str(new) in said and f"Using {old} instead" in said
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_state(new)
    (old / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="save_000002"):
        load_state(tmp_path)
    with pytest.raises(CheckpointError, match="holds no saved state"):
        load_state(tmp_path / "nowhere")


def test_a_linked_save_is_not_followed(tmp_path):
    away = save_state(tmp_path / "away", 1, {"step": 1})
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "save_000001_step_1").symlink_to(away)
    with pytest.raises(CheckpointError, match="holds no saved state"):
        load_state(tmp_path / "here")


# ---------------------------------------------------------------- R2: faults while saving

def fault_trials(subject):
    calls = trials.calls_of(subject)
    kinds = ("ENOSPC", "EIO", "kill")
    return [trials.fault_trial(subject, at, kind) for at in range(len(calls)) for kind in kinds]


@pytest.mark.parametrize("subject", [trials.MODEL, trials.STATE], ids=lambda s: s.name)
def test_r2_every_fault_leaves_a_whole_checkpoint(subject):
    calls = trials.calls_of(subject)
    assert {"open", "write", "fsync"} <= set(calls) and len(calls) > 20
    outcomes = fault_trials(subject)
    assert outcomes.count("previous") > outcomes.count("new") > 0


@pytest.mark.parametrize("subject", [trials.MODEL, trials.STATE], ids=lambda s: s.name)
def test_r2_every_power_cut_leaves_a_whole_checkpoint(subject):
    found = trials.power_cut_trials(subject)
    assert found["lost"] == 0 and found["whole"] > 100


def test_r2_can_fail():
    with pytest.raises((AssertionError, CheckpointError, OSError)):
        fault_trials(trials.CARELESS)
    for control in (trials.CARELESS, trials.UNSYNCED):
        assert trials.power_cut_trials(control)["lost"] > 0


def test_short_writes_are_continued(tmp_path):
    few = lambda call, *args: call(args[0], args[1][:7]) if call is os.write else call(*args)
    with mock.patch.object(af, "_disk", few):
        path = save_model(tmp_path / "m.safetensors", model_of())
    assert torch.equal(load_model(path).model(IDS), model_of()(IDS))


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for where in (tmp_path / "file" / "m.safetensors", tmp_path / ("x" * 300 + ".safetensors")):
        with pytest.raises(CheckpointError, match="not saved"):
            save_model(where, model_of())
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="not saved"):
        save_model(tmp_path / "folder.safetensors", model_of())
    with pytest.raises(CheckpointError, match="not saved"):
        save_state(tmp_path / "file", 1, {})
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.safetensors"]


def test_interrupted_by_the_user(tmp_path):
    def interrupt(call, *args):
        if call is os.write:
            raise KeyboardInterrupt
        return call(*args)

    save = save_state(tmp_path, 1, {"step": 1})
    before = trials.tree(tmp_path)
    with mock.patch.object(af, "_disk", interrupt), pytest.raises(KeyboardInterrupt):
        save_state(tmp_path, 2, {"step": 2})
    assert trials.tree(tmp_path) == before and latest_save(tmp_path) == save


# ---------------------------------------------------------------- R3: strangers

def refused(attempts) -> int:
    attempts = list(attempts)
    bad = [f"{a.name}: {a.verdict}" for a in attempts if a.verdict != "ok"]
    assert not bad, "\n".join(bad)
    return len(attempts)


def test_r3_mutations(tmp_path):
    assert refused(trials.mutation_trials(tmp_path, 300)) == 300


def test_r3_crafted(tmp_path):
    assert refused(trials.crafted_trials(tmp_path)) >= 120


def test_r3_can_fail(tmp_path):
    with mock.patch.object(ck, "_check_seal", lambda *_: None), \
            mock.patch.object(ck, "_check_sum", lambda *_: None):
        attempts = list(trials.mutation_trials(tmp_path, 300))
    assert any("no CheckpointError" in a.verdict for a in attempts)
    secret = tmp_path / "secret" / "file"
    secret.parent.mkdir()
    secret.write_text("x")

    def nosy(path):
        secret.read_text()
        __import__("this_module_does_not_exist_yet")

    atomic_write(tmp_path / "sub" / "m", b"")
    events = trials.attempt("nosy", nosy, tmp_path / "sub" / "m").events
    assert {"open", "import"} <= {event for event, _ in events}


def test_every_flipped_bit_of_the_weights_is_found(tmp_path):
    path = save_model(tmp_path / "m.safetensors", hostile.tiny_model())
    raw = bytearray(path.read_bytes())
    for at in range(len(raw) - 200, len(raw)):
        raw[at] ^= 1
        path.write_bytes(raw)
        with pytest.raises(CheckpointError):
            load_model(path)
        raw[at] ^= 1


def test_pt_mutations_never_give_other_weights(tmp_path):
    model = hostile.tiny_model()
    path = export_pt(save_model(tmp_path / "m.safetensors", model))
    raw, rng = path.read_bytes(), random.Random(0)
    for _ in range(100):
        path.write_bytes(trials.mutate(raw, rng))
        try:
            found = load_model(path).model
        except CheckpointError:
            continue
        same_bits(dict(found.state_dict()), dict(model.state_dict()))


@pytest.mark.slow
def test_r3_full_counts(tmp_path):
    assert refused(trials.mutation_trials(tmp_path, 4000, every=True, seed=1)) >= 10_000


@pytest.mark.slow
def test_r3_crafted_with_all_memory_counted(tmp_path):
    assert refused(trials.crafted_trials(tmp_path, deep=True)) >= 120


# ---------------------------------------------------------------- what it costs

def test_demo_size_loads_fast(tmp_path):
    from time import perf_counter
    model = GPTModel(GPTConfig(4096, 128, 192, 6, 6))
    path = save_model(tmp_path / "m.safetensors", model, dtype=torch.bfloat16)
    times = []
    for _ in range(7):
        start = perf_counter()
        load_model(path)
        times.append(perf_counter() - start)
    assert min(times) < 0.25, times  # 0.03 s when the machine is idle
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(path)
