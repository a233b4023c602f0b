"""Pretrained weights: equal to transformers for every family, there and back, and refusals."""
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gptbook.atomic_files import CheckpointError
from gptbook.core import GPTConfig, GPTModel, set_seed
from gptbook.inference import KVCache
from gptbook.pretrained import (
    HUB_FILES, INDEX, WEIGHTS, FAMILY_WORDS, config_from, export_transformers, find_folder,
    find_shards, from_layout, load_pretrained, map_tensors, read_config, their_name, to_layout,
)
from gptbook.tokenizer import train_bpe
from gptbook.tokenizer_files import LibraryTokenizer

T = pytest.importorskip("transformers")
T.logging.set_verbosity_error()
T.utils.logging.disable_progress_bar()

SMALL = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, bos_token_id=None,
             eos_token_id=None, pad_token_id=None, initializer_range=0.1)
GPT2 = dict(vocab_size=97, n_positions=300, n_embd=48, n_layer=2, n_head=4,
            bos_token_id=None, eos_token_id=None, initializer_range=0.1)
ORIGINAL = dict(original_max_position_embeddings=64)
CASES = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 untied": ("GPT2", GPT2 | dict(tie_word_embeddings=False)),
    "gpt2 one head": ("GPT2", GPT2 | dict(n_head=1, n_layer=1)),
    "llama": ("Llama", SMALL),
    "llama tied": ("Llama", SMALL | dict(tie_word_embeddings=True)),
    "llama biases": ("Llama", SMALL | dict(attention_bias=True, mlp_bias=True)),
    "llama one key head": ("Llama", SMALL | dict(num_key_value_heads=1, rms_norm_eps=1e-3)),
    "llama far base": ("Llama", SMALL | dict(rope_parameters=dict(
        rope_type="default", rope_theta=5e5))),
    "llama linear": ("Llama", SMALL | dict(rope_parameters=dict(
        rope_type="linear", rope_theta=1e4, factor=4.0))),
    "llama 3": ("Llama", SMALL | dict(rope_parameters=dict(
        rope_type="llama3", rope_theta=5e4, factor=8.0, low_freq_factor=1.0,
        high_freq_factor=4.0, **ORIGINAL))),
    "llama yarn": ("Llama", SMALL | dict(rope_parameters=dict(
        rope_type="yarn", rope_theta=1e4, factor=4.0, **ORIGINAL))),
    "mistral": ("Mistral", SMALL | dict(sliding_window=7)),
    "mistral, no window": ("Mistral", SMALL | dict(sliding_window=None)),
    "qwen2": ("Qwen2", SMALL),
    "qwen2 tied": ("Qwen2", SMALL | dict(tie_word_embeddings=True)),
    "mixtral": ("Mixtral", SMALL | dict(num_local_experts=4)),
    "mixtral, window": ("Mixtral", SMALL | dict(num_local_experts=3, num_experts_per_tok=3,
                                                sliding_window=9)),
}
IDS = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def theirs(kind, arguments):
    """A model of transformers whose norms and biases are random too."""
    torch.manual_seed(0)
    config = getattr(T, f"{kind}Config")(**arguments)
    model = T.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        if p.dim() == 1:
            p += 0.1 * torch.randn_like(p)
    return model


def greedy(model, ids, n):
    cache, x, new = KVCache(model, len(ids) + n), torch.tensor([ids]), []
    for _ in range(n):
        new.append(model(x, cache=cache)[0, -1].argmax().item())
        x = torch.tensor([new[-1:]])
    return new


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    with torch.no_grad():
        place = tmp_path_factory.mktemp("gpt2") / "m"
        theirs("GPT2", GPT2).save_pretrained(place)
    return place


@pytest.fixture
def folder(gpt2_folder, tmp_path):
    shutil.copytree(gpt2_folder, tmp_path / "m")
    return tmp_path / "m"


# Equal to transformers --------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES)
def test_logits_and_back_again(case, tmp_path):
    oracle = theirs(*CASES[case])
    shards = "60KB" if len(case) % 2 else "5GB"
    oracle.save_pretrained(tmp_path / "in", max_shard_size=shards)
    loaded = load_pretrained(tmp_path / "in")
    assert not loaded.model.training and loaded.tokenizer is None
    assert (loaded.model(IDS) - oracle(IDS).logits).abs().max() <= 1e-5
    export_transformers(loaded.model, tmp_path / "out")
    back = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    state, sent = back.state_dict(), oracle.state_dict()
    assert state.keys() == sent.keys() and all(torch.equal(state[k], sent[k]) for k in sent)
    assert (back(IDS).logits - oracle(IDS).logits).abs().max() <= 1e-6
    again = load_pretrained(tmp_path / "out").model
    assert again.config == loaded.model.config
    for name, weight in loaded.model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


@pytest.mark.parametrize("case", ["gpt2", "llama", "mistral", "qwen2", "mixtral"])
def test_256_greedy_ids(case, tmp_path):
    oracle = theirs(*CASES[case])
    oracle.save_pretrained(tmp_path)
    prompt = IDS[0, :5].tolist()
    x = torch.tensor([prompt])
    written = oracle.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=256,
                              do_sample=False, pad_token_id=0)[0, 5:].tolist()
    assert greedy(load_pretrained(tmp_path).model, prompt, 256) == written


def change(folder, **entries):
    path = folder / "config.json"
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "gone"}))


@pytest.mark.parametrize("case, entries", [
    ("mistral", dict(sliding_window=6)), ("mistral", dict(sliding_window=None)),
    ("llama", dict(rope_parameters=dict(rope_theta=9e3, rope_type="default"))),
    ("llama", dict(rms_norm_eps=1e-2)), ("mixtral", dict(num_experts_per_tok=3)),
    ("llama", dict(num_attention_heads=2, num_key_value_heads=1, head_dim=24))])
def test_each_entry_matters(case, entries, tmp_path):
    """The negative control: a config that says something else gives other logits."""
    oracle = theirs(*CASES[case])
    oracle.save_pretrained(tmp_path)
    change(tmp_path, **entries)
    assert (load_pretrained(tmp_path).model(IDS) - oracle(IDS).logits).abs().max() > 1e-4


def test_configs_of_transformers_4():
    """Rope lay in two entries, and what was the default was left out."""
    base = dict(model_type="llama", vocab_size=9, hidden_size=8, intermediate_size=16,
                num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=8)
    _, config = config_from(base | dict(rope_theta=5e5, rope_scaling=dict(
        type="linear", factor=2.0)))
    assert config.options["rope_base"] == 5e5
    assert config.options["rope_scaling"] == dict(rope_type="linear", factor=2.0)
    assert config.kv_heads == 2 and not config.tied and config.options["norm_eps"] == 1e-6
    _, plain = config_from(base)
    assert plain.options == dict(hidden_dim=16, norm_eps=1e-6)
    _, mixtral = config_from(base | dict(model_type="mixtral"))
    assert mixtral.options == dict(hidden_dim=16, norm_eps=1e-6)
    _, mistral = config_from(base | dict(model_type="mistral"))
    assert mistral.recipe == "mistral" and "window" not in mistral.options
    assert config_from(base | dict(model_type="qwen2"))[1].options["qkv_bias"]


def test_bare_models_and_old_tables(folder):
    """GPT-2 on the hub: no first word, and masks stored as tensors."""
    good = load_pretrained(folder).model
    state = {k.removeprefix("transformer."): v for k, v in load_file(folder / WEIGHTS).items()}
    state |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4).tril(),
              "h.1.attn.masked_bias": torch.tensor(-1e4)}
    save_file(state, folder / WEIGHTS)
    assert torch.equal(load_pretrained(folder).model(IDS), good(IDS))
    save_file(state | {"h.0.attn.biases": torch.ones(2)}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="has besides 1 tensors.*attn.biases"):
        load_pretrained(folder)


def test_a_tied_head_that_is_stored(folder):
    state = load_file(folder / WEIGHTS)
    table = state["transformer.wte.weight"]
    save_file(state | {"lm_head.weight": table.clone()}, folder / WEIGHTS)
    model = load_pretrained(folder).model
    assert model.head.weight is model.tok_emb.weight
    save_file(state | {"lm_head.weight": table + 1}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="is not the embedding"):
        load_pretrained(folder)
    change(folder, tie_word_embeddings=False)
    assert torch.equal(load_pretrained(folder).model.head.weight, table + 1)
    save_file(state, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="lacks 1 tensors.*lm_head"):
        load_pretrained(folder)


def test_dtypes(folder):
    full = load_pretrained(folder).model
    state = {k: v.bfloat16() for k, v in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS)
    for dtype, found in ((torch.float32, torch.float32), (None, torch.bfloat16),
                         (torch.float16, torch.float16)):
        model = load_pretrained(folder, dtype=dtype).model
        assert {p.dtype for p in model.parameters()} == {found}
        gap = (model.float()(IDS) - full(IDS)).abs().max()
        assert 0 < gap < 0.1
    with pytest.raises(ValueError, match="no float type"):
        load_pretrained(folder, dtype=torch.int8)
    export_transformers(load_pretrained(folder, dtype=None).model, folder / "out")
    again = load_file(folder / "out" / WEIGHTS)
    assert all(torch.equal(again[k], state[k]) for k in state)
    assert json.loads((folder / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_weights_are_mapped_and_copied(folder):
    """The file is not read by `map_tensors`, not changed by anyone, and not held after."""
    before = (folder / WEIGHTS).read_bytes()
    mapped = map_tensors(folder / WEIGHTS)
    assert all(torch.equal(v, mapped[k]) for k, v in load_file(folder / WEIGHTS).items())
    mapped["transformer.ln_f.weight"].fill_(7)
    assert (folder / WEIGHTS).read_bytes() == before
    model = load_pretrained(folder).model
    expected = model(IDS)
    with open(folder / WEIGHTS, "r+b") as file:
        file.write(bytes(len(before)))
    assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize("family", FAMILY_WORDS)
def test_layouts_are_inverse(family):
    recipe = "llama" if family == "qwen2" else family
    options = {} if family == "gpt2" else dict(hidden_dim=24)
    options |= dict(qkv_bias=True) if family == "qwen2" else {}
    model = GPTModel(GPTConfig(31, 16, 16, 2, 2, bias=family == "gpt2", recipe=recipe,
                               tied=False, options=options))
    weights = dict(model.state_dict())
    sent = to_layout(family, weights)
    for name, weight in weights.items():
        back = from_layout(family, name, sent[their_name(family, name)])
        assert torch.equal(back, weight), name
    square = "blocks.0.attn.out_proj.weight"
    turned = not torch.equal(sent[their_name(family, square)], weights[square])
    assert turned == (family == "gpt2")


# Ours, sent out ---------------------------------------------------------------------------
def ours(recipe="gpt2", **more):
    set_seed(0)
    options = more.pop("options", {})
    return GPTModel(GPTConfig(97, 64, 48, 2, 4, recipe=recipe, options=options, **more)).eval()


@pytest.mark.parametrize("model", [
    dict(), dict(tied=False), dict(drop_rate=0.1),
    dict(recipe="llama", bias=False, n_kv_heads=2),
    dict(recipe="llama", bias=True, tied=False, options=dict(rope_base=5e4, hidden_dim=56)),
    dict(recipe="llama", bias=False, options=dict(qkv_bias=True, norm_eps=1e-3)),
    dict(recipe="mistral", bias=False, options=dict(window=5)),
    dict(recipe="mixtral", bias=False, options=dict(n_experts=3, top_k=2, hidden_dim=24))])
def test_models_of_this_book_in_transformers(model, tmp_path):
    mine = ours(**model)
    export_transformers(mine, tmp_path / "m")
    back = T.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert (mine(IDS) - back(IDS).logits).abs().max() <= 1e-5
    again = load_pretrained(tmp_path / "m").model
    assert all(map(torch.equal, mine.state_dict().values(), again.state_dict().values()))
    assert again.config.drop_rate == mine.config.drop_rate


def test_export_with_its_tokenizer(tmp_path):
    words = train_bpe("the cat sat on the mat. " * 50, 270)
    mine = GPTModel(GPTConfig(300, 32, 16, 1, 2))
    export_transformers(mine, tmp_path / "m", words)
    theirs_words = T.AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "the cat  sat on 12 mats<|endoftext|>é"
    assert theirs_words(text).input_ids == words.encode(text, True)
    assert theirs_words.eos_token_id == words.end_of_text
    again = load_pretrained(tmp_path / "m")
    assert again.tokenizer.ranks == words.ranks and again.info["family"] == "gpt2"
    assert load_pretrained(tmp_path / "m", tokenizer=False).tokenizer is None
    small = GPTModel(GPTConfig(260, 32, 16, 1, 2))
    with pytest.raises(ValueError, match="has 269 tokens, the model 260"):
        export_transformers(small, tmp_path / "small", words)
    export_transformers(small, tmp_path / "small")
    shutil.copy(tmp_path / "m/tokenizer.json", tmp_path / "small")
    with pytest.raises(CheckpointError, match="has 269 tokens, its model 260"):
        load_pretrained(tmp_path / "small")
    load_pretrained(tmp_path / "small", tokenizer=False)


def test_export_with_a_tokenizer_of_the_library(tmp_path):
    from tokenizers import Tokenizer, models
    rust = Tokenizer(models.WordLevel({"the": 0, "cat": 1, "<unk>": 2}, unk_token="<unk>"))
    rust.add_special_tokens(["</s>"])
    words = LibraryTokenizer(rust.to_str())
    export_transformers(GPTModel(GPTConfig(4, 8, 16, 1, 2)), tmp_path / "m", words)
    assert T.AutoTokenizer.from_pretrained(tmp_path / "m").eos_token_id == 3
    again = load_pretrained(tmp_path / "m").tokenizer
    assert again.encode("cat") == [1] and again.special_tokens == {"</s>": 3}


def nan_model():
    model = ours()
    model.blocks[1].norm1.weight[3] = float("nan")
    return model


def changed():
    model = ours()
    model.transforms.append(["lora", {}])
    return model


@pytest.mark.parametrize("make, said", [
    (lambda: ours("alibi"), "no family of"), (lambda: ours(bias=False), "biases"),
    (lambda: ours(n_kv_heads=2), "as many key heads"),
    (lambda: ours("mistral", bias=True), "has no biases"),
    (lambda: ours("llama", bias=True, options=dict(qkv_bias=True)), "set bias=False"),
    (lambda: ours("mixtral", bias=False, options=dict(top_k=1)), "two experts"),
    (lambda: GPTModel(GPTConfig(97, 64, 48, 1, 4), norm=nn.LayerNorm), "norm"),
    (changed, "lora"), (nan_model, "ln_1.weight' holds NaN")])
def test_models_that_transformers_does_not_have(make, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        export_transformers(make(), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_folder_that_exists_is_not_overwritten(folder):
    before = sorted(folder.iterdir())
    with pytest.raises(CheckpointError, match="not saved"):
        export_transformers(ours(), folder)
    assert sorted(folder.iterdir()) == before


# Bad folders ------------------------------------------------------------------------------
@pytest.mark.parametrize("entries, said", [
    (dict(model_type="gpt_neox"), "model_type 'gpt_neox' is unknown; known: gpt2, llama"),
    (dict(model_type=["gpt2"]), "is unknown"), (dict(model_type="gone"), "None is unknown"),
    (dict(auto_map={"AutoModel": "x.Y"}), "auto_map"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(activation_function="relu"), "relu"), (dict(layer_norm_epsilon=1e-6), "1e-06"),
    (dict(scale_attn_by_inverse_layer_idx=True), "inverse_layer"),
    (dict(add_cross_attention=True), "cross"), (dict(n_inner=100), "n_inner=100"),
    (dict(n_head="gone"), "it lacks n_head"), (dict(n_head=5), "not divisible"),
    (dict(n_layer=0), "n_layers=0"), (dict(n_layer="two"), "n_layers='two'"),
    (dict(n_layer=3), "lacks 12 tensors.*h.2"), (dict(n_layer=1), "has besides 12 tensors"),
    (dict(n_layer=10**6), "more parts"), (dict(n_embd=48 * 10**7), "its embedding is"),
    (dict(vocab_size=10**15), "its embedding is"), (dict(vocab_size=96), "its embedding is"),
    (dict(n_positions=301), "wpe.weight.*shape"),
    (dict(n_positions=10**12), "wpe.weight.*shape|numbers|number"),
    (dict(tie_word_embeddings="yes"), "tied='yes'"),
])
def test_bad_configs(entries, said, folder):
    change(folder, **entries)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=said):
        load_pretrained(folder)
    assert time.monotonic() - start < 10, "no memory and no time is spent on a bad config"


@pytest.mark.parametrize("entries, said", [
    (dict(head_dim=24), "head_dim=24"), (dict(hidden_act="gelu"), "hidden_act"),
    (dict(attention_bias=True, mlp_bias=False), "differ"),
    (dict(partial_rotary_factor=0.5), "partial_rotary"),
    (dict(rope_parameters=dict(rope_type="spiral", rope_theta=1e4)), "'spiral'"),
    (dict(rope_parameters=dict(rope_type="yarn", factor=2.0)), "original_max_position"),
    (dict(rope_parameters=[1]), "no dictionary"), (dict(use_sliding_window=True), "sliding"),
    (dict(intermediate_size="gone"), "intermediate_size"),
    (dict(intermediate_size=81), "shape"), (dict(intermediate_size=10**11), "shape|number"),
    (dict(num_key_value_heads=3), "n_kv_heads=3"),
    (dict(model_type="mixtral", num_local_experts=10**6), "more parts"),
    (dict(model_type="mixtral", num_experts_per_tok=1), "num_experts_per_tok=1"),
    (dict(model_type="mixtral"), "lacks"), (dict(model_type="qwen2"), "lacks.*bias"),
])
def test_bad_llama_configs(entries, said, tmp_path):
    theirs(*CASES["llama"]).save_pretrained(tmp_path)
    change(tmp_path, **entries)
    with pytest.raises(CheckpointError, match=said):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "3", '{"model_type": "gpt2"}', "\x00",
                                  '{"a": 1, "a": 2}', '{"a": "' + "x" * (5 << 20) + '"}'])
def test_damaged_config(text, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json"):
        read_config(folder)


def with_tensor(name, make):
    def damage(folder):
        state = load_file(folder / WEIGHTS)
        value = make(state.get(name))
        save_file({k: v for k, v in (state | {name: value}).items() if v is not None},
                  folder / WEIGHTS)
    return damage


def poison(tensor):
    tensor.view(-1)[5] = float("nan")
    return tensor


LN = "transformer.h.1.ln_2.weight"


@pytest.mark.parametrize("damage, said", [
    (with_tensor(LN, lambda t: None), f"lacks 1 tensors.*{LN}"),
    (with_tensor("more", lambda t: torch.ones(2)), "has besides 1 tensors.*more"),
    (with_tensor(LN, lambda t: t[:-1].clone()), f"{LN}' has shape .47.*asks for .48"),
    (with_tensor(LN, poison), f"{LN}' holds NaN"),
    (with_tensor(LN, lambda t: t.to(torch.int32)), "torch.int32"),
    (with_tensor(LN, lambda t: t.to(torch.float8_e4m3fn)), "float8"),
    (with_tensor("transformer.h.0.attn.c_attn.weight", lambda t: t.T.contiguous()),
     r"shape \[144, 48\], config.json asks for \[48, 144\]"),
    (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), "should have"),
    (lambda f: (f / WEIGHTS).write_bytes(b""), "0 bytes"),
    (lambda f: (f / WEIGHTS).write_bytes(b"\x80\x04hello there, I am a pickle"), "header"),
    (lambda f: (f / WEIGHTS).write_text("<html>Not found</html>" * 9), "header|JSON"),
    (lambda f: [(f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()], "regular file|directory"),
    (lambda f: (f / WEIGHTS).unlink(), f"neither {WEIGHTS} nor"),
    (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "are pickles"),
    (lambda f: (f / WEIGHTS).rename(f / "model.gguf"), "load_gguf"),
    (lambda f: (f / "config.json").unlink(), "config.json"),
])
def test_bad_weights(damage, said, folder):
    damage(folder)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_pretrained(folder)
    assert caught.value.cure


def sharded(tmp_path):
    theirs(*CASES["gpt2"]).save_pretrained(tmp_path / "s", max_shard_size="60KB")
    return tmp_path / "s"


def edit_index(edit):
    def damage(folder):
        content = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(edit(content) or content))
    return damage


def first(content):
    return next(iter(content["weight_map"]))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors",
                                  "..", "", "model.bin", 3, None, ".x.safetensors",
                                  "x.safetensors\n"])
def test_an_index_that_leads_out(name, tmp_path):
    folder = sharded(tmp_path)
    edit_index(lambda c: c["weight_map"].update({first(c): name}))(folder)
    (tmp_path / "x.safetensors").write_bytes(b"secret")
    with pytest.raises(CheckpointError, match=f"{INDEX}.*names the file"):
        load_pretrained(folder)


@pytest.mark.parametrize("damage, said", [
    (edit_index(lambda c: c["weight_map"].update({first(c): "no.safetensors"})), "not beside"),
    (edit_index(lambda c: c["weight_map"].update(more=list(c["weight_map"].values())[0])),
     "disagree about .'more'"),
    (edit_index(lambda c: c["weight_map"].pop(first(c)) and None), "disagree about"),
    (edit_index(lambda c: {"weight_map": 3}), "not built like"),
    (edit_index(lambda c: {"metadata": {}}), "weight_map"),
    (edit_index(lambda c: {"weight_map": {}}), "its embedding is"),
    (lambda f: (f / INDEX).write_text("{"), INDEX),
    (lambda f: sorted(f.glob("*.safetensors"))[0].unlink(), "not beside it"),
    (lambda f: sorted(f.glob("*.safetensors"))[1].write_bytes(b"x" * 50), "00002"),
])
def test_bad_shards(damage, said, tmp_path):
    folder = sharded(tmp_path)
    assert len(find_shards(folder)) > 2
    damage(folder)
    with pytest.raises(CheckpointError, match=said):
        load_pretrained(folder)


def test_a_pickle_is_never_opened(folder, monkeypatch):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    opened = []
    monkeypatch.setattr("builtins.open", lambda path, *a, real=open, **k: (
        opened.append(str(path)), real(path, *a, **k))[1])
    with pytest.raises(CheckpointError, match="pickles.*safetensors"):
        load_pretrained(folder)
    assert opened and not any(path.endswith(".bin") for path in opened)


# The hub ----------------------------------------------------------------------------------
def test_a_name_is_fetched_once_and_only_data(gpt2_folder, monkeypatch):
    hub, asked = pytest.importorskip("huggingface_hub"), []
    monkeypatch.setattr(hub, "snapshot_download",
                        lambda name, **options: asked.append((name, options)) or gpt2_folder)
    found = load_pretrained("openai-community/gpt2", revision="main")
    assert found.info == dict(family="gpt2", source="openai-community/gpt2")
    assert asked == [("openai-community/gpt2", dict(revision="main", allow_patterns=HUB_FILES))]
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in HUB_FILES)


def test_no_network_says_what_to_do(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="hf download nobody/x --local-dir"):
        load_pretrained("nobody/x")

    def broken(*args, **options):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(hub, "snapshot_download", broken)
    with pytest.raises(CheckpointError, match="Network is unreachable"):
        load_pretrained("gpt2")


def test_without_the_hub_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        load_pretrained("nobody/x")


@pytest.mark.parametrize("name", ["no/such/folder", "../x", "/tmp/none", "", "a b", "x\n"])
def test_names_that_are_none(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name in ("",):
        name = str(Path("missing") / "folder" / "x")
    with pytest.raises(CheckpointError, match="no such folder"):
        find_folder(name)


def test_a_file_is_no_folder(folder):
    with pytest.raises(CheckpointError, match="it is a file"):
        load_pretrained(folder / WEIGHTS)


@pytest.mark.parametrize("scaling", [
    None, {"rope_type": "linear", "factor": 4.0}, {"rope_type": "ntk", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
], ids=lambda s: "default" if s is None else s.get("rope_type", s.get("type")))
def test_every_scaling_of_the_rotation_is_exported(scaling, tmp_path):
    set_seed(0)
    model = GPTModel(GPTConfig(100, 256, 64, 2, 4, bias=False, recipe="llama",
                               options=dict(rope_scaling=scaling))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # a wrong angle shows
        theirs = T.AutoModelForCausalLM.from_pretrained(export_transformers(model, tmp_path / "m"))
        ids = torch.randint(100, (1, 200), generator=torch.Generator().manual_seed(0))
        expected = model(ids)
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=5e-4)
        again = load_pretrained(tmp_path / "m").model(ids)
        torch.testing.assert_close(again, expected, rtol=0, atol=5e-4)
