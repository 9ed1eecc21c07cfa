"""
What the whole project uses: errors that end as one sentence, files that are whole or absent, small functions.
"""

import errno
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np


class UserError(ValueError):
    """Something that the user can mend: one sentence that names the flag or file and the way out."""


@contextmanager
def one_sentence(program):
    """Runs a program's main: what its user can mend ends as one sentence and exit status 2, without a
    traceback.

    program: its name as it is called, such as "train.py". Ctrl-C ends with status 130."""
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack letters of a name
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
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once on each machine
        print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def replacing(path):
    """Yields a temporary path beside `path`, which takes its place once it is written: a reader never finds
    half a file.

    Where the body raises, the old file stays and the temporary one goes."""
    path = Path(path)
    writing = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield writing
        os.replace(writing, path)
    finally:
        writing.unlink(missing_ok=True)


def default_cache():
    """Where drawn stickers and latents are kept unless --cache_dir says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdtf"


def evenly(things, count):
    """At most `count` of a list, evenly spread over it, first and last included."""
    chosen = np.linspace(0, len(things) - 1, min(count, len(things))).astype(int)
    return [things[i] for i in np.unique(chosen)]


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
