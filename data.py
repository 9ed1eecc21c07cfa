"""
A folder of stickers -> the key frames of each -> latents on disk -> batches.

    python data.py stickers/                        what would be used, what is dropped and why
    python data.py stickers/ --preview sheet.png    the same, and a picture of lengths and key frames
    python data.py stickers/ --encode --resolution 128
                                                    the latents that train.py would encode at its start
"""

import hashlib
import os
from contextlib import closing
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import masks
from masks import LENGTHS, NUM_FRAMES, TASKS
from support import cache, decode, media, pictures
from support.common import UserError, default_cache, evenly, one_sentence, printable
from support.encoders import PretrainedVAE
from support.flags import Parser, number, work_flags
from support.folder import DataError, print_summary, scan_folder
from support.machine import device
from support.workers import in_processes

THUMBNAIL = 32  # pixels, width and height of what key frames are chosen by
HASH_PROBABILITY = 0.2  # of a word to become "#"; the paper gives none, this is the released code's
NUM_TIMESTEPS = 1000  # diffusion steps (Table 6)
LEAST_SIDE = 8  # pixels of --resolution: the smallest that a VAE encodes

# ------------------------------------------------------------------------------------------------------------
# Key frames ("Clustering-based frame extraction")


def thumbnails(frames):
    """frames uint8 (N, R, R, 3) -> uint8 (N, 32 * 32 * 3), one feature vector per frame"""
    size, box = (THUMBNAIL, THUMBNAIL), Image.Resampling.BOX
    small = [np.asarray(Image.fromarray(f).resize(size, box, reducing_gap=1.0)) for f in frames]
    return np.stack(small).reshape(len(frames), -1)


def assign(distances):
    """distances (N, k) -> nearest centroid of each frame (N,). An empty cluster takes the farthest frame."""
    nearest, assignment = distances.min(dim=1)
    for cluster in set(range(distances.shape[1])) - set(assignment.tolist()):
        alone = assignment.bincount()[assignment] == 1
        farthest = nearest.masked_fill(alone, -1).argmax()
        assignment[farthest], nearest[farthest] = cluster, 0
    return assignment


def kmeans(x, k, rng, restarts=6, iterations=50):
    """Lloyd's k-means, the best of some k-means++ starts.

    x: float64 (N, D), at least k distinct rows
    Returns (assignment (N,), distances (N, k) to the means of the clusters).
    """
    runs, pairwise = [], torch.cdist(x, x).square()
    for _ in range(restarts):
        starts = [rng.integers(len(x))]
        while len(starts) < k:  # greedy: of three frames drawn by squared distance the one that leaves least
            nearest = pairwise[starts].amin(dim=0)  # (N,)
            drawn = rng.choice(len(x), size=3, p=(nearest / nearest.sum()).numpy())
            left = pairwise[drawn].minimum(nearest).sum(dim=1)  # (3,)
            starts.append(drawn[left.argmin()])
        distances, assignment = torch.cdist(x, x[starts]), None  # (N, k)
        for _ in range(iterations):
            before, assignment = assignment, assign(distances)
            if before is not None and before.equal(assignment):
                break
            members = F.one_hot(assignment, k).T.to(x)  # (k, N)
            distances = torch.cdist(x, members @ x / members.sum(dim=1, keepdim=True))
        inertia = distances.gather(1, assignment[:, None]).square().sum()
        runs.append((inertia, assignment, distances))
    return min(runs, key=lambda run: run[0])[1:]


def extract_key_frames(features, lengths=LENGTHS, seed=0):
    """Clustering-based frame extraction for every k that the clip allows.

    features: (N, D), one vector per frame
    lengths: values of k, ascending
    Returns {k: int array (k,)}: for each k of `lengths` up to the number of distinct frames the frame nearest
    to the centroid of each of k clusters, in the order of time. Empty where no k is that small.
    """
    distinct = len({feature.tobytes() for feature in features})
    x = torch.from_numpy(features).double()
    x = x - x.mean(dim=0)
    x = torch.linalg.qr(x.T, mode="r").R.T  # the same distances in at most N dimensions, which is faster
    key_frames = {}
    for k in lengths:
        if k > distinct:
            break
        assignment, distances = kmeans(x, k, np.random.default_rng((seed, k)))
        distances = distances.round(decimals=3)  # of equally near frames the first, whatever the rounding
        distances[assignment[:, None] != torch.arange(k)] = torch.inf
        key_frames[k] = np.sort(distances.argmin(dim=0).numpy())
    return key_frames


def equal_frames(count):
    """Indices of NUM_FRAMES equally spaced frames of `count` (the ablation without dual masks)."""
    return np.linspace(0, count - 1, NUM_FRAMES).round().astype(int)


# ------------------------------------------------------------------------------------------------------------
# One sticker


class Clip(NamedTuple):
    """The frames of one sticker that training can ask for."""

    pixels: np.ndarray  # uint8 (M, R, R, 3), M <= 41
    key_frames: dict  # {k: indices into `pixels`}
    equal: np.ndarray  # 8 indices into `pixels`, or None for a clip of fewer than 8 frames
    count: int  # frames in the file


def load_clip(sticker, resolution):
    """Decodes one sticker. Returns a Clip, or the reason (str) for dropping it, without the file's name: the
    cache knows it by its contents. Whatever it holds, only errors for lack of memory are raised."""
    try:
        frames, _ = media.read_clip(sticker.path, resolution)
    except media.MediaError as error:
        return str(error).removeprefix(f"{printable(sticker.path)} ")
    key_frames = extract_key_frames(thumbnails(frames))
    if not key_frames:
        return f"fewer than {LENGTHS[0]} distinct frames (it has {len(frames)} in all)"
    equal = equal_frames(len(frames)) if len(frames) >= NUM_FRAMES else None
    kept = np.unique(np.concatenate([*key_frames.values(), *([] if equal is None else [equal])]))  # (M,)
    key_frames = {k: np.searchsorted(kept, indices) for k, indices in key_frames.items()}
    equal = None if equal is None else np.searchsorted(kept, equal)
    return Clip(frames[kept], key_frames, equal, len(frames))


def load_clips(stickers, resolution, num_workers):
    """Yields load_clip for each sticker, in order, from `num_workers` processes (0: this one). A file that
    ends its process, or takes too much time or memory, is dropped alone: see workers.in_processes."""
    return in_processes(partial(load_clip, resolution=resolution), stickers, num_workers)


# ------------------------------------------------------------------------------------------------------------
# Latents on disk, and which of them stand for which k


class CachedClip(NamedTuple):
    """One clip of the cache."""

    name: str
    caption: str
    split: str  # "train" or "validation"
    shard: Path  # the file of its latents
    start: int  # where they begin in it
    # int8 (7, 8): which of them are its key frames for k = 3..8, and its equally spaced frames; -1 = none
    table: np.ndarray

    @property
    def longest(self):
        """The largest k that the clip allows."""
        return int((self.table[:-1, 0] >= 0).sum()) + LENGTHS[0] - 1

    @property
    def has_equal(self):
        """Whether it has 8 equally spaced frames."""
        return self.table[-1, 0] >= 0


def frame_table(clip):
    """`CachedClip.table` of a Clip."""
    table = np.full((len(LENGTHS) + 1, NUM_FRAMES), -1, np.int8)
    for k, frames in clip.key_frames.items():
        table[LENGTHS.index(k), :k] = frames
    if clip.equal is not None:
        table[-1] = clip.equal
    return table


def encode_clips(stickers, codec, resolution, num_workers):
    """Yields for each sticker latents float16 (M, C, h, w) and frame_table, or why it is dropped (str)."""
    # closing: no decoding process stays when the codec fails
    with closing(load_clips(stickers, resolution, num_workers)) as clips:
        for clip in clips:
            if isinstance(clip, Clip):
                yield codec.encode(torch.from_numpy(clip.pixels)).half().cpu(), frame_table(clip)
            else:
                yield clip


class LatentDataset:
    """The clips of one folder with their latents, which lie in the cache folder `folder`.

    clips: list of CachedClip, in the order of the stickers; the copies of a held-out file are held out, too
    identity: changes with any file of the folder, the codec or the resolution
    dropped: [(name, reason)]
    """

    def __init__(self, folder, stickers, digests):
        self.folder, self.clips, self.dropped = folder, [], []
        names = [f"{sticker.name!r} {digest}" for sticker, digest in zip(stickers, digests)]
        self.identity = hashlib.sha256("\n".join([folder.name, *names]).encode()).hexdigest()[:20]
        entries = cache.read_entries(folder)
        held_out = {digest for sticker, digest in zip(stickers, digests) if sticker.split == "validation"}
        for sticker, digest in zip(stickers, digests):
            entry, split = entries.get(digest), "validation" if digest in held_out else sticker.split
            if isinstance(entry, str):
                self.dropped.append((sticker.name, entry))
            else:
                self.clips.append(CachedClip(sticker.name, sticker.caption, split, *entry))
        self.latents = {}  # shard -> its latents, mapped when first read

    def split(self, name):
        """The clips of "train" or "validation"."""
        return [clip for clip in self.clips if clip.split == name]

    def read(self, clip, k=None):
        """The k key frames of a clip, or with k None its equally spaced ones: float32 (k | 8, C, h, w)."""
        if clip.shard not in self.latents:
            self.latents[clip.shard] = cache.map_latents(clip.shard)
        frames = clip.table[-1] if k is None else clip.table[LENGTHS.index(k), :k]
        return self.latents[clip.shard][clip.start + frames.astype(int)].float().numpy()


def open_dataset(folder, stickers, codec, resolution, cache_dir, num_workers=0):
    """The LatentDataset of the stickers of `folder` under this codec; what is missing is encoded first,
    shared with whatever other processes do the same. Captions and splits are those of `stickers`: they may
    change without making a latent stale. Raises DataError if no file is usable."""
    key = hashlib.sha256(f"{cache.CACHE_VERSION} {codec.identity} {resolution}".encode()).hexdigest()
    latents = Path(cache_dir) / f"latents-{key[:20]}"
    digests = cache.digest_files(folder, stickers, cache_dir)
    encode = partial(encode_clips, codec=codec, resolution=resolution, num_workers=num_workers)
    cache.fill(latents, dict(zip(digests, stickers)), encode)
    dataset = LatentDataset(latents, stickers, digests)
    if not dataset.clips:
        raise DataError("none of the stickers can be used: `python data.py FOLDER` says why for each file.")
    return dataset


# ------------------------------------------------------------------------------------------------------------
# Batches: everything random is drawn for (seed, step, index of the sample in the global batch)


class Batch(NamedTuple):
    latents: torch.Tensor  # float32 (B, F, C, h, w) clean frames, zeros in the slots beyond k
    noise: torch.Tensor  # float32 (B, F, C, h, w)
    timesteps: torch.Tensor  # int64 (B,)
    given: torch.Tensor  # bool (B, F) condition mask
    valid: torch.Tensor  # bool (B, F) loss mask
    captions: list  # B strings, empty where the text is hidden
    tasks: list  # B names
    lengths: list  # B numbers of frames, k


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    """The order in which an epoch shows `count` clips."""
    return np.random.default_rng((seed, epoch, count)).permutation(count)


def usable(clips, ddu):
    """Those of `clips` that a training can draw from: without loss mask, of at least 8 frames."""
    return [clip for clip in clips if ddu in masks.LOSS_MASK_ON or clip.has_equal]


def hash_words(caption, rng):
    """Replaces each word by "#" with HASH_PROBABILITY."""
    return " ".join("#" if rng.random() < HASH_PROBABILITY else word for word in caption.split())


def draw_timestep(seed, step, index, global_batch):
    """A uniform timestep. Those of a batch are spread evenly (Kingma et al. 2021): what a step draws of them
    is most of the noise of its loss, which the curriculum reads."""
    # A key that no sample has. (seed, step) would be that of sample 0: numpy fills a short key up with zeros.
    shift = np.random.default_rng((seed, step, global_batch)).random()
    return int(NUM_TIMESTEPS * ((index / global_batch + shift) % 1))


def draw_sample(dataset, clips, probabilities, seed, step, index, global_batch, ddu):
    """One training sample: the fields of Batch for sample `index` of the global batch of `step`.

    probabilities: (3, 6), P(task, k) of the curriculum (Algorithm 1)
    ddu: which of the dual masks are in use, "on", "condition", "loss" or "off" (Table 3). Without condition
        masks the first frame and the caption are given, without loss mask 8 equally spaced frames are shown
    """
    position = step * global_batch + index
    clip = clips[epoch_order(seed, position // len(clips), len(clips))[position % len(clips)]]
    rng = np.random.default_rng((seed, step, index))

    level = rng.choice(probabilities.size, p=probabilities.flatten())
    task, k = TASKS[level // len(LENGTHS)], LENGTHS[level % len(LENGTHS)]
    if ddu in masks.LOSS_MASK_ON:
        k = min(k, clip.longest)  # a clip of few distinct frames: k shrinks first, then the row is drawn
        frames = dataset.read(clip, k)
    else:
        k, frames = NUM_FRAMES, dataset.read(clip)
    row = masks.draw_row(task, k, rng) if ddu in masks.CONDITION_MASK_ON else masks.FIRST_FRAME

    keep_text, keep_image = masks.draw_dropout(rng)
    caption = hash_words(clip.caption, rng) if row.text and keep_text else ""
    given = masks.condition_mask(row, k) & keep_image
    latents = np.zeros((NUM_FRAMES, *frames.shape[1:]), np.float32)
    latents[:k] = frames
    noise = rng.standard_normal(latents.shape, dtype=np.float32)
    timestep = draw_timestep(seed, step, index, global_batch)
    return latents, noise, timestep, given, masks.loss_mask(k), caption, row.task, k


def draw_batch(dataset, clips, probabilities, seed, step, indices, global_batch, ddu="on"):
    """The Batch of the samples `indices` of the global batch of `global_batch` samples at `step`, in the
    CPU's memory. It has as many slots, F, as its longest clip has frames: a batch of one has no filler."""
    samples = [draw_sample(dataset, clips, probabilities, seed, step, i, global_batch, ddu) for i in indices]
    latents, noise, timesteps, given, valid, captions, tasks, lengths = zip(*samples)
    by_slot = latents, noise, given, valid
    latents, noise, given, valid = ([x[: max(lengths)] for x in part] for part in by_slot)
    tensors = (torch.from_numpy(np.stack(x)) for x in (latents, noise, timesteps, given, valid))
    return Batch(*tensors, list(captions), list(tasks), list(lengths))


# ------------------------------------------------------------------------------------------------------------
# What the preconditioning of small models learns from the stickers


def fit_prior(prior, dataset, clips, encoders, ddu, most_clips=1024):
    """Fits a GaussianPrior to latents, as draw_sample shows them, and captions of a selection of `clips`."""
    chosen = evenly(clips, most_clips)
    latents, texts = {}, {}
    for k in LENGTHS:
        having = [clip for clip in chosen if clip.longest >= k]
        some = having or chosen[:1]  # where no clip allows k, one lends its shapes and is cut away again
        shown = None if k == NUM_FRAMES and ddu not in masks.LOSS_MASK_ON else k  # None: equally spaced
        latents[k] = torch.from_numpy(np.stack([dataset.read(clip, shown) for clip in some]))[: len(having)]
        texts[k] = [x[: len(having)] for x in encoders.text([clip.caption for clip in some])]
    prior.fit(latents, texts, encoders.text([""]))


# ------------------------------------------------------------------------------------------------------------
# The command: what is in a folder


def parse_args():
    parser = Parser(description="Say what of a folder of stickers is used, and encode it.")
    add, side = parser.add_argument, number(int, LEAST_SIDE, decode.MAX_SIDE)
    add("folder", help="folder of stickers")
    add("--preview", metavar="FILE.png", help="write a histogram of lengths and a sheet of key frames")
    add("--encode", action="store_true", help="encode every key frame into the latent cache of train.py")
    add("--vae", metavar="DIR_OR_ID", help="VAE that encodes (default: the sticker VAE that ships)")
    add("--resolution", type=side, help="in pixels; with --encode the training's (default: 256, else 96)")
    work_flags(add, os.cpu_count() or 1)
    args = parser.parse_args()
    args.resolution = args.resolution or (256 if args.encode else 96)
    if args.preview:
        pictures.check_png("--preview", args.preview)
    return args


def inspect(args, stickers):
    """Decodes the stickers, says what is used and what is dropped, and draws the preview."""
    used, dropped, counts, shown = [], [], [], []
    clips = load_clips(stickers, args.resolution, args.num_workers)
    clips = tqdm(clips, "reading stickers", len(stickers), unit="file", disable=None)
    for sticker, clip in zip(stickers, clips):
        if isinstance(clip, str):
            dropped.append((sticker.name, clip))
            continue
        if len(used) % max(1, len(stickers) // 24) == 0:  # the first one, and some two dozen more
            key_frames = clip.pixels[clip.key_frames[max(clip.key_frames)]]
            shown.append((key_frames, sticker.caption or printable(sticker.name)))
        used.append(sticker)
        counts.append(clip.count)
    print_summary(args.folder, used, counts, dropped)
    if args.preview:
        pictures.save_png(pictures.preview(*zip(*shown), counts), args.preview)
        print(f"wrote {printable(args.preview)}")


@one_sentence("data.py")
def main():
    args = parse_args()
    stickers, notes = scan_folder(args.folder)
    print("".join(f"note: {note}\n" for note in notes), end="")
    if args.preview or not args.encode:
        inspect(args, stickers)
    if args.encode:
        codec = PretrainedVAE(args.vae, device())
        if args.resolution % codec.factor:
            raise UserError(f"--resolution {args.resolution}: must be a multiple of {codec.factor}.")
        cache_dir = args.cache_dir or default_cache()
        dataset = open_dataset(args.folder, stickers, codec, args.resolution, cache_dir, args.num_workers)
        where, dropped = printable(dataset.folder), len(dataset.dropped)
        print(f"{len(dataset.clips)} clips are in {where}, {dropped} dropped")


if __name__ == "__main__":
    main()
