"""
The latent cache: every frame that training can ask for, decoded and encoded once, memory-mapped afterwards.

    cache_dir/latents-KEY/            KEY: the codec, the resolution, CACHE_VERSION
        0a1b2c....npy                 a shard: float16 (rows, C, h, w), the latents of at most SHARD_CLIPS clips
        0a1b2c....npz                 its index: which files, which rows; written last, so a shard with an index
                                      is whole
        claims/                       what the processes that are at work have taken
    cache_dir/digests-FOLDER.json     contents of the files of a folder, so that they are not read at every start

Clips are known by the contents of their files, so a renamed or touched file costs nothing and a changed one
is encoded again. Any number of processes build a cache together: each takes the next shard of what is
missing. A claim is a locked file, and the lock dies with its process: nobody waits for the dead, and a build
that was interrupted goes on with the shard it was at.
"""

import fcntl
import hashlib
import json
import os
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from tqdm import tqdm

CACHE_VERSION = 4  # raise it when resizing, key frames or the layout of the cache change
SHARD_CLIPS = 256  # what an interruption can lose


# ------------------------------------------------------------------------------------------------------------
# Reading


def read_index(path):
    """{name: array} of a shard's index. None if it or its latents are damaged: as if the shard were not
    there, so that its files are encoded again."""
    try:
        np.load(path.with_suffix(".npy"), mmap_mode="r")
        with np.load(path) as arrays:
            return {
                name: arrays[name] for name in ("digest", "start", "count", "places", "dropped", "reason")
            }
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
        return None


# ------------------------------------------------------------------------------------------------------------
# Which files


def digest_files(folder, stickers, cache_dir):
    """sha256 of every file, in the order of `stickers`. A file whose size and time of change are those of the
    last call is not read again."""
    memory = (
        Path(cache_dir)
        / f"digests-{hashlib.sha256(os.fsencode(Path(folder).resolve())).hexdigest()[:16]}.json"
    )
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        known = {}
    now = {}
    for sticker in tqdm(stickers, "looking at files", unit="file", delay=2, disable=not sys.stderr.isatty()):
        try:
            state = sticker.path.stat()
            stamp = [state.st_size, state.st_mtime_ns, state.st_ino]
            entry = known.get(sticker.name)
            if entry is None or entry[:-1] != stamp:
                with open(sticker.path, "rb") as file:
                    entry = [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
        except OSError as error:  # it will be dropped for this reason, under a name of its own
            entry = [hashlib.sha256(f"{sticker.name!r} {error}".encode()).hexdigest()]
        now[sticker.name] = entry
    if now != known:
        memory.parent.mkdir(parents=True, exist_ok=True)
        writing = memory.with_suffix(f".{os.getpid()}.tmp")
        writing.write_text(json.dumps(now))
        os.replace(writing, memory)
    return [now[sticker.name][-1] for sticker in stickers]


# ------------------------------------------------------------------------------------------------------------
# Building


def try_lock(file):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def forget_cached(missing, folder, seen):
    """Takes what has been cached since the last call out of the dict `missing`; `seen`: the shards read so
    far."""
    for index in set(folder.glob("*.npz")) - seen:
        if (arrays := read_index(index)) is not None:
            seen.add(index)
            for digest in (*arrays["digest"].tolist(), *arrays["dropped"].tolist()):
                missing.pop(digest, None)


@contextmanager
def claim(folder, missing, seen):
    """Takes the next shard's worth of `missing` that no other process is at work on: yields a list of
    digests."""
    claims = folder / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    with open(claims / "lock", "w") as door:  # one process at a time decides
        fcntl.flock(door, fcntl.LOCK_EX)
        taken = set()
        for path in claims.glob("*.txt"):
            with suppress(FileNotFoundError), open(path) as file:  # it may be given back at this very moment
                if try_lock(file):  # its process is gone
                    path.unlink()
                else:
                    taken.update(file.read().split())
        if not taken:
            for leftover in folder.glob("*.tmp"):
                leftover.unlink()
        forget_cached(missing, folder, seen)
        mine = list(islice((digest for digest in missing if digest not in taken), SHARD_CLIPS))
        note = open(claims / f"{os.getpid()}-{time.monotonic_ns()}.txt", "w")
        try_lock(note)
        note.write("\n".join(mine))
        note.flush()
    try:
        yield mine
    finally:
        os.unlink(note.name)
        note.close()
