"""
The held-out loss of every (task, k): is the paper's order of difficulty true for a trained network?

    cells = measure_loss(...)               # {(task, k): losses of single draws}, equal draws for every cell
    summarize_loss(cells, latent_std)       # means, standard errors, which of the paper's inequalities hold

The paper takes H(interpolation, N) <= H(prediction, N) <= H(generation, N) and growth with N for plausible
(section 5); its curriculum rests on it. N is k, the number of valid frames.
"""

import os

import numpy as np
import torch
from tqdm import tqdm

import masks
from lab.metrics import mean_se
from masks import LENGTHS, NUM_FRAMES, TASKS
from model import loss_weights, make_scheduler
from support.machine import precision

RANGES = ((0, 200), (200, 400), (400, 600), (600, 800), (800, 1000))  # of timesteps

# ------------------------------------------------------------------------------------------------------------
# Measuring


def kept(path, compute):
    """The dict of arrays of an .npz file; where there is none, compute() is called and written, whole or not
    at all."""
    if not path.is_file():
        arrays = compute()
        writing = path.with_suffix(f".{os.getpid()}.tmp")
        with open(writing, "wb") as file:
            np.savez(file, **arrays)
        os.replace(writing, path)
    with np.load(path) as arrays:
        return dict(arrays)


@torch.no_grad()
def cell_loss(unet, encoders, dataset, clips, task, k, args, mixed_precision):
    """Eq. 1 on fixed draws of one (task, k); "text" is the text-only row that every model knows.

    Draw i has the same clip, timestep and noise in every cell, so that cells can be compared draw by draw.
    Timesteps are spread evenly over 0..999.
    Returns loss, unknown (the same over frames that are not given), timestep: each (draws,).
    """
    schedule, count, results = make_scheduler(), args.loss_draws, []
    order = np.random.default_rng((args.seed, 77)).permutation(count)
    for start in range(0, count, args.batch_size):
        indices = range(start, min(start + args.batch_size, count))
        parts = []
        for i in indices:
            rng = np.random.default_rng((args.seed, 78, i))
            clip = clips[i % len(clips)]
            timestep = int((order[i] + rng.random()) / count * schedule.config.num_train_timesteps)
            frames = dataset.read(clip, k)
            noise = rng.standard_normal((NUM_FRAMES, *frames.shape[1:]), dtype=np.float32)
            row = masks.TEXT_ONLY if task == "text" else masks.draw_row(task, k, rng)
            latents = np.zeros_like(noise)
            latents[:k] = frames
            parts.append(
                (
                    latents,
                    noise,
                    timestep,
                    masks.condition_mask(row, k),
                    masks.loss_mask(k),
                    clip.caption if row.text else "",
                )
            )
        *arrays, captions = zip(*parts)
        latents, noise, timesteps, given, valid = (
            torch.from_numpy(np.stack(a)).to(unet.device) for a in arrays
        )
        noisy = schedule.add_noise(latents, noise, timesteps)
        shown = latents * given[:, :, None, None, None]
        with precision(unet.device.type, mixed_precision):
            text = encoders.text(list(captions), unet.device)
            predicted = unet(noisy, shown, timesteps, text, valid)
        results.append(
            (
                masks.masked_loss(predicted, noise, valid),
                masks.masked_loss(predicted, noise, valid & ~given),
                timesteps,
            )
        )
    loss, unknown, timestep = (torch.cat(column).cpu().numpy() for column in zip(*results))
    return dict(loss=loss, unknown=unknown, timestep=timestep)


def measure_loss(unet, encoders, dataset, args, recorded, folder, ddu):
    """{(task, k): what cell_loss returns}, and ("text", 8). Every clip has 8 key frames, so all cells see the
    same."""
    clips = [clip for clip in dataset.split("validation") if clip.longest == NUM_FRAMES]
    cells = [("text", NUM_FRAMES), *((task, k) for task in TASKS for k in LENGTHS if ddu)]
    compute = lambda task, k: cell_loss(
        unet, encoders, dataset, clips, task, k, args, recorded["mixed_precision"]
    )
    return {
        (task, k): kept(folder / f"loss-{task}-{k}.npz", lambda: compute(task, k))
        for task, k in tqdm(cells if clips else [], "held-out loss of every (task, k)", unit="cell")
    }


# ------------------------------------------------------------------------------------------------------------
# Means, and the paper's inequalities


def compare(loss, harder, easier):
    """The mean of loss[harder] - loss[easier], draw by draw, and whether it is positive."""
    d = mean_se(loss[harder] - loss[easier])
    return dict(
        harder=list(harder),
        easier=list(easier),
        difference=d["mean"],
        se=d["se"],
        holds=d["mean"] >= 0,
        refuted=d["mean"] < -2 * d["se"],
    )


def summarize_loss(cells, latent_std):
    """cells: {(task, k): dict(loss, unknown, timestep)} of evaluate.cell_loss -> the section "loss" of the
    report."""
    # "balanced": as tiny and small are trained. Eq. 1 alone weighs small timesteps most, at which there is next to
    # nothing to decide.
    weights, views = loss_weights(latent_std).double().numpy(), {}
    for view, (name, weighted) in {
        "Eq. 1": ("loss", False),
        "balanced": ("loss", True),
        "Eq. 1, unknown frames": ("unknown", False),
        "balanced, unknown frames": ("unknown", True),
    }.items():
        loss = {
            cell: arrays[name] * (weights[arrays["timestep"]] if weighted else 1)
            for cell, arrays in cells.items()
        }
        entry = {"text only, k = 8": mean_se(loss["text", NUM_FRAMES])}
        if len(cells) > 1:
            entry["cells"] = {task: {str(k): mean_se(loss[task, k]) for k in LENGTHS} for task in TASKS}
            entry["tasks"] = {
                task: mean_se(np.mean([loss[task, k] for k in LENGTHS], axis=0)) for task in TASKS
            }
            entry["mean"] = mean_se(np.mean([loss[task, k] for task in TASKS for k in LENGTHS], axis=0))
            entry["order of tasks"] = [
                compare(loss, (hard, k), (easy, k)) for k in LENGTHS for easy, hard in zip(TASKS, TASKS[1:])
            ]
            entry["order of lengths"] = [
                compare(loss, (task, k + 1), (task, k)) for task in TASKS for k in LENGTHS[:-1]
            ]
            timestep = next(iter(cells.values()))["timestep"]
            within = [(timestep >= low) & (timestep < high) for low, high in RANGES]
            entry["by timestep"] = {
                task: {
                    f"{low}-{high - 1}": mean_se(np.mean([loss[task, k][inside] for k in LENGTHS], axis=0))
                    for (low, high), inside in zip(RANGES, within)
                    if inside.any()
                }
                for task in TASKS
            }
        views[view] = entry
    return views
