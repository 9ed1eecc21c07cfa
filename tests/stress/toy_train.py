"""
train.py in a hurry: little to validate, no pictures, and the faults that environment variables ask for.

    python -m tests.stress.toy_train --preset toy ...       or torchrun -m tests.stress.toy_train ...

    TOY_KILL=5 or 5:NAME   kills it at its 5th call that writes, renames or removes something, or the 5th that
                           has NAME in its path: halfway through the file or folder, where there is one
    TOY_NAN=1:3            makes the 3rd loss of rank 1 no number
    TOY_DIE=1:5            kills rank 1 when it draws the batch of step 5
    TOY_FULL=NAME          has a full disk for weights with NAME in their path
    TOY_RECORD=FOLDER      each rank writes there what it ends with: rank-N.json
    TOY_PICTURES=1         draws sheets after all, in few steps

TOY_NAN and TOY_DIE hold until torchrun starts the processes again.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import torch

import data
import sample
import train
from support import checkpoint
from tests.repeatable import be_repeatable
from tests.runs import FEW_STEPS, NO_PICTURES, QUICK

RANK = os.environ.get("RANK", "0")
WRITING = [(checkpoint, "save_file"), (torch, "save"), (Path, "write_text")]
MOVING = [(os, "rename"), (os, "replace"), (shutil, "rmtree")]


def in_a_path(name, arguments):
    """Whether one of the arguments of a call is a path with `name` in it."""
    return any(isinstance(argument, (str, Path)) and name in str(argument) for argument in arguments)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_call(number, name):
    """Kills this process at one of its writing, renaming and removing calls, of those with `name` in their
    path."""
    calls = []

    def count_down(module, function):
        real = getattr(module, function)

        def counted(*args, **kwargs):
            calls.extend([function] * in_a_path(name, args))
            if len(calls) == number:
                if (module, function) in WRITING:
                    real(*args, **kwargs)
                    path = Path(args[0 if function == "write_text" else 1])
                    os.truncate(path, path.stat().st_size // 2)
                if function == "rmtree":
                    for path in [path for path in Path(args[0]).rglob("*") if path.is_file()][::2]:
                        path.unlink()
                kill()
            return real(*args, **kwargs)

        setattr(module, function, counted)

    for module, function in WRITING + MOVING:
        count_down(module, function)


def at_each_loss(patch, change):
    """Multiplies both losses of each batch by what change(call) returns; the first call is 1. patch: setattr,
    or what undoes it in the end."""
    real, calls = train.noise_loss, []

    def changed(*args):
        calls.append(1)
        losses = real(*args)  # the one to train with, and the one that the curriculum reads
        factor = change(len(calls))
        return tuple(loss * factor for loss in losses)

    patch(train, "noise_loss", changed)


def die_at_step(step):
    """Kills this process when it draws the batch of `step`."""
    real = data.draw_batch

    def draw_batch(dataset, clips, probabilities, seed, at, *args):
        if at == step:
            kill()
        return real(dataset, clips, probabilities, seed, at, *args)

    data.draw_batch = draw_batch


def fill_disk(name):
    """Lets no weights be written whose path has `name` in it."""
    real = checkpoint.save_file

    def save_file(tensors, path, *args):
        if name in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path, *args)

    checkpoint.save_file = save_file


def numbers(tensors):
    """How many numbers this rank holds of some tensors, and how many there are: two ints."""
    held = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.numel() for tensor in held), sum(tensor.numel() for tensor in tensors)


def record(folder):
    """Writes what the training of this rank ends with: its curriculum, and which shares of the weights, of
    AdamW's moments and of the averaged weights it holds."""
    real = train.train

    def train_and_record(run, training, stop_signals):
        real(run, training, stop_signals)
        held, whole = numbers(list(training.unet.parameters()))
        moments = [x for state in training.optimizer.state.values() for x in state.values() if x.ndim]
        held_moments, whole_moments = numbers(moments)
        averaged, _ = numbers(training.average.ema.shadow_params)
        shares = dict(weights=held / whole, moments=held_moments / whole_moments, averages=averaged / whole)
        ending = dict(curriculum=training.curriculum.state_dict(), shares=shares)
        (folder / f"rank-{RANK}.json").write_text(json.dumps(ending))

    train.train = train_and_record


def inject(faults):
    """Puts in the faults that `faults`, the environment, asks for."""
    if "TOY_KILL" in faults:
        number, _, name = faults["TOY_KILL"].partition(":")
        kill_at_call(int(number), name)
    if "TOY_FULL" in faults:
        fill_disk(faults["TOY_FULL"])
    if "TOY_RECORD" in faults:
        record(Path(faults["TOY_RECORD"]))
    if faults.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    bad_rank, _, bad = faults.get("TOY_NAN", "").partition(":")
    if bad_rank == RANK:
        at_each_loss(setattr, lambda call: float("nan") if call == int(bad) else 1.0)
    dying_rank, _, step = faults.get("TOY_DIE", "").partition(":")
    if dying_rank == RANK:
        die_at_step(int(step))


def main():
    be_repeatable()
    vars(train).update(QUICK)
    if "TOY_PICTURES" in os.environ:
        sample.SHEET_STEPS = FEW_STEPS
    else:
        vars(train).update(NO_PICTURES)
    inject(os.environ)
    train.main()


if __name__ == "__main__":
    main()
