"""
Speed and memory, each figure with its baseline in the same run.

    python -m lab.bench --quick      what two CPU cores can measure in some ten minutes
    python -m lab.bench unet         one pass of `full` beside diffusers' video U-Nets
    python -m lab.bench peers        sizes and one pass of `full` and of the methods beside it (Table 8)
    python -m lab.bench train        one training step; a ladder with one trick per row
    python -m lab.bench sample       one sticker: 25 steps with text and image guidance
    python -m lab.bench data         files to key frames, beside Pillow and scikit-learn; start of train.py
    python -m lab.bench scaling      step time over frames, resolution and batch; two processes against one
    python -m lab.bench cache        latents read back from the cache
    python -m lab.bench save         one checkpoint of `full`, written to this folder (needs 20 GB of memory)
    python -m lab.bench memory       peak of one step of `full`, a row per set of flags (on a CPU: 24 GB)

What is compared takes turns, round after round, after one warm-up round: a machine that other programs slow
down slows them all. (Not where one model fills a GPU, and not the runs of train.py.) Times are medians over
the rounds, with the fastest and the slowest. A ratio is that of times, below 1 is faster; a speedup above 1
is faster. Both are medians of what a round gives.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from diffusers import AutoencoderKL, I2VGenXLUNet, UNet3DConditionModel, UNetMotionModel
from tqdm import tqdm

import sample
from lab.bench_files import bench_cache, bench_data, bench_save
from lab.bench_step import Step, bench_memory, bench_train, make_denoiser, materialized, training_step
from lab.peers import CHOICES, build_peer, make_base
from lab.timing import CUDA, DEVICE, HALF, HALF_NAME, ROOT, flops_of, machine, markdown, row, timed
from masks import NUM_FRAMES
from model import DFGN, SIZES
from support import stickers
from support.common import UserError, one_sentence, replacing
from support.encoders import Encoders, PretrainedVAE, WordVectors
from support.flags import Parser
from train import PRESETS

# ------------------------------------------------------------------------------------------------------------
# One U-Net pass, and the paper's Table 8


def unet_inputs(batch, device, dtype):
    """What each network takes for `batch` clips of eight frames, latents of 4 x 32 x 32."""

    def make(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    step, fps = (torch.full((batch,), value, device=device) for value in (500, 8))
    ours, theirs = make(batch, NUM_FRAMES, 4, 32, 32), make(batch, 4, NUM_FRAMES, 32, 32)
    given = torch.zeros(batch, NUM_FRAMES, dtype=torch.bool, device=device)
    tokens = make(batch, 77, 1024), torch.ones(batch, 77, dtype=torch.bool, device=device)
    return {
        "DFGN, full": (ours, ours, given, step, (*tokens, *tokens)),
        "I2VGenXLUNet": (theirs, step, fps, theirs, make(batch, 1024), tokens[0]),
        "UNet3DConditionModel": (theirs, step, tokens[0]),
        "UNetMotionModel": (theirs, step, make(batch * NUM_FRAMES, 77, 1280)),  # its text is per frame
    }


def bench_unet(quick):
    """1 x 8 x 256 x 256, that is latents of 8 x 4 x 32 x 32, and, unless --quick, eight of them; models of
    diffusers by their defaults."""
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

    @torch.no_grad()
    def call(unet, inputs):
        unet(*inputs)

    rows = []
    for batch in (1,) if quick else (1, 8):
        inputs = unet_inputs(batch, DEVICE, HALF)
        # on a CPU a pass of eight clips takes minutes
        compared = list(unets) if CUDA or batch == 1 else ["DFGN, full", "I2VGenXLUNet"]
        for mode, networks in modes.items():
            passes = {name: lambda n=name, u=networks[name]: call(u, inputs[n]) for name in compared}
            seconds = timed(passes, 5)
            for name, times in seconds.items():
                size = sum(p.numel() for p in unets[name].parameters()) / 1e6
                more = dict(parameters_M=size, TFLOP=batch * work[name])
                rows.append(row(f"{name}, batch {batch}, {mode}", times, seconds["I2VGenXLUNet"], **more))
    return rows


UNITS = """
U-Nets alone, counted in units of 1e9. The paper seems to print its own 0.96B in these and the sizes of the
others in units of 2^30, in which I2VGen-XL, 1.42 here, is its 1.32."""


def bench_peers(quick):
    """DFGN `full` and the methods that the paper measures it against, as lab/peers.py has them: all weights,
    those that learn, and a pass of one clip, as of `unet`. The four on I2VGen-XL share the memory of its
    weights. --quick: a single round after the warm-up."""
    with torch.device("meta"), torch.no_grad():
        unets = {"DFGN, full": DFGN(**SIZES["full"])}
        for name in CHOICES["name"]:
            unets[f"I2VGen-XL, {name}"] = build_peer(name, make_base(), text_tokens=77)
        inputs = unet_inputs(1, "meta", torch.float32)["DFGN, full"]
        work = {name: flops_of(lambda: unet(*inputs)) for name, unet in unets.items()}
    sizes = {}
    for name, unet in unets.items():
        counts = [(p.numel(), p.requires_grad) for p in unet.parameters()]
        every, learn = sum(n for n, _ in counts), sum(n for n, learns in counts if learns)
        sizes[name] = dict(parameters=every, learn=learn, learn_percent=100 * learn / every)

    dfgn, *peers = unets.values()
    materialized(dfgn)
    shared = materialized(peers[0].base).state_dict()
    for peer in peers:
        peer.base.load_state_dict(shared, assign=True)
        materialized(peer.adapters)
        peer.to(DEVICE).eval()
    inputs = unet_inputs(1, DEVICE, HALF)["DFGN, full"]

    @torch.no_grad()
    def call(unet):
        unet(*inputs)

    seconds = timed({name: partial(call, unet) for name, unet in unets.items()}, 1 if quick else 5)
    print(UNITS)
    baseline = seconds["DFGN, full"]
    return [row(name, t, baseline, **sizes[name], TFLOP=work[name]) for name, t in seconds.items()]


# ------------------------------------------------------------------------------------------------------------
# One sticker


class NoCodec:
    """Takes the place of a codec when decoding is not to be timed."""

    def decode(self, latents):
        return torch.zeros(len(latents), 1, 1, 3, dtype=torch.uint8)


def one_by_one(forward):
    """The forward of a denoiser, clip by clip: sampling then takes one pass per condition, the plain way."""

    def plain(noisy, latents, given, timestep, text):
        texts = zip(*(states.split(1) for states in text))
        clips = zip(*(x.split(1) for x in (noisy, latents, given, timestep)), texts)
        return torch.cat([forward(*clip) for clip in clips])

    return plain


def stable_diffusion_vae():
    """A PretrainedVAE of Stable Diffusion's size with random weights, never saved."""
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )
    codec = PretrainedVAE.__new__(PretrainedVAE)
    codec.vae, codec.scale, codec.shift = vae.to(DEVICE).eval().requires_grad_(False), 0.18215, 0.0
    return codec


def bench_sample(quick):
    """Text and a first frame, 25 steps, scales 7.5 and 3: three conditions. `tiny` on a CPU, `full` with a
    VAE of Stable Diffusion's size on a GPU."""
    if CUDA:
        codec, preset, side = stable_diffusion_vae(), "full", 32
    else:
        codec, preset, side = PretrainedVAE(), "tiny", PRESETS["tiny"]["resolution"] // 8
    _, denoiser = make_denoiser(preset, codec.latent_channels, side, WordVectors.width)
    denoiser.eval()
    encoders, bare = Encoders(codec=codec), Encoders(codec=NoCodec())
    latents = torch.randn(1, NUM_FRAMES, codec.latent_channels, side, side)
    given = (torch.arange(NUM_FRAMES) == 0)[None]
    settings = dict(num_inference_steps=25, guidance_scale=7.5, image_guidance_scale=3.0)

    def sticker(encoders):
        prompts = ["a red heart bouncing"]
        sample.generate(denoiser, encoders, prompts, latents, given, mixed_precision=HALF_NAME, **settings)

    def sequential():
        with patch.object(denoiser, "forward", one_by_one(denoiser.forward)):
            sticker(bare)

    functions = {
        "conditions one by one": sequential,
        "as one batch": lambda: sticker(bare),
        "as one batch, decoded": lambda: sticker(encoders),
    }
    seconds, baseline = timed(functions, 5), {"as one batch, decoded": "as one batch"}
    plain = "conditions one by one"
    return [row(name, times, seconds[baseline.get(name, plain)]) for name, times in seconds.items()]


# ------------------------------------------------------------------------------------------------------------
# Scaling


def exponent(sizes, values):
    """Slope of a line through log(value) over log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def bench_ranks():
    """`tiny` in two processes of one thread each against one process of two, the same global batch."""
    rates, rows = {}, []
    with tempfile.TemporaryDirectory() as place:
        folder = stickers.draw_stickers(Path(place) / "stickers", count=64)
        for ranks in (1, 2):
            output = Path(place) / str(ranks)
            command = f"-m torch.distributed.run --standalone --nproc_per_node {ranks}".split()
            command += [str(ROOT / "train.py"), "--data", str(folder), "--cache_dir", place]
            command += ["--output_dir", str(output), "--train_batch_size", str(8 // ranks)]
            command += "--max_train_steps 70 --validation_steps 0 --validation_prompts heart".split()
            on_cpu = dict(os.environ, OMP_NUM_THREADS=str(2 // ranks), CUDA_VISIBLE_DEVICES="")
            done = subprocess.run([sys.executable, *command], env=on_cpu, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"train.py failed: {done.stderr[-2000:]}")
            log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
            rates[ranks] = np.array([entry["clips_per_second"] for entry in log[1:-1]])
    for ranks, rate in rates.items():
        name = f"tiny, {ranks} process{'es' * (ranks > 1)} of {2 // ranks} thread{'s' * (ranks < 2)}, 8 clips"
        median = float(np.median(rate))
        rows.append(row(name, 8 / rate, clips_per_second=median, ratio=float(np.median(rates[1])) / median))
    return rows


def bench_scaling(quick):
    """How the time of forward and backward grows, as a fitted exponent beside that of the counted operations;
    and two processes against one."""
    preset, rows = "full" if CUDA else "tiny", []
    sides = (16, 32, 64) if CUDA else (12, 24, 36)
    step = Step(preset, 1, optimizes=False, side=sides[1], lengths=(8,))
    cases = {
        "frames 3, 4, 6, 8": {n: replace(step, lengths=(n,)) for n in (3, 4, 6, 8)},
        f"side of latents {sides}": {n: replace(step, side=n) for n in sides},
        "clips 1, 2, 4": {n: replace(step, clips=n) for n in (1, 2, 4)},
    }
    for name, case in tqdm(cases.items(), desc="scaling"):
        steps = {n: training_step(s) for n, s in case.items()}
        work = [flops_of(run) for run in steps.values()]
        seconds = timed(steps, 5)
        more = dict(
            exponent=exponent(list(case), [np.median(times) for times in seconds.values()]),
            exponent_of_operations=exponent(list(case), work),
        )
        rows.append(row(f"{preset}, {name}: at the largest", seconds[max(case)], **more))
    return rows + bench_ranks()


# ------------------------------------------------------------------------------------------------------------

BENCHES = {
    "unet": bench_unet,
    "train": bench_train,
    "sample": bench_sample,
    "data": bench_data,
    "scaling": bench_scaling,
    "cache": bench_cache,
    "save": bench_save,
    "peers": bench_peers,
    "memory": bench_memory,
}


def parse_args(words=None):
    parser = Parser(description="Measure speed and memory.")
    add, names = parser.add_argument, ", ".join(BENCHES)
    add("what", nargs="*", metavar="WHAT", help=f"{names} (default: what this machine can)")
    add("--quick", action="store_true", help="smaller sizes: some ten minutes on two CPU cores")
    add("--output", type=Path, metavar="FILE.json", help="write the figures there too")
    args = parser.parse_args(words)
    if unknown := set(args.what) - set(BENCHES):
        raise UserError(f"{', '.join(unknown)}: WHAT must be one of {names}.")
    args.what = args.what or [name for name in BENCHES if CUDA or name not in ("memory", "peers")]
    return args


def main():
    with one_sentence("lab.bench"):
        args, tables = parse_args(), {}
        if CUDA:
            torch.set_float32_matmul_precision("high")  # as in train.py
        print(machine())
        for what in args.what:
            started = time.perf_counter()
            tables[what] = BENCHES[what](args.quick)
            print(
                f"\n**{what}** ({time.perf_counter() - started:.0f} s)\n\n{markdown(tables[what])}",
                flush=True,
            )
            if args.output:
                with replacing(args.output) as writing:
                    writing.write_text(json.dumps(dict(machine=machine(), tables=tables), indent=2) + "\n")


if __name__ == "__main__":
    main()
