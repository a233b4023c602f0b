"""`gptbook corpus`: a text's sizes, and the critic in a pipe."""

import shlex

from commands_workspace import TEXT, check_bad, here, workspace  # noqa: F401, fixtures
from gptbook.cli import main
from gptbook.critic import corrupt_story
from gptbook.stories import story_text


def test_corpus_of_a_file(here, capsys):
    assert main(shlex.split("corpus --data good.txt --vocab-size 300")) == 0
    said = capsys.readouterr()
    assert said.out.startswith(TEXT[:1000]) and "more)" in said.out
    assert f"train: {int(len(TEXT) * 0.9):,} bytes" in said.err
    assert "bytes a token" in said.err and "The| cat" in said.err.replace("|T", "The", 0)


def test_corpus_shows_stories_and_their_exact_size(capsys):
    assert main(shlex.split("corpus --number 2")) == 0
    said = capsys.readouterr()
    assert said.out.split("\n\n")[:2] == [story_text(0, 0), story_text(0, 1)]
    assert "bits" in said.err and "documents" in said.err


def test_corpus_checks_a_story(tmp_path, capsys):
    right, path = story_text(0, 5), tmp_path / "story.txt"
    wrong = corrupt_story(right, "wrong_pronoun").text
    for text, code, n in ((right, 0, "0 problems"), (wrong, 1, "should be")):
        path.write_text(text + "\n")
        assert main(["corpus", "--check", str(path)]) == code
        assert n in capsys.readouterr().out


def test_corpus_checks_each_story_of_a_file(tmp_path, capsys):
    """What `generate --number` writes: many stories, each judged as one."""
    right = [story_text(0, i) for i in range(3)]
    wrong = corrupt_story(story_text(0, 5), "wrong_pronoun").text
    path = tmp_path / "stories.txt"
    path.write_text("\n\n".join(right) + "\n")
    assert main(["corpus", "--check", str(path)]) == 0
    assert capsys.readouterr().out == "0 problems in 3 stories\n"
    path.write_text(wrong)
    assert main(["corpus", "--check", str(path)]) == 1
    place, told = capsys.readouterr().out.split(":", 1)
    for before in ("\n\n", right[0] + "\n\n", right[1] + "\n \n\n" + right[2] + "\n\n"):
        path.write_text(before + wrong + "\n\n")  # the same slip, further down
        assert main(["corpus", "--check", str(path)]) == 1
        said = capsys.readouterr().out
        assert said.startswith(f"{int(place) + len(before)}:{told.splitlines()[0]}\n")


def test_corpus_checks_in_the_encoding_that_it_is_told(tmp_path, capsys, here):
    text = story_text(0, 5)
    (tmp_path / "wide.txt").write_text(text, encoding="utf-16")
    line = ["corpus", "--check", str(tmp_path / "wide.txt")]
    assert main([*line, "--encoding", "utf-16"]) == 0
    assert "0 problems" in capsys.readouterr().out
    said = check_bad(capsys, tmp_path, line)
    assert "wide.txt" in said and "utf-8" in said and "--encoding" in said


def test_corpus_judges_no_beginning_of_a_file(tmp_path, capsys, here):
    """A verdict on the first million characters would be told as one on the file."""
    wrong = corrupt_story(story_text(0, 5), "wrong_pronoun").text
    (tmp_path / "long.txt").write_text((story_text(0, 5) + "\n\n") * 9 + "\n" * 10**6 + wrong)
    said = check_bad(capsys, tmp_path, ["corpus", "--check", str(tmp_path / "long.txt")])
    assert "more than 1,000,000 characters" in said


def test_corpus_does_not_judge_the_mark_of_an_editor(tmp_path, capsys, here):
    """The three bytes that some editors put at the beginning are no part of a story."""
    wrong = corrupt_story(story_text(0, 5), "wrong_pronoun").text
    told = []
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "marked.txt").write_bytes(mark + wrong.encode())
        assert main(["corpus", "--check", str(tmp_path / "marked.txt")]) == 1
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] and "wrong pronoun" in told[0] and "1 problem" in told[0]
