"""
What a run shows: progress.png (the log as curves) and validation sheets (real stickers above generated ones).
"""

import os

import matplotlib

from masks import TASKS
from support.log import read_log

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402


def plot_progress(log_path, picture_path):
    """Draws log.jsonl: loss, task probabilities, mean k, and the three terms of Eq. 4."""
    log = read_log(log_path)
    if not log:
        return
    steps = [entry["step"] for entry in log]
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), dpi=100, sharex=True, layout="constrained")
    panels = {
        "loss": ["loss", "validation_loss"],
        "P(task)": [f"p_{task}" for task in TASKS],
        "mean k of the batch": ["mean_k"],
        "feedback, Eq. 4": ["p_term", "i_term", "d_term"],
    }
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for name in names:
            xy = [(entry["step"], entry[name]) for entry in log if name in entry]
            style = dict(marker="o", linestyle="--") if name == "validation_loss" else dict(linewidth=1)
            if xy:
                axis.plot(*zip(*xy), label=name[2:] if name[2:] in TASKS else name, **style)
        axis.set_title(title)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    axes[0, 0].set_yscale("log")
    for axis in axes[1]:
        axis.set_xlabel("step")
    axes[1, 0].set_xlim(0, max(steps) + 1)
    writing = picture_path.with_name("progress.tmp.png")
    figure.savefig(writing)
    plt.close(figure)
    os.replace(writing, picture_path)
