"""
Speed and memory of one training step. bench.py calls these as `train` and `memory`.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from lab.peers import build_peer, make_base
from lab.timing import CUDA, DEVICE, HALF, HALF_NAME, flops_of, forget, matmul_peak, row, timed
from masks import NUM_FRAMES, masked_loss
from model import DFGN, SIZES, make_scheduler
from support.common import UserError
from support.encoders import WordVectors
from support.machine import compile_layers, precision, prepare, recompute
from support.optim import ADAM, EMA_DECAY, MAX_GRAD_NORM, Average, make_optimizer
from support.prior import GaussianPrior, precondition
from train import PRESETS


@dataclass(frozen=True)
class Step:
    """One optimizer step, and how it is computed; the ladder of `bench_train` turns the first tricks on one
    by one."""

    preset: str
    clips: int
    mixed_precision: str = HALF_NAME
    channels_last: bool = (
        True  # of the weights; the network itself brings its frames to that layout now and then
    )
    attention: bool = True  # our choice of kernel, instead of torch's
    multi_tensor: bool = True  # AdamW and averages over all weights at once
    only_valid: bool = True  # frames beyond k are not computed
    muon: bool = True  # where the preset has it
    compiled: bool = False
    optimizes: bool = True  # clipping, AdamW, averages; without: forward and backward alone
    averages: bool = True  # with averaged weights
    lengths: tuple = (3, 8, 4, 7, 5, 6)  # frames of its clips, again and again
    side: int | None = None  # of the latents; None: that of the preset
    checkpointing: bool = False
    eight_bit: bool = False
    low_memory: bool = False


def materialized(unet):
    """A model from the meta device, in half precision with random weights: its own initialization takes
    minutes."""
    unet = torch.nn.Module.to(unet, HALF).to_empty(device=DEVICE)
    with torch.no_grad():
        for tensor in (*unet.parameters(), *unet.buffers()):
            tensor.uniform_(-0.03, 0.03)
    for weight in unet.parameters():
        if weight.dim() == 4:  # not those of 3D convolutions
            weight.data = weight.data.to(memory_format=torch.channels_last)
    return unet.eval().requires_grad_(False)


def make_denoiser(preset, channels, side, text_width, channels_last=True):
    """(unet, denoiser) as train.py builds them: `full` is the bare U-Net, the others are preconditioned."""
    config = dict(SIZES[preset], latent_channels=channels, clip_dim=text_width, t5_dim=text_width)
    prior = None
    if PRESETS[preset]["prior"]:
        config["condition_channels"] = 2 * channels
        prior = GaussianPrior(channels, side, text_width).to(DEVICE)
    with torch.device(DEVICE):  # on a CPU, drawing the weights of `full` takes ten seconds
        unet = DFGN(**config)
    unet = prepare(unet, DEVICE, channels_last)
    return unet, precondition(unet, prior, make_scheduler().alphas_cumprod)


def make_update(unet, step):
    """A function that changes the weights by their gradients, as far as `step` says."""
    if step.multi_tensor:
        muon = step.muon and PRESETS[step.preset]["muon"]
        optimizer = make_optimizer(unet, 1e-5, step.eight_bit, step.low_memory, muon)
        average = Average(unet) if step.averages else None
    else:  # what torch and diffusers do unless told otherwise
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, **ADAM)
        average = EMAModel(unet.parameters(), decay=EMA_DECAY)

    def update():
        if step.optimizes:
            torch.nn.utils.clip_grad_norm_(unet.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            if step.averages:
                average.step(unet if step.multi_tensor else unet.parameters())
        optimizer.zero_grad(set_to_none=True)

    return update


def training_step(step):
    """A function that does one optimizer step on random latents and returns nothing."""
    if step.preset == "full":
        channels, side, width, tokens = 4, 32, 1024, 77
    else:
        channels, side = 16, PRESETS[step.preset]["resolution"] // 8  # of the VAE that ships
        width, tokens = WordVectors.width, 8
    side = step.side or side
    torch.manual_seed(0)
    unet, denoiser = make_denoiser(step.preset, channels, side, width, step.channels_last)
    if step.low_memory:
        torch.nn.Module.to(unet, torch.bfloat16)
    if step.checkpointing:
        unet.enable_gradient_checkpointing(recompute)
    if step.compiled:
        compile_layers(unet)
    update = make_update(unet, step)
    states = torch.randn(step.clips, tokens, width, device=DEVICE)
    text = 2 * (states, torch.ones(step.clips, tokens, dtype=torch.bool, device=DEVICE))
    rng, slots = np.random.default_rng(0), max(step.lengths)
    given = torch.zeros(step.clips, slots, dtype=torch.bool, device=DEVICE)

    def context():
        if step.attention:
            return precision(DEVICE.type, step.mixed_precision)
        return torch.autocast(DEVICE.type, HALF, enabled=step.mixed_precision != "no")

    def run():
        k = rng.permutation(np.resize(step.lengths, step.clips))
        valid = torch.from_numpy(np.arange(slots) < k[:, None]).to(DEVICE)
        latents = torch.randn(step.clips, slots, channels, side, side, device=DEVICE)
        timestep = torch.randint(1000, (step.clips,), device=DEVICE)
        computed = valid if step.only_valid else None
        with context():
            noise_pred = denoiser(latents, latents, given, timestep, text, computed)
        masked_loss(noise_pred, latents, valid).mean().backward()
        update()

    return run


def adapter_step(base):
    """The same for SimDA's adapters, in single precision, on a base that stays as it is; one clip."""
    torch.manual_seed(0)
    peer = prepare(build_peer("simda", base, text_tokens=77), DEVICE).train()
    update = make_update(peer, Step("full", 1, averages=False))
    states = torch.randn(1, 77, peer.config.clip_dim, device=DEVICE)
    text = 2 * (states, torch.ones(1, 77, dtype=torch.bool, device=DEVICE))
    latents = torch.randn(1, NUM_FRAMES, peer.config.latent_channels, 32, 32, device=DEVICE)
    given = torch.zeros(1, NUM_FRAMES, dtype=torch.bool, device=DEVICE)
    timestep = torch.full((1,), 500, device=DEVICE)

    def run():
        with precision(DEVICE.type, HALF_NAME):
            noise_pred = peer(latents, latents, given, timestep, text)
        masked_loss(noise_pred, latents, ~given).mean().backward()
        update()

    return run


def make_ladder(quick):
    """{name: Step}: each keeps what those above it turned on."""
    preset, clips, large = ("full", 4, 16) if CUDA else ("tiny", 8, 16)
    # on a GPU the choice of kernel is torch's own
    off = dict(channels_last=False, multi_tensor=False, only_valid=False)
    step = Step(preset, clips, attention=CUDA, muon=CUDA, **off)  # `full` has no Muon
    ladder = {
        f"plain, fp32, {clips} clips": replace(step, mixed_precision="no"),
        f"{HALF_NAME} autocast": step,
    }
    tricks = {
        "weights channels_last": "channels_last",
        "attention kernel": "attention",
        "fused AdamW, multi-tensor averages": "multi_tensor",
        "frames beyond k not computed": "only_valid",
        "Muon": "muon",
    }
    for name, trick in tricks.items():
        if not getattr(step, trick):
            step = replace(step, **{trick: True})
            ladder[f"+ {name}"] = step
    if not quick:  # compiling takes minutes
        step = replace(step, compiled=True)
        ladder["+ --compile"] = step
    ladder[f"{large} clips"] = replace(step, clips=large)
    return ladder


def bench_train(quick):
    """Forward, backward, clipping, AdamW and averages: `tiny` on a CPU, `full` on a GPU. Speed-ups are
    against the second row, the plain way in half precision."""
    ladder = make_ladder(quick)
    work, seconds = {}, {}
    for name, step in tqdm(ladder.items(), desc="counting operations"):
        work[name] = flops_of(training_step(replace(step, compiled=False, optimizes=False)))
        forget()
    for names in [[name] for name in ladder] if CUDA else [list(ladder)]:  # a GPU cannot hold all at once
        steps = {name: training_step(ladder[name]) for name in names}
        seconds |= timed(steps, 5 if quick else 11)
        del steps
        forget()
    peak, rows = matmul_peak(), []
    second = list(ladder)[1]
    baseline = seconds[second] / ladder[second].clips
    for name, times in seconds.items():
        clips, middle = ladder[name].clips, np.median(times)
        # Where a GPU has timed each alone, rounds of two rows have nothing in common.
        ratios = np.median(baseline) / middle if CUDA else np.median(baseline / times)
        speedup, rate = float(clips * ratios), work[name] / middle
        work_done = dict(TFLOP_per_s=rate, share_of_matmul=rate / peak)
        rows.append(row(name, times, clips_per_second=clips / middle, speedup=speedup, **work_done))
    return rows


# ------------------------------------------------------------------------------------------------------------
# Memory

MODES = {
    "fp32 master weights, AdamW": dict(),
    "the same, --compile": dict(compiled=True),
    "--gradient_checkpointing": dict(checkpointing=True),
    "--low_memory": dict(checkpointing=True, low_memory=True),
    "--use_8bit_adam --gradient_checkpointing": dict(checkpointing=True, eight_bit=True),
}


FROZEN = f"I2VGen-XL frozen in {HALF_NAME.replace('no', 'fp32')}, SimDA's adapters learn"


def make_memory_step(name):
    if name == FROZEN:  # the fine-tuning that the paper says cannot be afforded, at its cheapest
        with torch.device("meta"):
            base = make_base()
        return adapter_step(materialized(base))
    return training_step(Step("full", 1, lengths=(8,), averages=False, **MODES[name]))


def resident():
    """The most memory that this process has held so far, in GB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9


def peak_of(name):
    """(seconds of a step, the peak of memory in GB): on a GPU of its allocator, on a CPU of this process,
    less what it held before. Raises UserError if torchao is missing."""
    forget()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        seconds = timed({name: make_memory_step(name)})[name]
        return seconds, torch.cuda.max_memory_allocated() / 1e9
    before = resident()
    seconds = timed({name: make_memory_step(name)}, repeats=1)[name]
    return seconds, resident() - before


def bench_memory(quick):
    """One optimizer step of `full`, and of SimDA's adapters beside it, on one clip of eight 256 x 256 frames,
    without averaged weights. On a CPU each in a process of its own."""
    rows = []
    names = [name for name, flags in MODES.items() if not ((quick or not CUDA) and "compiled" in flags)]
    for name in tqdm([*names, FROZEN], desc="memory"):
        try:
            if CUDA:
                seconds, peak = peak_of(name)
            else:
                with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                    seconds, peak = alone.submit(peak_of, name).result()
        except (UserError, BrokenProcessPool) as error:  # torchao is missing; it was killed for its memory
            print(f"{name}: not measured, {error}", file=sys.stderr)
            continue
        rows.append(row(name, seconds, peak_gb=peak))
    return rows
