"""Row R8 of the reliability scoreboard: what 8 bits may cost, one figure a part.

    python benchmarks/reliability_quantization.py            the full counts, a few minutes
    python benchmarks/reliability_quantization.py --quick    those of `make test`

The first writes benchmarks/results/reliability_quantization.json.

weights    rows of normal numbers, a scale a row: at least 40 dB, and what the formula says
w8a8       products of such rows and tokens, a scale a token: at least 36 dB
tokens     a token alone gives the same bits as in company
sums       integer sums are exact, the largest there are included
layers     the linears of the stories model on its own text, one by one
schemes    its loss and its divergence by each scheme
files      a quantized model saved and loaded: equal bit for bit, at most 0.27 of the file
qat        training prepared by `prepare_qat`, then `convert`: `quantize` of the same
           weights, exactly
smollm2    int8 weights on SmolLM2-135M: at most 0.5 % of perplexity; from the stored result
           of benchmarks/smollm2_int8.py

Each part has a control that must fail: 7 bits, one scale for a whole batch, sums in bf16, 2
bits, a changed weight, one scale for a whole matrix.
"""
import argparse
import math
import sys
import tempfile
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from gptbook.checkpoints import load_demo, load_model, save_model
from gptbook.core import GPTConfig, GPTModel, LossModel, set_seed
from gptbook.quantization import (
    SCHEMES, Int8Linear, decibels, integer_product, quantize, quantize_rows, quantize_tokens,
    to_integers,
)
from gptbook.qat import convert, prepare_qat
from gptbook.stories import story
from results_file import load, record

WIDTHS = (64, 192, 768, 3072)
LIMITS = {"weights": 40.0, "w8a8": 36.0, "file": 0.27, "smollm2": 0.005}


def expected(K: int, bits: int = 8) -> float:
    """Decibels of a row of K normal numbers: all but the largest err by scale^2 / 12."""
    t = torch.linspace(0, 9, 9001, dtype=torch.float64)
    beyond = 1 - torch.erf(t / math.sqrt(2)) ** K
    largest = torch.trapezoid(2 * t * beyond, t).item()
    return 10 * math.log10(12 * (2 ** (bits - 1) - 1) ** 2 / largest * K / (K - 1))


def one_scale(x):
    """The classic mistake: integers by one scale for all tokens."""
    q, scale = to_integers(x.flatten(), 127)
    return q.view_as(x), scale


def product(x, weight, rounding=quantize_tokens):
    (x_q, x_scale), (q, scale) = rounding(x), quantize_rows(weight)
    return integer_product(x_q, q) * x_scale * scale.flatten()


def gaussian(seeds: int, bits: int = 8) -> list:
    """(width, measured, formula) of rows of normal numbers."""
    found = []
    for seed in range(seeds):
        for K in WIDTHS:
            weight = torch.randn(200_000 // K, K, generator=torch.Generator().manual_seed(seed))
            q, scale = quantize_rows(weight, bits)
            found.append((K, decibels(weight, q * scale), expected(K, bits)))
    return found


def w8a8(seeds: int, rounding=quantize_tokens) -> list:
    """Decibels of the quiet tokens' products; a loud token is among them."""
    found = []
    for seed in range(seeds):
        for K in WIDTHS:
            made = torch.Generator().manual_seed(seed)
            weight, x = (torch.randn(n, K, generator=made) for n in (128, 33))
            x[32] *= 50
            true, got = x[:32] @ weight.T, product(x, weight, rounding)[:32]
            found.append(decibels(true, got))
    return found


def alone_as_in_company(rounding, x) -> bool:
    """Whether each token gives the same integers and scale whatever else is there."""
    x = x.reshape(-1, x.shape[-1])
    q, scale = rounding(x)
    for i in range(len(x)):
        alone_q, alone_scale = rounding(x[i : i + 1])
        whole = scale if scale.numel() == 1 else scale[i : i + 1]
        if not (torch.equal(alone_q, q[i : i + 1]) and torch.equal(alone_scale.flatten(), whole.flatten())):
            return False
    return True


def company(trials: int, rounding=quantize_tokens) -> int:
    """How many of so many random batches kept each token on its own."""
    good = 0
    for seed in range(trials):
        set_seed(seed)
        K, n = 1 + 97 * (seed % 13), 2 + seed % 9
        x = torch.randn(n, K) * 10 ** torch.randn(n, 1)
        linear = nn.Linear(K, 24)
        ours = Int8Linear(*quantize_rows(linear.weight), linear.bias, dynamic=True)
        together = ours(x)
        bits = all(torch.equal(ours(x[i]), together[i]) for i in range(n))
        good += bits and alone_as_in_company(rounding, x)
    return good


def sums(trials: int, multiply=integer_product) -> int:
    """How many of so many products of integer matrices are exact."""
    good = 0
    for seed in range(trials):
        made = torch.Generator().manual_seed(seed)
        K = (65, 768, 1024, 1025, 3072, 4099)[seed % 6]
        a, b = (torch.randint(-127, 128, (n, K), dtype=torch.int8, generator=made) for n in (3, 5))
        a[0] = b[0] = 127
        good += torch.equal(multiply(a, b).long(), a.long() @ b.long().T)
    return good


def sums_in_bf16(a, b):
    return (a.bfloat16() @ b.bfloat16().T).long()


def told(tokenizer, n: int) -> tuple:
    """Inputs and answers of n stories that no run has seen."""
    end = tokenizer.end_of_text
    texts = [torch.tensor([end, *tokenizer.encode(story(977, i).text), end]) for i in range(n)]
    return (pad_sequence([t[:-1] for t in texts], True),
            pad_sequence([t[1:] for t in texts], True, -100))


def layers(model, inputs) -> dict:
    """Decibels of each linear: its weights, what it reads, and both together."""
    seen, found = {}, {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.update({m: args[0][0]}))
             for m in linears.values()]
    model(inputs)
    for hook in hooks:
        hook.remove()
    for name, m in linears.items():
        x, (q, scale), (x_q, x_scale) = seen[m], quantize_rows(m.weight), quantize_tokens(seen[m])
        found[name] = {
            "weights": decibels(m.weight, q * scale), "tokens": decibels(x, x_q * x_scale),
            "product": decibels(x @ m.weight.T, product(x, m.weight))}
    return {n: {k: round(v, 2) for k, v in levels.items()} for n, levels in found.items()}


def schemes(model, inputs, answers) -> dict:
    """Nats a token, and divergence from the float model, by scheme; 2 bits as the control."""
    asked, found = answers != -100, {}
    true = model(inputs)[asked].log_softmax(-1)
    for name in ("float32", *SCHEMES, "2 bits"):
        changed = deepcopy(model)
        if name in SCHEMES:
            quantize(changed, name)
        elif name == "2 bits":
            for block in changed.blocks:
                for m in block.modules():
                    if isinstance(m, nn.Linear):
                        q, scale = quantize_rows(m.weight, 2)
                        m.weight.copy_(q * scale)
        log_p = changed(inputs)[asked].log_softmax(-1)
        found[name] = {"nats": F.nll_loss(log_p, answers[asked]).item(),
                       "divergence": (true.exp() * (true - log_p)).sum(-1).mean().item()}
    return found


def files(model, tokenizer, inputs) -> dict:
    """Share of the float file, and whether the loaded model gives the same bits."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        whole = save_model(Path(folder, "float.safetensors"), model, tokenizer).stat().st_size
        for scheme in SCHEMES:
            quantize(ours := deepcopy(model), scheme)
            file = save_model(Path(folder, f"{scheme}.safetensors"), ours, tokenizer)
            equal = torch.equal(load_model(file).model(inputs[:4]), ours(inputs[:4]))
            found[scheme] = {"share": round(file.stat().st_size / whole, 4), "equal": equal}
    return found


def trained(seed: int, scheme: str) -> tuple:
    """A small model after a few steps of quantization-aware training, and what it reads."""
    set_seed(seed)
    model = GPTModel(GPTConfig(61, 16, 40, 2, 4, tied=seed % 2 == 0, bias=seed % 3 > 0))
    prepare_qat(model, scheme)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    ids = torch.randint(61, (4, 17))
    with torch.enable_grad():
        for _ in range(3):
            optimizer.zero_grad()
            LossModel(model)(ids[:, :-1], ids[:, 1:]).backward()
            optimizer.step()
    return model.eval(), ids[:, :-1]


def plain_weights(prepared: GPTModel) -> GPTModel:
    """The float model with the weights that a prepared model has now."""
    model = GPTModel(prepared.config).eval()
    state = {name.replace(".base.", "."): tensor for name, tensor in prepared.state_dict().items()}
    names = model.state_dict().keys()
    model.load_state_dict({name: state[name] for name in names if name in state}, strict=False)
    return model


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def qat(seeds: int, nudge: float = 0.0) -> tuple:
    """(how many equal `quantize` of the same weights in all their bits and logits, of)."""
    good = 0
    for seed in range(seeds):
        for scheme in SCHEMES:
            prepared, ids = trained(seed, scheme)
            reference = plain_weights(prepared)
            reference.blocks[0].mlp.fc_in.weight.data[0] *= 1 + nudge
            quantize(reference, scheme)
            convert(prepared)
            good += same(prepared, reference) and torch.equal(prepared(ids), reference(ids))
    return good, seeds * len(SCHEMES)


@torch.no_grad()
def report(quick: bool) -> dict:
    """All parts and their controls."""
    torch.set_num_threads(1)
    few = lambda small, full: small if quick else full
    model, tokenizer = load_demo()
    inputs, answers = told(tokenizer, few(4, 100))
    rows = gaussian(few(1, 20))
    smollm2 = load("smollm2_int8")["figures"]["change"]
    found = {
        "weights": {"lowest": min(r[1] for r in rows), "matrices": len(rows),
                    "from_the_formula": max(abs(r[1] - r[2]) for r in rows)},
        "w8a8": {"lowest": min(levels := w8a8(few(1, 20))), "products": len(levels)},
        "tokens": {"equal": company(n := few(13, 1000)), "batches": n},
        "sums": {"exact": sums(n := few(12, 1200)), "products": n},
        "layers": layers(model, inputs), "schemes": schemes(model, inputs, answers),
        "files": files(model, tokenizer, inputs),
        "qat": dict(zip(("equal", "models"), qat(few(1, 20)))),
        "smollm2": {"change": smollm2["int8"]},
    }
    found["controls"] = {
        "7 bits": min(r[1] for r in gaussian(1, bits=7)) < LIMITS["weights"],
        "one scale a batch, noise": min(w8a8(1, one_scale)) < LIMITS["w8a8"],
        "one scale a batch, bits": company(13, one_scale) < 13,
        "sums in bf16": sums(12, sums_in_bf16) < 12,
        "2 bits": found["schemes"]["2 bits"]["divergence"] > 0.01,
        "a changed weight": qat(1, nudge=0.01)[0] == 0,
        "one scale a matrix": smollm2["one scale a matrix"] > LIMITS["smollm2"],
    }
    return found


def verdicts(found: dict) -> dict:
    """Whether each part is as it should be."""
    tokens, sums_, qat_ = found["tokens"], found["sums"], found["qat"]
    return {
        "weights": found["weights"]["lowest"] >= LIMITS["weights"]
        and found["weights"]["from_the_formula"] < 0.2,
        "w8a8": found["w8a8"]["lowest"] >= LIMITS["w8a8"],
        "tokens": tokens["equal"] == tokens["batches"],
        "sums": sums_["exact"] == sums_["products"],
        "schemes": all(found["schemes"][s]["divergence"] < 1e-3 for s in SCHEMES),
        "files": all(f["equal"] and f["share"] <= LIMITS["file"] for f in found["files"].values()),
        "qat": qat_["equal"] == qat_["models"] > 0,
        "smollm2": found["smollm2"]["change"] <= LIMITS["smollm2"],
        "controls": all(found["controls"].values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the counts of make test")
    quick = parser.parse_args().quick
    found = report(quick)
    green = verdicts(found)
    for name in ("weights", "w8a8", "tokens", "sums", "files", "qat", "smollm2", "controls"):
        print(f"R8 {name}: {'green' if green[name] else 'RED'}, {found[name]}")
    for name, levels in found["layers"].items():
        print(f"R8 {name}: weights {levels['weights']} dB, tokens {levels['tokens']}, "
              f"product {levels['product']}")
    for name, costs in found["schemes"].items():
        print(f"R8 {name}: {costs['nats']:.5f} nats, divergence {costs['divergence']:.2e}")
    if not quick:
        record("reliability_quantization", {"R8": found})
    sys.exit(not all(green.values()))


if __name__ == "__main__":
    main()
