"""
A folder of stickers: which files, and which captions.

    scan_folder    captions from metadata.jsonl / metadata.csv, or NAME.txt beside NAME.gif; a tenth held out

Files come from anywhere: only a folder without any sticker stops a run. Links to files are followed, wherever
they lead (many data sets are links into a store), links to folders are not (they may go in circles). Names in
metadata are not trusted: they only pick among the files that were found.
"""

import csv
import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from support import media
from support.common import UserError, printable

HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 500  # of a user's folder, for validation
MAX_CAPTION = 1000  # characters; the rest is cut: CLIP reads 77 tokens, and sheets show every line
MAX_DEPTH = 100  # folders in folders
MAX_METADATA_BYTES = 2**30  # of metadata.jsonl or .csv: a million stickers with captions of 1000 letters
MAX_ENTRY = 2**20  # characters of one entry there: a longer one is not held in memory
MAX_PROBLEMS = 1000  # entries that are named as unusable; the others are counted

# ------------------------------------------------------------------------------------------------------------
# The folder


class DataError(UserError):
    """Bad data: one sentence that names the folder or file and the way out."""


class Sticker(NamedTuple):
    """One file of a folder."""

    path: Path
    name: str  # path relative to the folder, with forward slashes
    caption: str  # may be empty
    split: str  # "train" or "validation"


def clean(caption):
    """Any value as a caption: one line of at most MAX_CAPTION characters, "" for what is not text. Letters of
    all scripts stay; control characters become spaces, invalid Unicode a question mark."""
    if not isinstance(caption, str):
        return ""
    caption = re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", caption[: 4 * MAX_CAPTION])
    return " ".join(caption.encode(errors="replace").decode().split())[:MAX_CAPTION].strip()


def open_text(path, **options):
    """A text file that may begin with a byte order mark; invalid bytes become surrogate escapes, as in names
    of files."""
    return open(path, encoding="utf-8-sig", errors="surrogateescape", **options)


class BoundedLines:
    """The lines of a text file, one by one. The reader of an entry first sets `left` to the characters that
    it may have: a line beyond them is skipped, and raises csv.Error."""

    def __init__(self, file):
        self.file, self.number, self.left = file, 0, MAX_ENTRY

    def __iter__(self):
        return self

    def __next__(self):
        self.number += 1
        line = self.file.readline(MAX_ENTRY + 1)
        self.left -= len(line)
        if self.left >= 0 and line:
            return line
        while line and line[-1] not in "\r\n":
            line = self.file.readline(MAX_ENTRY)
        raise csv.Error if self.left < 0 else StopIteration


def metadata_rows(folder):
    """Yields (where, entry) for every entry of metadata.jsonl, else metadata.csv; entry is None if broken.
    Raises DataError where the file is too large, OSError where it cannot be read."""
    for name, newline, parse in (
        ("metadata.jsonl", None, lambda lines: map(json.loads, filter(str.strip, lines))),
        ("metadata.csv", "", csv.DictReader),
    ):
        path = folder / name
        if not path.is_file():
            continue
        if path.stat().st_size > MAX_METADATA_BYTES:
            raise DataError(f"{printable(path)} has more than {MAX_METADATA_BYTES // 2**20} MiB: shorten it.")
        with open_text(path, newline=newline) as file:
            entries = parse(lines := BoundedLines(file))
            while True:
                lines.left = MAX_ENTRY
                try:
                    entry = next(entries)
                except StopIteration:
                    return
                # RecursionError: brackets in thousands of brackets. csv.Error: a field of more than 128 KiB
                # (an open quote, mostly), or an entry beyond MAX_ENTRY.
                except (ValueError, RecursionError, csv.Error):
                    entry = None
                yield f"{name} line {lines.number}", entry


def read_metadata(folder, names):
    """The entries that metadata.jsonl or metadata.csv has for the files `names`.

    Returns ({name: (caption, split or None)}, [(name or line, reason)]), the latter printable and at most
    MAX_PROBLEMS, then how many more. Raises DataError if it cannot be read at all.
    """
    entries, problems, more = {}, [], 0
    try:
        for where, entry in metadata_rows(folder):
            name = entry.get("file_name") if isinstance(entry, dict) else None
            usable = isinstance(name, str) and name
            path = os.path.normpath(name) if usable else ""
            if path in names:
                split = entry.get("split")
                caption = clean(entry.get("text")) or clean(entry.get("caption"))
                entries[path] = caption, split if split in ("train", "validation") else None
            elif len(problems) == MAX_PROBLEMS:
                more += 1
            elif not usable:
                reason = f"each entry needs file_name and text, in at most {MAX_ENTRY:,} characters"
                problems.append((where, f"has no usable file_name: {reason}"))
            elif os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
                problems.append((printable(name), f"{where} points outside of the folder"))
            else:
                reason = f"{where} names it, but there is no such file among the stickers"
                problems.append((printable(name), reason))
    except OSError as error:
        where = printable(error.filename or folder)
        raise DataError(f"{where} cannot be read ({error.strerror}): allow it or take it out.") from None
    if more:
        problems.append((where.split()[0], f"and {more} more of its entries, which cannot be used either"))
    return entries, problems


def find_files(folder):
    """The sticker files of a folder and its subfolders, sorted. Returns (paths, [(name, reason)])."""
    paths, problems = [], []

    def name_of(path):
        return Path(path).relative_to(folder).as_posix()

    def unreadable(error):
        problems.append((name_of(error.filename), f"is a folder that cannot be read ({error.strerror})"))

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        if len(Path(parent).relative_to(folder).parts) >= MAX_DEPTH and folders:
            problems.append((name_of(parent), f"is {MAX_DEPTH} folders deep: what is below is not looked at"))
            folders.clear()
        for path in (Path(parent, file) for file in files):
            if path.suffix.lower() not in media.SUFFIXES:
                continue
            if os.path.isfile(path):
                paths.append(path)
            else:
                problems.append((name_of(path), "is not a file that can be read, or a link to nothing"))
    return sorted(paths), problems


def scan_folder(folder):
    """Finds the stickers of a folder and its subfolders, with captions, in the order of their names.

    Returns (stickers, problems); problems are pairs (name, reason) for files and entries that cannot be
    used, with names of files as they are (common.printable shows them). Nothing is decoded. An entry may set
    "split" to "train" or "validation"; otherwise the tenth of the files (at most 500) whose names hash lowest
    is validation. Raises DataError if the folder is missing or holds no sticker file, or its metadata is too
    large or kept from being read.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise DataError(f"{printable(folder)} is not a folder: give --data a folder of stickers.")
    paths, problems = find_files(folder)
    if not paths:
        others = "".join(f" {printable(name)} {reason}." for name, reason in problems[:1])
        raise DataError(
            f"{printable(folder)} holds no sticker: looked, in its subfolders too, "
            f"for files that end in {', '.join(media.SUFFIXES)}.{others}"
        )
    names = [path.relative_to(folder).as_posix() for path in paths]
    entries, broken = read_metadata(folder, set(names))
    problems += broken
    by_hash = sorted(names, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest())
    held_out = set(by_hash[: min(HELD_OUT_MOST, int(HELD_OUT_SHARE * len(names)))])

    stickers = []
    for path, name in zip(paths, names):
        caption, split = entries.get(name, ("", None))
        sidecar = path.with_suffix(".txt")
        if not caption and os.path.isfile(sidecar):
            try:
                with open_text(sidecar) as file:
                    caption = clean(file.read(4 * MAX_CAPTION))
            except OSError as error:
                problems.append((name, f"is used without its caption: {sidecar.name}: {error.strerror}"))
        split = split or ("validation" if name in held_out else "train")
        stickers.append(Sticker(path, name, caption, split))
    return stickers, problems


def print_summary(folder, used, counts, dropped):
    """Says what of a folder is used and what is dropped. Raises DataError if nothing is used.

    used: list of Sticker; counts: frames of each of them; dropped: [(name, reason)]
    """
    for name, reason in dropped:
        print(f"dropped {printable(name)}: {reason}")
    print(
        f"{printable(folder)}: {len(used)} stickers used, {len(dropped)} dropped, "
        f"{sum(sticker.split == 'validation' for sticker in used)} of the used held out for validation, "
        f"{sum(not sticker.caption for sticker in used)} without a caption"
    )
    if not used:
        raise DataError(f"{printable(folder)} holds no usable sticker: the reasons are above.")
    print("frames per clip: " + ", ".join(f"{c} x {n}" for n, c in sorted(Counter(counts).items())[:40]))
