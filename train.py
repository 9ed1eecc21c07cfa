"""
Trains RDTF: Algorithm 1 of the paper, on one machine or many.

    python train.py    # built-in stickers, tiny, this machine; ends with a sample sheet
    python train.py --data stickers/ --preset small --output_dir runs/mine --mixed_precision bf16
    torchrun --nproc_per_node 8 train.py --data stickers/ --preset full --output_dir runs/full

In the output folder:  log.jsonl, progress.png (loss, task probabilities, mean k, feedback), validation-N.png
(real frames above generated ones), checkpoint-N/ (resumable), and at the end the model itself, which
sample.py reads. `train` is Algorithm 1; what it works on is Run (what stays) and Training (what a step
changes).
"""

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from tqdm import tqdm

import data
import masks
from curriculum import NUM_RANGES, Curriculum
from model import DFGN, NUM_TIMESTEPS, SIZES, make_scheduler
from sample import SAMPLING, validation_sheet
from support import checkpoint, hub, log, media, setup, stickers
from support.common import UserError, evenly, one_sentence
from support.encoders import Encoders, load_prior
from support.finished import start_from_model
from support.machine import (
    DTYPES,
    World,
    compile_layers,
    gradient_sync,
    precision,
    prepare,
    recompute,
    stop_requests,
    to_device,
)
from support.optim import Average, averaged, clip_gradients, make_optimizer, shard
from support.options import parse_args
from support.pictures import plot_progress, save_png
from support.pretrained import start_from_spatial
from support.prior import GaussianPrior, loss_weights, precondition

LOG_EVERY = 10  # steps
MAX_BAD_STEPS = 20  # in a row; fp16 needs some at its start, until the loss scale has come down
VALIDATION_SAMPLES = 64  # held-out samples behind the validation loss

# What each preset trains with unless a flag says otherwise, and the guidance scales and DDIM steps that
# sample.py then uses for the finished model. `full` is Table 6. prior: whether the network is preconditioned;
# muon: whether Muon takes the matrices from AdamW; neither is the paper's.
PRESETS = {
    name: dict(zip(("resolution", "prior", "muon", "max_train_steps", "train_batch_size", "learning_rate",
                    "lr_scheduler", "lr_warmup_steps", "validation_steps", "guidance_scale",
                    "image_guidance_scale", "num_inference_steps"), row))
    for name, row in {
        "toy":   (32,  True,  True,      6,  4, 1.0e-2, "cosine",                  2, 2000, 3.0, 1.5, 25),
        "tiny":  (64,  True,  True,   1000,  8, 2.0e-3, "cosine",                 50,  250, 3.0, 1.5, 25),
        "small": (128, True,  False, 50000, 16, 2.0e-4, "cosine",                500, 2000, 5.0, 2.0, 50),
        "full":  (256, False, False, 50000,  1, 1.0e-5, "constant_with_warmup", 1000, 2000, 7.5, 7.5, 50),
    }.items()
}  # fmt: skip


@dataclass
class Training:
    """What a step changes, and all of it: a checkpoint is this, saved and loaded as a whole."""

    unet: DFGN
    average: Average  # its averaged weights, or None
    optimizer: torch.optim.Optimizer
    lr_schedule: Any
    scaler: torch.amp.GradScaler  # of the loss, for fp16
    curriculum: Curriculum
    step: int = 0  # steps done
    skipped: int = 0  # steps whose loss or gradients were not finite
    bad_in_row: int = 0  # of these, the last ones without a good one between


class Run(NamedTuple):
    """What stays the same from step to step."""

    args: Any  # the flags
    world: World  # the processes
    encoders: Encoders  # codec, text encoders, prior
    scheduler: Any  # the noise schedule
    dataset: data.LatentDataset
    clips: list  # to train on
    held_out: list
    prompts: list  # of the validation sheet
    network: Any  # Training.unet, in DDP where there are several ranks
    denoiser: Any  # the network, preconditioned where there is a prior: what the loop calls
    loss_weight: torch.Tensor  # (1000,), of each timestep; ones, but for a preconditioned network
    global_batch: int
    about: dict  # what a checkpoint says of the run
    summary: str  # of the data
    report: Any  # sends an entry of the log to TensorBoard or Weights & Biases
    validate: Any  # `validate`, or what lab/arm.py looks at in its place

    @property
    def parts(self):
        """What is saved beside the U-Net."""
        names = ("preset", "resolution", "mixed_precision", *SAMPLING)
        return self.encoders, self.scheduler, {name: getattr(self.args, name) for name in names}


# ------------------------------------------------------------------------------------------------------------
# One step


def noise_loss(run, denoiser, batch):
    """Eq. 1 under both masks: the network sees the frames that the condition mask gives, and its squared
    error counts where the loss mask is set. batch: of data.draw_batch. Returns float32 (B,), and the same
    over the frames that are not given, which the curriculum reads: (B,), without gradient or weight."""
    device = run.world.device
    tensors = batch.latents, batch.noise, batch.timesteps, batch.valid, batch.valid & ~batch.given
    latents, noise, timesteps, valid, unknown = (to_device(x, device) for x in tensors)
    noisy = run.scheduler.add_noise(latents, noise, timesteps)  # (B, F, C, h, w)
    text = run.encoders.text(batch.captions, device)
    with precision(device.type, run.args.mixed_precision):
        noise_pred = denoiser(noisy, latents, batch.given, timesteps, text, batch.valid)
    loss = run.loss_weight[timesteps] * masks.masked_loss(noise_pred, noise, valid)
    return loss, masks.masked_loss(noise_pred.detach(), noise, unknown)


def accumulate_gradients(run, training, probabilities, stop_signals):
    """Draws the samples of this rank, in micro-batches, and adds up their gradients.

    probabilities: (3, 6), P(task, k). Returns, of all ranks, loss, mean k, whether one was asked to stop, and
    for each range of timesteps the sum of the losses over unknown frames and how many they are."""
    args, world, step = run.args, run.world, training.step
    size, micro_steps = args.train_batch_size, args.gradient_accumulation_steps
    totals, by_range = (torch.zeros(*shape, device=world.device) for shape in ((3,), (2, NUM_RANGES)))
    for micro in range(micro_steps):
        first = (micro * world.size + world.rank) * size  # index of the sample in the global batch
        indices = range(first, first + size)
        draws = args.seed, step, indices, run.global_batch
        batch = data.draw_batch(run.dataset, run.clips, probabilities, *draws, args.ddu)
        with gradient_sync(run.network, last=micro == micro_steps - 1):
            loss, unknown = noise_loss(run, run.denoiser, batch)
            loss = loss.mean() / micro_steps
            training.scaler.scale(loss).backward()
        totals[0] += loss.detach()
        totals[1] += np.mean(batch.lengths) / micro_steps
        ranges = to_device(batch.timesteps * NUM_RANGES // NUM_TIMESTEPS, world.device)
        by_range.index_add_(1, ranges, torch.stack([unknown, torch.ones_like(unknown)]))
    totals[2] = len(stop_signals)
    totals = world.sum(torch.cat([totals, by_range.flatten()])).tolist()
    loss, mean_k, stop = (total / world.size for total in totals[:3])
    return loss, mean_k, stop > 0, np.reshape(totals[3:], (2, NUM_RANGES))


def update(training, loss, by_range):
    """Weights, averages and curriculum after one step; a step whose loss or gradients are not finite changes
    none of them. Both are of all ranks, so each sees it. Returns the step's log entry."""
    training.scaler.unscale_(training.optimizer)
    grad_norm = clip_gradients(training.unet)
    good = math.isfinite(loss) and math.isfinite(grad_norm)
    if good:
        training.scaler.step(training.optimizer)
        if training.average is not None:
            training.average.step(training.unet)
        training.curriculum.update(*by_range)
    training.scaler.update()
    training.optimizer.zero_grad(set_to_none=True)
    learning_rate = float(training.lr_schedule.get_last_lr()[0])
    training.lr_schedule.step()
    training.step += 1
    training.skipped += not good
    training.bad_in_row = 0 if good else training.bad_in_row + 1
    entry = dict(step=training.step, loss=loss, learning_rate=learning_rate, grad_norm=grad_norm)
    return dict(entry, skipped=training.skipped)


# ------------------------------------------------------------------------------------------------------------
# Algorithm 1


def train(run, training, stop_signals):
    """Algorithm 1. Ends when the steps are done, or exits with 128 plus a signal's number."""
    args, world, total = run.args, run.world, run.args.max_train_steps
    bar = tqdm(desc="training", unit="step", total=total, initial=training.step, disable=not world.main)
    log_path, save_due = args.output_dir / "log.jsonl", False
    logged_step, seconds = training.step, 0.0  # of training, since logged_step
    while training.step < total:
        began = time.perf_counter()
        # Static probabilities f_s, feedback P* (Eq. 2 to 4), difficulty map m_ad, their balance
        probabilities = training.curriculum.probabilities(training.step)
        terms = training.curriculum.terms(training.step)
        # Samples X', their task, row and k, both masks; the gradients of the network on them
        loss, mean_k, stop, by_range = accumulate_gradients(run, training, probabilities, stop_signals)
        # The network, and the current loss that the next step's feedback reads
        entry = update(training, loss, by_range)
        seconds += time.perf_counter() - began
        bar.update()
        good, last = training.bad_in_row == 0, training.step == total
        if training.bad_in_row == MAX_BAD_STEPS:
            setup.too_many_bad_steps(args.output_dir, training.step, MAX_BAD_STEPS)

        # Look, write the log, save: in this order, so that whatever is saved has been logged. Asked to stop,
        # it saves first: who asked may not wait for a sheet.
        if stop:
            save(run, training)
        validates = last or (args.validation_steps and training.step % args.validation_steps == 0)
        seen = run.validate(run, training) if validates else {}
        if world.main and good and (validates or training.step % LOG_EVERY == 0):
            entry["clips_per_second"] = round((training.step - logged_step) * run.global_batch / seconds, 2)
            shares = zip(masks.TASKS, probabilities.sum(axis=1).tolist())
            entry |= {f"p_{task}": share for task, share in shares} | dict(mean_k=mean_k) | terms | seen
            bar.set_postfix(loss=f"{loss:.4f}")
            with log.report_write_errors(world.print0):
                log.append_log(log_path, entry)
                run.report(entry)
                if validates:
                    plot_progress(log_path, args.output_dir / "progress.png")
            logged_step, seconds = training.step, 0.0
        save_due |= training.step % args.checkpointing_steps == 0
        if not stop and (last or (save_due and good)):  # what was saved before bad steps stays
            save(run, training)
            save_due = False
        if stop and not last:
            setup.leave(args.output_dir, training.step, world, stop_signals)
    bar.close()


@torch.no_grad()
def held_out_loss(run, denoiser):
    """{"validation_loss": mean over held-out samples}, drawn with equal probabilities and as at step 0: the
    same ones every time. Empty without any."""
    if not run.held_out:
        return {}
    args, losses, uniform = run.args, [], Curriculum("none", 1).probabilities(0)
    for i in range(0, VALIDATION_SAMPLES, args.train_batch_size):
        indices = range(i, min(i + args.train_batch_size, VALIDATION_SAMPLES))
        draws = args.seed, 0, indices, VALIDATION_SAMPLES
        batch = data.draw_batch(run.dataset, run.held_out, uniform, *draws, args.ddu)
        losses.append(noise_loss(run, denoiser, batch)[0])
    return dict(validation_loss=torch.cat(losses).mean().item())


def validate(run, training):
    """Under averaged weights: the held-out loss, for the log, the sheet and the first prompt's sticker.
    Rank 0 does it alone, unless it holds only a part of the weights: then all do the same."""
    args, world, unet, loss = run.args, run.world, training.unet, {}
    if world.main or args.shard:
        denoiser = precondition(unet, run.encoders.prior, run.scheduler.alphas_cumprod)
        unet.eval()
        with averaged(unet, training.average):
            loss = held_out_loss(run, denoiser)
            shown = run.dataset, run.held_out, run.prompts
            picture, samples = validation_sheet(denoiser, run.encoders, *shown, args)
        unet.train()
        if world.main:
            with log.report_write_errors(world.print0):
                save_png(picture, args.output_dir / f"validation-{training.step}.png")
                if samples:
                    media.write_clip(args.output_dir / "sample.gif", next(iter(samples.values())), fps=8)
    world.barrier()
    return loss


def save(run, training):
    limit = run.args.checkpoints_total_limit or None
    with log.report_write_errors(run.world.print0):
        checkpoint.save_checkpoint(run.args.output_dir, training, run.parts, run.about, limit, run.world.main)
    run.world.barrier()


# ------------------------------------------------------------------------------------------------------------
# Set-up, in this order. Rank 0 makes what all ranks then read


def fit_prior(args, world, encoders, dataset, clips):
    """What the presets but `full` precondition their network with, fitted to the latents and captions."""
    side = args.resolution // encoders.codec.factor
    if world.main:
        prior = GaussianPrior(encoders.codec.latent_channels, side, encoders.clip.width, masks.LENGTHS)
        data.fit_prior(prior.to(world.device), dataset, clips, encoders, args.ddu)
        prior.save_pretrained(args.output_dir / "prior")
    world.barrier()
    encoders.prior = load_prior(args.output_dir / "prior").to(world.device)


def build_network(args, world, encoders, fresh):
    """The U-Net with random weights, or those of --init_unet or --init_from, as it will be trained."""
    torch.manual_seed(args.seed)
    channels = encoders.codec.latent_channels
    unet = DFGN(
        latent_channels=channels,
        condition_channels=channels if encoders.prior is None else 2 * channels,
        clip_dim=encoders.clip.width,
        t5_dim=encoders.t5.width,
        temporal=args.temporal,
        **SIZES[args.preset],
    )
    prepare(unet, world.device, channels_last=not args.shard)  # sharded weights have to be contiguous
    if args.init_unet and fresh:
        start_from_spatial(unet, args.init_unet)
    if args.init_from and fresh:
        start_from_model(unet, args.init_from)
    if args.low_memory:
        torch.nn.Module.to(unet, torch.bfloat16)  # ModelMixin's own may keep some in fp32
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing(recompute)
    if args.compile:
        compile_layers(unet)
    if args.shard:
        shard(unet, world.device, DTYPES[args.mixed_precision])
    return unet.train()


def begin_training(args, world, unet):
    """The state of the loop before the first step."""
    optimizer = make_optimizer(unet, args.learning_rate, args.use_8bit_adam, args.low_memory, args.muon)
    steps = dict(num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps)
    return Training(
        unet=unet,
        average=Average(unet, args.ema_on_cpu) if args.use_ema else None,
        optimizer=optimizer,
        lr_schedule=get_scheduler(args.lr_scheduler, optimizer, **steps),
        scaler=torch.amp.GradScaler(world.device.type, enabled=args.mixed_precision == "fp16"),
        curriculum=Curriculum(args.curriculum, args.max_train_steps),
    )


def open_stickers(args, world, folder, found, notes, encoders):
    """Latents of the stickers, encoded where they are missing by all ranks together; says what is there."""
    setup.digest_first(args, world, folder, found)
    workers = args.num_workers and max(1, args.num_workers // world.local_size)
    dataset = data.open_dataset(folder, found, encoders.codec, args.resolution, args.cache_dir, workers)
    clips = evenly(dataset.split("train"), args.max_train_samples or len(dataset.clips))
    clips, held_out = (data.usable(some, args.ddu) for some in (clips, dataset.split("validation")))
    if not clips:
        raise UserError(f"--data {folder}: no clip is left to train on; `python data.py {folder}` says why.")
    summary = f"{len(clips)} clips to train on, {len(held_out)} held out, {len(dataset.dropped)} dropped"
    log.report_folder(world.print0, folder, summary, notes, dataset.dropped, any(c.caption for c in clips))
    prompts = args.validation_prompts
    if prompts is None:
        captions = [clip.caption for clip in held_out or clips if clip.caption][:6]
        # Without any captions one sticker is drawn without text.
        prompts = (captions or [""]) if args.data else stickers.PROMPTS
    return dict(dataset=dataset, clips=clips, held_out=held_out, prompts=prompts, summary=summary)


def set_up(args, world, on_exit, build=None):
    """(Run, Training), fresh or resumed. What on_exit, an ExitStack, holds is undone when the run ends."""
    resume, schedule = setup.claim_output(args, world, on_exit)
    report = log.make_reporter(args) if world.main else None
    folder, found, notes = setup.find_stickers(args, world)
    levels = len(SIZES[args.preset]["block_out_channels"])
    encoders = setup.load_frozen_parts(args, world, resume, levels)
    opened = open_stickers(args, world, folder, found, notes, encoders)
    dataset, clips = opened["dataset"], opened["clips"]
    if args.prior and resume is None and not args.init_from:
        fit_prior(args, world, encoders, dataset, clips)
    unet = (build or build_network)(args, world, encoders, fresh=resume is None)
    training = begin_training(args, world, unet)
    if resume is not None:
        setup.resume_training(args, world, resume, training, dataset)
    if world.main:
        log.begin_log(args.output_dir / "log.jsonl", training.step if resume is not None else -1)

    network, scheduler, global_batch = world.distribute(unet), make_scheduler(), schedule["global_batch"]
    denoiser = precondition(network, encoders.prior, scheduler.alphas_cumprod)
    weight = loss_weights(denoiser, scheduler.alphas_cumprod).to(world.device)
    about = dict(schedule=schedule, latents=dataset.identity, **setup.origins(args))
    built = dict(network=network, denoiser=denoiser, loss_weight=weight, global_batch=global_batch)
    hooks = dict(report=report, validate=validate)
    run = Run(args, world, encoders, scheduler, about=about, **built, **opened, **hooks)
    machine = f"{world.size} x {world.device.type}, {args.mixed_precision}"
    steps = f"{global_batch} clips per step, {args.max_train_steps} steps"
    world.print0(f"{args.preset}: {unet.num_parameters() / 1e6:.1f}M parameters on {machine}, {steps}")
    return run, training


@one_sentence("train.py")
def main():
    args = parse_args(PRESETS)
    with ExitStack() as on_exit:
        world = World()
        run, training = set_up(args, world, on_exit)
        train(run, training, on_exit.enter_context(stop_requests()))
        facts = run.encoders.sources(), run.summary, run.global_batch, training.step
        card = log.model_card(training.unet, args, *facts)
        checkpoint.write_finished(args.output_dir, training, run.parts, card, main=world.main)
        pictures = f"validation-{training.step}.png, sample.gif and progress.png"
        world.print0(f"wrote {args.output_dir}: the model, {pictures}")
        world.barrier()
        world.close()
        hub.push(args, world.main)


if __name__ == "__main__":
    main()
