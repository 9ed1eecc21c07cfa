"""
What a run leaves on disk.

    output_dir/checkpoint-N/    unet/, unet_ema/, codec/, scheduler/,
                                model_index.json            what sample.py reads
                                optimizer.pt, state.json    what resuming needs besides
    output_dir/                 at the end: unet/ (EMA weights where EMA is on), codec/, scheduler/,
                                model_index.json

A folder is written under a temporary name and renamed when it is whole,
so whatever carries its final name can be trusted.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch

from model import DFGN


def with_ema(unet, ema, function):
    """Calls `function` while the U-Net holds the averaged weights; without EMA (None) just calls it."""
    if ema is None:
        return function()
    ema.store(unet.parameters())
    ema.copy_to(unet.parameters())
    try:
        return function()
    finally:
        ema.restore(unet.parameters())


def write_model(folder, unet, encoders, scheduler, settings):
    """A diffusers-style folder that `sample.load` and `DFGN.from_pretrained` read."""
    unet.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    encoders.save(folder)
    index = dict(
        _class_name="RDTF",
        unet=["model", "DFGN"],
        scheduler=["diffusers", "DDIMScheduler"],
        codec=["encoders", type(encoders.codec).__name__],
        clip=["encoders", type(encoders.clip).__name__],
        t5=["encoders", type(encoders.t5).__name__],
        **settings,
    )
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def list_checkpoints(output_dir):
    """[(step, path)] of the whole checkpoints in `output_dir`, oldest first."""
    found = [
        (re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")
    ]
    return sorted((int(match[1]), path) for match, path in found if match)


def save_checkpoint(output_dir, step, limit, unet, ema, encoders, scheduler, settings, tensors, state):
    """Writes output_dir/checkpoint-{step} and then deletes the oldest beyond `limit` (None = keep all).

    tensors: state dicts with tensors in them (optimizer, gradient scaler); state: what JSON can hold.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    writing = final.with_name(final.name + ".tmp")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    write_model(writing, unet, encoders, scheduler, settings)
    if ema is not None:
        with_ema(unet, ema, lambda: unet.save_pretrained(writing / "unet_ema"))
        state = dict(state, ema_step=ema.optimization_step)
    torch.save(tensors, writing / "optimizer.pt")
    (writing / "state.json").write_text(json.dumps(dict(state, step=step), indent=2) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    os.rename(writing, final)
    if limit is not None:
        for _, old in list_checkpoints(output_dir)[:-limit]:
            shutil.rmtree(old)
    return final


def load_checkpoint(path, unet, ema):
    """Puts the weights of a checkpoint into `unet` and `ema` (or None).
    Returns (tensors, state) as they were saved.

    Raises ValueError if the checkpoint is of another network, OSError if a part of it is missing."""
    state = json.loads((path / "state.json").read_text())
    saved = DFGN.load_config(path / "unet")
    for name in dict(unet.config):
        if not name.startswith("_") and json.dumps(saved.get(name)) != json.dumps(unet.config[name]):
            raise ValueError(
                f"{path} is of another size: its {name} is {saved.get(name)}, here it is {unet.config[name]}."
            )
    unet.load_state_dict(DFGN.from_pretrained(path / "unet", low_cpu_mem_usage=False).state_dict())
    if ema is not None:
        averaged = DFGN.from_pretrained(path / "unet_ema", low_cpu_mem_usage=False)
        ema.shadow_params = [p.detach().clone().to(unet.device) for p in averaged.parameters()]
        ema.optimization_step = state["ema_step"]
    return torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True), state


def write_finished(output_dir, unet, ema, encoders, scheduler, settings):
    """Turns `output_dir` itself into the finished folder, with the averaged weights where there are any."""
    writing = Path(output_dir) / "finished.tmp"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    with_ema(unet, ema, lambda: write_model(writing, unet, encoders, scheduler, settings))
    for part in sorted(
        writing.iterdir(), key=lambda part: part.is_file()
    ):  # model_index.json last: with it the folder is whole
        final = Path(output_dir) / part.name
        if final.is_dir():
            shutil.rmtree(final)
        os.replace(part, final)
    writing.rmdir()
