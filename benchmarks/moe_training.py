"""What experts are worth on the stories: the same active parameters, the same time.

    python benchmarks/moe_training.py --jobs 16   # about two minutes on 16 fast cores
    python benchmarks/moe_training.py --quick     # seconds, writes nothing

Trains a dense model, one that asks 1 of 8 experts as wide as its feed-forward, and one that asks
2 of 8 half as wide; three seeds. Runs of one seed share their batches. `dense, time of ...` makes
as many more steps as the stored step times of `benchmarks/moe.py` allow. Then 1 of 8 without any
balancing, with the balance loss ten times as strong, and with a bias in its place. While they
train, the entropy of the load is noted; at the end, which kind of word goes to which expert.
Finished runs are recorded at once.
"""
import argparse
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial

import torch
from results_file import load, record
from tqdm import tqdm

from gptbook.architecture import SwiGLU, gated_width
from gptbook.core import GPTConfig, GPTModel, init_weights, set_seed
from gptbook.data import TokenDataset, tokenize
from gptbook.grammar import POINTING
from gptbook.initial_weights import init_copying
from gptbook.moe import MixtureOfExperts, expert_choices, expert_load
from gptbook.runs import TrainConfig
from gptbook.schedules import warmup_cosine
from gptbook.stories import stories, story, subjects
from gptbook.tokenizer import train_bpe
from gptbook.training import evaluate_loss, train

WIDTH, LAYERS, HEADS, LENGTH, ROWS, VOCAB = 64, 3, 4, 128, 16, 1024
UNSEEN = 977                       # a seed that no run trains on
N_EXPERTS = 8
KIND_OF_SLOT = {**dict.fromkeys("ABC", "name"), **dict.fromkeys("TUV", "thing"),
                **dict.fromkeys("FSR", "food"), **dict.fromkeys("YZ", "animal"), "P": "place"}
KINDS = ("name", "pronoun", "thing", "food", "animal", "place", "verb", "other word",
         "punctuation")


def parts(width: int = WIDTH) -> dict:
    """{name: factory for the mlp slot}; all but the balancing is equal in active size."""
    hidden = gated_width(width, 16)
    one = partial(MixtureOfExperts, n_experts=N_EXPERTS, top_k=1,
                  expert=partial(SwiGLU, hidden_dim=hidden))
    two = partial(MixtureOfExperts, n_experts=N_EXPERTS, top_k=2,
                  expert=partial(SwiGLU, hidden_dim=hidden // 2))
    return {"dense": partial(SwiGLU, hidden_dim=hidden), "top-1": one, "top-2": two,
            "top-1, not balanced": partial(one, balance=0.0, z_loss=0.0),
            "top-1, balanced by a bias": partial(one, balance=0.0, bias_balanced=True),
            "top-1, balanced ten times": partial(one, balance=0.1)}


def build(part, vocab_size: int, width: int = WIDTH) -> GPTModel:
    """A small model with such feed-forwards, its first weights those of the preset."""
    model = GPTModel(GPTConfig(vocab_size, LENGTH, width, LAYERS, HEADS), mlp=part)
    init_weights(model, width**-0.5)
    init_copying(model)
    return model


def kinds_of_tokens(told, tokenizer) -> tuple:
    """(ids, kind of each), by the story's own notes."""
    ids, at = tokenizer.encode(told.text), 0
    kinds = {}
    for start, end, slot, form in told.mentions:
        kind = "pronoun" if form.lower() in POINTING else KIND_OF_SLOT.get(slot)
        kinds.update(dict.fromkeys(range(start, end), kind or "other word"))
    for _, (start, end) in subjects(told):
        kinds.update(dict.fromkeys(range(start, end), "verb"))
    found = []
    for i in ids:
        piece = tokenizer.token_bytes(i).decode()
        mark = re.search(r"\S", piece)
        place = at + (mark.start() if mark else 0)
        word = mark and piece[mark.start()].isalnum()
        found.append(KINDS.index(kinds.get(place, "other word") if word else "punctuation"))
        at += len(piece)
    return ids, found


def entropy(counts) -> float:
    """Bits; 3 if eight experts are used alike."""
    share = counts[counts > 0] / counts.sum()
    return -(share * share.log2()).sum().item()


def routed(model, ids) -> list:
    """For each layer the experts of each token, (N, k)."""
    return [said.chosen for said in expert_choices(model, ids).values()]


def by_kind(model, labelled: list) -> list:
    """Layer, kind, expert: how many tokens went there."""
    table = torch.zeros(LAYERS, len(KINDS), N_EXPERTS, dtype=torch.long)
    for ids, kinds in labelled:
        where = torch.tensor(kinds)[:LENGTH]
        for layer, chosen in enumerate(routed(model, torch.tensor([ids[:LENGTH]]))):
            for k in range(chosen.shape[1]):
                table[layer].index_put_((where, chosen[:, k]), torch.tensor(1), accumulate=True)
    return table.tolist()


def prepare(args) -> dict:
    """Text, tokens and what is known of each, made once and sent to every worker."""
    corpus = stories(args.stories, validation=100)
    tokenizer = train_bpe(corpus.text("train", 1_000_000), VOCAB)
    data, held_out = (TokenDataset(tokenize(corpus, tokenizer, split), LENGTH, ROWS,
                                   document_end=tokenizer.end_of_text)
                      for split in ("train", "validation"))
    labelled = [kinds_of_tokens(story(UNSEEN, i), tokenizer) for i in range(100)]
    return dict(data=data, held_out=held_out, labelled=labelled, vocab=tokenizer.n_vocab)


def start(shared: dict) -> None:
    """A worker's first act."""
    global SHARED
    SHARED = shared
    torch.set_num_threads(1)


def one_run(name: str, kind: str, steps: int, seed: int) -> dict:
    """Train one model; its loss, the entropy of its load, and where its words go."""
    data, held_out = SHARED["data"], SHARED["held_out"]
    set_seed(seed)
    model = build(parts()[kind], SHARED["vocab"])
    looks, routers = {}, kind != "dense"
    ids = next(held_out.windows())[0]

    def look(run):
        if run.at(max(1, steps // 12)) or run.step == 1:
            loads = [expert_load(c, N_EXPERTS) for c in routed(run.model, ids)]
            looks[run.step] = [round(entropy(n), 3) for n in loads]

    config = TrainConfig(steps, 3e-3, betas=(0.9, 0.98), seed=seed)
    train(model, data, None, config, schedule=warmup_cosine(steps, max(1, steps // 30), 0.02),
          callbacks=[look] * routers, progress=False)
    found = dict(name=name, seed=seed, steps=steps, loss=round(evaluate_loss(model, held_out), 4),
                 parameters=sum(p.numel() for p in model.parameters()))
    if routers:
        loads = [expert_load(c, N_EXPERTS) for c in routed(model, ids)]
        found |= dict(load_entropy=looks, load=[n.tolist() for n in loads])
        if kind in ("top-1", "top-2") and seed == 0:
            found["by_kind"] = by_kind(model, SHARED["labelled"])
    return found


def todo(args) -> list:
    """(name, kind, steps, seed), the long ones first."""
    runs = {name: (name, args.steps) for name in parts()}
    for name in ("top-1", "top-2"):
        times = load("moe")["figures"]["step"][name]["median"]
        runs[f"dense, time of {name}"] = ("dense", round(args.steps * times))
    return [(name, kind, steps, seed) for seed in range(args.seeds)
            for name, (kind, steps) in runs.items()]


def gather(found: list, args) -> dict:
    """The JSON: losses by name and seed, curves, tables."""
    found = sorted(found, key=lambda one: (one["seed"], one["name"]))
    figures = {"steps": args.steps, "rows": ROWS, "length": LENGTH, "width": WIDTH,
               "layers": LAYERS, "kinds": KINDS}
    for key in ("loss", "load_entropy", "load", "by_kind"):
        figures[key] = {}
        for one in (one for one in found if key in one):
            figures[key].setdefault(one["name"], {})[str(one["seed"])] = one[key]
    for key in ("steps", "parameters"):
        figures[f"{key}_of"] = {one["name"]: one[key] for one in found}
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stories", type=int, default=9000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few steps, writes nothing")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds, args.stories = 6, 1, 300
    shared, found = prepare(args), []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, spawn, start, (shared,)) as pool:
        futures = [pool.submit(one_run, *run) for run in todo(args)]
        for future in tqdm(as_completed(futures), "runs", len(futures)):
            found.append(future.result())
            tqdm.write(f"{found[-1]['name']}, seed {found[-1]['seed']}: {found[-1]['loss']}")
            if not args.quick:
                record("moe_training", gather(found, args))
    if args.quick:
        print(gather(found, args)["loss"])


if __name__ == "__main__":
    main()
