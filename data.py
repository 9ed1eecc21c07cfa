"""
A folder of stickers -> captions, key frames, cached latents, batches.

    python data.py stickers/                          what would be used, what is dropped and why
    python data.py stickers/ --preview sheet.png      the same, with a histogram of lengths and a sheet
                                                      of key frames

    sticker folder    captions from metadata.jsonl / metadata.csv, or NAME.txt beside NAME.gif
    key frames        clustering-based frame extraction (section 4.2, Figure 3), for every k in 3..8
    latent cache      every frame that training can ask for, encoded once, memory-mapped
    batches           clip, task, k, row, dropout, "#", timestep and noise,
                      drawn for (seed, step, index of the sample)
"""

import argparse
import csv
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import masks
import media
from curriculum import LENGTHS, TASKS
from keyframes import equal_frames, extract_key_frames, thumbnails
from masks import NUM_FRAMES

HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 500  # of a user's folder, for validation
HASH_PROBABILITY = 0.2  # that a word of a caption becomes "#" (section 3.2; the value is the released code's)
NUM_TIMESTEPS = 1000  # diffusion steps (Table 6)
MIN_FRAMES = LENGTHS[0]  # distinct frames that a clip needs
CACHE_VERSION = 1  # raise it when key frames or the layout of the cache change

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


def load_clips(stickers, resolution, num_workers, description):
    """Yields load_clip for each sticker, in order, from `num_workers` processes (0 = this one),
    with a progress bar."""
    load = partial(load_clip, resolution=resolution)
    bar = partial(tqdm, total=len(stickers), desc=description, unit="file", disable=not sys.stderr.isatty())
    if num_workers == 0:
        yield from bar(map(load, stickers))
        return
    with ProcessPoolExecutor(num_workers) as pool:
        yield from bar(pool.map(load, stickers, chunksize=4))


# ------------------------------------------------------------------------------------------------------------
# The latent cache


class LatentDataset:
    """Latents of all frames that training can ask for, memory-mapped from disk.

    clips: list of dicts with name, caption, split, count, start (first row), key_frames {k: rows},
        equal (rows or None)
    latents: float16 (rows, C, h, w)
    """

    def __init__(self, folder, stickers):
        index = json.loads((folder / "index.json").read_text())
        self.folder, self.dropped = folder, index["dropped"]
        self.latents = np.load(folder / "latents.npy", mmap_mode="r")
        by_name = {sticker.name: sticker for sticker in stickers}
        # Captions and splits are read afresh each time: they may change without making a latent stale.
        self.clips = [
            dict(
                clip,
                caption=by_name[clip["name"]].caption,
                split=by_name[clip["name"]].split,
                key_frames={int(k): np.array(rows) for k, rows in clip["key_frames"].items()},
            )
            for clip in index["clips"]
        ]

    def split(self, name, ddu=True):
        """The clips of "train" or "validation".
        Without dual masks (`ddu`) clips of fewer than 8 frames are dropped."""
        return [clip for clip in self.clips if clip["split"] == name and (ddu or clip["equal"] is not None)]

    def read(self, clip, k=None):
        """The k key frames of a clip, or with k None its equally spaced ones:
        latents float32 (k | 8, C, h, w)."""
        rows = np.asarray(clip["equal"] if k is None else clip["key_frames"][k])
        return np.asarray(self.latents[clip["start"] + rows], dtype=np.float32)


def default_cache():
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rdtf"


def file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fit_codec(codec, stickers, resolution, num_workers, most_clips=384, frames_per_clip=4):
    """Fits a codec that learns from the stickers (PatchPCA) to an even selection of the training files."""
    train = [sticker for sticker in stickers if sticker.split == "train"]
    chosen = (
        [train[i] for i in np.unique(np.linspace(0, len(train) - 1, most_clips).astype(int))] if train else []
    )
    clips = [
        clip
        for clip in load_clips(chosen, resolution, num_workers, "fitting the codec")
        if isinstance(clip, Clip)
    ]
    if not clips:
        raise DataError("none of the stickers can be used: `python data.py FOLDER` says why for each file.")
    frames = [
        clip.pixels[np.linspace(0, len(clip.pixels) - 1, frames_per_clip).astype(int)] for clip in clips
    ]
    codec.fit(torch.from_numpy(np.concatenate(frames)))


def build_cache(folder, stickers, codec, resolution, num_workers):
    """Decodes and encodes every sticker into `folder`: latents.npy and index.json.
    Written under a temporary name."""
    building = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    building.mkdir(parents=True)
    try:
        clips, dropped, rows = [], [], 0
        raw_path = building / "latents.raw"  # the number of rows is known only at the end
        with open(raw_path, "wb") as raw:
            loaded = load_clips(stickers, resolution, num_workers, "encoding stickers")
            for sticker, clip in zip(stickers, loaded):
                if not isinstance(clip, Clip):
                    dropped.append((sticker.name, clip))
                    continue
                latents = codec.encode(torch.from_numpy(clip.pixels)).cpu().numpy().astype(np.float16)
                raw.write(latents.tobytes())
                key_frames = {k: places.tolist() for k, places in clip.key_frames.items()}
                equal = None if clip.equal is None else clip.equal.tolist()
                clips.append(
                    dict(name=sticker.name, count=clip.count, start=rows, key_frames=key_frames, equal=equal)
                )
                rows += len(latents)
        if not clips:
            raise DataError(
                "none of the stickers can be used: `python data.py FOLDER` says why for each file."
            )
        out = np.lib.format.open_memmap(
            building / "latents.npy", mode="w+", dtype=np.float16, shape=(rows, *latents.shape[1:])
        )
        out[:] = np.memmap(raw_path, dtype=np.float16, mode="r", shape=out.shape)
        out.flush()
        raw_path.unlink()
        (building / "index.json").write_text(json.dumps(dict(clips=clips, dropped=dropped)))
        os.rename(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def open_dataset(stickers, codec, resolution, cache_dir, num_workers=0):
    """The latent cache of these stickers under this codec, built if it is missing. The key is made of the
    names and the contents of the files, the codec and the resolution, so a stale cache is never read. Raises
    DataError if no file is usable."""
    key = hashlib.sha256(f"{CACHE_VERSION} {codec.identity} {resolution}".encode())
    for sticker in stickers:
        key.update(f"{sticker.name!r} {file_digest(sticker.path)}".encode())
    folder = Path(cache_dir) / f"latents-{key.hexdigest()[:20]}"
    if not folder.exists():
        build_cache(folder, stickers, codec, resolution, num_workers)
    return LatentDataset(folder, stickers)


# ------------------------------------------------------------------------------------------------------------
# Batches: everything random is drawn for (seed, step, index of the sample in the global batch)


class Batch(NamedTuple):
    latents: torch.Tensor  # float32 (B, 8, C, h, w) clean frames, zeros in the slots beyond k
    noise: torch.Tensor  # float32 (B, 8, C, h, w)
    timesteps: torch.Tensor  # int64 (B,)
    given: torch.Tensor  # bool (B, 8) condition mask
    valid: torch.Tensor  # bool (B, 8) loss mask
    captions: list  # B strings, empty where the text is hidden
    tasks: list  # B names
    lengths: list  # B numbers of frames, k


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    return np.random.default_rng((seed, epoch, count)).permutation(count)


def hash_words(caption, rng):
    """Replaces each word by "#" with HASH_PROBABILITY (section 3.2)."""
    return " ".join("#" if rng.random() < HASH_PROBABILITY else word for word in caption.split())


def draw_sample(dataset, clips, probabilities, seed, step, index, global_batch, ddu):
    """One training sample: the fields of Batch for sample `index` of the global batch of `step`.

    probabilities: (3, 6), P(task, k) of the curriculum (Algorithm 1); ignored without dual masks
    """
    position = step * global_batch + index
    clip = clips[epoch_order(seed, position // len(clips), len(clips))[position % len(clips)]]
    rng = np.random.default_rng((seed, step, index))

    if ddu:
        level = rng.choice(probabilities.size, p=probabilities.flatten())
        task, k = TASKS[level // len(LENGTHS)], LENGTHS[level % len(LENGTHS)]
        k = min(
            k, max(clip["key_frames"])
        )  # a clip of few distinct frames: k shrinks first, then the row is drawn
        row = masks.draw_row(task, k, rng)
        frames = dataset.read(clip, k)
    else:
        k, row = NUM_FRAMES, masks.TEXT_ONLY
        frames = dataset.read(clip)

    keep_text, keep_image = masks.draw_dropout(rng)
    caption = hash_words(clip["caption"], rng) if row.text and keep_text else ""
    given = masks.condition_mask(row, k) & keep_image
    latents = np.zeros((NUM_FRAMES, *frames.shape[1:]), np.float32)
    latents[:k] = frames
    timestep = rng.integers(NUM_TIMESTEPS)
    noise = rng.standard_normal(latents.shape, dtype=np.float32)
    return latents, noise, timestep, given, masks.loss_mask(k), caption, row.task, k


def draw_batch(dataset, clips, probabilities, seed, step, indices, global_batch, ddu=True):
    """The Batch of the samples `indices` of the global batch of `global_batch` samples at `step`."""
    samples = [draw_sample(dataset, clips, probabilities, seed, step, i, global_batch, ddu) for i in indices]
    latents, noise, timesteps, given, valid, captions, tasks, lengths = zip(*samples)
    tensors = (torch.from_numpy(np.stack(x)) for x in (latents, noise, timesteps, given, valid))
    return Batch(*tensors, list(captions), list(tasks), list(lengths))


# ------------------------------------------------------------------------------------------------------------
# What is in a folder


def preview(clips, captions, counts):
    """A picture of a data set: a histogram of lengths
    above rows of key frames with their captions (PIL.Image)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 2.2), dpi=100)
    axes.hist(counts, bins=np.arange(0.5, max(counts) + 1.5, max(1, max(counts) // 60)), color="#4c72b0")
    axes.set(xlabel="frames in the file", ylabel="clips")
    figure.tight_layout()
    figure.canvas.draw()
    histogram = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    plt.close(figure)

    rows = [clip.pixels[clip.key_frames[max(clip.key_frames)]] for clip in clips]
    sheet = media.sheet(rows, captions)
    picture = Image.new("RGB", (max(sheet.width, histogram.width), sheet.height + histogram.height), "white")
    picture.paste(histogram, (0, 0))
    picture.paste(sheet, (0, histogram.height))
    return picture


def main():
    parser = argparse.ArgumentParser(
        description="Say which stickers of a folder would be used, and why others would not."
    )
    parser.add_argument("folder", help="folder of stickers")
    parser.add_argument(
        "--preview", metavar="FILE.png", help="write a histogram of lengths and a sheet of key frames"
    )
    parser.add_argument(
        "--resolution", type=int, default=96, help="side of the frames in the preview, in pixels"
    )
    parser.add_argument(
        "--num_workers", type=int, default=os.cpu_count() or 1, help="decoding processes, 0 = this one alone"
    )
    args = parser.parse_args()
    try:
        stickers, problems = scan_folder(args.folder)
        if args.preview:
            media.check_suffix(args.preview)
    except ValueError as error:
        parser.exit(2, f"data.py: {error}\n")

    used, shown, counts = [], [], []
    for sticker, clip in zip(
        stickers, load_clips(stickers, args.resolution, args.num_workers, "reading stickers")
    ):
        if isinstance(clip, Clip):
            used.append(sticker)
            counts.append(clip.count)
            if len(used) % max(1, len(stickers) // 24) == 0:
                shown.append((clip, sticker.caption or sticker.name))
        else:
            problems.append((sticker.name, clip))

    for name, reason in problems:
        print(f"dropped {name}: {reason}")
    print(f"{args.folder}: {len(used)} stickers used, {len(problems)} dropped, "
          f"{sum(s.split == 'validation' for s in used)} of the used held out for validation, "
          f"{sum(not s.caption for s in used)} without a caption")  # fmt: skip
    if not used:
        parser.exit(2, f"data.py: {args.folder} holds no usable sticker: the reasons are above.\n")
    print("frames per clip: " + ", ".join(f"{c} x {n}" for n, c in sorted(Counter(counts).items())[:40]))
    if args.preview:
        preview(*zip(*shown), counts).save(args.preview)
        print(f"wrote {args.preview}")


if __name__ == "__main__":
    main()
