"""Toy runs of train.py: how they are started, in this process or in others, and what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from safetensors.torch import load_file

import train
from support.log import read_log

ROOT = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)

FLAGS = dict(
    preset="toy",
    resolution=16,
    mixed_precision="no",
    num_workers=0,
    validation_steps=3,
    validation_prompts="a red heart",
    checkpointing_steps=3,
    checkpoints_total_limit=0,
)
# In train: much is logged, and little is looked at. Then either no pictures, or quick ones.
QUICK = dict(LOG_EVERY=1, VALIDATION_SAMPLES=4)
NO_PICTURES = dict(
    validation_sheet=lambda *args: (Image.new("RGB", (1, 1)), {}),
    plot_progress=lambda *args: None,
)
FEW_STEPS = 3  # of a sheet, in sample.SHEET_STEPS


def words(flags):
    """{name: value} as words of a command line; True and False are switches, None is left out."""
    line = []
    for name, value in flags.items():
        if value is None:
            continue
        if isinstance(value, bool):
            line.append(f"--{name}" if value else f"--no-{name}")
        else:
            line += [f"--{name}", str(value)]
    return line


def run_here(main, *arguments):
    """Calls a program's main in this process. Errors raise SystemExit."""
    with mock.patch.object(sys, "argv", ["program.py", *map(str, arguments)]):
        main()


def train_here(out, **flags):
    """Trains in this process. Returns the output folder, `out`."""
    run_here(train.main, *words(FLAGS | dict(output_dir=out) | flags))
    return out


def start(out, launcher=(), env=None, **flags):
    """Starts the same in processes of their own, with the faults that env asks for. What they say is
    in `out`.txt."""
    program = [*launcher, "-m", "tests.stress.toy_train", *words(FLAGS | dict(output_dir=out) | flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    if launcher and torch.cuda.device_count() < 2:  # a GPU takes one process
        env["CUDA_VISIBLE_DEVICES"] = ""
    with open(f"{out}.txt", "w") as said:
        return subprocess.Popen(
            [sys.executable, *map(str, program)], cwd=ROOT, env=env, stdout=said, stderr=subprocess.STDOUT
        )


def said(out):
    return Path(f"{out}.txt").read_text()


def train_elsewhere(out, launcher=(), env=None, **flags):
    """As train_here, in processes of their own."""
    status = start(out, launcher, env, **flags).wait(timeout=300)
    assert status == 0, said(out)[-3000:]
    return out


def weights(folder, part="unet"):
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def state(out, step):
    return json.loads((out / f"checkpoint-{step}" / "state.json").read_text())


def log(out):
    """The entries of a run's log, without what tells of the machine."""
    entries = read_log(out / "log.jsonl")
    return [{name: x for name, x in entry.items() if name != "clips_per_second"} for entry in entries]


def same(a, b):
    """Equality of nested dicts, lists and tensors, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def same_end(a, b):
    """Whether two finished runs have the same weights and the same log."""
    return same(weights(a), weights(b)) and log(a) == log(b)
