"""
Trains RDTF: Algorithm 1 of the paper, on one machine or many.

    python train.py    # built-in stickers, tiny, this machine; ends with a sample sheet
    python train.py --data stickers/ --preset small --output_dir runs/mine --mixed_precision bf16
    torchrun --nproc_per_node 8 train.py --data stickers/ --preset full --output_dir runs/full

In the output folder:  log.jsonl, progress.png (loss, task probabilities, mean k, feedback), validation-N.png
(real frames above generated ones), checkpoint-N/ (resumable), and at the end the model itself, which
sample.py reads.
"""

import errno
import json
import math
import os
import signal
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.distributed as dist
from diffusers.optimization import get_scheduler
from safetensors import SafetensorError
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import masks
from curriculum import Curriculum
from data import open_dataset
from masks import TASKS
from model import DFGN, SIZES, loss_weights, make_scheduler
from sample import validation_sheet
from support import media, stickers
from support.cache import digest_files
from support.checkpoint import (
    SaveError,
    alone_in,
    choose_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    sweep,
    write_finished,
)
from support.common import UserError, printable
from support.encoders import Encoders, PatchPCA
from support.folder import DataError, scan_folder
from support.log import make_reporter, model_card, read_log
from support.machine import DTYPES, compile_layers, precision, stop_requests
from support.optim import MAX_GRAD_NORM, Average, make_optimizer, shard, with_average
from support.options import SCHEDULE_FLAGS, check_resolution, check_schedule, parse_args
from support.pictures import plot_progress
from support.pretrained import EncoderError, start_from_spatial

LOG_EVERY = 10  # steps
MAX_BAD_STEPS = 20  # in a row; fp16 needs some at its start, until the loss scale has come down
VALIDATION_SAMPLES = 64  # held-out samples behind the validation loss

# ------------------------------------------------------------------------------------------------------------
# Other places for the log


# ------------------------------------------------------------------------------------------------------------
# Stopping


# ------------------------------------------------------------------------------------------------------------
# Training


def given_latents(batch):
    """The clean latents of the given frames, zeros elsewhere (section 3.2)."""
    return batch.latents * batch.given[:, :, None, None, None]


def train(args, on_exit):
    """Trains as `args` (parse_args) say. What `on_exit`, an ExitStack, holds is undone however the run ends: the
    handlers of its signals."""
    # ---- processes: one, or those of torchrun
    world, rank, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    if world > 1:
        # Rank 0 decodes, validates and saves while the others wait:
        # far longer than the default timeout allows.
        patience = timedelta(hours=12)
        store, _, _ = next(rendezvous("env://", timeout=patience))
        # torchrun's store outlives a restart, with the addresses of the processes that are gone (pytorch issue
        # 135712). On several machines the count differs, and an environment variable helps instead (see README).
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(world)
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "0"
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=rank,
            world_size=world,
            store=dist.PrefixStore(f"restart-{restart}", store),
            timeout=patience,
        )
    main_process = rank == 0

    def say(text):
        if main_process:
            tqdm.write(text)

    def barrier():
        if world > 1:
            dist.barrier()

    # ---- output folder
    if main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        try:
            on_exit.enter_context(alone_in(args.output_dir))
        except BlockingIOError as error:
            raise UserError(
                f"--output_dir {args.output_dir} is in use by a run that has not ended: end it, or choose "
                "another folder."
            ) from error
    resume = choose_checkpoint(args, say) if main_process else None
    if world > 1:
        dist.broadcast_object_list(chosen := [resume])
        resume = chosen[0]
    micro_steps, batch_size = args.gradient_accumulation_steps, args.train_batch_size
    global_batch = world * batch_size * micro_steps
    schedule = dict({name: getattr(args, name) for name in SCHEDULE_FLAGS}, global_batch=global_batch)
    if resume is not None:
        check_schedule(resume, schedule)
    log_path = args.output_dir / "log.jsonl"
    if main_process:
        sweep(args.output_dir)
    report = make_reporter(args) if main_process else None

    # ---- stickers
    folder = Path(args.data) if args.data else stickers.default_folder(root=args.cache_dir)
    if not args.data and main_process:
        try:
            stickers.draw_stickers(folder)
        except ValueError as error:
            raise UserError(str(error)) from error
    barrier()
    found, problems = scan_folder(folder)

    # ---- frozen parts
    half = DTYPES[args.mixed_precision]
    sources = dict(vae=args.vae, clip=args.clip, t5=args.t5)
    codec_folder = args.output_dir
    if resume is not None:  # the same ones again, unless they are named anew
        codec_folder, recorded = resume, json.loads((resume / "model_index.json").read_text())
        sources = {name: sources.get(name) or value for name, value in recorded.items()}
    elif main_process and not args.vae:
        codec = PatchPCA(*args.codec)
        check_resolution(args, codec)
        data.fit_codec(codec, found, args.resolution, args.num_workers)
        codec.save_pretrained(codec_folder / "codec")
    barrier()
    encoders = Encoders.load(codec_folder, sources, device, half)
    check_resolution(args, encoders.codec)

    # ---- latents: rank 0 looks at the files, then all ranks encode what is missing
    if main_process:
        digest_files(folder, found, args.cache_dir)
    barrier()
    workers = args.num_workers // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    dataset = open_dataset(folder, found, encoders.codec, args.resolution, args.cache_dir, workers)
    clips, held_out = dataset.split("train", args.ddu), dataset.split("validation", args.ddu)
    if not clips:
        raise UserError(f"--data {folder}: no clip is left to train on; `python data.py {folder}` says why.")
    problems += dataset.dropped
    say(f"{folder}: {len(clips)} clips to train on, {len(held_out)} held out, {len(problems)} dropped")
    for name, reason in problems[:20]:
        say(f"  dropped {printable(name)}: {reason}")
    if len(problems) > 20:
        say(f"  and {len(problems) - 20} more: `python data.py {folder}` lists them")
    if not any(clip.caption for clip in clips):
        say(
            f"{folder} has no captions: training without text. "
            "(metadata.jsonl or NAME.txt files would give it some.)"
        )
    prompts = args.validation_prompts
    if prompts is None:
        captions = [clip.caption for clip in held_out if clip.caption][:6]
        prompts = captions if args.data else stickers.PROMPTS

    # ---- network
    torch.manual_seed(args.seed)
    unet = DFGN(
        latent_channels=encoders.codec.latent_channels,
        clip_dim=encoders.clip.width,
        t5_dim=encoders.t5.width,
        temporal=args.temporal,
        prior_side=None if args.preset == "full" else args.resolution // encoders.codec.factor,
        **SIZES[args.preset],
    ).to(device)
    if unet.config.prior_side is not None and resume is None:
        if main_process:
            data.fit_prior(unet.prior, dataset, clips, encoders)
        for buffer in unet.prior.buffers() if world > 1 else ():
            dist.broadcast(buffer, 0)
    if not args.shard:  # which wants its weights contiguous
        unet.to(memory_format=torch.channels_last)
    if args.init_unet and resume is None:
        start_from_spatial(unet, args.init_unet)
    if args.low_memory:
        for weight in unet.parameters():  # not the buffers
            weight.data = weight.data.to(torch.bfloat16)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.compile:
        compile_layers(unet)
    if args.shard:
        shard(unet, device)
    scheduler = make_scheduler()
    average = Average(unet, args.ema_on_cpu) if args.use_ema else None
    try:
        optimizer = make_optimizer(unet, args.learning_rate, args.use_8bit_adam, args.low_memory)
    except ImportError as error:
        raise UserError("--use_8bit_adam and --low_memory need a package: pip install torchao") from error
    lr_schedule = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=args.mixed_precision == "fp16")
    curriculum = Curriculum(args.curriculum, args.max_train_steps)

    # ---- the state of the loop: `step`, and what the objects above hold; a fresh start, or the saved one
    step = skipped = bad_in_row = 0
    if resume is not None:
        try:
            tensors, state = load_checkpoint(resume, unet, average, optimizer)
        except (ValueError, KeyError, OSError, RuntimeError, UnpicklingError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{resume} cannot be resumed, optimizer.pt or weights do not fit: start from another "
                f"({reason})."
            ) from error
        lr_schedule.load_state_dict(tensors["lr_schedule"])
        scaler.load_state_dict(tensors["scaler"])
        curriculum.load_state_dict(state["curriculum"])
        step, skipped, bad_in_row = state["step"], state["skipped"], state["bad_in_row"]
        say(f"resuming {resume} at step {step}")
        if state["latents"] != dataset.identity:
            say(f"warning: the stickers in {folder} have changed since: the run goes on with the new ones")
    weights_of = loss_weights(float(unet.prior.std) if unet.config.prior_side else None).to(device)
    if main_process:  # what was logged after the checkpoint will be logged again
        kept = [
            entry for entry in (read_log(log_path) if resume is not None else []) if entry["step"] <= step
        ]
        writing = log_path.with_suffix(".tmp")
        writing.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        os.replace(writing, log_path)

    network = unet
    if world > 1 and not args.shard:
        network = DistributedDataParallel(
            unet,
            device_ids=[local_rank] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
        )
    say(
        f"{args.preset}: {sum(p.numel() for p in unet.parameters()) / 1e6:.1f}M parameters "
        f"on {world} x {device.type}, {args.mixed_precision}, "
        f"{global_batch} clips per step, {args.max_train_steps} steps"
    )

    settings = dict(
        preset=args.preset,
        resolution=args.resolution,
        mixed_precision=args.mixed_precision,
        guidance_scale=args.guidance_scale,
        image_guidance_scale=args.image_guidance_scale,
    )

    def noise_loss(batch):
        """Eq. 1 under both masks: (B,)"""
        batch = batch._replace(
            **{
                name: getattr(batch, name).to(device, non_blocking=True)
                for name in ("latents", "noise", "timesteps", "given", "valid")
            }
        )
        noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        with precision(device.type, args.mixed_precision):
            text = encoders.text(batch.captions, device)
            noise_pred = network(noisy, given_latents(batch), batch.timesteps, text, batch.valid)
        return weights_of[batch.timesteps] * masks.masked_loss(noise_pred, batch.noise, batch.valid)

    def write_checkpoint():
        save_checkpoint(
            args.output_dir,
            step,
            args.checkpoints_total_limit or None,
            unet,
            average,
            optimizer,
            encoders,
            scheduler,
            settings=dict(settings, step=step),
            tensors=dict(lr_schedule=lr_schedule.state_dict(), scaler=scaler.state_dict()),
            state=dict(
                schedule=schedule,
                latents=dataset.identity,
                curriculum=curriculum.state_dict(),
                skipped=skipped,
                bad_in_row=bad_in_row,
            ),
            main_process=main_process,
        )

    @contextmanager
    def forgiven():
        """What cannot be written is said, and the run goes on: it is worth more than one checkpoint or one picture."""
        try:
            yield
        except (OSError, media.MediaError) as error:
            say(f"warning: {error}")

    def save():
        with forgiven():
            write_checkpoint()
        barrier()

    @torch.no_grad()
    def validation_loss():
        if not held_out:
            return None
        uniform = Curriculum("none", 1).probabilities(0)
        losses = []
        for i in range(0, VALIDATION_SAMPLES, batch_size):
            indices = range(i, min(i + batch_size, VALIDATION_SAMPLES))
            always = 0  # step 0, whenever it is: the same draws every time
            batch = data.draw_batch(
                dataset, held_out, uniform, args.seed, always, indices, VALIDATION_SAMPLES, args.ddu
            )
            losses.append(noise_loss(batch))
        return torch.cat(losses).mean().item()

    def validate():
        """Writes the sheet and the first prompt's sticker; returns the held-out loss. Rank 0 does it alone, unless
        it holds only a part of the weights: then all do the same."""
        nonlocal network
        loss = None
        if main_process or args.shard:
            unet.eval()
            network, wrapped = unet, network  # the other ranks do not take part
            sheet = partial(validation_sheet, unet, encoders, dataset, held_out, prompts, args)
            loss, (picture, samples) = with_average(average, unet, lambda: (validation_loss(), sheet()))
            if main_process:
                with forgiven():
                    picture.save(args.output_dir / f"validation-{step}.png")
                    if samples:
                        media.write_clip(args.output_dir / "sample.gif", next(iter(samples.values())), fps=8)
            network = wrapped
            unet.train()
        barrier()
        return loss

    # ---- the loop
    unet.train()
    bar = tqdm(
        desc="training", unit="step", total=args.max_train_steps, initial=step, disable=not main_process
    )
    started, since = time.perf_counter(), step
    asked, due = on_exit.enter_context(stop_requests()), False
    while step < args.max_train_steps:
        probabilities = curriculum.probabilities(step)
        totals = torch.zeros(3, device=device)  # sums over the ranks: loss, k, whether to stop
        for micro in range(micro_steps):
            first = (micro * world + rank) * batch_size
            indices = range(first, first + batch_size)
            batch = data.draw_batch(
                dataset, clips, probabilities, args.seed, step, indices, global_batch, args.ddu
            )
            last = micro == micro_steps - 1
            if args.shard:
                network.set_requires_gradient_sync(last)
            with (
                network.no_sync()
                if isinstance(network, DistributedDataParallel) and not last
                else nullcontext()
            ):
                micro_loss = noise_loss(batch).mean() / micro_steps
                scaler.scale(micro_loss).backward()
            totals[0] += micro_loss.detach()
            totals[1] += np.mean(batch.lengths) / micro_steps
        totals[2] = len(asked)
        if world > 1:
            dist.all_reduce(totals)
        loss, mean_k, stop = (totals / world).tolist()

        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), MAX_GRAD_NORM)
        grad_norm = (grad_norm.full_tensor() if args.shard else grad_norm).item()
        # Both numbers are sums over the ranks, so all of them see what is no number on one, and skip the step.
        good = math.isfinite(loss) and math.isfinite(grad_norm)
        if good:
            scaler.step(optimizer)
            if average is not None:
                average.step(unet)
            curriculum.update(loss)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        learning_rate = float(lr_schedule.get_last_lr()[0])
        lr_schedule.step()
        skipped, bad_in_row = skipped + (not good), 0 if good else bad_in_row + 1
        step += 1
        bar.update()
        if bad_in_row == MAX_BAD_STEPS:
            kept = [found for found in list_checkpoints(args.output_dir) if found[0] < step]
            raise UserError(
                f"{MAX_BAD_STEPS} steps in a row, up to step {step}, gave a loss or gradients that are no "
                "numbers: lower --learning_rate, or use --mixed_precision bf16 or no. "
                + (
                    f"The last good checkpoint is {kept[-1][1]}."
                    if kept
                    else "No checkpoint had been saved yet."
                )
            )

        # ---- look, write the log, save: in this order, so that whatever is saved has been logged. Asked to stop, it
        # saves first: who asked may not wait for a sheet.
        last_step = step == args.max_train_steps
        if stop:
            save()
        validates = last_step or (args.validation_steps and step % args.validation_steps == 0)
        if validates:
            validation = validate()
        if main_process and good and (validates or step % LOG_EVERY == 0):
            terms, seconds = curriculum.terms, time.perf_counter() - started
            entry = dict(
                step=step,
                loss=loss,
                learning_rate=learning_rate,
                grad_norm=grad_norm,
                skipped=skipped,
                clips_per_second=round((step - since) * global_batch / seconds, 2),
                **{f"p_{task}": p for task, p in zip(TASKS, probabilities.sum(axis=1).tolist())},
                mean_k=mean_k,
                p_term=terms["p"],
                i_term=terms["i"],
                d_term=terms["d"],
            )
            bar.set_postfix(loss=f"{loss:.4f}")
            if validates and validation is not None:
                entry["validation_loss"] = validation
            with forgiven():
                with open(log_path, "a") as file:
                    file.write(json.dumps(entry) + "\n")
                report(entry)
                if validates:
                    plot_progress(log_path, args.output_dir / "progress.png")
            started, since = time.perf_counter(), step
        due |= step % args.checkpointing_steps == 0
        if not stop and (
            last_step or (due and good)
        ):  # what was saved before bad steps makes no room for them
            save()
            due = False
        if stop and not last_step:
            if world > 1:
                dist.destroy_process_group()
            if main_process and not (args.output_dir / f"checkpoint-{step}" / "files.json").exists():
                raise UserError(
                    f"stopped after step {step}, as asked, which could not be saved: "
                    "--resume_from_checkpoint latest goes on from the checkpoint before."
                )
            say(f"stopped after step {step}, as asked; --resume_from_checkpoint latest goes on")
            sys.exit(128 + (asked[0] if asked else signal.SIGTERM))
    bar.close()

    # ---- the finished model
    summary = f"{len(clips)} clips to train on, {len(held_out)} held out, {len(problems)} dropped"
    write_finished(
        args.output_dir,
        unet,
        average,
        encoders,
        scheduler,
        dict(settings, step=step),
        model_card(unet, args, encoders.sources(), summary, global_batch, step),
        main_process,
    )
    if main_process:
        say(f"wrote {args.output_dir}: the model, validation-{step}.png, sample.gif and progress.png")
    barrier()
    if world > 1:
        dist.destroy_process_group()


def main():
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack letters of a name
    try:
        with ExitStack() as on_exit:
            return train(parse_args(), on_exit)
    except KeyboardInterrupt:  # before the first step
        sys.exit(128 + signal.SIGINT)
    except (UserError, SaveError, DataError, EncoderError, media.MediaError) as error:
        message = str(error)
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"{error.filename or 'a file'} cannot be used ({error.strerror}): make room or choose another place."
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once on each machine
        print(f"train.py: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
