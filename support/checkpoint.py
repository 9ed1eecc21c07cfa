"""
What a run leaves on disk.

    output_dir/checkpoint-N/    unet/, unet_ema/, codec/, scheduler/,
                                model_index.json            what sample.py reads
                                optimizer.pt, state.json    what resuming needs besides
                                files.json                  sha256 of each of these files
    output_dir/                 at the end: unet/ (EMA weights where EMA is on), codec/, scheduler/,
                                model_index.json, README.md (the model card)

A folder is written under a temporary name and renamed when it is whole,
so whatever carries its final name can be trusted. Weights and optimizer state are stored whole, under the names
of the U-Net's parameters, however many ranks they were spread over: any number of ranks can go on from them.
Functions that take `main_process` are called by every rank; only that one writes.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from model import DFGN
from support.common import UserError

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def whole_weights(unet, average=None):
    """{name: tensor in the CPU's memory} on rank 0; every rank has to call it. With `average` the averaged weights,
    copied, since they stand in the network for a moment only."""
    if average is None:
        return get_model_state_dict(unet, options=WHOLE)
    return average.applied(unet, lambda: {name: w.clone() for name, w in whole_weights(unet).items()})


def write_unet(folder, unet, weights):
    """unet/ as `DFGN.from_pretrained` reads it."""
    folder.mkdir(parents=True)
    config = json.loads(unet.to_json_string()) | dict(_class_name="DFGN")  # sharding renames the class
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / WEIGHTS, dict(format="pt"))


def write_index(folder, encoders, scheduler, settings):
    """What a diffusers-style folder holds besides the U-Net. Pre-trained encoders are named, not copied."""
    scheduler.save_pretrained(folder / "scheduler")
    encoders.save(folder)
    index = dict(
        _class_name="RDTF",
        unet=["model", "DFGN"],
        scheduler=["diffusers", "DDIMScheduler"],
        **encoders.sources(),
        **settings,
    )
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def list_checkpoints(output_dir):
    """[(step, path)] of the whole checkpoints in `output_dir`, oldest first."""
    found = [
        (re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")
    ]
    return sorted((int(match[1]), path) for match, path in found if match)


class SaveError(UserError):
    """Something could not be written, in one sentence. What had been saved before is still there."""


@contextmanager
def removed_on_failure(writing, final):
    """Turns a failure to write into SaveError, with the half-written folder gone."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap the system's error
        shutil.rmtree(writing, ignore_errors=True)
        reason = " ".join(str(error).split())[:200]
        raise SaveError(
            f"{final} could not be written ({reason}): make room on its disk. Checkpoints saved before are unharmed."
        ) from error


def remove(folder):
    """Takes the name off a checkpoint before its files go, so that a kill leaves nothing that looks whole. What
    cannot be removed is left to `sweep`."""
    gone = folder.with_name(folder.name + ".old.tmp")
    with suppress(OSError):
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def sweep(output_dir):
    """Removes what a killed run was writing or removing."""
    for pattern in ("checkpoint-*.tmp", "finished.tmp"):
        for leftover in Path(output_dir).glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def alone_in(output_dir):
    """Keeps other runs out of `output_dir` while this one is there: BlockingIOError if one is already. The lock is
    that of the process, and goes with it however it ends."""
    with open(Path(output_dir) / ".lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError from error
            # else a disk without locks
        yield


def digests(folder):
    """{path inside the folder: sha256} of its files."""

    def digest(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "files.json")
    with ThreadPoolExecutor() as threads:  # hashing holds no lock of Python's, and takes as long as writing
        return {
            path.relative_to(folder).as_posix(): found
            for path, found in zip(files, threads.map(digest, files))
        }


def find_damage(folder):
    """What is wrong with a checkpoint, in a few words; None if it is what was saved."""
    try:
        expected = json.loads((folder / "files.json").read_text())
    except (OSError, ValueError):
        expected = None
    if not isinstance(expected, dict) or not expected:
        return "files.json is missing or unreadable"
    try:
        found = digests(folder)
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read: {error.strerror}"
    for name, digest in expected.items():
        if found.get(name) != digest:
            return f"{name} is {'not what was saved' if name in found else 'missing'}"
    return None


def choose_checkpoint(args, say):
    """The checkpoint that --resume_from_checkpoint asks for, None for a fresh start. A damaged one is never used:
    `latest` then takes the one before it. Raises UserError."""
    checkpoints = [path for _, path in list_checkpoints(args.output_dir)]
    finished = [name for name in ("model_index.json", "README.md") if (args.output_dir / name).exists()]
    if finished and not checkpoints:
        raise UserError(
            f"--output_dir {args.output_dir} holds {finished[0]} and no checkpoint to go on from: choose "
            "another folder, so that nothing in it is overwritten."
        )
    if args.resume_from_checkpoint == "latest":
        for path in reversed(checkpoints):
            damage = find_damage(path)
            if damage is None:
                return path
            say(f"{path} is damaged ({damage}): trying the one before it")
        if checkpoints:
            raise UserError(
                f"--output_dir {args.output_dir}: all its checkpoints are damaged: "
                "start anew in another folder."
            )
        return None
    if args.resume_from_checkpoint:
        path = Path(args.resume_from_checkpoint)
        if not (path / "state.json").is_file():
            raise UserError(
                f"--resume_from_checkpoint {path} is no checkpoint: give latest or a checkpoint-N folder."
            )
        if checkpoints and path.resolve().parent != args.output_dir.resolve():
            raise UserError(
                f"--resume_from_checkpoint {path} is of another run than --output_dir {args.output_dir} "
                "holds: choose another --output_dir."
            )
        if damage := find_damage(path):
            raise UserError(
                f"--resume_from_checkpoint {path} is damaged ({damage}): give another, or latest."
            )
        return path
    if checkpoints or (args.output_dir / "log.jsonl").exists():
        raise UserError(
            f"--output_dir {args.output_dir} already holds a run: continue it with "
            "--resume_from_checkpoint latest, or choose another folder."
        )
    return None


def save_checkpoint(
    output_dir,
    step,
    limit,
    unet,
    average,
    optimizer,
    encoders,
    scheduler,
    settings,
    tensors,
    state,
    main_process,
):
    """Writes output_dir/checkpoint-{step} and then deletes the oldest of those before it beyond `limit` (None = keep
    all). What has a higher number is damaged, or was turned back from: it stays.

    average: the averaged weights, or None; tensors: further state dicts with tensors in them; state: what JSON
    can hold
    """
    # First what all ranks do together, then what one writes: a full disk must not leave the others waiting.
    weights, averaged = whole_weights(unet), None
    if average is not None:
        averaged = whole_weights(unet, average)
        state = dict(state, ema_step=average.ema.optimization_step)
    moments = get_optimizer_state_dict(unet, optimizer, options=WHOLE)
    if not main_process:
        return
    final = Path(output_dir) / f"checkpoint-{step}"
    writing = final.with_name(final.name + ".tmp")
    with removed_on_failure(writing, final):
        shutil.rmtree(writing, ignore_errors=True)
        write_unet(writing / "unet", unet, weights)
        if averaged is not None:
            write_unet(writing / "unet_ema", unet, averaged)
        write_index(writing, encoders, scheduler, settings)
        torch.save(dict(tensors, optimizer=moments), writing / "optimizer.pt")
        (writing / "state.json").write_text(json.dumps(dict(state, step=step), indent=2) + "\n")
        (writing / "files.json").write_text(json.dumps(digests(writing), indent=2) + "\n")
        remove(final)
        os.rename(writing, final)
    if limit is not None:
        before = [path for number, path in list_checkpoints(output_dir) if number < step]
        for path in before[: max(0, len(before) + 1 - limit)]:
            remove(path)


def load_checkpoint(path, unet, average, optimizer):
    """Puts a checkpoint into `unet`, `average` (or None) and `optimizer`, on however many ranks.
    Returns (tensors, state) as they were saved.

    Raises ValueError if the checkpoint is of another network, OSError if a part of it is missing."""
    state = json.loads((path / "state.json").read_text())
    saved = DFGN.load_config(path / "unet")
    for name in dict(unet.config):
        if not name.startswith("_") and json.dumps(saved.get(name)) != json.dumps(unet.config[name]):
            raise ValueError(
                f"{path} is of another size: its {name} is {saved.get(name)}, here it is {unet.config[name]}."
            )
    options = StateDictOptions(full_state_dict=True)
    if average is not None:
        set_model_state_dict(unet, load_file(path / "unet_ema" / WEIGHTS), options=options)
        average.load(unet, state["ema_step"])
    set_model_state_dict(unet, load_file(path / "unet" / WEIGHTS), options=options)
    tensors = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    set_optimizer_state_dict(unet, optimizer, tensors.pop("optimizer"), options=options)
    return tensors, state


def write_finished(output_dir, unet, average, encoders, scheduler, settings, card, main_process):
    """Turns `output_dir` itself into the finished folder, with the averaged weights where there are any.
    card: the text of its README.md"""
    writing = Path(output_dir) / "finished.tmp"
    weights = whole_weights(unet, average)
    if not main_process:
        return
    with removed_on_failure(writing, output_dir):
        shutil.rmtree(writing, ignore_errors=True)
        write_unet(writing / "unet", unet, weights)
        write_index(writing, encoders, scheduler, settings)
        (writing / "README.md").write_text(card)
        order = sorted(writing.iterdir(), key=lambda part: (part.name == "model_index.json", part.name))
        for part in order:  # model_index.json last: with it the folder is whole
            final = Path(output_dir) / part.name
            if final.is_dir():
                shutil.rmtree(final)
            os.replace(part, final)
        writing.rmdir()
