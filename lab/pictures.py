"""
Pictures of a report: the loss of every (task, k), the loss over the diffusion step and sheets of samples;
and the samples that an arm leaves.
"""

import numpy as np
from PIL import Image

from lab import metrics
from lab.items import given_frames
from masks import LENGTHS, NUM_FRAMES, TASKS
from support.common import evenly
from support.pictures import pyplot, save_png, sheet

plt = pyplot()
SHEET_ITEMS = 8  # samples of each task on its sheet
STRIPS = 0, 17  # which samples of each task samples.png has: of different rows of Table 7


# ------------------------------------------------------------------------------------------------------------
# The pictures of report.py


def heat_map(entry, title, axis):
    """The loss of every (task, k), its standard error below it; `entry`: a view of the section "loss"."""
    mean = np.array([[entry["cells"][task][str(k)]["mean"] for k in LENGTHS] for task in TASKS])
    image = axis.imshow(mean, cmap="viridis", aspect="auto")
    middle = (mean.min() + mean.max()) / 2
    for row, task in enumerate(TASKS):
        for column, k in enumerate(LENGTHS):
            text = f"{mean[row, column]:.3f}\n± {entry['cells'][task][str(k)]['se']:.3f}"
            color = "white" if mean[row, column] < middle else "black"
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    axis.set_xticks(range(len(LENGTHS)), [f"k = {k}" for k in LENGTHS], fontsize=9)
    axis.set_yticks(range(len(TASKS)), TASKS, fontsize=9)
    axis.set_title(title, fontsize=10)
    axis.figure.colorbar(image, ax=axis, shrink=0.85)


def plot_heat_maps(loss):
    """Four heat maps (matplotlib figure): a column per weighting, unknown frames alone below all valid
    ones."""
    figure, axes = plt.subplots(2, 2, figsize=(13, 5.4), dpi=100, layout="constrained")
    for axis, (view, entry) in zip(axes.flat, loss.items()):
        heat_map(entry, f"held-out loss: {view}", axis)
    return figure


def plot_timesteps(loss):
    """The loss of the three tasks over the diffusion step (matplotlib figure)."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), dpi=100, layout="constrained")
    for axis, view in zip(axes, ("Eq. 1", "balanced")):
        for task, ranges in loss[view]["by timestep"].items():
            mean, se = ([r[name] for r in ranges.values()] for name in ("mean", "se"))
            axis.errorbar(list(ranges), mean, se, marker="o", capsize=3, linewidth=1, label=task)
        axis.set(title=f"held-out loss over the diffusion step: {view}", yscale="log")
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def sample_sheet(task, clips, readings):
    """PIL.Image: the ground truth, where there is one, above the sample, and below it the cross-fade."""
    rows, labels, marks = [], [], []
    for i in evenly([i for i, item in enumerate(clips.items) if item.task == task], SHEET_ITEMS):
        item, given = clips.items[i], given_frames(clips.items[i])
        new = " (held-out words)" if item.held_out and item.words else ""
        read = "; read as " + ", ".join(readings[i]) if readings else ""
        shown = [(clips.made["network"][i], f"{task} ({item.row}): {item.prompt}{new}{read}", given.tolist())]
        if item.clip:
            real = clips.real[item.clip]
            shown.insert(0, (real, f"real: {item.prompt or item.clip}", [False] * NUM_FRAMES))
        if task in ("interpolation", "prediction"):
            shown.append((metrics.cross_fade(real, given), "baseline: cross-fade", given.tolist()))
        for lines, line in zip((rows, labels, marks), zip(*shown)):
            lines += line
    return sheet(rows, labels, marks=marks)


# ------------------------------------------------------------------------------------------------------------
# samples.png of an arm


def show_samples(items, made, real, path):
    """Writes samples.png: for each of a few samples the real clip, and below it what was made, a row of 8
    frames each, without gaps. Returns the (task, row) of each."""
    strips, shown = [], []
    for task in dict.fromkeys(item.task for item in items):
        mine = [i for i, item in enumerate(items) if item.task == task]
        for i in (mine[j % len(mine)] for j in STRIPS):
            strips += [real[items[i].clip], made[i]]
            shown.append((task, items[i].row))
    picture = np.stack(strips).swapaxes(1, 2)  # (rows, 8, R, R, 3) -> (rows, R, 8, R, 3)
    rows, height, frames, width, _ = picture.shape
    save_png(Image.fromarray(picture.reshape(rows * height, frames * width, 3)), path)
    return shown


def read_samples(path):
    """The real clips and the samples of a samples.png: two uint8 (N, 8, R, R, 3)"""
    picture = np.asarray(Image.open(path))
    side = picture.shape[1] // NUM_FRAMES
    clips = picture.reshape(-1, side, NUM_FRAMES, side, 3).swapaxes(1, 2)
    return clips[::2], clips[1::2]
