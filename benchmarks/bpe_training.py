"""Train 4,096 tokens on 1 MB of text on one core, beside the Rust trainer of `tokenizers`.

    python benchmarks/bpe_training.py              # the source of this Python's library
    python benchmarks/bpe_training.py mytext.txt   # a text of your own

Programs run in turn (A B A B) and the median counts. Writes results/bpe_training.json, or
results/bpe_training_NAME.json for a text of your own.
"""
import os

os.environ["RAYON_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # one core, for all of them

import hashlib
import sys
from collections import Counter
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import tokenizers
import torch
from results_file import record
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from gptbook.data import TokenDataset, python_stdlib, text_file
from gptbook.tokenizer import (
    END_OF_TEXT, count_pieces, encode_naive, learn_merges, train_bpe,
)

VOCAB, REPEATS = 4096, 5


def timed(call):
    start = perf_counter()
    result = call()
    return perf_counter() - start, result


def in_turn(calls: dict, repeats: int = REPEATS) -> dict:  # name -> median seconds
    """Run programs in turn, so that a noisy neighbour disturbs all alike."""
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(timed(call)[0])
    return {name: median(seconds) for name, seconds in times.items()}


def rust_bpe(text: str) -> RustTokenizer:
    """The usual way: byte level, one iterator of lines."""
    tokenizer = RustTokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB, min_frequency=2, special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def rust_merges(pieces: Counter, n_merges: int) -> list:  # tokens in order of their ids
    """The same trainer on our pieces, with a byte as the character of its number."""
    rust = RustTokenizer(BPE())
    trainer = BpeTrainer(vocab_size=256 + n_merges, min_frequency=2, show_progress=False,
                         initial_alphabet=[chr(b) for b in range(256)])
    rust.train_from_iterator((p.decode("latin-1") for p in pieces.elements()), trainer)
    vocabulary = rust.get_vocab()
    return [t.encode("latin-1") for t in sorted(vocabulary, key=vocabulary.get)]


def naive_merges(pieces: Counter, n_merges: int) -> list:
    """The trainer of the page that recounts everything for each merge."""
    words, merges = [(list(piece), n) for piece, n in pieces.items()], []
    for new in range(256, 256 + n_merges):
        counts = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                counts[pair] += n
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        joined = []
        for word, n in words:
            out, i = [], 0
            while i < len(word):
                here = tuple(word[i : i + 2]) == best
                out.append(new if here else word[i])
                i += 2 if here else 1
            joined.append((out, n))
        words = joined
        merges.append(best)
    return merges


def batch_seconds() -> float:
    """Median time of one batch of 32 rows of 256 from 10 million ids."""
    ids = np.random.default_rng(0).integers(VOCAB, size=10_000_000).astype(np.uint16)
    data = TokenDataset(ids, 256, 32)
    data.batch(0, 0)
    return median(timed(lambda: data.batch(0, step))[0] for step in range(1, 200))


def main(path: str | None = None) -> None:
    torch.set_num_threads(1)
    corpus = text_file(path) if path else python_stdlib(max_bytes=1_200_000)
    text = corpus.text("train", limit_chars=1_000_000)
    size = len(text.encode())
    pieces = count_pieces(text)
    trained = in_turn({"ours": lambda: train_bpe(text, VOCAB), "rust": lambda: rust_bpe(text)})
    ours, theirs = train_bpe(text, VOCAB), rust_bpe(text)
    same = rust_merges(pieces, VOCAB - 257) == list(ours.ranks)
    held = corpus.text("validation", limit_chars=100_000)
    encoded = in_turn({"ours": lambda: ours.encode(text), "rust": lambda: theirs.encode(text)})
    naive_encode = timed(lambda: encode_naive(ours, held))
    assert naive_encode[1] == ours.encode(held)
    n = 64
    naive = timed(lambda: naive_merges(pieces, n))
    fast = timed(lambda: learn_merges(pieces, n))
    assert naive[1] == fast[1]
    figures = {
        "text": corpus.name, "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "megabytes": size / 1e6, "vocab_size": ours.n_vocab, "cores": 1,
        "distinct_pieces": len(pieces), "train_seconds": trained["ours"],
        "target_seconds": 20, "rust_train_seconds": trained["rust"],
        "tokenizers_version": tokenizers.__version__, "same_merges_as_rust": same,
        "naive_merges": n, "naive_seconds": naive[0], "naive_slowdown": naive[0] / fast[0],
        "encode_mb_per_second": size / 1e6 / encoded["ours"],
        "rust_encode_mb_per_second": size / 1e6 / encoded["rust"],
        "naive_encode_mb_per_second": len(held.encode()) / 1e6 / naive_encode[0],
        "bytes_per_token": size / len(ours.encode(text)),
        "bytes_per_token_held_out": len(held.encode()) / len(ours.encode(held)),
        "rust_bytes_per_token": size / len(theirs.encode(text).ids),
        "batch_seconds": batch_seconds(),
    }
    assert same and figures["train_seconds"] < figures["target_seconds"]
    name = f"bpe_training_{Path(path).stem}" if path else "bpe_training"
    print(record(name, figures))
    for key, value in figures.items():
        print(f"{key:28} {value:.3g}" if isinstance(value, float) else f"{key:28} {value}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
