"""
Speed and memory, each figure with its baseline in the same run.

    python bench.py --quick          what two CPU cores can measure in some ten minutes
    python bench.py unet             one pass of `full` beside diffusers' video U-Nets (the paper's Table 8)
    python bench.py train            one training step; a ladder with one trick per row
    python bench.py sample           one sticker: 25 steps with text and image guidance
    python bench.py data             files to key frames, beside Pillow alone and scikit-learn; start of train.py
    python bench.py scaling          step time over frames, resolution and batch; two processes against one
    python bench.py cache            latents read back from the cache
    python bench.py save             one checkpoint of `full`, written to this folder's disk (needs 20 GB of memory)
    python bench.py memory           peak of one training step of `full`, a row per set of flags (needs a GPU)

What is compared takes turns, round after round, after a round that is not counted: a machine that other programs
slow down slows them all. (Not where one model fills a GPU, and not the runs of train.py.) Times are medians over the
rounds, with the fastest and the slowest. A ratio is that of times, below 1 is faster; a speedup above 1 is faster. Both
are medians of what a round gives.
"""

import argparse
import gc
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, I2VGenXLUNet, UNet3DConditionModel, UNetMotionModel
from diffusers.training_utils import EMAModel
from PIL import Image, ImageSequence
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import masks
import sample
from curriculum import Curriculum
from data import Clip, LatentDataset, draw_batch, extract_key_frames, load_clips, row_table, thumbnails
from masks import LENGTHS
from model import DFGN, SIZES, make_scheduler
from support import cache, media, stickers
from support.checkpoint import find_damage, list_checkpoints, save_checkpoint
from support.encoders import Encoders, NgramVectors, PatchPCA, PretrainedVAE, WordVectors
from support.folder import Sticker
from support.machine import compile_layers, native_bf16, precision
from support.optim import ADAM, EMA_DECAY, MAX_GRAD_NORM, Average, make_optimizer
from support.options import PRESETS

REPEATS = 7
ROOT = Path(__file__).parents[1]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
HALF = torch.bfloat16 if native_bf16() else torch.float32  # what is called half precision below
HALF_NAME = "bf16" if native_bf16() else "no"


def machine():
    """One line: what the figures were measured on."""
    try:
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except OSError:  # no git
        commit = ""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")
        ]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    gpu = f", {torch.cuda.get_device_name()}" if CUDA else ""
    return (
        f"{cpu}{gpu}, {torch.get_num_threads()} threads, {HALF_NAME}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, commit {commit or 'unknown'}"
    )


def timed(functions, repeats=REPEATS):
    """Calls the functions of a dict in turns. Returns {name: seconds of every round but the first, float (repeats,)}"""
    seconds = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if CUDA:
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values) for name, values in seconds.items()}


def row(what, seconds, baseline=None, **more):
    """One line of a table. seconds, baseline: as `timed` gives them."""
    line = dict(
        what=what, ms=1e3 * np.median(seconds), fastest=1e3 * seconds.min(), slowest=1e3 * seconds.max()
    )
    if baseline is not None:
        line["ratio"] = float(np.median(seconds / baseline))
    return {**line, **more}


def flops_of(function):
    """Floating point operations of one call, in units of 1e12. The counter does not know the CPU's flash attention."""
    kernel = nullcontext() if CUDA else sdpa_kernel(SDPBackend.MATH)
    with kernel, FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e12


def forget():
    """Frees what is no longer used on the GPU: compiled modules hold themselves alive."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def matmul_peak(side=4096 if CUDA else 2048):
    """TFLOP/s of a large matrix product in half precision: what 100 % of this machine is below."""
    a, b = (torch.randn(side, side, device=DEVICE, dtype=HALF) for _ in range(2))
    return 2 * side**3 / timed({"product": lambda: a @ b})["product"].min() / 1e12


# ------------------------------------------------------------------------------------------------------------
# One U-Net pass (the paper's Table 8)


def materialized(unet):
    """A model from the meta device, in half precision with random weights: its own initialization takes minutes."""
    unet = torch.nn.Module.to(unet, HALF).to_empty(device=DEVICE)
    with torch.no_grad():
        for tensor in (*unet.parameters(), *unet.buffers()):
            tensor.uniform_(-0.03, 0.03)
    for weight in unet.parameters():
        if weight.dim() == 4:  # not those of 3D convolutions
            weight.data = weight.data.to(memory_format=torch.channels_last)
    return unet.eval().requires_grad_(False)


def unet_inputs(batch, device, dtype):
    """What each network takes for `batch` clips of eight frames, latents of 4 x 32 x 32."""
    slots = masks.NUM_FRAMES
    make = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)
    step, fps = (torch.full((batch,), value, device=device) for value in (500, 8))
    ours, theirs = make(batch, slots, 4, 32, 32), make(batch, 4, slots, 32, 32)
    token = make(batch, 77, 1024), torch.ones(batch, 77, dtype=torch.bool, device=device)
    return {
        "DFGN, full": (ours, torch.zeros_like(ours), step, (*token, *token)),
        "I2VGenXLUNet": (theirs, step, fps, theirs, make(batch, 1024), token[0]),
        "UNet3DConditionModel": (theirs, step, token[0]),
        "UNetMotionModel": (theirs, step, make(batch * slots, 77, 1280)),  # its text is per frame
    }


def bench_unet(quick):
    """1 x 8 x 256 x 256, that is latents of 8 x 4 x 32 x 32, and, unless --quick, eight of them; models of diffusers
    by their defaults."""
    rows, batches = [], (1,) if quick else (1, 8)
    with torch.device("meta"), torch.no_grad():
        unets = {
            "DFGN, full": DFGN(**SIZES["full"]),
            "I2VGenXLUNet": I2VGenXLUNet(),
            "UNet3DConditionModel": UNet3DConditionModel(),
            "UNetMotionModel": UNetMotionModel(),
        }
        inputs = unet_inputs(1, "meta", torch.float32)
        work = {name: flops_of(lambda: unet(*inputs[name])) for name, unet in unets.items()}  # of one clip
    unets = {name: materialized(unet) for name, unet in unets.items()}
    modes = {"plain": unets}
    if CUDA:
        modes["compiled"] = {name: torch.compile(unet, dynamic=False) for name, unet in unets.items()}
    for batch in batches:
        inputs = unet_inputs(batch, DEVICE, HALF)

        def call(name, unet):
            with torch.no_grad():
                unet(*inputs[name])

        compared = (
            list(unets) if CUDA or batch == 1 else ["DFGN, full", "I2VGenXLUNet"]
        )  # minutes per pass on a CPU
        for mode, those in modes.items():
            seconds = timed({name: lambda n=name, u=those[name]: call(n, u) for name in compared}, 5)
            for name in compared:
                rows.append(
                    row(
                        f"{name}, batch {batch}, {mode}",
                        seconds[name],
                        seconds["I2VGenXLUNet"],
                        parameters_M=sum(p.numel() for p in unets[name].parameters()) / 1e6,
                        TFLOP=batch * work[name],
                    )
                )
    return rows


# ------------------------------------------------------------------------------------------------------------
# One training step


def training_step(
    preset,
    batch,
    mixed=HALF_NAME,
    channels_last=True,
    attention=True,
    multi_tensor=True,
    only_valid=True,
    compiled=False,
    optimizes=True,
    lengths=(3, 8, 4, 7, 5, 6),
    side=None,
    checkpointing=False,
    eight_bit=False,
    low_memory=False,
    averages=True,
):
    """A function that does one optimizer step of a preset on random latents and returns nothing. lengths: numbers of
    frames of its clips, again and again. The switches are what the ladder of `bench_train` turns on one by one.

    channels_last: of the weights; the network itself brings its frames to that layout now and then
    attention: our choice of kernel, instead of torch's
    multi_tensor: AdamW and averages over all weights at once
    only_valid: frames beyond k are not computed
    averages: with averaged weights"""
    channels = 4 if preset == "full" else PRESETS[preset]["codec"][1]
    side = side or (32 if preset == "full" else PRESETS[preset]["resolution"] // PRESETS[preset]["codec"][0])
    width = 1024 if preset == "full" else WordVectors.width
    tokens = 77 if preset == "full" else 8
    torch.manual_seed(0)
    unet = DFGN(
        latent_channels=channels,
        clip_dim=width,
        t5_dim=width,
        prior_side=None if preset == "full" else side,
        **SIZES[preset],
    ).to(DEVICE)
    if low_memory:
        torch.nn.Module.to(unet, torch.bfloat16)
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    if compiled:
        compile_layers(unet)
    if multi_tensor:
        optimizer = make_optimizer(unet, 1e-5, eight_bit, low_memory)
        average = Average(unet) if averages else None
    else:  # what torch and diffusers do unless told otherwise
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, **ADAM)
        average = EMAModel(unet.parameters(), decay=EMA_DECAY)
    token = (
        torch.randn(batch, tokens, width, device=DEVICE),
        torch.ones(batch, tokens, dtype=bool, device=DEVICE),
    )
    rng = np.random.default_rng(0)
    count = max(lengths)

    def step():
        k = rng.permutation(np.resize(lengths, batch))
        valid = torch.from_numpy(np.arange(count) < k[:, None]).to(DEVICE)
        latents = torch.randn(batch, count, channels, side, side, device=DEVICE)
        timestep = torch.randint(1000, (batch,), device=DEVICE)
        with (
            precision(DEVICE.type, mixed)
            if attention
            else torch.autocast(DEVICE.type, HALF, enabled=mixed != "no")
        ):
            noise_pred = unet(
                latents, torch.zeros_like(latents), timestep, (*token, *token), valid if only_valid else None
            )
        masks.masked_loss(noise_pred, latents, valid).mean().backward()
        if optimizes:
            torch.nn.utils.clip_grad_norm_(unet.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            if averages:
                average.step(unet if multi_tensor else unet.parameters())
        optimizer.zero_grad(set_to_none=True)

    return step


def bench_train(quick):
    """Forward, backward, clipping, AdamW and averages: `tiny` on a CPU, `full` on a GPU. Each row keeps what the rows
    above it turned on; speed-ups are against the second, the plain way in half precision."""
    preset, batch, large = ("full", 4, 16) if CUDA else ("tiny", 8, 16)
    plain = dict(channels_last=False, attention=False, multi_tensor=False, only_valid=False)
    ladder = {f"plain, fp32, {batch} clips": dict(plain, mixed="no"), f"{HALF_NAME} autocast": dict(plain)}
    tricks = {
        "weights channels_last": "channels_last",
        "attention kernel": "attention",
        "fused AdamW, multi-tensor averages": "multi_tensor",
        "frames beyond k not computed": "only_valid",
    }
    if CUDA:
        del tricks["attention kernel"]  # torch's own choice there
        plain["attention"] = True
    for name, trick in tricks.items():
        plain = dict(plain, **{trick: True})
        ladder[f"+ {name}"] = dict(plain)
    compiles = CUDA or not quick  # two minutes on two cores
    if compiles:
        ladder["+ --compile"] = dict(plain, compiled=True)
    clips = dict.fromkeys(ladder, batch)
    ladder[f"{large} clips"], clips[f"{large} clips"] = dict(plain, compiled=compiles), large
    work, seconds = {}, {}
    for name, switches in tqdm(ladder.items(), desc="counting operations"):
        uncompiled = dict(switches, compiled=False, optimizes=False)
        work[name] = flops_of(training_step(preset, clips[name], **uncompiled))
        forget()
    for names in (
        [[name] for name in ladder] if CUDA else [list(ladder)]
    ):  # a GPU cannot hold all of them at once
        steps = {name: training_step(preset, clips[name], **ladder[name]) for name in names}
        seconds |= timed(steps, 5 if quick else 11)
        del steps
        forget()
    peak = matmul_peak()
    baseline, rows = seconds[f"{HALF_NAME} autocast"] / batch, []
    for name, times in seconds.items():
        rate = work[name] / np.median(times)
        rows.append(
            row(
                name,
                times,
                clips_per_second=clips[name] / np.median(times),
                speedup=float(np.median(baseline / (times / clips[name]))),
                TFLOP_per_s=rate,
                share_of_matmul=rate / peak,
            )
        )
    return rows


# ------------------------------------------------------------------------------------------------------------
# One sticker


class NoCodec:
    """Takes the place of a codec when decoding is not to be timed."""

    def decode(self, latents):
        return torch.zeros(len(latents), 1, 1, 3, dtype=torch.uint8)


def one_by_one(unet, noisy, given, timestep, text, null_text, weights):
    """sample.guided_noise, a pass of the network per condition: the plain way."""
    noise = 0
    for (with_image, with_text), weight in weights.items():
        z = given if with_image else torch.zeros_like(given)
        t = torch.full((len(noisy),), int(timestep), device=noisy.device)
        noise = noise + weight * unet(noisy, z, t, text if with_text else null_text).float()
    return noise


def bench_sample(quick):
    """Text and a first frame, 25 steps, scales 7.5 and 3: three conditions. `tiny` on a CPU, `full` with a VAE of
    Stable Diffusion's size on a GPU."""
    if CUDA:
        codec, preset, side = stable_diffusion_vae(), "full", 32
    else:
        codec, preset, side = PatchPCA(*PRESETS["tiny"]["codec"]), "tiny", 12
        codec.fit(torch.randint(0, 256, (8, 48, 48, 3), dtype=torch.uint8))
    channels = codec.latent_channels
    unet = DFGN(
        latent_channels=channels,
        clip_dim=WordVectors.width,
        t5_dim=NgramVectors.width,
        prior_side=None if CUDA else side,
        **SIZES[preset],
    )
    unet.eval().to(DEVICE, memory_format=torch.channels_last)
    encoders, bare = Encoders(codec, device=DEVICE), Encoders(codec, device=DEVICE)
    bare.codec = NoCodec()
    given = torch.randn(1, masks.NUM_FRAMES, channels, side, side)
    is_given = (torch.arange(masks.NUM_FRAMES) == 0)[None]

    def sticker(encoders):
        sample.generate(
            unet,
            encoders,
            ["a red heart bouncing"],
            given,
            is_given,
            num_inference_steps=25,
            guidance_scale=7.5,
            image_guidance_scale=3.0,
            mixed_precision=HALF_NAME,
        )

    def sequential():
        with patch.object(sample, "guided_noise", one_by_one):
            sticker(bare)

    seconds = timed(
        {
            "conditions one by one": sequential,
            "as one batch": lambda: sticker(bare),
            "as one batch, decoded": lambda: sticker(encoders),
        },
        5,
    )
    baseline = {"as one batch, decoded": "as one batch"}
    return [
        row(name, times, seconds[baseline.get(name, "conditions one by one")])
        for name, times in seconds.items()
    ]


def stable_diffusion_vae():
    """A PretrainedVAE of Stable Diffusion's size with random weights, never saved."""
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )
    codec = PretrainedVAE.__new__(PretrainedVAE)
    codec.vae = vae.to(DEVICE).eval().requires_grad_(False)
    codec.to = lambda device: codec
    return codec


# ------------------------------------------------------------------------------------------------------------
# Files


def bench_data(quick):
    """GIFs of 24 frames of 240 x 240 pixels, one thread unless said otherwise."""
    count, frames, side = 16 if quick else 64, 24, 240
    with tempfile.TemporaryDirectory() as place:
        files = []
        for i in range(count):
            subject, colour, motion = stickers.COMBINATIONS[7 * i % len(stickers.COMBINATIONS)]
            pictures, delays = stickers.draw_clip(
                subject, colour, motion, np.random.default_rng((0, i)), frames
            )
            pictures = [p.resize((side, side), Image.Resampling.NEAREST) for p in pictures]
            files.append(Path(place) / f"{i}.gif")
            pictures[0].save(
                files[-1], save_all=True, append_images=pictures[1:], duration=delays, disposal=2, loop=0
            )
        stickers_list = [Sticker(path, path.name, "", "train") for path in files]
        features = [thumbnails(media.read_clip(path, side)[0]) for path in files]

        def pillow():
            for path in files:
                for frame in ImageSequence.Iterator(Image.open(path)):
                    frame.convert("RGBA")

        def read(resolution):
            for path in files:
                media.read_clip(path, resolution)

        def load(workers, laps=1):
            for _ in load_clips(laps * stickers_list, 256, workers):
                pass

        functions = {
            "Pillow alone, frames to RGBA": pillow,
            "read_clip, 240 x 240": lambda: read(side),
            "read_clip, resized to 256 x 256": lambda: read(256),
            "file to key frames, all k": lambda: load(0),
            "the same, two processes": lambda: load(2, laps=4),  # their start counts less over more files
            "key frames alone, all k": lambda: [extract_key_frames(x) for x in features],
        }
        try:
            from sklearn.cluster import KMeans

            def sklearn():
                for x in features:
                    for k in LENGTHS:
                        KMeans(k, n_init=6, random_state=0).fit(x.astype(np.float32))

            functions["scikit-learn's KMeans, all k"] = sklearn
        except ImportError:
            print("without scikit-learn its k-means is not compared", file=sys.stderr)
        seconds = timed(functions, 5)
        seconds["the same, two processes"] /= 4
    rows = []
    for name, times in seconds.items():
        baseline = seconds[
            "key frames alone, all k"
            if "KMeans" in name or "alone, all" in name
            else "Pillow alone, frames to RGBA"
        ]
        rows.append(
            row(
                f"{name}, per clip",
                times / count,
                baseline / count,
                clips_per_second=count / np.median(times),
            )
        )
    start = lambda code: subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True
    )
    seconds = timed(
        {"import torch": lambda: start("import torch"), "import train": lambda: start("import train")}, 5
    )
    return rows + [row(f"start: {name}", times, seconds["import torch"]) for name, times in seconds.items()]


# ------------------------------------------------------------------------------------------------------------
# Scaling


def exponent(sizes, values):
    """Slope of a line through log(value) over log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def bench_scaling(quick):
    """How the time of forward and backward grows, as a fitted exponent beside that of the counted operations; and
    `tiny` in two processes of one thread each against one process of two, the same global batch."""
    preset, rows = "full" if CUDA else "tiny", []
    sides = (16, 32, 64) if CUDA else (12, 24, 36)
    usual = dict(optimizes=False, side=sides[1])
    cases = {
        "frames 3, 4, 6, 8": ((3, 4, 6, 8), lambda n: training_step(preset, 1, **dict(usual, lengths=(n,)))),
        f"side of latents {sides}": (
            sides,
            lambda n: training_step(preset, 1, **dict(usual, lengths=(8,), side=n)),
        ),
        "clips 1, 2, 4": ((1, 2, 4), lambda n: training_step(preset, n, **dict(usual, lengths=(8,)))),
    }
    for name, (sizes, make) in tqdm(cases.items(), desc="scaling"):
        steps = {n: make(n) for n in sizes}
        work = [flops_of(steps[n]) for n in sizes]
        seconds = timed(steps, 5)
        rows.append(
            row(
                f"{preset}, {name}: at the largest",
                seconds[sizes[-1]],
                exponent=exponent(sizes, [np.median(seconds[n]) for n in sizes]),
                exponent_of_operations=exponent(sizes, work),
            )
        )
    rates = {}
    with tempfile.TemporaryDirectory() as place:
        folder = stickers.draw_stickers(Path(place) / "stickers", count=64)
        for ranks in (1, 2):
            output = Path(place) / str(ranks)
            flags = [
                "--data",
                str(folder),
                "--cache_dir",
                place,
                "--output_dir",
                str(output),
                "--max_train_steps",
                "70",
                "--train_batch_size",
                str(8 // ranks),
                "--validation_prompts",
                "a red heart bouncing",
                "--validation_steps",
                "0",
            ]
            launcher = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                str(ranks),
            ]
            on_cpu = dict(os.environ, OMP_NUM_THREADS=str(2 // ranks), CUDA_VISIBLE_DEVICES="")
            done = subprocess.run(
                [*launcher, str(ROOT / "train.py"), *flags], env=on_cpu, capture_output=True
            )
            if done.returncode:
                raise SystemExit(f"bench.py scaling: train.py failed: {done.stderr.decode()[-2000:]}")
            log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
            rates[ranks] = np.array([entry["clips_per_second"] for entry in log[1:-1]])
    for ranks, rate in rates.items():
        rows.append(
            row(
                f"tiny, {ranks} process{'es' * (ranks > 1)} of {2 // ranks} thread{'s' * (ranks < 2)}, 8 clips",
                8 / rate,
                clips_per_second=float(np.median(rate)),
                ratio=float(np.median(rates[1]) / np.median(rate)),
            )
        )
    return rows


# ------------------------------------------------------------------------------------------------------------
# Memory

MODES = {
    "fp32 master weights, AdamW": dict(),
    "the same, --compile": dict(compiled=True),
    "--gradient_checkpointing": dict(checkpointing=True),
    "--use_8bit_adam --gradient_checkpointing": dict(checkpointing=True, eight_bit=True),
    "--low_memory": dict(checkpointing=True, low_memory=True),
}


def bench_memory(quick):
    """One optimizer step of `full` on one clip of eight 256 x 256 frames, without averaged weights."""
    if not CUDA:
        raise SystemExit("bench.py memory: needs a GPU: the figure is the peak of its allocator.")
    rows = []
    for name, flags in tqdm(MODES.items(), desc="memory"):
        forget()
        torch.cuda.reset_peak_memory_stats()
        try:
            step = training_step("full", 1, lengths=(8,), averages=False, **flags)
        except ImportError:
            print(f"{name}: not measured, it needs torchao", file=sys.stderr)
            continue
        seconds = timed({name: step})[name]
        rows.append(row(name, seconds, peak_gb=torch.cuda.max_memory_allocated() / 1e9))
        del step
    return rows


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


def bench_save(quick):
    """One checkpoint with averaged weights and moments, beside the same number of bytes from one buffer: what SIGTERM
    must leave time for. `small` with --quick."""
    with torch.device("meta"):
        unet = DFGN(**SIZES["small" if quick else "full"])
    unet = torch.nn.Module.to_empty(unet, device=DEVICE)
    with torch.no_grad():
        for weight in unet.parameters():
            weight.uniform_(-0.03, 0.03)
    average, optimizer = Average(unet), make_optimizer(unet, 1e-5)
    for weight in unet.parameters():
        moments = (torch.rand_like(weight) for _ in range(2))
        optimizer.state[weight] = dict(
            zip(("step", "exp_avg", "exp_avg_sq"), (torch.ones((), device=DEVICE), *moments))
        )
    codec = PatchPCA(*PRESETS["tiny"]["codec"])
    codec.fit(torch.randint(0, 256, (8, 48, 48, 3), dtype=torch.uint8))
    parts, steps, buffer = (
        (Encoders(codec), make_scheduler(), {}, {}, {}, True),
        itertools.count(),
        bytes(2**28),
    )
    with tempfile.TemporaryDirectory(dir=".") as place:
        place = Path(place)

        def newest():
            return list_checkpoints(place)[-1][1]

        def save():
            save_checkpoint(place, next(steps), 1, unet, average, optimizer, *parts)

        def plain():
            left = sum(path.stat().st_size for path in newest().rglob("*") if path.is_file())
            with open(place / "plain", "wb") as file:
                while left > 0:
                    left -= file.write(buffer[:left])

        save()
        gigabytes = sum(path.stat().st_size for path in newest().rglob("*") if path.is_file()) / 1e9
        functions = {
            "the same bytes from one buffer": plain,
            "checkpoint written": save,
            "its checksums, looked at again": lambda: find_damage(newest()),
        }
        seconds = timed(functions, 3)
    plain = seconds["the same bytes from one buffer"]
    return [row(name, times, plain, gigabytes=gigabytes) for name, times in seconds.items()]


# ------------------------------------------------------------------------------------------------------------
# The latent cache


class RandomCodec:
    """As many latents as a Stable Diffusion VAE gives, without the VAE."""

    def encode(self, frames):
        return torch.randn(len(frames), 4, 32, 32)


def bench_cache(quick, rows=24, shard=256, count=2000):
    """Key frames of random clips and k, 64 KB each at k = 8, beside one file per clip; and whole training samples with
    their noise. From the operating system's own cache, as in training."""
    clips = 512 if quick else 2048
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        rng = np.random.default_rng(0)
        pixels = np.zeros((rows, 8, 8, 3), np.uint8)
        names = [f"{i:064d}" for i in range(clips)]
        for first in tqdm(range(0, clips, shard), desc="writing a cache"):
            made = []
            for _ in range(shard):
                key_frames = {k: np.sort(rng.choice(rows, k, replace=False)) for k in LENGTHS}
                table = row_table(Clip(pixels, key_frames, np.arange(8), rows))
                made.append((RandomCodec().encode(pixels).half(), table))
            cache.write_shard(place / f"{first}.safetensors", names[first : first + shard], made)
        found = [Sticker(Path(name), name, "a red heart bouncing", "train") for name in names]
        dataset = LatentDataset(place, found, names)
        for clip in dataset.clips:  # the baseline: one file per clip
            np.save(place / f"{clip.name}.one.npy", np.zeros((rows, 4, 32, 32), np.float16))
        draws = [
            (dataset.clips[i], int(k))
            for i, k in zip(rng.integers(clips, size=count), rng.integers(3, 9, count))
        ]
        uniform = Curriculum("none", 1).probabilities(0)

        def one_file_per_clip():
            for clip, k in draws:
                file = np.load(place / f"{clip.name}.one.npy")
                np.asarray(file[clip.rows[k - LENGTHS[0], :k]], np.float32)

        def cached():
            for clip, k in draws:
                dataset.read(clip, k)

        def samples():
            for step in range(count // 16):
                draw_batch(dataset, dataset.clips, uniform, 0, step, range(16), 16)

        seconds = timed(
            {"one file per clip": one_file_per_clip, "cache": cached, "cache, whole samples": samples}
        )
    return [
        row(
            f"{name}, per clip",
            times / count,
            seconds["one file per clip"] / count,
            clips_per_second=count / np.median(times),
        )
        for name, times in seconds.items()
    ]


BENCHES = {
    "unet": bench_unet,
    "train": bench_train,
    "sample": bench_sample,
    "data": bench_data,
    "scaling": bench_scaling,
    "cache": bench_cache,
    "save": bench_save,
    "memory": bench_memory,
}


def main():
    parser = argparse.ArgumentParser(description="Measure speed and memory.")
    parser.add_argument(
        "what", nargs="*", metavar="WHAT", help=f"{', '.join(BENCHES)} (default: what this machine can)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="smaller sizes: some ten minutes on two CPU cores"
    )
    parser.add_argument("--output", metavar="FILE.json", help="write the figures there too")
    args = parser.parse_args()
    if unknown := set(args.what) - set(BENCHES):
        parser.error(f"{', '.join(unknown)}: WHAT must be one of {', '.join(BENCHES)}.")
    tables = {}
    if CUDA:
        torch.set_float32_matmul_precision("high")  # as in train.py
    print(machine())
    for what in args.what or [name for name in BENCHES if CUDA or name != "memory"]:
        started = time.perf_counter()
        rows = tables[what] = BENCHES[what](args.quick)
        print(f"\n**{what}** ({time.perf_counter() - started:.0f} s)\n")
        names = list(dict.fromkeys(name for row in rows for name in row))
        print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
        for line in rows:
            cells = [line.get(name, "") for name in names]
            print(
                "| " + " | ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells) + " |",
                flush=True,
            )
        if args.output:
            Path(args.output).write_text(json.dumps(dict(machine=machine(), tables=tables), indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
