"""
The held-out loss of every (task, k), measured: is the paper's order of difficulty true for a trained network?

    cells = measure_loss(...)       # {(task, k): losses of single draws}, equal draws for every cell

summary.py makes means, standard errors and the paper's inequalities of it. N of the paper is k, the number of
valid frames.
"""

import math
from contextlib import suppress
from functools import partial
from zipfile import BadZipFile

import numpy as np
import torch
from tqdm import tqdm

import masks
from lab.items import FIDELITY
from masks import LENGTHS, NUM_FRAMES, TASKS
from model import make_scheduler
from support import machine
from support.common import replacing
from support.prior import Preconditioned


def cached_npz(path, compute):
    """The dict of arrays of an .npz file; where there is none, or a damaged one, compute() is called and
    written, whole or not at all."""
    with suppress(OSError, ValueError, EOFError, BadZipFile), np.load(path) as arrays:
        return dict(arrays)
    arrays = compute()
    with replacing(path) as writing, open(writing, "wb") as file:
        np.savez(file, **arrays)
    return arrays


FIXED = {
    "text": masks.ROWS["G0"],
    "image": masks.FIRST_FRAME,
}  # rows that are measured by themselves, at k = 8
NO_TEXT = " without text"  # of a cell: "text without text" shows nothing
GAUSSIAN = ", Gaussian alone"  # of a cell: what the fitted Gaussian knows without the network


def gaussian_alone(prior):
    """A denoiser that answers with the estimate of `prior`, a fitted GaussianPrior."""
    return Preconditioned(lambda x, *_: x, prior, make_scheduler().alphas_cumprod, math.inf).eval()


def draw(dataset, clips, task, k, i, timestep_order, seed, equal=False, hide_text=False):
    """Draw i of one cell: latents and noise (8, C, h, w), timestep, given and valid (8,), caption.

    Clip, timestep and noise are the same in every cell, so that cells can be compared draw by draw. Timesteps
    are spread evenly over 0..999, in the order of `timestep_order`. equal: 8 equally spaced frames in the
    place of key frames; hide_text: no caption, whatever the row."""
    rng = np.random.default_rng((seed, 78, i))
    clip = clips[i % len(clips)]
    share = (timestep_order[i] + rng.random()) / len(timestep_order)
    timestep = int(share * make_scheduler().config.num_train_timesteps)
    frames = dataset.read(clip, None if equal else k)
    noise = rng.standard_normal((NUM_FRAMES, *frames.shape[1:]), dtype=np.float32)
    row = FIXED[task] if task in FIXED else masks.draw_row(task, k, rng)
    latents = np.zeros_like(noise)
    latents[:k] = frames
    caption = clip.caption if row.text and not hide_text else ""
    return latents, noise, timestep, masks.condition_mask(row, k), masks.loss_mask(k), caption


@torch.no_grad()
def cell_loss(model, dataset, clips, task, k, args, hide_text=False):
    """Eq. 1 on fixed draws of one (task, k); "text" is the text-only row that every model knows, "image" the
    first frame and text; hide_text: each without its text.

    model: of sample.load; clips: held-out ones of 8 key frames
    Returns loss, unknown (the same over frames that are not given), timestep, each (draws,); and for every
    frame its error and whether it was given, (draws, 8).
    """
    denoiser, encoders, settings = model
    scheduler, device, results = make_scheduler(), machine.device(), []
    order = np.random.default_rng((args.seed, 77)).permutation(args.loss_draws)
    for start in range(0, args.loss_draws, args.batch_size):
        indices = range(start, min(start + args.batch_size, args.loss_draws))
        draws = [draw(dataset, clips, task, k, i, order, args.seed, hide_text=hide_text) for i in indices]
        *arrays, captions = zip(*draws)
        latents, noise, timesteps, given, valid = (torch.from_numpy(np.stack(a)).to(device) for a in arrays)
        noisy = scheduler.add_noise(latents, noise, timesteps)  # (B, 8, C, h, w)
        with machine.precision(device.type, settings["mixed_precision"]):
            text = encoders.text(list(captions), device)
            predicted = denoiser(noisy, latents, given, timesteps, text, valid)
        loss = masks.masked_loss(predicted, noise, valid)
        unknown = masks.masked_loss(predicted, noise, valid & ~given)
        frames = (predicted.float() - noise).square().mean(dim=(2, 3, 4))  # (B, 8)
        results.append((loss, unknown, timesteps, frames, given))
    names = ("loss", "unknown", "timestep", "frames", "given")
    return {name: torch.cat(column).cpu().numpy() for name, column in zip(names, zip(*results))}


def measure_loss(model, dataset, args, folder, dual_masks):
    """{(task, k): what cell_loss returns}, ("text", 8) and ("image", 8); at k = 8 also (task + NO_TEXT, 8),
    and both with GAUSSIAN where there is one. Every clip has 8 key frames, so all cells see the same."""
    clips = [clip for clip in dataset.split("validation") if clip.longest == NUM_FRAMES]
    tasks, hidden = (TASKS, [*FIXED, *FIDELITY]) if dual_masks else ((), [*FIXED])
    cells = [(task, NUM_FRAMES, "", "") for task in FIXED]
    cells += [(task, k, "", "") for task in tasks for k in LENGTHS]
    cells += [(task, NUM_FRAMES, NO_TEXT, "") for task in hidden]
    models, (_, encoders, settings) = {"": model}, model
    if encoders.prior is not None:
        models[GAUSSIAN] = gaussian_alone(encoders.prior), encoders, settings
        cells += [(task, NUM_FRAMES, without, GAUSSIAN) for task in hidden for without in ("", NO_TEXT)]
    losses, bar = {}, tqdm(cells if clips else [], "held-out loss of every (task, k)", unit="cell")
    for task, k, without, who in bar:
        compute = partial(cell_loss, models[who], dataset, clips, task, k, args, hide_text=bool(without))
        path = folder / f"loss-{task}{without}{who}-{k}.npz".replace(",", "").replace(" ", "-")
        losses[task + without + who, k] = cached_npz(path, compute)
    return losses
