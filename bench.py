"""
Speed and memory, each figure with its baseline in the same run.

    python bench.py memory     peak of one training step of `full`, a row per set of flags (needs a GPU)
    python bench.py cache      latents read back from the cache, clips per second

Every time is the median of REPEATS runs after a warm-up, with the fastest and the slowest.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import masks
from cache import LatentDataset, write_shard
from curriculum import LENGTHS, Curriculum
from data import draw_batch
from folder import Clip, Sticker
from model import DFGN, SIZES, precision
from optim import MAX_GRAD_NORM, compile_layers, make_optimizer

REPEATS = 7


def machine():
    """One line: what the figures were measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")
        ]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}{gpu}, Python {platform.python_version()}, torch {torch.__version__}, commit {commit or 'unknown'}"


def timed(function, repeats=REPEATS):
    """(median, fastest, slowest) of `function` in seconds, after one call that is not counted."""
    seconds = []
    for i in range(repeats + 1):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i:
            seconds.append(time.perf_counter() - started)
    return float(np.median(seconds)), min(seconds), max(seconds)


# ------------------------------------------------------------------------------------------------------------
# Memory

MODES = {
    "fp32 master weights, AdamW": dict(),
    "the same, --compile": dict(compiled=True),
    "--gradient_checkpointing": dict(checkpointing=True),
    "--use_8bit_adam --gradient_checkpointing": dict(checkpointing=True, eight_bit=True),
    "--low_memory": dict(checkpointing=True, low_memory=True),
}


def training_step(device, checkpointing=False, eight_bit=False, low_memory=False, compiled=False):
    """A function that does one optimizer step of `full` on one clip of eight 256 x 256 frames (no EMA)."""
    unet = DFGN(**SIZES["full"]).to(device, torch.bfloat16 if low_memory else torch.float32)
    unet.to(memory_format=torch.channels_last)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    if compiled:
        compile_layers(unet)
    optimizer = make_optimizer(unet, 1e-5, eight_bit, low_memory)
    latents = torch.randn(1, masks.NUM_FRAMES, 4, 32, 32, device=device)
    token = torch.randn(1, 77, 1024, device=device), torch.ones(1, 77, dtype=torch.bool, device=device)
    timestep = torch.tensor([500], device=device)

    def step():
        with precision(device.type, "bf16"):
            noise_pred = unet(latents, torch.zeros_like(latents), timestep, (*token, *token))
        noise_pred.float().square().mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bench_memory():
    if not torch.cuda.is_available():
        raise SystemExit("bench.py memory: needs a GPU: the figure is the peak of its allocator.")
    rows = []
    for name, flags in tqdm(MODES.items(), desc="memory"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = training_step(torch.device("cuda"), **flags)
        median, fastest, slowest = timed(step)
        rows.append(dict(mode=name, peak_gb=torch.cuda.max_memory_allocated() / 1e9, seconds=median,
                         fastest=fastest, slowest=slowest))  # fmt: skip
        del step
    for row in rows:
        row["time_ratio"] = row["seconds"] / rows[0]["seconds"]
    return rows


# ------------------------------------------------------------------------------------------------------------
# The latent cache


class RandomCodec:
    """As many latents as a Stable Diffusion VAE gives, without the VAE."""

    def encode(self, frames):
        return torch.randn(len(frames), 4, 32, 32)


def bench_cache(clips=2048, rows=24, shard=256):
    """Clips per second read back: key frames of random clips and k, 64 KB each at k = 8, beside one file per clip;
    and whole training samples with their noise. From the disk cache of the operating system, as in training."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        rng = np.random.default_rng(0)
        pixels = np.zeros((rows, 8, 8, 3), np.uint8)
        names = [f"{i:064d}" for i in range(clips)]
        for first in tqdm(range(0, clips, shard), desc="writing a cache"):
            made = []
            for _ in range(shard):
                key_frames = {k: np.sort(rng.choice(rows, k, replace=False)) for k in LENGTHS}
                made.append(Clip(pixels, key_frames, np.arange(8), rows))
            write_shard(place, names[first : first + shard], made, RandomCodec())
        stickers = [Sticker(Path(name), name, "a red heart bouncing", "train") for name in names]
        dataset = LatentDataset(place, stickers, names)
        for clip in dataset.clips:  # the baseline: one file per clip
            np.save(place / f"{clip.name}.one.npy", np.zeros((rows, 4, 32, 32), np.float16))
        draws = [
            (dataset.clips[i], int(k))
            for i, k in zip(rng.integers(clips, size=2000), rng.integers(3, 9, 2000))
        ]
        uniform = Curriculum("none", 1).probabilities(0)

        def cached():
            for clip, k in draws:
                dataset.read(clip, k)

        def one_file_per_clip():
            for clip, k in draws:
                np.asarray(
                    np.load(place / f"{clip.name}.one.npy")[clip.places[k - LENGTHS[0], :k]], np.float32
                )

        def samples():
            for step in range(2000 // 16):
                draw_batch(dataset, dataset.clips, uniform, 0, step, range(16), 16)

        found = []
        for name, function in (
            ("one file per clip", one_file_per_clip),
            ("cache", cached),
            ("cache, whole samples", samples),
        ):
            median, fastest, slowest = timed(function)
            found.append(
                dict(what=name, clips_per_second=2000 / median, best=2000 / fastest, worst=2000 / slowest)
            )
        return found


def main():
    parser = argparse.ArgumentParser(description="Measure speed and memory.")
    parser.add_argument("what", choices=["memory", "cache"])
    parser.add_argument("--output", metavar="FILE.json", help="write the figures there too")
    args = parser.parse_args()
    rows = {"memory": bench_memory, "cache": bench_cache}[args.what]()
    print(machine())
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    if args.output:
        Path(args.output).write_text(json.dumps(dict(machine=machine(), rows=rows), indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
