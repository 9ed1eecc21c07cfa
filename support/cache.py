"""
The latent cache: what was encoded once, memory-mapped afterwards. It knows nothing of what it keeps: for each
file some rows of latents, and a small table that says which row is what.

    cache_dir/latents-KEY/              KEY: all that latents depend on beside the file
        0a1b2c....safetensors           a shard: the rows and tables of at most SHARD_CLIPS files
        0a1b2c....lock                  empty; locked by the process that is at work on the shard
    cache_dir/digests-FOLDER.json       contents of the files of a folder, not to read all at every start

Files are known by their contents: a renamed or touched one costs nothing, a changed one is encoded again. Any
number of processes build a cache together: each takes the next shard that nobody is at work on. A lock ends
with its process, so nobody waits for the dead, and a build that was interrupted loses one shard at most.
On a disk without locks a shard may be encoded more than once, with the same result. A cache that holds all
that a run needs may be read-only.
"""

import hashlib
import json
import os
from contextlib import closing, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from support.common import locked, replacing

CACHE_VERSION = 7  # raise it when decoding, resizing, key frames or the layout of the cache change
SHARD_CLIPS = 256  # what an interruption can lose


# ------------------------------------------------------------------------------------------------------------
# Which files


def digest_files(folder, stickers, cache_dir):
    """sha256 of every file, in the order of `stickers`. A file whose size and time of change are those of the
    last call is not read again."""
    key = hashlib.sha256(os.fsencode(Path(folder).resolve())).hexdigest()[:16]
    path = Path(cache_dir) / f"digests-{key}.json"
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    now = {}
    for sticker in tqdm(stickers, "looking at files", unit="file", delay=2, disable=None):
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
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError), replacing(path) as temporary:  # a cache with all latents may be read-only
            temporary.write_text(json.dumps(now))
    return [now[sticker.name][-1] for sticker in stickers]


# ------------------------------------------------------------------------------------------------------------
# Reading


def read_shard(path):
    """The index of one shard: {digest: (path, first row, table), or the reason (str) for having no latents}.

    None where the shard is missing or damaged: its files are encoded again."""
    try:
        with safe_open(path, "numpy") as file:
            index = {name: json.loads(text) for name, text in file.metadata().items()}
            starts, tables = file.get_tensor("starts").tolist(), file.get_tensor("tables")
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
    entries = {digest: (path, *entry) for digest, *entry in zip(index["encoded"], starts, tables)}
    return index["dropped"] | entries


def read_entries(folder):
    """The indices of all shards of a folder in one."""
    entries = {}
    for path in sorted(folder.glob("*.safetensors")):
        entries.update(read_shard(path) or {})
    return entries


def map_latents(path):
    """The latents of a shard, float16 (rows, C, h, w), memory-mapped: only what is looked at is read."""
    with safe_open(path, "pt") as file:
        return file.get_tensor("latents")


# ------------------------------------------------------------------------------------------------------------
# Building


def fill(folder, items, encode):
    """Encodes those of `items`, a dict {digest: anything}, that the cache folder lacks, shared with whatever
    other processes do the same.

    encode: generator function; of a list of items it yields for each the latents, float16 (rows, C, h, w),
        and a table, an int array whose shape is the same for all, or the reason (str) why there are none
    """
    cached = read_entries(folder)
    missing = [digest for digest in items if digest not in cached]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    shards = [missing[i : i + SHARD_CLIPS] for i in range(0, len(missing), SHARD_CLIPS)]
    with tqdm(desc="encoding stickers", total=len(missing), unit="file", disable=None) as bar:
        # First what nobody is at work on, then what others are at: we wait for them, and they may die.
        for wait in (False, True):
            for digests in shards.copy():
                name = hashlib.sha256("".join(digests).encode()).hexdigest()[:20]
                path = folder / f"{name}.safetensors"
                with locked(path.with_suffix(".lock"), wait) as alone:
                    if alone is False:
                        continue
                    for leftover in folder.glob(f".{path.name}.*.tmp") if alone else ():  # of who was killed
                        leftover.unlink()
                    if read_shard(path) is None:
                        with closing(encode([items[digest] for digest in digests])) as results:
                            write_shard(path, digests, results)
                    shards.remove(digests)
                    bar.update(len(digests))


def write_shard(path, digests, results):
    """Writes what `encode` of `fill` yields for the files of these digests."""
    encoded, latents, tables, dropped = [], [], [], {}
    for digest, result in zip(digests, results):
        if isinstance(result, str):
            dropped[digest] = result
        else:
            encoded.append(digest)
            latents.append(result[0])
            tables.append(torch.from_numpy(result[1]))
    nothing = [torch.empty(0)]  # where all files were dropped
    arrays = {
        "starts": torch.tensor([0, *map(len, latents)]).cumsum(0),
        "tables": torch.stack(tables or nothing),
        "latents": torch.cat(latents or nothing).contiguous(),
    }
    index = {"encoded": json.dumps(encoded), "dropped": json.dumps(dropped)}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(save(arrays, index))
        file.flush()
        os.fsync(file.fileno())
