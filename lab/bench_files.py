"""
Speed of files: sticker files, the latent cache, checkpoints. bench.py calls these as `data`, `cache` and
`save`.
"""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence

from curriculum import Curriculum
from data import Clip, LatentDataset, draw_batch, extract_key_frames, frame_table, load_clips, thumbnails
from lab.timing import DEVICE, ROOT, row, timed
from masks import LENGTHS
from model import DFGN, SIZES, make_scheduler
from support import cache, media, stickers
from support.checkpoint import find_damage, list_checkpoints, save_checkpoint
from support.encoders import Encoders
from support.folder import Sticker
from support.optim import Average, make_optimizer
from train import Training

# ------------------------------------------------------------------------------------------------------------
# Sticker files

GIF_FRAMES, GIF_SIDE = 24, 240


def draw_gifs(folder, count):
    """`count` GIFs of the built-in kind, as large as real ones: [Path]"""
    files = []
    for i in range(count):
        words = stickers.COMBINATIONS[7 * i % len(stickers.COMBINATIONS)]
        pictures, delays = stickers.draw_clip(*words, np.random.default_rng((0, i)), GIF_FRAMES)
        first, *rest = (p.resize((GIF_SIDE, GIF_SIDE), Image.Resampling.NEAREST) for p in pictures)
        files.append(folder / f"{i}.gif")
        first.save(files[-1], save_all=True, append_images=rest, duration=delays, disposal=2, loop=0)
    return files


def readers(files):
    """{name: function} of what is timed on GIF files, one thread unless the name says otherwise."""
    found = [Sticker(path, path.name, "", "train") for path in files]
    features = [thumbnails(media.read_clip(path, GIF_SIDE)[0]) for path in files]

    def pillow():
        for path in files:
            for frame in ImageSequence.Iterator(Image.open(path)):
                frame.convert("RGBA")

    def read(resolution):
        for path in files:
            media.read_clip(path, resolution)

    def load(workers, laps=1):
        for _ in load_clips(laps * found, 256, workers):
            pass

    def key_frames():
        for x in features:
            extract_key_frames(x)

    functions = {
        "Pillow alone, frames to RGBA": pillow,
        f"read_clip, {GIF_SIDE} x {GIF_SIDE}": lambda: read(GIF_SIDE),
        "read_clip, resized to 256 x 256": lambda: read(256),
        "file to key frames, all k": lambda: load(0),
        "the same, two processes": lambda: load(2, laps=4),  # their start counts less over more files
        "key frames alone, all k": key_frames,
    }
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        print("without scikit-learn its k-means is not compared", file=sys.stderr)
        return functions

    def sklearn():
        for x in features:
            for k in LENGTHS:
                KMeans(k, n_init=6, random_state=0).fit(x.astype(np.float32))

    return functions | {"scikit-learn's KMeans, all k": sklearn}


def bench_data(quick):
    """GIFs of 24 frames of 240 x 240 pixels, beside Pillow alone and scikit-learn; start of train.py."""
    count = 16 if quick else 64
    with tempfile.TemporaryDirectory() as place:
        seconds = timed(readers(draw_gifs(Path(place), count)), 5)
    seconds["the same, two processes"] /= 4  # laps
    rows = []
    for name, times in seconds.items():
        clusters = "KMeans" in name or name == "key frames alone, all k"
        baseline = seconds["key frames alone, all k" if clusters else "Pillow alone, frames to RGBA"]
        rate = count / np.median(times)
        rows.append(row(f"{name}, per clip", times / count, baseline / count, clips_per_second=rate))

    def start(code):
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)

    seconds = timed({code: partial(start, code) for code in ("import torch", "import train")}, 5)
    return rows + [row(f"start: {name}", times, seconds["import torch"]) for name, times in seconds.items()]


# ------------------------------------------------------------------------------------------------------------
# The latent cache

CACHED_FRAMES, READS = 24, 2000  # frames of a clip, clips read


def encode_random(names):
    """Yields for each clip latents as large as a Stable Diffusion VAE's, and random key frames for all k."""
    pixels = np.zeros((CACHED_FRAMES, 8, 8, 3), np.uint8)
    for name in names:
        rng = np.random.default_rng(int(name))
        key_frames = {k: np.sort(rng.choice(CACHED_FRAMES, k, replace=False)) for k in LENGTHS}
        clip = Clip(pixels, key_frames, np.arange(8), CACHED_FRAMES)
        yield torch.randn(CACHED_FRAMES, 4, 32, 32).half(), frame_table(clip)


def write_cache(folder, count):
    """A cache of `count` random clips, and beside it one file per clip. Returns a LatentDataset."""
    names = [f"{i:064d}" for i in range(count)]
    cache.fill(folder, dict(zip(names, names)), encode_random)
    for name in names:
        np.save(folder / f"{name}.npy", np.zeros((CACHED_FRAMES, 4, 32, 32), np.float16))
    found = [Sticker(Path(name), name, "a red heart bouncing", "train") for name in names]
    return LatentDataset(folder, found, names)


def bench_cache(quick):
    """Key frames of random clips and k, 64 KB each at k = 8, beside one file per clip; and whole training
    samples with their noise. From the operating system's own cache, as in training."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        dataset = write_cache(Path(place), 512 if quick else 2048)
        chosen = rng.integers(len(dataset.clips), size=READS), rng.integers(3, 9, READS)
        draws = [(dataset.clips[i], int(k)) for i, k in zip(*chosen)]
        uniform = Curriculum("none", 1).probabilities(0)

        def one_file_per_clip():
            for clip, k in draws:
                file = np.load(Path(place) / f"{clip.name}.npy")
                np.asarray(file[clip.table[LENGTHS.index(k), :k]], np.float32)

        def cached():
            for clip, k in draws:
                dataset.read(clip, k)

        def samples():
            for step in range(READS // 16):
                draw_batch(dataset, dataset.clips, uniform, 0, step, range(16), 16)

        functions = {"one file per clip": one_file_per_clip, "cache": cached, "cache, whole samples": samples}
        seconds = timed(functions)
    baseline, rows = seconds["one file per clip"] / READS, []
    for name, times in seconds.items():
        rate = READS / np.median(times)
        rows.append(row(f"{name}, per clip", times / READS, baseline, clips_per_second=rate))
    return rows


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


def checkpoint_writer(preset, folder):
    """A function that writes the next checkpoint of `preset`, of random weights, averages and moments, to
    `folder`."""
    with torch.device("meta"):
        unet = DFGN(**SIZES[preset])
    unet = torch.nn.Module.to_empty(unet, device=DEVICE)
    with torch.no_grad():
        for weight in unet.parameters():
            weight.uniform_(-0.03, 0.03)
    optimizer = make_optimizer(unet, 1e-5)
    for weight in unet.parameters():
        first, second = (torch.rand_like(weight) for _ in range(2))
        step = torch.ones((), device=DEVICE)
        optimizer.state[weight] = dict(step=step, exp_avg=first, exp_avg_sq=second)
    lr_schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    states = lr_schedule, torch.amp.GradScaler(enabled=False), Curriculum("none", 1)
    training = Training(unet, Average(unet), optimizer, *states)
    parts = Encoders(), make_scheduler(), {}

    def save():
        training.step += 1
        save_checkpoint(folder, training, parts, about={}, limit=1)

    return save


def bench_save(quick):
    """One checkpoint with averaged weights and moments, beside the same number of bytes from one buffer: what
    SIGTERM must leave time for. `small` with --quick."""
    buffer = bytes(2**28)
    with tempfile.TemporaryDirectory(dir=".") as place:
        place = Path(place)
        save = checkpoint_writer("small" if quick else "full", place)
        save()

        def newest():
            return list_checkpoints(place)[-1][1]

        size = sum(path.stat().st_size for path in newest().rglob("*") if path.is_file())

        def plain():
            left = size
            with open(place / "plain", "wb") as file:
                while left > 0:
                    left -= file.write(buffer[:left])

        functions = {
            "the same bytes from one buffer": plain,
            "checkpoint written": save,
            "its checksums, looked at again": lambda: find_damage(newest()),
        }
        seconds = timed(functions, 3)
    plain = seconds["the same bytes from one buffer"]
    return [row(name, times, plain, gigabytes=size / 1e9) for name, times in seconds.items()]
