"""Row R4 of the reliability scoreboard, and the kept sets at GPT-2's vocabulary.

    python benchmarks/reliability_sampling.py            the full counts, in two minutes
    python benchmarks/reliability_sampling.py --quick    600 cells and 60 kept sets, no file

R4    7 temperatures x 8 top_k x 7 top_p x 6 prompt lengths x 5 kinds of logits: the text
      that a float64 oracle writes from the same random numbers, or a `ValueError` that
      is ours (and never torch's "probability tensor contains inf or nan"), each where
      it is due; the kept set is the oracle's, and the logits are as they were.
kept  Vocabulary 50,257: six kinds of logits (with many ties, with half of them banned) x
      temperature x top-k x top-p x min-p x typical, three rows each: the set that may be
      drawn is the oracle's, which sorts everything in float64, and the probabilities
      are its to 1e-5 (float32 where nothing is cut).

Each has its negative controls, samplers with a known bug, and these must turn it red.
"""
import argparse
import itertools
import math
import random
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from results_file import record
from torch import nn
from tqdm import tqdm

from gptbook import sampler, sampling
from gptbook.core import GPTConfig, GPTModel, set_seed
from gptbook.generation import generate_text
from gptbook.sampler import Sampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from sampling_oracle import oracle_draw, oracle_kept  # noqa: E402

# ------------------------------------------------------------------ R4, the grid
V, CONTEXT = 23, 16
TEMPERATURES = (-1.0, 0, 1e-40, 0.3, 1.0, 3, math.nan)
TOP_K = (None, 0, -1, 1, 2, 5, V, V + 10)
TOP_P = (None, 0, 1e-9, 0.3, 0.9, 1.0, 1.5)
LENGTHS = (0, 1, 2, CONTEXT - 3, CONTEXT - 1, CONTEXT + 1)  # of the prompt; 3 tokens follow
KINDS = ("normal", "equal", "nan", "inf", "banned")
GRID = list(itertools.product(TEMPERATURES, TOP_K, TOP_P, LENGTHS, KINDS))


class Dictated(nn.Module):
    """A head that says the same logits everywhere, whatever it reads."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return self.logits.expand(*x.shape[:-1], -1)


def small_model() -> GPTModel:
    """A model that is all head."""
    set_seed(0)
    return GPTModel(GPTConfig(V, CONTEXT, 8, 1, 2))


def dictated_logits() -> dict:
    """One row (V,) of each kind."""
    normal = 3 * torch.randn(V, generator=torch.Generator().manual_seed(5))
    logits = {kind: normal.clone() for kind in KINDS}
    logits["equal"][:] = 1.5
    logits["nan"][7], logits["inf"][7] = math.nan, math.inf
    logits["banned"][torch.arange(V) % 7 != 3] = -math.inf
    return logits


LOGITS = dictated_logits()


def kept_set(logits, **settings) -> dict:
    """{id: probability} of one row, as `candidates` has it."""
    ids, probs = sampling.candidates(logits, **settings)
    return {i: p for i, p in zip(ids[0].tolist(), probs[0].tolist()) if i >= 0}


def fault(model, cell) -> str | None:
    """What is wrong in a cell of the grid; None if nothing is."""
    temperature, top_k, top_p, length, kind = cell
    bad = (not temperature >= 0 or top_k in (0, -1) or top_p in (0, 1.5)
           or length == 0 or length + 3 > CONTEXT or kind in ("nan", "inf"))
    before, prompt = LOGITS[kind], [i % V for i in range(length)]
    model.head = Dictated(before.clone())
    settings = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    text = None
    try:
        text = generate_text(model, [prompt], length=3, seed=11, **settings)
    except ValueError as error:
        if "probability tensor" in str(error):
            return "untyped"
    except Exception:
        return "untyped"
    if (text is None) != bad or not model.head.logits.equal(before) and kind != "nan":
        return "wrong"
    if bad:
        return None
    kept = oracle_kept(before, **settings)
    luck = torch.rand(3, generator=torch.Generator().manual_seed(11), dtype=torch.double)
    due = [prompt + [oracle_draw(kept, u) for u in luck.tolist()]]
    return None if text == due and set(kept_set(before, **settings)) == set(kept) else "wrong"


def report_r4(n: int | None = None) -> dict:
    """Counts over the grid, or over n of its cells."""
    model = small_model()
    cells = random.Random(0).sample(GRID, n) if n else GRID
    found = [fault(model, cell) for cell in tqdm(cells, "R4")]
    return {"cells": len(cells), "wrong": found.count("wrong"),
            "untyped": found.count("untyped"),
            "controls": {bug.__name__: control_r4(model, bug) for bug in BUGS}}


def control_r4(model, bug) -> int:
    """How many of 300 cells a bug turns red."""
    with bug():
        return sum(fault(model, cell) is not None
                   for cell in random.Random(1).sample(GRID, 300))


# ------------------------------------------------------------------ known bugs


def drops_the_crossing_token():
    """Top-p that asks for the mass with the token, as in many tutorials."""
    def until(values, weights, goal):
        order = np.argsort(-values, axis=1, kind="stable")
        inside = np.take_along_axis(weights, order, 1).cumsum(1) <= goal
        inside[:, 0] = True
        kept = np.empty_like(inside)
        np.put_along_axis(kept, order, inside, 1)
        return kept & (values > -math.inf)
    return mock.patch.object(sampling, "until", until)


def keeps_all_of_a_tie():
    """Top-k that cuts below the k-th value; to be tried on one row."""
    def strongest(logits, k):
        cut = logits.topk(min(k, logits.shape[1])).values[:, -1:]
        kept = (logits >= cut).nonzero()[:, 1].view(len(logits), -1).numpy()
        return np.take_along_axis(logits.numpy(), kept, 1), kept
    return mock.patch.object(sampling, "strongest", strongest)


def forgets_the_temperature():
    """A knob that does nothing."""
    return mock.patch.object(sampling, "heat_of", lambda temperature: 1.0)


BUGS = (drops_the_crossing_token, keeps_all_of_a_tie, forgets_the_temperature)

# ------------------------------------------------------------------ kept sets
VOCAB = 50257
SETTINGS = [dict(zip(("temperature", "top_k", "top_p", "min_p", "typical_p"), cell))
            for cell in itertools.product((0.5, 1.0, 2.0), (None, 1, 50, 1000),
                                          (None, 0.1, 0.9, 0.999), (None, 0.05), (None, 0.2, 0.9))]


def large_logits() -> dict:
    """Three rows (3, VOCAB) of each kind."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(3, VOCAB, generator=g)
    rank = torch.stack([torch.randperm(VOCAB, generator=g) for _ in range(3)]) + 1.0
    trained = -1.3 * rank.log() + noise / 2
    half = torch.rand(3, VOCAB, generator=g) < 0.5
    return {"sure": -2 * rank.log() + noise, "trained": trained, "normal": 4 * noise,
            "flat": noise, "rounded": trained.bfloat16(),
            "banned": trained.masked_fill(half, -math.inf)}


def kept_rows(cells) -> tuple[int, int]:
    """(rows compared, rows that differ from the oracle)."""
    rows = wrong = 0
    for logits, settings in cells:
        ids, probs = Sampler(**settings).candidates(logits)
        for b in range(len(logits)):
            due = oracle_kept(logits[b].double().numpy(), **settings)
            real = ids[b] >= 0
            ours = dict(zip(ids[b][real].tolist(), probs[b][real].tolist()))
            rows += 1
            wrong += ours.keys() != due.keys() or max(
                abs(ours[i] - due[i]) for i in due) > 1e-5
    return rows, wrong


def wrong_mean():
    """Typical sampling around the most likely token instead of the expected surprise."""
    right = sampler.nucleus
    return mock.patch.object(sampler, "nucleus", lambda key, off, probs, mass: right(
        -probs.max() + probs, probs.max() - probs, probs, mass))


def report_kept(n: int | None = None) -> dict:
    """Counts over the grid of settings, or over n of its cells."""
    kinds = large_logits()
    names = [(kind, settings) for kind in kinds for settings in SETTINGS]
    chosen = random.Random(0).sample(names, n) if n else names
    rows, wrong = kept_rows((kinds[k], s) for k, s in tqdm(chosen, "kept"))
    few = [(kinds[k][:1], s) for k, s in random.Random(1).sample(names, 24)]
    few += [(kinds["rounded"][:1], {"top_k": k}) for k in (200, 500, 1000)]  # ties
    controls = {}
    for bug in (*BUGS, wrong_mean):
        with bug():
            controls[bug.__name__] = kept_rows(few)[1]
    return {"vocabulary": VOCAB, "settings": len(SETTINGS), "kinds": list(kinds),
            "rows": rows, "wrong": wrong, "controls": controls}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few of each, no file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    r4, kept = report_r4(600 if args.quick else None), report_kept(60 if args.quick else None)
    green = {"R4": not r4["wrong"] and not r4["untyped"] and all(r4["controls"].values()),
             "kept": not kept["wrong"] and all(kept["controls"].values())}
    print(f"R4    {r4['cells']:,} cells: {r4['wrong']} wrong, {r4['untyped']} untyped errors; "
          f"red by controls: {r4['controls']}")
    print(f"kept  {kept['rows']:,} kept sets at vocabulary {VOCAB:,}: {kept['wrong']} differ; "
          f"red by controls: {kept['controls']}")
    for row, good in green.items():
        print(row, "green" if good else "RED")
    if not args.quick:
        print(record("reliability_sampling", dict(green=green, r4=r4, kept=kept)))
    raise SystemExit(not all(green.values()))


if __name__ == "__main__":
    main()
