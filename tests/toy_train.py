"""train.py with a toy network in the place of `tiny`:
python tests/toy_train.py, or torchrun tests/toy_train.py."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import model  # noqa: E402
import train  # noqa: E402
from support import (
    checkpoint,  # noqa: E402
    options,  # noqa: E402
    pictures,  # noqa: E402
)

TOY = dict(
    block_out_channels=(16, 32),
    attention_levels=(True, True),
    layers_per_block=1,
    head_width=8,
    cross_attention_dim=16,
    norm_num_groups=4,
    sti_heads=2,
    sti_head_width=8,
)


def shrink(presets, sizes, generate):
    """The toy network at 32 x 32 pixels, and three sampling steps on the sheets."""
    sizes["tiny"] = TOY
    presets["tiny"] = dict(presets["tiny"], resolution=32, learning_rate=1e-2, lr_warmup_steps=2)
    return lambda *args, **kwargs: generate(*args, **{**kwargs, "num_inference_steps": 3})


def no_sheet(*args):
    """In the place of the validation sheet, which is slow."""
    return Image.new("RGB", (1, 1)), {}


NO_PICTURES = dict(
    validation_sheet=no_sheet, plot_progress=lambda *args: None
)  # in train, where nobody looks at them


class WatchedCurriculum(train.Curriculum):
    """Keeps what every draw was made from, and writes it at the end: one file per rank."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen, self.count = [], 0

    def probabilities(self, step):
        p = super().probabilities(step)
        self.seen.append(p.tolist())
        return p

    def update(self, loss):
        super().update(loss)
        self.count += 1
        rank, folder = os.environ.get("RANK", 0), Path(os.environ["TOY_CURRICULUM"])
        record = dict(losses=self.count, state=self.state_dict(), probabilities=self.seen[: self.count])
        (folder / f"rank-{rank}.json").write_text(json.dumps(record))


def count_down(module, function, calls):
    """Makes `function` of `module` kill this process at the n-th of the `calls` that write, rename or remove something
    whose path has NAME in it, TOY_KILL = n or n:NAME: halfway through the file or folder, where there is one."""
    real = getattr(module, function)
    number, _, name = os.environ["TOY_KILL"].partition(":")

    def counted(*args, **kwargs):
        calls.extend([function] * any(name in str(arg) for arg in args))
        if len(calls) == int(number):
            if function in ("save_file", "save", "write_text"):
                real(*args, **kwargs)
                path = Path(args[0 if function == "write_text" else 1])
                os.truncate(path, path.stat().st_size // 2)
            if function == "rmtree":
                for path in [path for path in Path(args[0]).rglob("*") if path.is_file()][::2]:
                    path.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(module, function, counted)


def first_start():
    """Whether torchrun has not started this process again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def poison(rank, steps):
    """Makes the loss of one rank no number at the given calls."""
    real, calls = train.masks.masked_loss, []

    def poisoned(*args):
        calls.append(1)
        bad = os.environ.get("RANK", "0") == rank and len(calls) in steps and first_start()
        return real(*args) * (float("nan") if bad else 1.0)

    train.masks.masked_loss = poisoned


def die(rank, step):
    """Kills one rank when it draws the batch of `step` for the first time."""
    real = train.data.draw_batch

    def draw_batch(dataset, clips, probabilities, seed, at, *args):
        if at == step and os.environ["RANK"] == rank and first_start():
            os.kill(os.getpid(), signal.SIGKILL)
        return real(dataset, clips, probabilities, seed, at, *args)

    train.data.draw_batch = draw_batch


def fill_disk(name):
    """Makes the disk full for weights whose path has `name` in it."""
    real = checkpoint.save_file

    def save_file(tensors, path, *args):
        if name in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path, *args)

    checkpoint.save_file = save_file


if __name__ == "__main__":
    if "TOY_NO_PICTURES" in os.environ:
        vars(train).update(NO_PICTURES)
    if "TOY_FULL" in os.environ:
        fill_disk(os.environ["TOY_FULL"])
    if "TOY_KILL" in os.environ:
        calls = []
        for module, function in (
            (checkpoint, "save_file"),
            (torch, "save"),
            (Path, "write_text"),
            (os, "rename"),
            (os, "replace"),
            (shutil, "rmtree"),
        ):
            count_down(module, function, calls)
    if "TOY_NAN" in os.environ:  # rank:call,call
        rank, steps = os.environ["TOY_NAN"].split(":")
        poison(rank, {int(step) for step in steps.split(",")})
    if "TOY_DIE" in os.environ:  # rank:step
        rank, step = os.environ["TOY_DIE"].split(":")
        die(rank, int(step))
    if "TOY_CURRICULUM" in os.environ:
        train.Curriculum = WatchedCurriculum
    torch.set_num_threads(1)
    pictures.generate = shrink(options.PRESETS, model.SIZES, pictures.generate)
    train.main()
