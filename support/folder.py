"""
A folder of stickers: which files, and which of them are held out.

    scan_folder    the stickers of a folder, with captions (captions.py), and notes on what is not used

Files come from anywhere: only a folder without any sticker stops a run. Links are followed, wherever they
lead: many data sets are links into a store. Nothing is lost without a word: what is passed over is noted,
each kind once, with a few names.
"""

import os
from collections import Counter
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from support import media
from support.captions import HELD_OUT, METADATA, DataError, Notes, Said, finder, read_metadata, read_sidecar
from support.common import printable

HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 500  # of a user's folder, for validation
MAX_DEPTH = 100  # folders in folders
OF_PROGRAMS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "__pycache__"}  # as good as hidden


class Sticker(NamedTuple):
    """One file of a folder."""

    path: Path
    name: str  # path relative to the folder, with forward slashes
    caption: str  # may be empty
    split: str  # "train" or "validation"


class Files(NamedTuple):
    """Paths of the files of a folder, those of a subfolder after those of the folder above."""

    stickers: list
    texts: list
    metadata: list


# ------------------------------------------------------------------------------------------------------------
# Files


def is_hidden(name):
    return name.startswith(".") or name in OF_PROGRAMS


def is_run(folder):
    """Whether train.py wrote a folder: a run, a checkpoint or a finished model."""
    begun = (os.path.exists(os.path.join(folder, name)) for name in (".lock", "log.jsonl"))
    return os.path.exists(os.path.join(folder, "model_index.json")) or all(begun)


def why_passed_over(path, top, seen):
    """Why a subfolder is not entered, or None. top, seen: real paths of the whole folder and of what was
    entered."""
    real = os.path.realpath(path)
    if is_hidden(os.path.basename(path)):
        return "what is hidden, or belongs to another program, is passed over"
    if is_run(path):
        return "folders that train.py wrote are passed over"
    circles = os.path.islink(path) and os.path.commonpath([real, top]) in (real, top)
    if circles or real in seen:
        return "links to what is read anyway, or to what holds this folder, are not followed"
    seen.add(real)
    return None


def walk(folder, notes):
    """Yields (parent, names of its files) for a folder, its subfolders and those that links in it lead to,
    each once, in the order of their names."""

    def shown(path):
        return Path(path).relative_to(folder).as_posix()

    def unreadable(error):
        notes.add("folders that cannot be read", f"{shown(error.filename)} ({error.strerror})")

    top = os.path.realpath(folder)
    seen = {top}
    for parent, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        if len(Path(parent).relative_to(folder).parts) >= MAX_DEPTH and folders:
            notes.add(f"what lies more than {MAX_DEPTH} folders deep is not looked at", shown(parent))
            folders.clear()
        entered = []
        for name in sorted(folders):
            reason = why_passed_over(os.path.join(parent, name), top, seen)
            if reason is None:
                entered.append(name)
            else:
                notes.add(reason, shown(os.path.join(parent, name)))
        folders[:] = entered
        yield parent, sorted(files)


def find_files(folder, notes):
    """The Files of a folder and its subfolders. notes: of class Notes, gets what is passed over"""
    found = Files([], [], [])
    for parent, names in walk(folder, notes):
        tables = {}  # lower-case name: path
        for path in (Path(parent, name) for name in names):
            name, suffix = path.relative_to(folder).as_posix(), path.suffix.lower()
            if is_hidden(path.name):
                if suffix in media.SUFFIXES:
                    notes.add("what is hidden, or belongs to another program, is passed over", name)
            elif not os.path.isfile(path):
                notes.add("what is no file, or a link to nothing", name)
            elif suffix in media.SUFFIXES:
                found.stickers.append(path)
            elif suffix == ".txt":
                found.texts.append(path)
            elif path.stem.lower() == "metadata":
                tables[path.name.lower()] = path
            elif path.name != "stickers.json":  # of the built-in set
                notes.add("files with a suffix that is not read", suffix or "none")
        read = next((tables.pop(name) for name in METADATA if name in tables), None)
        found.metadata.extend([read] if read else [])
        for path in tables.values():
            where = path.relative_to(folder).as_posix()
            notes.add("metadata is read from metadata.jsonl, else from metadata.csv, and not from", where)
    return found


# ------------------------------------------------------------------------------------------------------------
# Stickers


def choose_splits(names, said, notes):
    """The split of each of `names`: what its entry says, else whether a folder above it is called validation,
    test or the like. Where nothing is held out in this way, the tenth (at most 500) whose names hash lowest
    is.

    said: {name: Said}"""
    held = {}
    for name in names:
        folders = PurePosixPath(name).parts[:-1]
        places = [i for i, folder in enumerate(folders) if folder.lower() in HELD_OUT]
        if places:
            held[name] = "/".join(folders[: places[0] + 1])
    if len(held) == len(names):  # no split: a split has another part
        held = {}
    splits = {name: said[name].split if name in said else None for name in names}
    for name, folder in held.items():
        if splits[name] is None:
            splits[name] = "validation"
            notes.add("stickers are held out, as the name of their folder says", folder)
    if "validation" not in splits.values():
        by_hash = sorted(names, key=lambda name: sha256(name.encode(errors="surrogateescape")).digest())
        for name in by_hash[: min(HELD_OUT_MOST, int(HELD_OUT_SHARE * len(names)))]:
            splits[name] = splits[name] or "validation"
    elif set(splits.values()) == {"validation"}:
        notes.add("nothing is left to train on: metadata holds out all stickers, that is", str(len(names)))
    return {name: split or "train" for name, split in splits.items()}


def read_sidecars(folder, paths, names, notes):
    """{name: caption} of those of `names` beside which a text file of the same name lies. paths: of the text
    files"""
    texts = {path.relative_to(folder).as_posix(): path for path in paths}
    find, captions, used = finder(texts), {}, set()
    wanted = {name: str(PurePosixPath(name).with_suffix(".txt")) for name in names}
    taken = texts.keys() & wanted.values()  # these have a sticker of exactly their name
    for name in names:
        text = find(wanted[name])
        if text is None or text in taken and text != wanted[name]:
            continue
        used.add(text)
        try:
            captions[name] = read_sidecar(texts[text])
        except OSError as error:
            notes.add("captions that cannot be read", f"{text} ({error.strerror})")
        except ValueError:
            notes.add("captions that are not used, since they are no UTF-8 text", text)
    for text in texts:
        if text not in used:
            notes.add("text files without a sticker of the same name", text)
    return captions


def scan_folder(folder):
    """Finds the stickers of a folder and its subfolders, with captions, in the order of their names.

    Returns (stickers, notes), notes being printable sentences on files and entries that are not used.
    Nothing is decoded. Raises DataError if the folder is missing, holds no sticker file or was written by
    train.py, or if its metadata is too large or kept from being read.
    """
    folder, notes = Path(folder), Notes()
    if not os.path.isdir(folder):
        raise DataError(f"{printable(folder)} is not a folder: give --data a folder of stickers.")
    if is_run(folder):
        raise DataError(
            f"{printable(folder)} is a folder that train.py wrote: give --data a folder of stickers alone."
        )
    files = find_files(folder, notes)
    paths = sorted(files.stickers)
    if not paths:
        others = "".join(f" Note: {note}." for note in notes.lines()[:3])
        raise DataError(
            f"{printable(folder)} holds no sticker: looked, in its subfolders too, "
            f"for files that end in {', '.join(media.SUFFIXES)}.{others}"
        )
    names = [path.relative_to(folder).as_posix() for path in paths]
    said = read_metadata(folder, files.metadata, names, notes)
    sidecars = read_sidecars(folder, files.texts, names, notes)
    splits = choose_splits(names, said, notes)
    captions = [said.get(name, Said()).caption or sidecars.get(name, "") for name in names]
    rows = zip(paths, names, captions, splits.values())
    return [Sticker(*row) for row in rows], notes.lines()


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
