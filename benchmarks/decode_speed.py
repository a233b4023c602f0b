"""Decoding: no cache, gptbook's cache, and transformers' generate, on the same random weights.

    python benchmarks/decode_speed.py                      # both shapes, one thread
    python benchmarks/decode_speed.py --shapes small --rounds 5 --threads 2

All write the same greedy tokens from the same prompt (checked), in turn (A B C A B C …);
a figure is the median over the rounds. Then one draw from logits of GPT-2's vocabulary:
gptbook's samplers against transformers' warpers and torch.multinomial.
"""
import argparse
from statistics import median
from time import perf_counter

import torch
from results_file import record
from transformers import (
    GPT2Config, GPT2LMHeadModel, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper,
)

from gptbook.core import GPTConfig, GPTModel, pick_device, set_seed
from gptbook.generation import generate_text
from gptbook.sampling import sample

SHAPES = {
    "small": GPTConfig(vocab_size=4096, context_length=1024, emb_dim=384, n_layers=6, n_heads=6),
    "gpt2": GPTConfig(),
}
PROMPT = 64


def copy_weights(model, theirs):
    """Give transformers' GPT-2 the weights of ours; its linears are stored transposed."""
    core = theirs.transformer
    core.wte.weight.copy_(model.tok_emb.weight)
    core.wpe.weight.copy_(model.position_embedding.table.weight)
    core.ln_f.load_state_dict(model.norm.state_dict())
    for ours, block in zip(model.blocks, core.h):
        parts = ours.attn.W_query, ours.attn.W_key, ours.attn.W_value
        block.attn.c_attn.weight.copy_(torch.cat([p.weight for p in parts]).T)
        block.attn.c_attn.bias.copy_(torch.cat([p.bias for p in parts]))
        for conv, linear in ((block.attn.c_proj, ours.attn.out_proj),
                             (block.mlp.c_fc, ours.mlp.fc_in), (block.mlp.c_proj, ours.mlp.fc_out)):
            conv.weight.copy_(linear.weight.T)
            conv.bias.copy_(linear.bias)
        block.ln_1.load_state_dict(ours.norm1.state_dict())
        block.ln_2.load_state_dict(ours.norm2.state_dict())


def pair(config, device, scale=2):
    """Our model and theirs, with equal random weights, scaled so that they have opinions."""
    set_seed(0)
    model = GPTModel(config)
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.context_length, n_embd=config.emb_dim,
        n_layer=config.n_layers, n_head=config.n_heads, bos_token_id=0, eos_token_id=0))
    for p in model.parameters():
        p.mul_(scale)
    copy_weights(model, theirs)
    return model.to(device).eval(), theirs.to(device).eval()


def without_cache(model, ids, length):
    for _ in range(length):
        new = model.head(model.features(ids)[:, -1]).argmax(-1, keepdim=True)
        ids = torch.cat([ids, new], 1)
    return ids.tolist()


def race(runners: dict, rounds: int) -> dict:
    """Seconds of each runner, in turn; all must give the same result."""
    times, results = {name: [] for name in runners}, {}
    for turn in range(rounds + 1):
        for name, run in runners.items():
            start = perf_counter()
            results[name] = run()
            if turn:  # the first round warms up
                times[name].append(perf_counter() - start)
    first, *others = results.values()
    assert all(other == first for other in others), "they do not write the same text"
    return times


def decode(shape, device, length, rounds):
    model, theirs = pair(SHAPES[shape], device)
    ids = torch.randint(SHAPES[shape].vocab_size, (1, PROMPT), device=device)
    options = dict(max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0)
    mask = torch.ones_like(ids)
    times = race({
        "no cache": lambda: without_cache(model, ids, length),
        "gptbook": lambda: generate_text(model, ids, length, temperature=0),
        "transformers": lambda: theirs.generate(ids, attention_mask=mask, **options).tolist(),
    }, rounds)
    speed = {name: round(length / median(t), 2) for name, t in times.items()}
    print(f"{shape}: " + ", ".join(f"{n} {s:.1f} tokens/s" for n, s in speed.items()), flush=True)
    return {
        "tokens_per_second": speed,
        "cache_over_no_cache": round(speed["gptbook"] / speed["no cache"], 2),
        "gptbook_over_transformers": round(speed["gptbook"] / speed["transformers"], 2),
    }


def theirs_draw(logits, top_k, top_p):
    scores = TemperatureLogitsWarper(0.8)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return torch.multinomial(scores.softmax(-1), 1)


def sampling(device, rounds):
    """Milliseconds a draw at V = 50,257 from peaked and from flat logits."""
    figures = {}
    for name, scale in (("peaked", 4.0), ("flat", 1.0)):
        logits = scale * torch.randn(1, 50257, generator=torch.Generator().manual_seed(0))
        logits = logits.to(device)
        for k, p in ((None, None), (50, None), (None, 0.9), (50, 0.9)):
            times = {"gptbook": [], "transformers": []}
            for _ in range(20 * rounds):
                start = perf_counter()
                sample(logits, 0.8, k, p).item()
                middle = perf_counter()
                theirs_draw(logits, k, p).item()
                times["gptbook"].append(middle - start)
                times["transformers"].append(perf_counter() - middle)
            ms = {who: round(1e3 * median(t), 3) for who, t in times.items()}
            ratio = round(ms["transformers"] / ms["gptbook"], 2)
            figures[f"{name}, top_k={k}, top_p={p}"] = {**ms, "ratio": ratio}
            print(name, k, p, ms, ratio, flush=True)
    return figures


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens after a prompt of 64")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = pick_device()
    figures = {"prompt": PROMPT, "new_tokens": options.tokens, "rounds": options.rounds}
    figures["decode"] = {s: decode(s, device, options.tokens, options.rounds) for s in options.shapes}
    figures["sampling_ms"] = sampling(device, options.rounds)
    print(record("decode_speed", figures))


if __name__ == "__main__":
    main()
