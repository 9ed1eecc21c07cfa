"""
The pictures of ablate.py: for Table 3 what the masks are worth with how many clips, for Table 4 what the
curricula drew and how the network learned, the counterpart of the paper's Figure 7.
"""

import numpy as np

from lab.summary import RANGES
from masks import LENGTHS, TASKS
from support.pictures import pyplot

plt = pyplot()
LOOKS = {
    "conv3d": ("#c4c4c4", "3 x 3 x 3 for STI"),
    "conv1d": ("#8a8a8a", "3 x 1 x 1 for STI"),
    "sti": ("#1a1a1a", "DFGN"),
    "condition": ("#e6801a", "+ condition masks"),
    "loss": ("#1b9e77", "+ loss mask"),
    "ddu": ("#1f5fa8", "+ both (DDU)"),
    "dcl": ("#d6337c", "+ both and DCL"),
    "constant": ("#8a8a8a", "linear's average"),
    "linear": ("#e6801a", "linear"),
    "reversed": ("#7570b3", "linear, backwards"),
    "set-point": ("#a6522b", "set point alone"),
    "yoked": ("#1b9e77", "DCL, yoked"),
    "measured": ("#e6a700", "measured order"),
    "measured-average": ("#7a5a00", "its average"),
}
COLOURS = {row: colour for row, (colour, _) in LOOKS.items()}
LABELS = {row: label for row, (_, label) in LOOKS.items()}
CURRICULA = LABELS | {"ddu": "uniform (DDU)", "dcl": "DCL"}  # the same rows in Table 4
BASELINE = "sti"


def curve(arm, name):
    """(steps, values) of a number in the log."""
    points = [(entry["step"], entry[name]) for entry in arm["log"] if name in entry]
    return np.array(points, float).T


def by_row(arms):
    """{(row, clips): [arm of every seed]}, in the order of COLOURS."""
    groups = {}
    for (row, clips, _), arm in sorted(arms.items(), key=lambda item: str(item[0])):
        groups.setdefault((row, clips), []).append(arm)
    rows = list(COLOURS)
    return dict(sorted(groups.items(), key=lambda item: rows.index(item[0][0]) if item[0][0] in rows else 99))


def draw_curves(axis, groups, clips, name, labels, smooth=1, legend=True):
    """The mean over seeds of a logged number over steps, and the range of the seeds as a band. smooth: over
    how many entries of the log a mean is taken"""
    for (row, count), runs in groups.items():
        if count != clips or row not in COLOURS:
            continue
        steps = curve(runs[0], name)[0]
        n = min(smooth, len(steps))
        values = [np.convolve(curve(run, name)[1], np.full(n, 1 / n), "valid") for run in runs]
        steps, values = steps[n - 1 :], np.stack(values)
        look = dict(color=COLOURS[row], linewidth=1.4, label=f"{labels[row]} ({len(runs)})")
        axis.plot(steps, values.mean(axis=0), **look)
        if len(runs) > 1:
            axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=COLOURS[row], alpha=0.15)
    axis.set(xlabel="step")
    axis.grid(alpha=0.3)
    if legend:
        axis.legend(fontsize=8)


def zoom(axis, groups, clips, name):
    """Leaves out the first quarter, where all curves fall alike."""
    values = [curve(run, name) for (_, count), runs in groups.items() if count == clips for run in runs]
    late = np.concatenate([v[steps >= steps[-1] / 4] for steps, v in values])
    margin = 0.1 * (late.max() - late.min()) + 1e-6
    axis.set_ylim(late.min() - margin, late.max() + margin)


def gain(run, base):
    """How much lower the loss is than the baseline's, in percent."""
    return 100 * (1 - run["numbers"]["loss"] / base["numbers"]["loss"])


def plot_table3(arms):
    """matplotlib figure, or None without arms: panels for the paper's rows, and below for those beside the
    Gaussian. arms: {(row, clips, seed): of ablation_tables.read_arm}"""
    kinds = {"": {}, ", beside the Gaussian": {}}
    for (row, clips, seed), arm in arms.items():
        kind = ", beside the Gaussian" if row.endswith("-prior") else ""
        if (row := row.removesuffix("-prior")) in COLOURS:
            kinds[kind][row, clips, seed] = arm
    kinds = {kind: some for kind, some in kinds.items() if some}
    if not kinds:
        return None
    counts = {
        kind: sorted({clips for _, clips, _ in some}, key=lambda clips: (clips == "all", clips))
        for kind, some in kinds.items()
    }
    heights = [min(2, len(counts[kind])) for kind in kinds]  # in rows of panels
    height, width = sum(heights), max(2, *map(len, counts.values()))
    figure, axes = plt.subplots(height, width, figsize=(4.6 * width, 3.8 * height), dpi=100, squeeze=False)
    for (kind, some), panels in zip(kinds.items(), np.split(axes, np.cumsum(heights)[:-1])):
        draw_kind(kind, some, counts[kind], panels)
    for axis in axes.flat:
        if not axis.has_data():
            axis.set_axis_off()
    figure.tight_layout()
    return figure


def draw_kind(kind, arms, counts, panels):
    """Curves of the loss for every number of clips; below them what is gained over the baseline, and of one
    number beside them. panels: (1 or 2, width) axes"""
    groups = by_row(arms)
    for axis, clips in zip(panels[0], counts):
        trained = max(arm["about"]["clips"] for (_, count, _), arm in arms.items() if count == clips)
        draw_curves(axis, groups, clips, "G1", LABELS)
        zoom(axis, groups, clips, "G1")
        axis.set_title(f"loss, image + text: {trained} clips{kind}", fontsize=10)
    if len(counts) > 1:
        draw_gains(panels[1, 0], arms, counts)
    for axis, clips in zip(panels[-1, 1:], counts):
        draw_ranges(axis, arms, clips)


def draw_gains(axis, arms, counts):
    """The gain of each row over the baseline against the number of clips, a point per seed."""
    for row in ("condition", "loss", "ddu", "dcl"):
        means, places = [], []
        for place, clips in enumerate(counts):
            seeds = [
                seed for r, c, seed in arms if (r, c) == (row, clips) and (BASELINE, clips, seed) in arms
            ]
            gains = [gain(arms[row, clips, seed], arms[BASELINE, clips, seed]) for seed in seeds]
            if gains:
                axis.plot([place] * len(gains), gains, ".", color=COLOURS[row], alpha=0.6)
                places, means = [*places, place], [*means, np.mean(gains)]
        if means:
            axis.plot(places, means, color=COLOURS[row], label=LABELS[row])
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(counts)), [f"{clips} clips" for clips in counts])
    axis.set_title(f"loss lower than {LABELS[BASELINE]}'s, % (below zero: higher)", fontsize=10)
    axis.grid(alpha=0.3)
    if axis.lines[:-1]:
        axis.legend(fontsize=8)


def draw_ranges(axis, arms, clips):
    """The gain by range of timesteps, a mean over seeds; colours as in the other panels."""
    rows = [row for row in COLOURS if row != BASELINE and any(key[:2] == (row, clips) for key in arms)]
    for i, row in enumerate(rows):
        gains = []
        for (r, c, seed), arm in arms.items():
            base = arms.get((BASELINE, clips, seed))
            if (r, c) == (row, clips) and base:
                mine, theirs = (
                    np.array([e for e in x["log"] if "G1" in e][-1]["G1_ranges"]) for x in (arm, base)
                )
                gains.append(100 * (1 - mine / theirs))
        if gains:
            places = np.arange(len(RANGES)) + 0.8 * (i / len(rows) - 0.5)
            axis.bar(places, np.mean(gains, axis=0), 0.8 / len(rows), color=COLOURS[row], align="edge")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(RANGES)), [f"{low}-{high - 1}" for low, high in RANGES], fontsize=8)
    axis.set_title(f"% lower than {LABELS[BASELINE]}'s by timestep, {clips} clips", fontsize=10)
    axis.grid(alpha=0.3, axis="y")


def plot_table4(arms):
    """matplotlib figure, or None without arms. arms: {(row, clips, seed): of ablation_tables.read_arm}"""
    groups = by_row(arms)
    if not groups:
        return None
    clips = next(iter(groups))[1]
    figure, axes = plt.subplots(2, 3, figsize=(14, 7.6), dpi=100)
    draw_differences(axes[0, 0], arms, clips)
    draw_curves(axes[0, 1], groups, clips, "probe", CURRICULA)
    zoom(axes[0, 1], groups, clips, "probe")
    axes[0, 1].set_title("loss of a fixed batch, weights as they are", fontsize=10)
    draw_curves(axes[0, 2], groups, clips, "mean_k", CURRICULA, smooth=4, legend=False)
    axes[0, 2].set_title("mean k of what was drawn, over four looks", fontsize=10)
    draw_course(axes[1, 0], arms)
    draw_jumps(axes[1, 1], groups)
    draw_order(axes[1, 2], arms)
    figure.tight_layout()
    return figure


def draw_differences(axis, arms, clips):
    """The held-out loss over steps less that of uniform draws, in percent of it: mean and standard error of
    the seeds that both have."""
    for row in COLOURS:
        seeds = [s for r, c, s in arms if (r, c) == (row, clips) and ("ddu", clips, s) in arms]
        pairs = [[curve(arms[r, clips, s], "G1") for r in (row, "ddu")] for s in seeds]
        if row == "ddu" or not pairs:
            continue
        change = np.stack([100 * (a[1] / b[1] - 1) for a, b in pairs])
        steps, mean = pairs[0][0][0], change.mean(axis=0)
        axis.plot(steps, mean, color=COLOURS[row], linewidth=1.4)
        if len(pairs) > 1:
            error = change.std(axis=0, ddof=1) / len(pairs) ** 0.5
            axis.fill_between(steps, mean - error, mean + error, color=COLOURS[row], alpha=0.15)
    axis.axhline(0, color=COLOURS["ddu"], linewidth=1.4)
    axis.set(xlabel="step")
    axis.set_title("held-out loss against uniform draws, % (below zero: better)", fontsize=10)
    axis.grid(alpha=0.3)


def draw_course(axis, arms):
    """What the controller did: its set point, its aim, and the expected difficulty of the samples."""
    runs = {seed: arm for (row, _, seed), arm in arms.items() if row == "dcl"}
    for seed, arm in sorted(runs.items()):
        steps, aims = curve(arm, "aim")
        axis.plot(steps, aims, linewidth=0.6, alpha=0.8, label=f"aim, seed {seed}")
        axis.plot(*curve(arm, "difficulty"), linewidth=0.8, color=COLOURS["dcl"])
    if runs:
        axis.plot(*curve(arm, "set_point"), "--", color="black", linewidth=1, label="set point")
        axis.plot([], [], color=COLOURS["dcl"], label="expected difficulty")
        axis.legend(fontsize=8)
    axis.set(xlabel="step", ylim=(0, 1))
    axis.set_title("DCL: what the feedback added", fontsize=10)
    axis.grid(alpha=0.3)


def draw_jumps(axis, groups):
    """The jumps of the fixed batch's loss, a point per seed."""
    names = [CURRICULA.get(row, row) for row, _ in groups]
    for i, ((row, _), runs) in enumerate(groups.items()):
        values = [100 * run["numbers"]["jumps"] for run in runs if run["numbers"]["jumps"]]
        axis.plot([i] * len(values), values, "o", color=COLOURS.get(row, "black"), alpha=0.7)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axis.set_title("jumps of the fixed batch's loss, %", fontsize=10)
    axis.grid(alpha=0.3)


def draw_order(axis, arms):
    """The measured loss of every level, relative to their mean, without a curriculum."""
    cells = [arm["cells"] for (row, _, _), arm in arms.items() if row == "ddu" and "cells" in arm]
    axis.set_title("loss over unknown frames by level, no curriculum", fontsize=10)
    if not cells:
        return
    loss = np.array([[np.mean([c[f"{t}, {k}"]["relative"] for c in cells]) for k in LENGTHS] for t in TASKS])
    axis.imshow(loss, cmap="viridis", aspect="auto")
    for (row, column), value in np.ndenumerate(loss):
        dark = value < (loss.min() + loss.max()) / 2
        axis.text(column, row, f"{value:.3f}", ha="center", va="center", color="white" if dark else "black")
    axis.set_xticks(range(len(LENGTHS)), [f"k = {k}" for k in LENGTHS], fontsize=8)
    axis.set_yticks(range(len(TASKS)), TASKS, fontsize=8)
