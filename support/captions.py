"""
What is said of the stickers of a folder: captions and splits, from metadata and from text files.

    read_metadata    metadata.jsonl, else metadata.csv, of any subfolder: names are relative to where it lies
    read_sidecar     NAME.txt beside NAME.gif

Names are not trusted: they only pick among the files that were found. What cannot be used stops nothing: it
is noted, each kind once, with a few examples.
"""

import codecs
import csv
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from typing import NamedTuple

from support.common import UserError, printable

MAX_CAPTION = 1000  # characters; the rest is cut: CLIP reads 77 tokens, and sheets show every line
MAX_METADATA_BYTES = 2**30  # of metadata.jsonl or .csv: a million stickers with captions of 1000 letters
MAX_ARRAY_BYTES = 2**26  # of a metadata.jsonl that is one array: it is read as a whole
MAX_ENTRY = 2**20  # characters of one entry there: a longer one is not held in memory
MAX_EXAMPLES = 6  # that a note names; the others are counted

METADATA = {
    "metadata.jsonl": "one JSON object per line",
    "metadata.csv": "one row per sticker, below a header",
}
TRAIN = {"train", "training"}
HELD_OUT = {
    "validation",
    "valid",
    "val",
    "dev",
    "test",
    "testing",
    "eval",
    "evaluation",
    "holdout",
    "held_out",
}
BYTE_ORDER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class DataError(UserError):
    """Bad data: one sentence that names the folder or file and the way out."""


class Said(NamedTuple):
    """What a folder says of one sticker."""

    caption: str = ""
    split: str | None = None  # "train", "validation", or None: it does not say


class Notes:
    """Sentences about files and entries, each said once, with some of those that it is about."""

    def __init__(self):
        self.counts, self.examples = Counter(), defaultdict(Counter)

    def add(self, sentence, example):
        """Notes that `sentence` holds of `example`, a name or a place from a file."""
        self.counts[sentence] += 1
        example, examples = example[:150], self.examples[sentence]
        if example in examples or len(examples) < MAX_EXAMPLES:
            examples[example] += 1

    def lines(self):
        """The sentences, printable, in the order in which they were first added."""
        lines = []
        for sentence, count in self.counts.items():
            examples = self.examples[sentence]
            shown = [printable(name)[:100] + (f" ({n})" if n > 1 else "") for name, n in examples.items()]
            more = count - examples.total()
            lines.append(f"{sentence}: {', '.join(shown)}" + (f" and {more} more" if more else ""))
        return lines


# ------------------------------------------------------------------------------------------------------------
# Text and names


def clean(caption):
    """Any value as a caption: one line of at most MAX_CAPTION characters, "" for what is not text. Letters of
    all scripts stay; control characters become spaces, invalid Unicode a question mark."""
    if not isinstance(caption, str):
        return ""
    caption = re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", caption[: 4 * MAX_CAPTION])
    return " ".join(caption.encode(errors="replace").decode().split())[:MAX_CAPTION].strip()


def open_text(path, errors=None, **options):
    """A text file in UTF-8, or in what its byte order mark says. Unless `errors` says otherwise, invalid
    bytes of UTF-8 become surrogate escapes, as in names of files."""
    with open(path, "rb") as file:
        start = file.read(4)
    found = [encoding for mark, encoding in BYTE_ORDER_MARKS.items() if start.startswith(mark)]
    encoding, lenient = (found[0], "replace") if found else ("utf-8-sig", "surrogateescape")
    return open(path, encoding=encoding, errors=errors or lenient, **options)


def alike(name):
    """What names have in common that look the same, or are the same elsewhere: composed and decomposed
    letters (macOS), backslashes and case (Windows), spaces around them."""
    name = "/".join(part.strip() for part in name.replace("\\", "/").split("/"))
    return os.path.normpath(unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()))


def finder(names):
    """Returns find(name): the one of `names` that is meant, or None. It is the very same name, or the only
    one that is alike."""
    names, by_look = set(names), {}
    for name in names:
        look = alike(name)
        by_look[look] = None if look in by_look else name

    def find(name):
        path = os.path.normpath(name)
        return path if path in names else by_look.get(alike(name))

    return find


def read_sidecar(path):
    """The caption in a text file. Raises OSError, or ValueError if it holds something else than text."""
    with open_text(path, errors="strict") as file:
        text = file.read(4 * MAX_CAPTION)
    if "\0" in text:
        raise ValueError
    return clean(text)


# ------------------------------------------------------------------------------------------------------------
# Metadata


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


def parse_lines(lines):
    """The objects of JSON lines; a comma may end a line."""
    stripped = map(lambda line: line.strip().rstrip(","), lines)  # no generator: that ends at the first error
    return map(json.loads, filter(None, stripped))


def parse_table(lines, header):
    """The rows of a table whose fields are divided by what divides its header: comma, semicolon or tab. Where
    captions stand last, what is beyond them belongs to them: commas that nobody quoted."""
    mark = max(",;\t", key=header.count)

    def whole(row):
        if None in row and (last := list(row)[-2]) in ("text", "caption"):
            row[last] = f"{mark} ".join([row[last], *row.pop(None)])
        return row

    return map(whole, csv.DictReader(lines, delimiter=mark, skipinitialspace=True))


def whole_array(file, size):
    """The entries of a JSON file that is one array; None if it is none, or too large to be read at once."""
    try:
        if size <= MAX_ARRAY_BYTES and file.read(100).lstrip().startswith("["):
            file.seek(0)
            entries = json.load(file)
            return entries if isinstance(entries, list) else None
    except (ValueError, RecursionError):
        pass
    return None


def metadata_rows(path):
    """Yields (where, entry) for every entry of a metadata.jsonl or metadata.csv; entry is None if broken.
    Raises DataError where the file is too large, OSError where it cannot be read."""
    size, is_table = path.stat().st_size, path.suffix.lower() == ".csv"
    if size > MAX_METADATA_BYTES:
        raise DataError(f"{printable(path)} has more than {MAX_METADATA_BYTES // 2**20} MiB: shorten it.")
    with open_text(path, newline="" if is_table else None) as file:
        array = None if is_table else whole_array(file, size)
        if array is not None:
            yield from ((f"entry {number}", entry) for number, entry in enumerate(array, 1))
            return
        file.seek(0)
        header = file.readline(MAX_ENTRY)
        file.seek(0)
        lines = BoundedLines(file)
        entries = parse_table(lines, header) if is_table else parse_lines(lines)
        while True:
            lines.left = MAX_ENTRY
            try:
                entry = next(entries)
            except StopIteration:
                return
            # RecursionError: brackets in thousands of brackets. csv.Error: a field of more than 128 KiB (an
            # open quote, mostly), or an entry beyond MAX_ENTRY.
            except (ValueError, RecursionError, csv.Error):
                entry = None
            yield f"line {lines.number}", entry


def keys_of(entry):
    """What an entry has instead."""
    return f"it has {', '.join(key for key in entry if isinstance(key, str))}"


def read_caption(entry, note, where):
    """The caption of an entry; of a list of texts it is the first."""
    values = [entry[key] for key in ("text", "caption") if key in entry]
    for value in values:
        texts = value if isinstance(value, list) else [value]
        if caption := next(filter(None, map(clean, texts)), ""):
            if len(texts) > 1:
                note("has lists of texts, of which the first counts", where)
            if isinstance(value, str) and re.search(r"[\udc80-\udcff]", value):  # of open_text
                note("has letters that are not UTF-8 and became question marks", where)
            return caption
    if wrong := [value for value in values if value not in (None, []) and not isinstance(value, str)]:
        note("has a text that is no text, and is not used", f"{where} ({type(wrong[0]).__name__})")
    if not values and set(entry) - {"file_name", "split"}:
        note('has entries without "text" or "caption"', f"{where} ({keys_of(entry)})")
    return ""


def read_split(entry, note, where):
    """ "train", "validation", or None where an entry says neither, in any of the usual words."""
    split = entry.get("split")
    word = split.strip().lower() if isinstance(split, str) else type(split).__name__
    if split is None or word == "":
        return None
    if word in TRAIN | HELD_OUT:
        return "train" if word in TRAIN else "validation"
    note('has a "split" that is neither train nor validation, and counts for nothing', f"{where} ({split})")
    return None


def read_metadata(folder, paths, names, notes):
    """What the metadata files `paths` of a folder say of its stickers: {name: Said}.

    names: of the stickers, relative to the folder; notes: of class Notes, gets what cannot be used. Of
    several entries for one sticker the last counts, so `paths` begin with those that lie highest. Raises
    DataError if one of them cannot be read at all.
    """
    said, find = {}, finder(names)
    for path in paths:
        relative = path.relative_to(folder)

        def note(sentence, example, file=printable(relative)):
            notes.add(f"{file} {sentence}", example)

        try:
            read_entries(path, str(relative.parent), find, said, note)
        except OSError as error:
            where = printable(error.filename or path)
            raise DataError(f"{where} cannot be read ({error.strerror}): allow it or take it out.") from None
    return said


def read_entries(path, parent, find, said, note):
    """Adds the entries of one metadata file to `said`. parent: where it lies; find: of `finder`"""
    where = None
    for where, entry in metadata_rows(path):
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(entry, dict):
            form = METADATA[path.name.lower()]
            limit = f"of at most {MAX_ENTRY:,} characters"
            note(f"has entries that cannot be read, it needs {form}, {limit}", where)
        elif None in entry:
            note("has entries of more fields than its header: put texts with commas into quotes", where)
        elif not (isinstance(name, str) and name):
            note('has entries without a "file_name", which are not used', f"{where} ({keys_of(entry)})")
        elif os.path.isabs(name) or os.path.normpath(os.path.join(parent, name)).startswith("../"):
            note("names files outside of the folder, or not relative to it", f"{where} ({name})")
        elif (found := find(os.path.join(parent, name))) is None:
            note("names files that are not among the stickers", f"{where} ({name})")
        else:
            new = Said(read_caption(entry, note, where), read_split(entry, note, where))
            if said.get(found, new) != new:
                note("names stickers for the second time: the last entry counts", f"{where} ({name})")
            said[found] = new
    if where is None:
        note("has no entries", "it is empty")
