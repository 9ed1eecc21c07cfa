"""
What the whole project uses: errors that end as one sentence, files that are whole or absent, small functions.
"""

import errno
import fcntl
import os
import re
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import numpy as np

FIRST_SPEAKS = 5  # seconds that processes with an error wait for the first one of their machine


class UserError(ValueError):
    """Something that the user can mend: one sentence that names the flag or file and the way out."""


def out_of_memory(error):
    """Whether an exception says so: some of torch, FFmpeg and Pillow do it in words alone."""
    return isinstance(error, MemoryError) or re.search("(allocate|out of) memory", str(error)) is not None


@contextmanager
def one_sentence(program):
    """Runs a program's main: what its user can mend ends as one sentence and exit status 2, without a
    traceback.

    program: its name as it is called, such as "train.py". Ctrl-C ends with status 130. Of the processes on a
    machine the first speaks at once, and torchrun then ends the others; what another one alone met, it says
    a little later."""
    with lasting_output():
        try:
            yield
            return
        except KeyboardInterrupt:
            sys.exit(130)
        except UserError as error:
            message = str(error)
        except OSError as error:
            if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            name = printable(error.filename or "a file")
            message = f"{name} cannot be used ({error.strerror}): make room or choose another place."
        except (MemoryError, RuntimeError) as error:
            if out_of_memory(error):
                message = f"memory does not suffice ({printable(error, 200)}): ask for less at a time."
            elif re.search("Connection (closed|reset) by peer", str(error)):
                message = "another process of this run has ended, and says why: mend that."
            else:
                raise
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:
            program += f", rank {os.environ.get('RANK')}"
            time.sleep(FIRST_SPEAKS)
        print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


class Lasting:
    """A stream of text that swallows what it cannot write."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with suppress(OSError, ValueError):  # ValueError: it was closed
            self.stream.write(text)
        return len(text)

    def flush(self):
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextmanager
def lasting_output():
    """While it lasts, printing never raises: a run outlives its terminal, the program that it is piped into,
    and a log on a full disk. Letters that the terminal lacks come out as escapes."""
    # None: it was closed from the start. The first file to be opened would then take its number.
    streams = [stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr)]
    if hasattr(streams[0], "reconfigure"):  # a notebook's has not
        streams[0].reconfigure(errors="backslashreplace")  # as standard error has it from the start
    try:
        with redirect_stdout(Lasting(streams[0])), redirect_stderr(Lasting(streams[1])):
            yield
    finally:
        for stream in streams:
            try:
                stream.flush()
            except OSError:  # Python would try again at its end, and report that as its exit status
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def temporary_path(path):
    """A path beside `path` for what will be `path`: of another name in every process on every machine."""
    return path.with_name(f".{path.name}.{int.from_bytes(os.urandom(4))}.tmp")


@contextmanager
def replacing(path):
    """Yields a temporary path beside `path`, which takes its place once it is written: a reader never finds
    half a file.

    Where the body raises, the old file stays and the temporary one goes."""
    path = Path(path)
    writing = temporary_path(path)
    try:
        yield writing
        os.replace(writing, path)
    finally:
        writing.unlink(missing_ok=True)


def check_output(flag, path):
    """Raises UserError, naming the flag, unless a file can be written at `path`: said before the work, not
    after. Missing folders count as made."""
    path, shown = Path(path), f"{flag} {printable(path)}"
    if os.path.isdir(path):
        raise UserError(f"{shown} is a folder: give the name of a file.")
    folder = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    trial = folder / temporary_path(path).name
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"{shown} cannot be written ({error.strerror}): choose another place.") from error


@contextmanager
def locked(path, wait=False):
    """Holds the lock on `path`, an empty file that is made; it ends with the process at the latest.

    Yields True, or False if another process holds it, which `wait` waits for. On a disk without locks, as
    some of NFS and Lustre are, nobody can be kept out: it yields None."""
    with open(path, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            alone = True
        except OSError as error:
            alone = False if error.errno in (errno.EACCES, errno.EAGAIN) else None
        yield alone


def default_cache():
    """Where drawn stickers and latents are kept unless --cache_dir says otherwise. Raises UserError."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdtf"
    except RuntimeError as error:  # this user has no home
        raise UserError(
            "there is no home folder to keep a cache in: set XDG_CACHE_HOME, or give --cache_dir."
        ) from error


def evenly(things, count):
    """At most `count` of a list, evenly spread over it, first and last included."""
    chosen = np.linspace(0, len(things) - 1, min(count, len(things))).astype(int)
    return [things[i] for i in np.unique(chosen)]


def even_parts(count, most):
    """The sizes of as few parts of `count` things as there can be with at most `most` in each."""
    return [len(part) for part in np.array_split(range(count), -(-count // most))]


def one_line(error):
    """What an error says, as part of a sentence."""
    return " ".join(str(error).split())[:200]


def printable(text, most=500):
    """A name or message from a file (str or Path) as one line that any terminal shows as it is meant.

    Control characters, line breaks, invalid bytes and marks that turn the writing direction come out as
    escapes such as \\x1b; beyond `most` characters it is cut."""
    text = str(text)
    shown = text if len(text) <= most else text[:most] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def table(header, rows):
    """A table in Markdown: a list of column names, and a list of rows of anything that `str` shows."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
