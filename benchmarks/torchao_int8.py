"""Our int8 beside torchao's: the same integers from the same rule, the same outputs.

    pip install --no-deps --target SOMEWHERE torchao==0.18
    PYTHONPATH=SOMEWHERE python benchmarks/torchao_int8.py [--quick]

It is not part of the environment: wherever torchao is installed, transformers imports it, and
it writes about libraries that it could not load into every page. Seconds; `--quick` takes one
shape and writes nothing.
"""
import argparse
import logging
import sys
from copy import deepcopy
from importlib import metadata
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

if find_spec("torchao") is None:
    print("torchao is not here: see the lines above in", __file__.rpartition("/")[2])
    sys.exit()
logging.disable(logging.WARNING)
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_,
)
logging.disable(logging.NOTSET)

from gptbook.checkpoints import load_demo
from gptbook.core import set_seed
from gptbook.quantization import Int8Linear, decibels, quantize, quantize_rows
from gptbook.stories import story
from results_file import record

SHAPES = ((64, 32), (100, 7), (768, 768), (768, 3072), (3072, 768))


def swapped(linear, config):
    quantize_(holder := nn.Sequential(deepcopy(linear)), config())
    return holder[0]


def compare(K: int, N: int) -> dict:
    """One linear: integers, outputs from their integers, decibels of both schemes."""
    set_seed(0)
    linear, x = nn.Linear(K, N), torch.randn(64, K)
    true = linear(x)
    theirs, both = (swapped(linear, c) for c in (Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig))
    q, scale = theirs.weight.qdata, theirs.weight.scale
    rule = (linear.weight / (linear.weight.abs().amax(1, keepdim=True) / 127.5)).round().clamp(-128, 127)
    ours, dynamic = (Int8Linear(*quantize_rows(linear.weight), linear.bias, d) for d in (False, True))
    given = Int8Linear(q, scale, linear.bias)(x)
    return {
        "shape": [K, N], "integers_unlike_the_rule": (q != rule).float().mean().item(),
        "output_difference": (given - theirs(x)).abs().max().item(),
        "control_difference": (ours(x) - theirs(x)).abs().max().item(),
        "weight_only_dB": {"torchao": decibels(true, theirs(x)), "ours": decibels(true, ours(x))},
        "dynamic_dB": {"torchao": decibels(true, both(x)), "ours": decibels(true, dynamic(x))},
    }


def stories_model() -> dict:
    """Divergence of the stories model's predictions, its linears by each; tables as they are."""
    model, tokenizer = load_demo()
    end = tokenizer.end_of_text
    texts = [torch.tensor([end, *tokenizer.encode(story(977, i).text), end]) for i in range(24)]
    inputs = pad_sequence([t[:-1] for t in texts], True)
    asked = pad_sequence([t[1:] for t in texts], True, -100) != -100
    true = model(inputs)[asked].log_softmax(-1)
    names = ("tok_emb", "table")

    def theirs(config):
        return lambda m: quantize_(m, config(), lambda part, name: isinstance(part, nn.Linear) and name != "head")

    plans = {
        "int8": {"torchao": theirs(Int8WeightOnlyConfig), "ours": lambda m: quantize(m, "int8", names)},
        "int8_dynamic": {"torchao": theirs(Int8DynamicActivationInt8WeightConfig),
                         "ours": lambda m: quantize(m, "int8_dynamic", names)},
    }
    found = {}
    for scheme, makers in plans.items():
        for name, change in makers.items():
            change(changed := deepcopy(model))
            log_p = changed(inputs)[asked].log_softmax(-1)
            found.setdefault(scheme, {})[name] = (true.exp() * (true - log_p)).sum(-1).mean().item()
    return found


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape, nothing written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    linears = [compare(*shape) for shape in (SHAPES[:1] if args.quick else SHAPES)]
    figures = dict(torchao=metadata.version("torchao"), linears=linears,
                   divergence={} if args.quick else stories_model())
    print(figures)
    if not args.quick:
        print(record("torchao_int8", figures))


if __name__ == "__main__":
    main()
