"""
What a run leaves on disk, written whole or not at all.

    output_dir/checkpoint-N/    unet/, unet_ema/, vae/, prior/, scheduler/,
                                model_index.json            what sample.py reads
                                optimizer.pt, state.json    what resuming needs besides
                                files.json                  sha256 of each of these files
    output_dir/                 at the end: unet/ (EMA weights where EMA is on), vae/, prior/, scheduler/,
                                model_index.json, README.md (the model card)

A folder is written under a temporary name and renamed when it is whole, so whatever carries its final name
can be trusted. Weights and optimizer state are stored whole, under the names of the U-Net's parameters,
however many ranks they were spread over: any number of ranks can go on from them. What is saved is called
`training`: it has unet, average (or None), optimizer, lr_schedule, scaler, curriculum, and the numbers step,
skipped, bad_in_row.
"""

import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError

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

from support.common import UserError, locked, one_line
from support.optim import align_moments

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
WEIGHTS = "diffusion_pytorch_model.safetensors"
NUMBERS = ("step", "skipped", "bad_in_row")

# ------------------------------------------------------------------------------------------------------------
# The output folder of a run


@contextmanager
def output_lock(output_dir):
    """Makes `output_dir` and keeps other runs out of it: UserError if one is there. The process holds the
    lock until it exits, however it does."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with locked(output_dir / ".lock") as alone:
        if alone is False:
            raise UserError(
                f"--output_dir {output_dir} is in use by a run that has not ended: end it, or choose another "
                "folder."
            )
        yield


def remove(folder):
    """Takes the name off a checkpoint before its files go, so that a kill leaves nothing that looks whole.
    What cannot be removed is left to `remove_leftovers`."""
    gone = folder.with_name(folder.name + ".old.tmp")
    with suppress(OSError):
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(output_dir):
    """Removes what a killed run was writing or removing."""
    for pattern in ("checkpoint-*.tmp", "finished.tmp"):
        for leftover in Path(output_dir).glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
    for path in Path(output_dir).glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):  # of common.replacing
            path.unlink()


def list_checkpoints(output_dir):
    """[(step, path)] of the whole checkpoints in `output_dir`, oldest first."""
    paths = Path(output_dir).glob("checkpoint-*")
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in paths]
    return sorted((int(match[1]), path) for match, path in found if match)


def digests(folder):
    """{path inside the folder: sha256} of its files."""

    def digest(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "files.json")
    names = [path.relative_to(folder).as_posix() for path in files]
    with ThreadPoolExecutor() as threads:  # hashlib releases the GIL, and takes as long as writing
        return dict(zip(names, threads.map(digest, files)))


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


def choose_checkpoint(output_dir, wanted, print0):
    """The checkpoint that --resume_from_checkpoint asks for ("latest", a path, or None), None for a fresh
    start. A damaged one is never used: `latest` then takes the one before it. Raises UserError."""
    checkpoints = [path for _, path in list_checkpoints(output_dir)]
    finished = [name for name in ("model_index.json", "README.md") if (output_dir / name).exists()]
    holds_run, problem = checkpoints or (output_dir / "log.jsonl").exists(), None
    if finished and not checkpoints:
        problem = (
            f"--output_dir {output_dir} holds {finished[0]} and no checkpoint to go on from: choose another "
            "folder, so that nothing in it is overwritten (--init_from starts a run from a finished model)."
        )
    elif wanted == "latest":
        for path in reversed(checkpoints):
            damage = find_damage(path)
            if damage is None:
                return path
            print0(f"{path} is damaged ({damage}): trying the one before it")
        if checkpoints:
            problem = (
                f"--output_dir {output_dir}: all its checkpoints are damaged: start anew in another folder."
            )
        else:
            print0(f"{output_dir} holds no checkpoint: the run starts at its beginning")
    elif wanted:
        path = Path(wanted)
        flag = f"--resume_from_checkpoint {path}"
        if not (path / "state.json").is_file():
            problem = f"{flag} is no checkpoint: give latest or a checkpoint-N folder."
        elif holds_run and path.resolve().parent != output_dir.resolve():
            problem = f"{flag} is of another run than --output_dir {output_dir} holds: choose another folder."
        elif damage := find_damage(path):
            problem = f"{flag} is damaged ({damage}): give another, or latest."
        else:
            return path
    elif holds_run:
        problem = (
            f"--output_dir {output_dir} already holds a run: continue it with --resume_from_checkpoint "
            "latest, or choose another folder."
        )
    if problem:
        raise UserError(problem)
    return None


def check_schedule(checkpoint, schedule):
    """Refuses to resume with flags under which the run would not be the one that was interrupted.
    schedule: {flag: value} of this run. Raises UserError."""
    saved = json.loads((checkpoint / "state.json").read_text())["schedule"]
    for name, value in schedule.items():
        if saved.get(name) != value:
            flag = f"--{name}"
            if name == "global_batch":
                flag = "--train_batch_size x --gradient_accumulation_steps x processes"
            raise UserError(
                f"{flag} is {value}, but {checkpoint} was trained with {saved.get(name)}: a resumed run "
                "keeps its schedule. Give the old value, or let a new run in another --output_dir start from "
                f"its weights: --init_from {checkpoint}"
            )


# ------------------------------------------------------------------------------------------------------------
# Writing. Every rank calls these functions; only the one with `main` writes


class SaveError(UserError):
    """Something could not be written. Checkpoints saved before are still there."""


@contextmanager
def removed_on_failure(writing, final):
    """Turns a failure to write into SaveError, with the half-written folder gone."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap the system's error
        shutil.rmtree(writing, ignore_errors=True)
        reason = one_line(error)
        raise SaveError(
            f"{final} could not be written ({reason}): make room on its disk. Checkpoints saved before are "
            "unharmed."
        ) from error


def whole_weights(unet):
    """{name: tensor in the CPU's memory} on rank 0; every rank has to call it."""
    return get_model_state_dict(unet, options=WHOLE)


def class_of(unet):
    """The class of a network, before which sharding puts one of its own."""
    return next(kind for kind in type(unet).__mro__ if not kind.__name__.startswith("FSDP"))


def write_unet(folder, unet, weights):
    """unet/ as `DFGN.from_pretrained` reads it, or that of another class of network."""
    folder.mkdir(parents=True)
    config = json.loads(unet.to_json_string()) | dict(_class_name=class_of(unet).__name__)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()}, folder / WEIGHTS, dict(format="pt")
    )


def write_parts(folder, unet, encoders, scheduler, settings):
    """What a diffusers-style folder holds besides weights of the U-Net. Named parts are not copied."""
    scheduler.save_pretrained(folder / "scheduler")
    encoders.save(folder)
    network = class_of(unet)
    classes = dict(unet=[network.__module__, network.__name__], scheduler=["diffusers", "DDIMScheduler"])
    index = dict(_class_name="RDTF", **classes, **encoders.sources(), **settings)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_checkpoint(output_dir, training, parts, about, limit, main=True):
    """Writes output_dir/checkpoint-STEP and then deletes the oldest of those before it beyond `limit` (None:
    keep all). What has a higher number is damaged, or was turned back from: it stays. Raises SaveError.

    parts: (encoders, scheduler, settings), as write_parts takes them; about: a dict that JSON can hold
    """
    # First what all ranks do together, then what one writes: a full disk must not leave the others waiting.
    unet, average, step = training.unet, training.average, training.step
    weights = dict(unet=whole_weights(unet))
    if average is not None:
        weights["unet_ema"] = average.weights(unet)
    moments = get_optimizer_state_dict(unet, training.optimizer, options=WHOLE)
    if not main:
        return
    tensors = dict(lr_schedule=training.lr_schedule.state_dict(), scaler=training.scaler.state_dict())
    state = {**about, "curriculum": training.curriculum.state_dict()}
    state |= {name: getattr(training, name) for name in NUMBERS}
    state["ema_step"] = average.ema.optimization_step if average is not None else None
    final = Path(output_dir) / f"checkpoint-{step}"
    writing = final.with_name(final.name + ".tmp")
    with removed_on_failure(writing, final):
        shutil.rmtree(writing, ignore_errors=True)
        for name, tensor in weights.items():
            write_unet(writing / name, unet, tensor)
        encoders, scheduler, settings = parts
        write_parts(writing, unet, encoders, scheduler, dict(settings, step=step))
        torch.save(dict(tensors, optimizer=moments), writing / "optimizer.pt")
        (writing / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        (writing / "files.json").write_text(json.dumps(digests(writing), indent=2) + "\n")
        remove(final)
        os.rename(writing, final)
    if limit is not None:
        before = [path for number, path in list_checkpoints(output_dir) if number < step]
        for path in before[: max(0, len(before) + 1 - limit)]:
            remove(path)


def load_checkpoint(path, training):
    """Puts a checkpoint into `training`, on however many ranks. Returns state.json, a dict. Raises UserError
    if it is of another network, or a part of it is missing or damaged."""
    unet, whole = training.unet, StateDictOptions(full_state_dict=True)
    try:
        state = json.loads((path / "state.json").read_text())
        saved = unet.load_config(path / "unet")
        for name in dict(unet.config):
            if not name.startswith("_") and json.dumps(saved.get(name)) != json.dumps(unet.config[name]):
                raise ValueError(f"its {name} is {saved.get(name)}, here it is {unet.config[name]}")
        if training.average is not None:
            averages = load_file(path / "unet_ema" / WEIGHTS)
            training.average.load(unet, averages, state["ema_step"])
        set_model_state_dict(unet, load_file(path / "unet" / WEIGHTS), options=whole)
        tensors = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        set_optimizer_state_dict(unet, training.optimizer, tensors["optimizer"], options=whole)
        align_moments(training.optimizer)
        training.lr_schedule.load_state_dict(tensors["lr_schedule"])
        training.scaler.load_state_dict(tensors["scaler"])
        training.curriculum.load_state_dict(state["curriculum"])
        for name in NUMBERS:
            setattr(training, name, state[name])
    except UserError:  # of the curriculum
        raise
    except (ValueError, KeyError, OSError, RuntimeError, UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} cannot be resumed, optimizer.pt or weights do not fit: start from another ({reason})."
        ) from error
    return state


def write_finished(output_dir, training, parts, card, main=True):
    """Turns `output_dir` itself into the finished folder, with the averaged weights where there are any.
    parts: as of save_checkpoint; card: the text of its README.md. Raises SaveError."""
    unet, average = training.unet, training.average
    weights = whole_weights(unet) if average is None else average.weights(unet)
    if not main:
        return
    writing = Path(output_dir) / "finished.tmp"
    encoders, scheduler, settings = parts
    with removed_on_failure(writing, output_dir):
        shutil.rmtree(writing, ignore_errors=True)
        write_unet(writing / "unet", training.unet, weights)
        write_parts(writing, unet, encoders, scheduler, dict(settings, step=training.step))
        # An --output_dir of letters that this locale lacks stands in it as surrogates.
        (writing / "README.md").write_text(card, encoding="utf-8", errors="surrogateescape")
        # Parts of another run that this model does not have, and the index of the model that goes
        for name in {"vae", "prior"} - {part.name for part in writing.iterdir()}:
            shutil.rmtree(Path(output_dir) / name, ignore_errors=True)
        (Path(output_dir) / "model_index.json").unlink(missing_ok=True)
        order = sorted(writing.iterdir(), key=lambda part: (part.name == "model_index.json", part.name))
        for part in order:  # model_index.json last: with it the folder is whole
            final = Path(output_dir) / part.name
            if final.is_dir():
                shutil.rmtree(final)
            os.replace(part, final)
        writing.rmdir()
