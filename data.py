"""
A folder of stickers -> latents on disk -> batches.

    python data.py stickers/                          what would be used, what is dropped and why
    python data.py stickers/ --preview sheet.png      the same, with a histogram of lengths and a sheet
                                                      of key frames
    python data.py stickers/ --encode --vae DIR_OR_ID --resolution 256
                                                      encode every key frame into the latent cache, which
                                                      train.py reads (it would encode what is missing itself)

A batch is clips, tasks, k, rows, dropout, "#", timesteps and noise, drawn for (seed, step, index of the sample).
"""

import argparse
import errno
import os
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import masks
import media
from cache import default_cache, open_dataset
from curriculum import LENGTHS, TASKS
from encoders import EncoderError, PretrainedVAE
from folder import Clip, DataError, load_clips, scan_folder
from masks import NUM_FRAMES

HASH_PROBABILITY = 0.2  # that a word of a caption becomes "#" (section 3.2; the value is the released code's)
NUM_TIMESTEPS = 1000  # diffusion steps (Table 6)
LEAST_SIDE = 8  # pixels of --resolution: the smallest that a VAE encodes

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
        k = min(k, clip.longest)  # a clip of few distinct frames: k shrinks first, then the row is drawn
        row = masks.draw_row(task, k, rng)
        frames = dataset.read(clip, k)
    else:
        k, row = NUM_FRAMES, masks.TEXT_ONLY
        frames = dataset.read(clip)

    keep_text, keep_image = masks.draw_dropout(rng)
    caption = hash_words(clip.caption, rng) if row.text and keep_text else ""
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


def fit_codec(codec, stickers, resolution, num_workers, most_clips=384, frames_per_clip=4):
    """Fits a codec that learns from the stickers (PatchPCA) to an even selection of the training files."""
    train = [sticker for sticker in stickers if sticker.split == "train"]
    chosen = (
        [train[i] for i in np.unique(np.linspace(0, len(train) - 1, most_clips).astype(int))] if train else []
    )
    loaded = tqdm(load_clips(chosen, resolution, num_workers), "fitting the codec", len(chosen), unit="file",
                  disable=not sys.stderr.isatty())  # fmt: skip
    clips = [clip for clip in loaded if isinstance(clip, Clip)]
    if not clips:
        raise DataError("none of the stickers can be used: `python data.py FOLDER` says why for each file.")
    frames = [
        clip.pixels[np.linspace(0, len(clip.pixels) - 1, frames_per_clip).astype(int)] for clip in clips
    ]
    codec.fit(torch.from_numpy(np.concatenate(frames)))


def fit_prior(prior, dataset, clips, encoders, most_clips=1024):
    """Fits a GaussianPrior to the latents and captions of an even selection of `clips`."""
    chosen = [clips[i] for i in np.unique(np.linspace(0, len(clips) - 1, most_clips).astype(int))]
    latents, texts = {}, {}
    for k in LENGTHS:
        having = [clip for clip in chosen if clip.longest >= k] or chosen[:1]
        n = len(having) if having[0].longest >= k else 0
        latents[k] = torch.from_numpy(np.stack([dataset.read(clip, k) for clip in having]))[:n]
        texts[k] = [x[:n] for x in encoders.text([clip.caption for clip in having])]
    prior.fit(latents, texts, encoders.text([""]))


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


def parse_args():
    parser = argparse.ArgumentParser(description="Say what of a folder of stickers is used, and encode it.")
    # fmt: off
    add = parser.add_argument
    add("folder", help="folder of stickers")
    add("--preview", metavar="FILE.png", help="write a histogram of lengths and a sheet of key frames")
    add("--encode", action="store_true", help="encode every key frame into the latent cache that train.py reads")
    add("--vae", metavar="DIR_OR_ID", help="the VAE to encode with: a folder or a hub id")
    add("--resolution", type=int, help="side of the frames in pixels (default: 256 with --encode, else 96)")
    add("--cache_dir", help=f"where latents are kept (default: {default_cache()})")
    add("--num_workers", type=int, default=os.cpu_count() or 1, help="decoding processes, 0 = this one alone")
    # fmt: on
    args = parser.parse_args()
    if args.resolution is None:
        args.resolution = 256 if args.encode else 96
    if not LEAST_SIDE <= args.resolution <= media.MAX_SIDE:
        parser.error(f"--resolution {args.resolution}: must be {LEAST_SIDE} to {media.MAX_SIDE} pixels.")
    if args.num_workers < 0:
        parser.error(f"--num_workers {args.num_workers}: must not be negative.")
    if args.encode and not args.vae:
        parser.error(
            "--encode needs --vae: the built-in codec is fitted, and its latents encoded, by train.py."
        )
    if args.preview:
        shown, place = media.printable(args.preview), Path(args.preview).parent
        if not args.preview.lower().endswith(".png"):
            parser.error(f"--preview {shown}: the sheet is a PNG, give it a name that ends in .png.")
        if not os.access(place, os.W_OK | os.X_OK) or not place.is_dir():
            parser.error(f"--preview {shown}: its folder cannot be written to, make it or choose another.")
    return args


def encode(args):
    """Fills the latent cache of a folder. Returns a LatentDataset."""
    stickers, _ = scan_folder(args.folder)
    codec = PretrainedVAE(args.vae, "cuda" if torch.cuda.is_available() else "cpu")
    if args.resolution % codec.factor:
        raise DataError(f"--resolution {args.resolution}: must be a multiple of the VAE's {codec.factor}.")
    dataset = open_dataset(args.folder, stickers, codec, args.resolution, args.cache_dir or default_cache(),
                           args.num_workers)  # fmt: skip
    source, place = map(media.printable, (args.folder, dataset.folder))
    print(f"{len(dataset.clips)} clips of {source} are in {place}")
    return dataset


def inspect(args):
    """Decodes a folder, says what is used and what is dropped, and draws the preview."""
    stickers, problems = scan_folder(args.folder)
    used, shown, counts = [], [], []
    clips = tqdm(load_clips(stickers, args.resolution, args.num_workers), "reading stickers", len(stickers),
                 unit="file", disable=not sys.stderr.isatty())  # fmt: skip
    for sticker, clip in zip(stickers, clips):
        if isinstance(clip, Clip):
            used.append(sticker)
            counts.append(clip.count)
            if (len(used) - 1) % max(1, len(stickers) // 24) == 0:  # the first one, and some two dozen more
                shown.append((clip, sticker.caption or media.printable(sticker.name)))
        else:
            problems.append((sticker.name, clip))

    for name, reason in problems:
        print(f"dropped {media.printable(name)}: {reason}")
    print(f"{media.printable(args.folder)}: {len(used)} stickers used, {len(problems)} dropped, "
          f"{sum(s.split == 'validation' for s in used)} of the used held out for validation, "
          f"{sum(not s.caption for s in used)} without a caption")  # fmt: skip
    if not used:
        raise DataError(f"{media.printable(args.folder)} holds no usable sticker: the reasons are above.")
    print("frames per clip: " + ", ".join(f"{c} x {n}" for n, c in sorted(Counter(counts).items())[:40]))
    if args.preview:
        preview(*zip(*shown), counts).save(args.preview)
        print(f"wrote {media.printable(args.preview)}")


def main():
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack letters of a name
    try:
        args = parse_args()
        if args.preview or not args.encode:
            inspect(args)
        if args.encode:
            encode(args)
    except (DataError, media.MediaError, EncoderError) as error:
        message = error
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        name = media.printable(error.filename or "a file")
        message = f"{name} cannot be used ({error.strerror}): make room or choose another place."
    else:
        return
    print(f"data.py: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
