"""Files that are never half there: every fault, at every call, leaves the old or the new one."""
import errno
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from unittest import mock

import pytest

from gptbook import atomic_files as af
from gptbook.atomic_files import (
    CheckpointError, atomic_folder, atomic_write, clear_leftovers, discard, printable,
)

OLD, NEW = [b"old " * 300] * 3, [b"new!" * 500] * 3
posix = pytest.mark.skipif(os.name != "posix", reason="permissions and signals of POSIX")


def joined(pieces) -> bytes:
    return b"".join(bytes(piece) for piece in pieces)


def failing(at: int, fault):
    """A `_disk` that hands call number `at` to the fault; a write is done half before."""
    number = count()

    def disk(call, *args):
        if next(number) != at:
            return call(*args)
        if call is os.write:
            call(args[0], args[1][: len(args[1]) // 2])
        return fault()

    return disk


def raising(code: int):
    def fault():
        raise OSError(code, os.strerror(code))

    return fault


def calls_of(save) -> list[str]:
    """The system calls of a save, in order."""
    log = []

    def disk(call, *args):
        log.append(call.__name__)
        return call(*args)

    with mock.patch.object(af, "_disk", disk):
        save()
    return log


# ---------------------------------------------------------------- one file

@pytest.mark.parametrize("data", [
    b"", b"abc", bytearray(b"abc"), memoryview(b"abc"), [b"a", b"", b"bc"], [],
    [memoryview(b"ab").cast("H"), b"c"], [b"x" * 3_000_000]])
@pytest.mark.parametrize("old", [None, b"", b"what was there"])
def test_what_is_written_is_what_is_read(tmp_path, data, old):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    assert atomic_write(str(path), data) == path
    assert path.read_bytes() == joined(data if isinstance(data, list) else [data])
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("data", ["text", 7, ["text"], None])
def test_what_is_not_bytes_is_refused_before_anything_is_made(tmp_path, data):
    with pytest.raises(TypeError):
        atomic_write(tmp_path / "new" / "file", data)
    assert not os.listdir(tmp_path)


def test_the_calls_are_those_of_the_picture(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(joined(OLD))
    assert calls_of(lambda: atomic_write(path, NEW)) == [
        "open", "write", "write", "write", "fsync", "replace", "open", "fsync"]
    assert calls_of(lambda: atomic_folder(tmp_path / "save", {"a": b"1", "b": [b"2"]})) == [
        "mkdir", *["open", "write", "fsync"] * 2, "open", "fsync", "rename", "open", "fsync"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_fault_at_any_call_leaves_the_old_or_the_new_file(tmp_path, code):
    path, there = tmp_path / "file", []
    for at in range(8):
        path.write_bytes(joined(OLD))
        with mock.patch.object(af, "_disk", failing(at, raising(code))):
            if at < 6:
                with pytest.raises(CheckpointError, match="untouched"):
                    atomic_write(path, NEW)
            else:
                with pytest.warns(UserWarning, match="a power cut may undo it"):
                    atomic_write(path, NEW)
        there.append(path.read_bytes())
        assert os.listdir(tmp_path) == ["file"]
    assert there == [joined(OLD)] * 6 + [joined(NEW)] * 2


@posix
def test_a_kill_at_any_call_leaves_the_old_or_the_new_file(tmp_path):
    path, kill = tmp_path / "file", lambda: os.kill(os.getpid(), signal.SIGKILL)
    for at in range(8):
        path.write_bytes(joined(OLD))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fork beside idle threads
            child = os.fork()
        if child == 0:
            try:
                with mock.patch.object(af, "_disk", failing(at, kill)):
                    atomic_write(path, NEW)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert path.read_bytes() == joined(NEW if at > 5 else OLD)
        assert len(os.listdir(tmp_path)) == (2 if 0 < at < 6 else 1)  # a partial file stays
        atomic_write(path, b"next")  # and the next save takes it away
        assert os.listdir(tmp_path) == ["file"]


def test_the_trials_can_fail(tmp_path):
    """In place, the same trials lose the file."""
    def in_place(path, pieces):
        file = af._disk(os.open, path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for piece in pieces:
            af._disk(os.write, file, piece)
        os.close(file)

    there = []
    for at in range(4):
        (tmp_path / "file").write_bytes(joined(OLD))
        with mock.patch.object(af, "_disk", failing(at, raising(errno.ENOSPC))):
            with suppress(OSError):
                in_place(tmp_path / "file", NEW)
        there.append((tmp_path / "file").read_bytes())
    assert there[0] == joined(OLD)
    assert not {joined(OLD), joined(NEW)} & set(there[1:])


def test_a_reader_never_sees_a_part(tmp_path):
    path, seen, done = tmp_path / "file", set(), threading.Event()
    contents = [bytes([i]) * (100_000 + 7 * i) for i in range(40)]
    atomic_write(path, contents[0])

    def read():
        while not done.is_set():
            seen.add(path.read_bytes())

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        for content in contents:
            atomic_write(path, content)
        done.set()
        reading.result()
    assert seen <= set(contents) and len(seen) > 1


def test_short_writes_are_continued(tmp_path):
    few = lambda call, *args: call(args[0], args[1][:7]) if call is os.write else call(*args)
    with mock.patch.object(af, "_disk", few):
        atomic_write(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_bytes() == joined(NEW)


def test_an_fsync_that_fails_is_not_tried_again(tmp_path):
    log = []

    def disk(call, *args):
        log.append(call)
        return raising(errno.EIO)() if call is os.fsync else call(*args)

    with mock.patch.object(af, "_disk", disk), pytest.raises(CheckpointError):
        atomic_write(tmp_path / "file", b"1")
    assert log.count(os.fsync) == 1 and not os.listdir(tmp_path)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interruption_passes_through_and_leaves_nothing(tmp_path, stop):
    def interrupt():
        raise stop

    (tmp_path / "file").write_bytes(b"old")
    for at in range(6):
        with mock.patch.object(af, "_disk", failing(at, interrupt)), pytest.raises(stop):
            atomic_write(tmp_path / "file", NEW)
        assert (tmp_path / "file").read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"] and not af._writing


# ---------------------------------------------------------------- permissions and links

@posix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o444, 0o666, 0o755])
def test_the_new_file_has_the_permissions_of_the_old(tmp_path, mode, umask):
    path, before = tmp_path / "file", os.umask(umask)
    try:
        atomic_write(path, b"1")
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
        path.chmod(mode)
        atomic_write(path, b"2")
        assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_bytes() == b"2"
    finally:
        os.umask(before)


@posix
def test_a_private_file_is_private_while_it_is_written(tmp_path):
    path, seen = tmp_path / "file", []
    path.write_bytes(b"secret")
    path.chmod(0o600)

    def disk(call, *args):
        if call is os.write:
            seen.append(stat.S_IMODE(os.fstat(args[0]).st_mode))
        return call(*args)

    with mock.patch.object(af, "_disk", disk):
        atomic_write(path, b"new secret")
    assert seen == [0o600]


@posix
def test_a_file_system_without_permissions_is_no_obstacle(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"1")
    path.chmod(0o666)
    before = os.umask(0o077)
    try:
        with mock.patch.object(os, "fchmod", lambda *_: raising(errno.EPERM)()):
            atomic_write(path, b"2")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"2"


@posix
def test_a_link_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "to nothing").symlink_to("nothing")
    for name in ("link", "to nothing"):
        atomic_write(tmp_path / name, b"new")
        assert not (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_bytes() == b"new"
    assert (tmp_path / "target").read_bytes() == b"old"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"):
            atomic_write(tmp_path / "file", b"new")
        with pytest.raises(CheckpointError, match="Permission denied"):
            atomic_folder(tmp_path / "a" / "b", {"x": b"1"})
        with pytest.raises(OSError):
            discard(tmp_path / "file")
    finally:
        tmp_path.chmod(0o755)
    assert (tmp_path / "file").read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_folder_that_refuses_new_names(tmp_path):
    """As the one above, for root too."""
    (tmp_path / "file").write_bytes(b"old")
    with mock.patch.object(af, "_disk", failing(0, raising(errno.EACCES))):
        with pytest.raises(CheckpointError, match="Permission denied"):
            atomic_write(tmp_path / "file", b"new")
    with mock.patch.object(Path, "mkdir", lambda *_, **__: raising(errno.EROFS)()):
        with pytest.raises(CheckpointError, match="Read-only file system"):
            atomic_write(tmp_path / "new" / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_places_that_are_taken(tmp_path):
    (tmp_path / "file").write_bytes(b"in the way")
    (tmp_path / "folder").mkdir()
    for where in ("file/x", "file/x/y", "folder", "x" * 300):
        with pytest.raises(CheckpointError, match="not saved"):
            atomic_write(tmp_path / where, b"new")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


# ---------------------------------------------------------------- folders on the way, and errors

def test_full_disk_says_what_is_needed(tmp_path):
    def full(call, *args):
        if call is os.write:
            raise OSError(errno.ENOSPC, "No space left on device")
        return call(*args)

    with mock.patch.object(af, "_disk", full):
        with pytest.raises(CheckpointError, match=(
                r"untouched \(No space left on device\).*: 1,000 bytes are needed, [\d,]+ are free")):
            atomic_write(tmp_path / "new" / "file", bytes(1000))
    assert not any(p.is_file() for p in tmp_path.rglob("*"))


def test_new_folders_are_synced_by_name(tmp_path):
    """A power cut must not take a new folder away from under the file in it."""
    opened, synced = {}, []

    def disk(call, *args):
        found = call(*args)
        if call is os.open:
            opened[found] = Path(args[0])
        elif call is os.fsync:
            synced.append(opened[args[0]])
        return found

    with mock.patch.object(af, "_disk", disk):
        atomic_write(tmp_path / "a" / "b" / "file", b"1")
    assert synced[:2] == [tmp_path, tmp_path / "a"] and synced[-1] == tmp_path / "a" / "b"
    synced.clear()
    with mock.patch.object(af, "_disk", disk):
        atomic_write(tmp_path / "a" / "b" / "file", b"2")
    assert tmp_path not in synced and synced[-1] == tmp_path / "a" / "b"


def test_a_folder_that_cannot_be_synced_is_a_warning(tmp_path):
    def no_sync(call, *args):
        if call is os.open and args[1] == os.O_RDONLY:
            raise OSError(errno.EINVAL, "Invalid argument")
        return call(*args)

    with mock.patch.object(af, "_disk", no_sync), pytest.warns(UserWarning, match="power cut"):
        atomic_write(tmp_path / "x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"


def test_errors_are_one_line_and_can_be_pickled():
    error = CheckpointError(Path("a\nb"), "c" * 1000, "d\x1b")
    assert str(error).isprintable() and len(str(error)) <= 600
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.cause) == (str(error), error.cause)


@pytest.mark.parametrize("text, limit, wanted", [
    ("abc", 3, "abc"), ("abcd", 3, "ab…"), ("a\x1b[2Jb\n", 9, "a?[2Jb?"), ("é\u202e", 5, "é?"),
    ("x" * 10**6, 4, "xxx…"), ("", 1, "")])
def test_printable(text, limit, wanted):
    assert printable(text, limit) == wanted


def test_the_error_is_a_value_error_with_its_three_parts(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError) as caught:
        atomic_write(tmp_path / "file" / "x", b"1")
    error = caught.value
    assert error.path == tmp_path / "file" / "x" and "not saved" in error.cause
    assert "1 bytes are needed" in error.cure and isinstance(error.__cause__, OSError)


# ---------------------------------------------------------------- folders

FILES = {"a": OLD, "b": b"2", "manifest": [b"3"]}


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    steps = len(calls_of(lambda: atomic_folder(tmp_path / "counted", FILES)))
    discard(tmp_path / "counted")
    outcomes = []
    for at in range(steps):
        with mock.patch.object(af, "_disk", failing(at, raising(errno.ENOSPC))), \
                warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(CheckpointError):
                atomic_folder(tmp_path / "save", FILES)
        outcomes.append((tmp_path / "save").exists())
        if outcomes[-1]:
            assert sorted(os.listdir(tmp_path / "save")) == sorted(FILES)
            assert (tmp_path / "save" / "a").read_bytes() == joined(OLD)
            discard(tmp_path / "save")
        assert not os.listdir(tmp_path)
    assert set(outcomes) == {True, False}


def test_files_are_written_in_the_order_given(tmp_path):
    opened = []

    def disk(call, *args):
        if call is os.open and args[1] & os.O_CREAT:
            opened.append(Path(args[0]).name)
        return call(*args)

    with mock.patch.object(af, "_disk", disk):
        atomic_folder(tmp_path / "save", FILES)
    assert opened == list(FILES)


def test_a_folder_does_not_replace_one_that_holds_something(tmp_path):
    atomic_folder(tmp_path / "save", FILES)
    for other in ({}, {"a": b"other"}):
        with pytest.raises(CheckpointError, match="untouched"):
            atomic_folder(tmp_path / "save", other)
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(CheckpointError, match="untouched"):
        atomic_folder(tmp_path / "file", FILES)
    assert sorted(os.listdir(tmp_path / "save")) == sorted(FILES)
    assert sorted(os.listdir(tmp_path)) == ["file", "save"]


def test_discard_takes_the_name_first(tmp_path):
    atomic_folder(tmp_path / "save", FILES)
    (tmp_path / "file").write_bytes(b"1")
    with mock.patch.object(af, "_remove", lambda path: None):  # as if killed in between
        discard(tmp_path / "save")
    (left,) = set(os.listdir(tmp_path)) - {"file"}
    assert left.endswith(".partial") and sorted(os.listdir(tmp_path / left)) == sorted(FILES)
    discard(tmp_path / "file")
    atomic_write(tmp_path / "x", b"1")  # the next save clears the leftovers
    assert os.listdir(tmp_path) == ["x"]
    with pytest.raises(OSError):
        discard(tmp_path / "nothing")


def test_discard_of_a_link_leaves_what_it_points_to(tmp_path):
    atomic_folder(tmp_path / "save", FILES)
    (tmp_path / "link").symlink_to("save")
    discard(tmp_path / "link")
    assert os.listdir(tmp_path) == ["save"]
    assert sorted(os.listdir(tmp_path / "save")) == sorted(FILES)


# ---------------------------------------------------------------- leftovers, threads

def test_leftovers_of_the_dead_go_and_of_the_living_stay(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    mine = [f".m.safetensors.{dead.pid}-0.partial", f".save_000001_step_1.{dead.pid}-12.partial",
            f".m.safetensors.{os.getpid()}-999999.partial"]  # an earlier process of our number
    (tmp_path / mine[0]).write_text("half")
    (tmp_path / mine[2]).write_text("half")
    (tmp_path / mine[1]).mkdir()
    (tmp_path / mine[1] / "state.json").write_text("half")
    others = [f".m.safetensors.{os.getppid()}-0.partial", ".notes.partial", ".gitignore"]
    for name in others:
        (tmp_path / name).write_text("not ours")
    assert clear_leftovers(tmp_path) == sorted(mine)
    assert sorted(os.listdir(tmp_path)) == sorted(others)
    (tmp_path / mine[0]).write_text("half")
    atomic_write(tmp_path / "x", b"1")  # a save clears them by itself
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "x"])
    assert clear_leftovers(tmp_path / "nowhere") == []


def test_threads_that_save_to_one_path_do_not_mix(tmp_path):
    contents = [bytes([i]) * 50_000 for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            list(pool.map(lambda content: atomic_write(tmp_path / "x", content), contents))
            assert (tmp_path / "x").read_bytes() in contents
    assert os.listdir(tmp_path) == ["x"]


def test_a_save_leaves_alone_what_another_thread_writes(tmp_path):
    with af._saving(tmp_path / "slow", 1) as partial:
        partial.write_bytes(b"half")
        atomic_write(tmp_path / "quick", b"1")
        assert partial.exists() and clear_leftovers(tmp_path) == []
    partial.unlink()
    assert os.listdir(tmp_path) == ["quick"]


def test_the_module_needs_nothing_but_the_standard_library():
    """So that a tool, or a child process, can use it in a moment."""
    code = ("import importlib.util, sys; s = importlib.util.spec_from_file_location('af', "
            "sys.argv[1]); m = importlib.util.module_from_spec(s); s.loader.exec_module(m); "
            "assert not {'torch', 'numpy', 'gptbook'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code, af.__file__], check=True)
