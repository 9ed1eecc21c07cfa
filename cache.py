"""
The latent cache: every frame that training can ask for, decoded and encoded once, memory-mapped afterwards.

    cache_dir/latents-KEY/            KEY: the codec, the resolution, CACHE_VERSION
        0a1b2c....npy                 a shard: float16 (rows, C, h, w), the latents of at most SHARD_CLIPS clips
        0a1b2c....npz                 its index: which files, which rows; written last, so a shard with an index
                                      is whole
        claims/                       what the processes that are at work have taken
    cache_dir/digests-FOLDER.json     contents of the files of a folder, so that they are not read at every start

Clips are known by the contents of their files, so a renamed or touched file costs nothing and a changed one is
encoded again. Any number of processes build a cache together: each takes the next shard of what is missing. A
claim is a locked file, and the lock dies with its process: nobody waits for the dead, and a build that was
interrupted goes on with the shard it was at.
"""

import fcntl
import hashlib
import json
import os
import sys
import time
import zlib
from contextlib import closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from tqdm import tqdm

from curriculum import LENGTHS
from folder import Clip, DataError, load_clips

CACHE_VERSION = 4  # raise it when resizing, key frames or the layout of the cache change
SHARD_CLIPS = 256  # what an interruption can lose
SLOTS = LENGTHS[-1]  # frames of the longest list


def default_cache():
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rdtf"


# ------------------------------------------------------------------------------------------------------------
# Reading


class CachedClip(NamedTuple):
    """One clip of the cache."""

    name: str
    caption: str
    split: str  # "train" or "validation"
    count: int  # frames in the file
    shard: int
    start: int  # first row in its shard
    places: (
        np.ndarray
    )  # int8 (7, 8): rows of the key frames for k = 3..8, then of the equally spaced frames; -1 = none

    @property
    def longest(self):
        """The largest k that the clip allows."""
        return int((self.places[:-1, 0] >= 0).sum()) + LENGTHS[0] - 1

    @property
    def has_equal(self):
        """Whether it has 8 equally spaced frames."""
        return self.places[-1, 0] >= 0


def read_index(path):
    """{name: array} of a shard's index. None if it or its latents are damaged: as if the shard were not there, so that
    its files are encoded again."""
    try:
        np.load(path.with_suffix(".npy"), mmap_mode="r")
        with np.load(path) as arrays:
            return {name: arrays[name] for name in ("digest", "start", "count", "places", "dropped", "reason")}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
        return None


class LatentDataset:
    """The clips of one folder with their latents.

    clips: list of CachedClip, in the order of the folder
    identity: changes with any file of the folder, the codec or the resolution
    dropped: [(name, reason)]
    """

    def __init__(self, folder, stickers, digests):
        self.folder, self.clips, self.dropped, self.shards = folder, [], [], []
        names = [f"{sticker.name!r} {digest}" for sticker, digest in zip(stickers, digests)]
        self.identity = hashlib.sha256("\n".join([folder.name, *names]).encode()).hexdigest()[:20]
        places, where, reasons = {}, {}, {}
        for index in sorted(folder.glob("*.npz")):
            if (arrays := read_index(index)) is None:
                continue
            number = len(self.shards)
            self.shards.append(index.with_suffix(".npy"))
            for digest, start, count, table in zip(*(arrays[n] for n in ("digest", "start", "count", "places"))):
                where[str(digest)], places[str(digest)] = (int(count), number, int(start)), table
            reasons.update(zip(arrays["dropped"].tolist(), arrays["reason"].tolist()))
        for sticker, digest in zip(stickers, digests):
            if digest in where:
                labels = sticker.name, sticker.caption, sticker.split
                self.clips.append(CachedClip(*labels, *where[digest], places[digest]))
            else:
                self.dropped.append((sticker.name, reasons[digest]))
        self.latents = {}  # shard number -> memory map, opened when first read

    def split(self, name, ddu=True):
        """The clips of "train" or "validation".
        Without dual masks (`ddu`) clips of fewer than 8 frames are dropped."""
        return [clip for clip in self.clips if clip.split == name and (ddu or clip.has_equal)]

    def read(self, clip, k=None):
        """The k key frames of a clip, or with k None its equally spaced ones:
        latents float32 (k | 8, C, h, w)."""
        if clip.shard not in self.latents:
            self.latents[clip.shard] = np.load(self.shards[clip.shard], mmap_mode="r")
        rows = clip.places[-1] if k is None else clip.places[k - LENGTHS[0], :k]
        return np.asarray(self.latents[clip.shard][clip.start + rows.astype(int)], dtype=np.float32)


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
    """Takes what has been cached since the last call out of the dict `missing`; `seen`: the shards read so far."""
    for index in set(folder.glob("*.npz")) - seen:
        if (arrays := read_index(index)) is not None:
            seen.add(index)
            for digest in (*arrays["digest"].tolist(), *arrays["dropped"].tolist()):
                missing.pop(digest, None)


@contextmanager
def claim(folder, missing, seen):
    """Takes the next shard's worth of `missing` that no other process is at work on: yields a list of digests."""
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


def write_shard(folder, digests, clips, codec):
    """Encodes `clips` (of load_clip, in the order of `digests`) into a shard of `folder`."""
    latents, index = [], dict(digest=[], start=[], count=[], places=[], dropped=[], reason=[])
    rows = 0
    for digest, clip in zip(digests, clips):
        if not isinstance(clip, Clip):
            index["dropped"].append(digest)
            index["reason"].append(clip)
            continue
        latents.append(codec.encode(torch.from_numpy(clip.pixels)).half().cpu().numpy())
        places = np.full((len(LENGTHS) + 1, SLOTS), -1, np.int8)
        for k, frames in clip.key_frames.items():
            places[k - LENGTHS[0], :k] = frames
        if clip.equal is not None:
            places[-1] = clip.equal
        for name, value in (("digest", digest), ("start", rows), ("count", clip.count), ("places", places)):
            index[name].append(value)
        rows += len(latents[-1])
    name = hashlib.sha256("".join(digests).encode()).hexdigest()[:20]
    frames = np.concatenate(latents) if latents else np.zeros((0, 1, 1, 1), np.float16)
    for suffix, save in (
        (".npy", lambda file: np.save(file, frames)),
        (".npz", lambda file: np.savez(file, **{n: np.array(v) for n, v in index.items()})),
    ):
        writing = folder / f"{name}{suffix}.tmp"
        with open(writing, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(writing, folder / f"{name}{suffix}")


def open_dataset(folder, stickers, codec, resolution, cache_dir, num_workers=0):
    """The latents of the stickers of `folder` under this codec; what is missing is encoded first, shared with
    whatever other processes do the same. Captions and splits are those of `stickers`: they may change without
    making a latent stale. Raises DataError if no file is usable."""
    key = hashlib.sha256(f"{CACHE_VERSION} {codec.identity} {resolution}".encode()).hexdigest()
    place = Path(cache_dir) / f"latents-{key[:20]}"
    digests = digest_files(folder, stickers, cache_dir)
    missing, seen = dict(zip(digests, stickers)), set()  # {digest: sticker}; equal files are encoded once
    forget_cached(missing, place, seen)
    total = len(missing)
    with tqdm(
        desc="encoding stickers", total=total, unit="file", disable=not (total and sys.stderr.isatty())
    ) as bar:
        while missing:
            with claim(place, missing, seen) as mine:
                bar.update(total - len(missing) - bar.n)  # what the others have done meanwhile
                clips = load_clips([missing[digest] for digest in mine], resolution, num_workers)
                if mine:
                    with closing(clips):  # no decoding process stays when the encoder or the disk fails
                        write_shard(place, mine, (clip for clip in clips if bar.update() or True), codec)
            if not mine:
                time.sleep(0.2)  # until the others are done, or dead
            forget_cached(missing, place, seen)
    dataset = LatentDataset(place, stickers, digests)
    if not dataset.clips:
        raise DataError("none of the stickers can be used: `python data.py FOLDER` says why for each file.")
    return dataset
