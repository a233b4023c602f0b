"""Decoding on a CPU: gptbook's Decoder beside transformers and llama.cpp, in one run.

    python benchmarks/decoder.py                         # both shapes, one thread and two
    python benchmarks/decoder.py --quick                 # a few tokens, nothing is stored
    python benchmarks/decoder.py --llama-cpp FOLDER      # FOLDER holds the package llama_cpp

Random weights, batch 1, a prompt of 64, greedy. The peers take turns (A B A B ...); a figure
is the median over the turns, a ratio the median of the ratios within a turn; the time of a turn includes reading the prompt. All that compute
in float32 must write the same tokens, or the script fails. llama.cpp runs the same weights
from a GGUF file that is written here. Each result is stored at once: a later call with other
shapes or threads adds to the file.
"""
import argparse
import gc
import sys
import tempfile
import warnings
from copy import deepcopy
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from decode_speed import SHAPES, pair
from results_file import RESULTS, load, record
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from gptbook.decoder import Decoder
from gptbook.roofline import bandwidth, decode_roof, token_cost
from gptbook.structured_pruning import prune_heads, prune_neurons
from gptbook.throughput import matmul_peak

PROMPT = 64


# The peers ---------------------------------------------------------------------------
class Ours:
    """A decoder made once; each call writes `n` tokens after the prompt."""

    def __init__(self, model, ids, batch=1, length=256, **options):
        self.decoder = Decoder(model, batch, length, **options)
        self.ids = [ids[0].tolist()] * batch

    def start(self):
        self.logits = self.decoder.start(self.ids)

    def write(self, n):
        ids = []
        for _ in range(n):
            new = self.logits.argmax(-1)
            ids.append(int(new[0]))
            self.logits = self.decoder.step(new)
        return ids


class Theirs:
    """transformers' generate, with its cache; the prompt is read by the same call."""

    def __init__(self, model, ids):
        self.model, self.ids = model, ids
        self.options = dict(attention_mask=torch.ones_like(ids), do_sample=False,
                            eos_token_id=None, pad_token_id=0)

    def start(self):
        pass

    def write(self, n):
        out = self.model.generate(self.ids, max_new_tokens=n, **self.options)
        return out[0, self.ids.shape[1]:].tolist()


class NoCache:
    """The whole text again for each token: a few lengths, spread over the text."""

    def __init__(self, model, ids):
        self.model, self.ids = model, ids

    def start(self):
        pass

    def write(self, n):
        for length in range(PROMPT + 4, PROMPT + 8 * n, 8):
            ids = self.ids[:, torch.arange(length) % PROMPT]
            self.model.head(self.model.features(ids)[:, -1]).argmax(-1).item()
        return []


def all_linears_dynamic(theirs):
    """transformers' GPT-2 with every linear in dynamic int8: its Conv1D become Linear first."""
    model = deepcopy(theirs)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.weight, linear.bias = nn.Parameter(child.weight.T.contiguous()), child.bias
                setattr(module, name, linear)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it will be removed
        return torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear})


class LlamaCpp:
    """llama.cpp, called as its own Python package calls it."""

    def __init__(self, path, ids, threads):
        import llama_cpp
        self.api, self.ids = llama_cpp, ids[0].tolist()
        self.llama = llama_cpp.Llama(str(path), n_ctx=512, n_threads=threads, verbose=False,
                                     n_threads_batch=threads)

    def start(self):
        self.llama.reset()
        self.llama.eval(self.ids)

    def logits(self):
        import numpy as np
        pointer = self.api.llama_get_logits_ith(self.llama.ctx, -1)
        return np.ctypeslib.as_array(pointer, (self.llama.n_vocab(),))

    def write(self, n):
        ids = []
        for _ in range(n):
            ids.append(int(self.logits().argmax()))
            self.llama.eval(ids[-1:])
        return ids


def write_gguf(model, path, kind):
    """The weights as a GGUF file of the architecture gpt2, matrices in `kind`."""
    import gguf
    config, writer = model.config, gguf.GGUFWriter(str(path), "gpt2")
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.emb_dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(4 * config.emb_dim)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    matrix = gguf.GGMLQuantizationType[kind]

    def add(name, *tensors, exact=False):
        data = torch.cat([t.detach() for t in tensors]).float().numpy()
        if exact or data.ndim == 1:
            return writer.add_tensor(name, data)
        writer.add_tensor(name, gguf.quants.quantize(data, matrix), raw_dtype=matrix)

    add("token_embd.weight", model.tok_emb.weight)
    add("output.weight", model.head.weight)
    add("position_embd.weight", model.position_embedding.table.weight, exact=True)
    for i, block in enumerate(model.blocks):
        a, m, b = block.attn, block.mlp, f"blk.{i}."
        for name, norm in (("attn_norm", block.norm1), ("ffn_norm", block.norm2)):
            add(b + name + ".weight", norm.weight), add(b + name + ".bias", norm.bias)
        for name, parts in (("attn_qkv", (a.W_query, a.W_key, a.W_value)),
                            ("attn_output", (a.out_proj,)), ("ffn_up", (m.fc_in,)),
                            ("ffn_down", (m.fc_out,))):
            add(b + name + ".weight", *(p.weight for p in parts))
            add(b + name + ".bias", *(p.bias for p in parts))
    add("output_norm.weight", model.norm.weight), add("output_norm.bias", model.norm.bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# The measurements --------------------------------------------------------------------
def take_turns(makers: dict, n: int, rounds: int, same: list, bar) -> tuple[dict, dict]:
    """{name: tokens/s of each round}, with the prompt, and without it where it is read apart."""
    peers = {name: make() for name, make in makers.items()}
    speeds, alone, wrote = ({name: [] for name in peers} for _ in range(3))
    for turn in range(rounds + 1):
        for name, peer in peers.items():
            steps = n if name != "no cache" else max(2, n // 8)  # spread over the same lengths
            start = perf_counter()
            peer.start()
            middle = perf_counter()
            wrote[name] = peer.write(steps)
            end = perf_counter()
            if turn:  # the first turn warms up
                speeds[name].append(steps / (end - start))
                alone[name].append(steps / (end - middle))
            bar.update(1)
    for name in same:
        assert wrote[name] == wrote[same[0]], f"{name} does not write what {same[0]} writes"
    return speeds, alone


def ratio(speeds, a, b):
    """The median of the ratios within a turn, with the first and third quartile."""
    found = sorted(x / y for x, y in zip(speeds[a], speeds[b]))
    return {"median": round(median(found), 3), "low": round(found[len(found) // 4], 3),
            "high": round(found[-1 - len(found) // 4], 3)}


def shape_figures(shape, threads, options, bar) -> dict:
    """All figures of one shape and number of threads."""
    torch.set_num_threads(threads)
    model, theirs = pair(SHAPES[shape], torch.device("cpu"))
    ids = torch.randint(model.config.vocab_size, (1, PROMPT))
    small = deepcopy(model)
    prune_heads(small, 1 / 3), prune_neurons(small, 1 / 3)
    makers = {
        "no cache": lambda: NoCache(model, ids),
        "transformers": lambda: Theirs(theirs, ids),
        "gptbook": lambda: Ours(model, ids),
        "transformers, bf16": lambda: Theirs(deepcopy(theirs).bfloat16(), ids),
        "gptbook, bf16": lambda: Ours(model, ids, dtype=torch.bfloat16),
        "transformers, int8": lambda: Theirs(all_linears_dynamic(theirs), ids),
        "gptbook, int8": lambda: Ours(model, ids, quantize="int8"),
        "gptbook, int4": lambda: Ours(model, ids, quantize="int4"),
        "gptbook, pruned by a third": lambda: Ours(small, ids),
        "gptbook, pruned, int8": lambda: Ours(small, ids, quantize="int8"),
    }
    same = ["gptbook", "transformers"]
    with tempfile.TemporaryDirectory() as folder:
        if options.llama_cpp:
            for kind, name in (("F32", "f32"), ("Q8_0", "q8_0"), ("Q4_0", "q4_0")):
                path = Path(folder) / f"{kind}.gguf"
                write_gguf(model, path, kind)
                makers[f"llama.cpp, {name}"] = (
                    lambda path=path: LlamaCpp(path, ids, threads))
        speeds, alone = take_turns(makers, options.tokens, options.rounds, same, bar)
    speed = bandwidth()
    peak = matmul_peak(torch.device("cpu"))
    figures = {"tokens_per_second": {n: round(median(s), 2) for n, s in speeds.items()},
               "bandwidth_GBs": round(speed / 1e9, 2), "peak_GFLOPs": round(peak / 1e9, 1)}
    pairs = [("gptbook", "transformers"), ("gptbook, bf16", "transformers, bf16"),
             ("gptbook, int8", "transformers, int8"), ("gptbook", "no cache"),
             ("gptbook, pruned by a third", "gptbook"), ("gptbook, int8", "gptbook"),
             ("gptbook, pruned, int8", "gptbook, int8"), ("gptbook, bf16", "gptbook"),
             ("gptbook, int4", "gptbook, int8")]
    if options.llama_cpp:
        pairs += [("gptbook", "llama.cpp, f32"), ("gptbook, int8", "llama.cpp, q8_0"),
                  ("gptbook, int4", "llama.cpp, q4_0")]
    figures["ratios"] = {f"{a} / {b}": ratio(speeds, a, b) for a, b in pairs}
    figures["ratios_without_prompt"] = {
        f"{a} / {b}": ratio(alone, a, b) for a, b in pairs if "transformers" not in b}
    figures["of_roof"] = {}
    for name, form in (("gptbook", {}), ("gptbook, bf16", {"dtype": torch.bfloat16}),
                       ("gptbook, int8", {"quantize": "int8"}),
                       ("gptbook, int4", {"quantize": "int4"})):
        cost = token_cost(Decoder(model, **form).model, PROMPT + options.tokens // 2)
        roof = decode_roof(cost, speed, peak)
        figures["of_roof"][name] = round(median(alone[name]) / roof, 3)
    return {**figures, **batches(model, ids, options), **prefill(model, theirs, options)}


def batches(model, ids, options) -> dict:
    """Tokens/s of a batch of 8 over those of one row, and the tokens of both."""
    found = {}
    for name, form in (("fp32", {}), ("bf16", {"dtype": torch.bfloat16}),
                       ("int8", {"quantize": "int8"})):
        runs = {b: Ours(model, ids, batch=b, **form) for b in (1, 8)}
        ratios = []
        for _ in range(options.rounds + 1):
            seconds = {}
            for b, run in runs.items():
                run.start()
                start = perf_counter()
                run.write(options.tokens // 2)
                seconds[b] = perf_counter() - start
            ratios.append(8 * seconds[1] / seconds[8])
        found[name] = round(median(ratios[1:]), 2)
    return {"batch_8_over_1": found}


def prefill(model, theirs, options) -> dict:
    """Operations a second while 512 tokens are read, over the best product of matrices beside it."""
    ids = torch.randint(model.config.vocab_size, (1, 512))
    decoder = Decoder(model, 1, 512, tune=True)
    operations = token_cost(model, 0, n_tokens=512, n_logits=1).operations
    decoder.start(ids.tolist()), theirs(ids, logits_to_keep=1)  # warm up
    rows = []
    for _ in range(2 * options.rounds):
        best = matmul_peak(torch.device("cpu"), seconds=0.3)
        start = perf_counter()
        decoder.start(ids.tolist())
        middle = perf_counter()
        theirs(ids, logits_to_keep=1)
        rows.append((best, middle - start, perf_counter() - middle))
    return {"prefill_512": {
        "tokens_per_second": round(512 / median(ours for _, ours, _ in rows), 1),
        "of_best_product": round(median(operations / t / best for best, t, _ in rows), 3),
        "over_transformers": round(median(other / t for _, t, other in rows), 3)}}


def compiled(shape, rounds) -> dict:
    """How much faster a compiled forward pass is: one token, and 64; and what compiling took."""
    torch.set_num_threads(1)
    model, _ = pair(SHAPES[shape], torch.device("cpu"))
    found = {}
    for name, length in (("one token", 1), ("64 tokens", 64)):
        torch.compiler.reset()
        ids = torch.randint(model.config.vocab_size, (1, length))
        fast = torch.compile(model)
        start = perf_counter()
        fast(ids)
        found[f"seconds to compile, {name}"] = round(perf_counter() - start, 1)
        ratios = []
        for _ in range(8 * rounds):
            start = perf_counter()
            model(ids)
            middle = perf_counter()
            fast(ids)
            ratios.append((middle - start) / (perf_counter() - middle))
        found[name] = round(median(ratios[rounds:]), 3)
    return found


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a turn")
    parser.add_argument("--llama-cpp", metavar="FOLDER", help="a folder with the package llama_cpp")
    parser.add_argument("--prefill-only", action="store_true", help="measure that part again")
    parser.add_argument("--quick", action="store_true", help="the small shape, 4 tokens, not stored")
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.threads, options.tokens, options.rounds = ["small"], [1], 4, 1
    if options.llama_cpp:
        sys.path.append(options.llama_cpp)
    figures = {"prompt": PROMPT}
    if (RESULTS / "decoder.json").exists():
        figures = load("decoder")["figures"]
    if options.prefill_only:
        for shape in options.shapes:
            model, theirs = pair(SHAPES[shape], torch.device("cpu"))
            for threads in options.threads:
                torch.set_num_threads(threads)
                found = prefill(model, theirs, options)
                figures[shape][f"{threads} threads"].update(found)
                print(shape, threads, found, flush=True)
        return print(record("decoder", figures))
    n_peers = 10 + 3 * bool(options.llama_cpp)
    cases = [(s, t) for s in options.shapes for t in options.threads]
    with tqdm(total=len(cases) * n_peers * (options.rounds + 1), unit="run") as bar:
        for shape, threads in cases:
            found = shape_figures(shape, threads, options, bar)
            figures.setdefault(shape, {})[f"{threads} threads"] = {
                **found, "new_tokens": options.tokens, "rounds": options.rounds}
            gc.collect()
            tqdm.write(f"{shape}, {threads} threads: {found}")
            if not options.quick:
                record("decoder", figures)
    for shape in options.shapes if not options.quick else ():
        figures.setdefault("compile", {})[shape] = compiled(shape, options.rounds)
        tqdm.write(f"compile, {shape}: {figures['compile'][shape]}")
        record("decoder", figures)


if __name__ == "__main__":
    main()
