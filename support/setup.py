"""
How a run of train.py begins and how it is ended early. Rank 0 makes what all ranks then read.
"""

import json
import signal
import sys
from pathlib import Path

from support import checkpoint, stickers
from support.cache import digest_files
from support.common import UserError
from support.encoders import Encoders
from support.finished import local_folder, readable
from support.folder import scan_folder
from support.machine import DTYPES
from support.options import SCHEDULE_FLAGS, check_resolution


def claim_output(args, world, on_exit):
    """Locks the output folder, until on_exit, an ExitStack, ends. Returns the checkpoint to go on from, or
    None, and the schedule of this run, which it must have had: {flag: value}. Raises UserError."""
    resume = None
    if world.main:
        on_exit.enter_context(checkpoint.output_lock(args.output_dir))
        wanted = args.resume_from_checkpoint
        resume = checkpoint.choose_checkpoint(args.output_dir, wanted, world.print0)
    resume = world.first(resume)
    global_batch = world.size * args.train_batch_size * args.gradient_accumulation_steps
    schedule = dict({name: getattr(args, name) for name in SCHEDULE_FLAGS}, global_batch=global_batch)
    if resume is not None:
        checkpoint.check_schedule(resume, schedule)
        recall(args, resume)
    if world.main:
        checkpoint.remove_leftovers(args.output_dir)
    return resume, schedule


def origins(args):
    """What a checkpoint says of where its run came from, {flag: value or None}."""
    data = args.data and str(Path(args.data).resolve())
    return dict(data=data, init_from=args.init_from, init_unet=args.init_unet)


def recall(args, resume):
    """Flags that a resumed run left out and its checkpoint `resume` knows: the stickers it was trained on,
    and what it had started from. Raises UserError if it had started from anything else."""
    saved = json.loads((resume / "state.json").read_text())
    args.data = args.data or saved.get("data")
    for name in ("init_from", "init_unet"):
        value = getattr(args, name)
        if value and saved.get(name, value) != value:
            raise UserError(
                f"--{name} is {value}, but {resume} started from {saved[name] or 'random weights'}: leave "
                "the flag out, or start anew in another --output_dir."
            )
        setattr(args, name, saved.get(name, value))


def find_stickers(args, world):
    """Returns the folder, its stickers, and sentences on what is not used; the built-in set is drawn. Raises
    UserError."""
    folder = Path(args.data) if args.data else stickers.default_folder(root=args.cache_dir)
    if folder.resolve() == args.output_dir.resolve():
        raise UserError(
            f"--output_dir {args.output_dir} is the folder of the stickers: choose another, so that the next "
            "run does not train on what this one draws."
        )
    if not args.data and world.main:
        stickers.draw_stickers(folder)
    world.barrier()
    found, notes = scan_folder(folder)
    return folder, found, notes


def load_frozen_parts(args, world, resume, levels):
    """The VAE, prior and text encoders: those of the checkpoint or of --init_from, unless they are named
    anew. levels: resolutions of the U-Net. Raises UserError."""
    named = dict(vae=args.vae, clip=args.clip, t5=args.t5)
    how = dict(device=world.device, dtype=DTYPES[args.mixed_precision])
    if resume is not None or args.init_from:
        folder = resume or local_folder(args.init_from, "--init_from")
        recorded = json.loads((folder / "model_index.json").read_text())
        sources = {name: named.get(name) or value for name, value in recorded.items()}
        with readable(folder, "the model in"):
            encoders = Encoders.load(folder, sources, **how)
    else:
        encoders = Encoders(**named, **how)
    check_resolution(args.resolution, encoders.codec.factor, levels)
    return encoders


def digest_first(args, world, folder, found):
    """Rank 0 looks at all files, so that the other ranks need not."""
    if world.main:
        digest_files(folder, found, args.cache_dir)
    world.barrier()


def resume_training(args, world, resume, training, dataset):
    """Puts the checkpoint `resume` into `training`, and says what differs. Raises UserError."""
    saved = checkpoint.load_checkpoint(resume, training)
    world.print0(f"resuming {resume} at step {training.step}")
    if saved["latents"] == dataset.identity:
        return
    if args.data is None and "data" not in saved:  # of a version that did not write it down
        raise UserError(
            f"{resume} was trained on other stickers than the built-in ones: name them with --data."
        )
    world.print0("warning: the stickers have changed since: the run goes on with the new ones")


def too_many_bad_steps(output_dir, step, count):
    """Raises UserError: `count` steps in a row were not finite."""
    saved = [path for number, path in checkpoint.list_checkpoints(output_dir) if number < step]
    newest = f"The last good checkpoint is {saved[-1]}." if saved else "No checkpoint had been saved yet."
    raise UserError(
        f"{count} steps in a row, up to step {step}, gave a loss or gradients that are not finite: lower "
        f"--learning_rate, or use --mixed_precision bf16 or no. {newest}"
    )


def leave(output_dir, step, world, stop_signals):
    """Ends a run that was asked to stop and has saved, with 128 plus the signal's number."""
    world.close()
    if world.main and not (output_dir / f"checkpoint-{step}" / "files.json").exists():
        raise UserError(
            f"stopped after step {step}, as asked, which could not be saved: --resume_from_checkpoint latest "
            "goes on from the checkpoint before."
        )
    world.print0(f"stopped after step {step}, as asked; --resume_from_checkpoint latest goes on")
    sys.exit(128 + (stop_signals[0] if stop_signals else signal.SIGTERM))
