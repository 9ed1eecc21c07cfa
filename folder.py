"""
A folder of stickers: which files, with which captions, and what becomes of one file (section 4.2).

    scan_folder    captions from metadata.jsonl / metadata.csv, or NAME.txt beside NAME.gif; a tenth held out
    load_clip      one file -> frames, and its key frames for every k in 3..8
"""

import csv
import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import media
from curriculum import LENGTHS
from keyframes import equal_frames, extract_key_frames, thumbnails
from masks import NUM_FRAMES

HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 500  # of a user's folder, for validation
MIN_FRAMES = LENGTHS[0]  # distinct frames that a clip needs

# ------------------------------------------------------------------------------------------------------------
# The folder


class DataError(ValueError):
    """Bad data in one sentence that names the folder or file and the way out."""


class Sticker(NamedTuple):
    path: Path
    name: str  # path relative to the folder, with forward slashes
    caption: str  # may be empty
    split: str  # "train" or "validation"


def read_metadata(folder):
    """The entries of metadata.jsonl or metadata.csv. Returns ({name: entry}, [(where, reason)])."""
    entries, problems = {}, []
    jsonl, table = folder / "metadata.jsonl", folder / "metadata.csv"
    if jsonl.exists():
        lines = enumerate(jsonl.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        rows = [(f"{jsonl.name} line {number}", line) for number, line in lines if line.strip()]
    elif table.exists():
        with open(table, newline="", encoding="utf-8", errors="replace") as file:
            rows = [
                (f"{table.name} row {number}", row)
                for number, row in enumerate(csv.DictReader(file), start=2)
            ]
    else:
        rows = []
    for where, row in rows:
        try:
            entry = json.loads(row) if isinstance(row, str) else row
            name = Path(entry["file_name"]).as_posix()
        except (ValueError, KeyError, TypeError):
            problems.append((where, "has no usable file_name: each entry needs file_name and text"))
            continue
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            problems.append((name, f"{where} points outside of the folder"))
        elif not (folder / name).is_file():
            problems.append((name, f"{where} names it, but there is no such file"))
        else:
            entries[name] = entry
    return entries, problems


def scan_folder(folder):
    """Finds the stickers of a folder and its subfolders, with captions, in the order of their names.

    Returns (stickers, problems); problems are pairs (name, reason) for entries that cannot be used. Nothing
    is decoded. A metadata entry may set "split" to "train" or "validation"; otherwise the tenth of the files
    (at most 500) whose names hash lowest is validation. Raises DataError if the folder is missing or holds no
    sticker file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give --data a folder of stickers.")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in media.SUFFIXES and p.is_file())
    if not paths:
        raise DataError(
            f"{folder} holds no sticker: looked, in its subfolders too, "
            f"for files that end in {', '.join(media.SUFFIXES)}."
        )
    entries, problems = read_metadata(folder)

    names = [path.relative_to(folder).as_posix() for path in paths]
    by_hash = sorted(names, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest())
    held_out = set(by_hash[: min(HELD_OUT_MOST, int(HELD_OUT_SHARE * len(names)))])

    stickers = []
    for path, name in zip(paths, names):
        entry, sidecar = entries.get(name, {}), path.with_suffix(".txt")
        caption = entry.get("text") or entry.get("caption") or ""
        if not caption and sidecar.is_file():
            caption = sidecar.read_text(encoding="utf-8", errors="replace")
        split = entry.get("split")
        if split not in ("train", "validation"):
            split = "validation" if name in held_out else "train"
        stickers.append(Sticker(path, name, " ".join(str(caption).split()), split))
    return stickers, problems


# ------------------------------------------------------------------------------------------------------------
# One sticker


class Clip(NamedTuple):
    """The frames of one sticker that training can ask for."""

    pixels: np.ndarray  # uint8 (M, R, R, 3), M <= 41
    key_frames: dict  # {k: positions in `pixels`}
    equal: np.ndarray  # 8 positions in `pixels`, or None for a clip of fewer than 8 frames
    count: int  # frames in the file


def load_clip(sticker, resolution):
    """Decodes one sticker. Returns a Clip, or the reason (str) for dropping it;
    nothing that a file holds raises."""
    try:
        frames, _ = media.read_clip(sticker.path, resolution)
    except media.MediaError as error:
        return str(error)
    key_frames = extract_key_frames(thumbnails(frames))
    if not key_frames:
        return f"fewer than {MIN_FRAMES} distinct frames (it has {len(frames)} in all)"
    equal = equal_frames(len(frames)) if len(frames) >= NUM_FRAMES else None
    wanted = np.unique(np.concatenate([*key_frames.values(), *([] if equal is None else [equal])]))
    place = {frame: i for i, frame in enumerate(wanted)}
    key_frames = {k: np.array([place[f] for f in indices]) for k, indices in key_frames.items()}
    equal = None if equal is None else np.array([place[f] for f in equal])
    return Clip(frames[wanted], key_frames, equal, len(frames))


def load_clips(stickers, resolution, num_workers):
    """Yields load_clip for each sticker, in order, from `num_workers` processes (0 = this one)."""
    load = partial(load_clip, resolution=resolution)
    if num_workers == 0:
        yield from map(load, stickers)
        return
    with ProcessPoolExecutor(num_workers) as pool:
        yield from pool.map(load, stickers, chunksize=4)
