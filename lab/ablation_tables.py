"""
From finished arms to the tables of an ablation: tableN.json, tableN.md and tableN.png.
"""

import json
from pathlib import Path

import numpy as np
from scipy.stats import t as student_t

from curriculum import HORIZON, K_P
from lab.ablation_pictures import plot_table3, plot_table4
from lab.simulate_curriculum import swings
from masks import LENGTHS, NUM_FRAMES, TASKS
from support.common import replacing, table
from support.pictures import save_png

NAMES = {
    "conv3d": "DFGN (3D-Conv), two of 3 x 3 x 3",
    "conv1d": "DFGN (3D-Conv), four of 3 x 1 x 1",
    "sti": "DFGN",
    "condition": "DFGN w/ condition masks",
    "loss": "DFGN w/ loss mask",
    "ddu": "DFGN w/ DDU, no curriculum",
    "dcl": "DFGN w/ DDU & DCL",
    "sti-prior": "DFGN, beside the Gaussian",
    "condition-prior": "DFGN w/ condition masks, beside the Gaussian",
    "loss-prior": "DFGN w/ loss mask, beside the Gaussian",
    "ddu-prior": "DFGN w/ DDU, beside the Gaussian",
    "constant": "the linear curriculum's average, always",
    "linear": "linear (LCL)",
    "reversed": "linear, backwards",
    "set-point": "DCL without feedback: the set point alone",
    "yoked": "DCL, yoked: the course of another seed",
    "measured": "DCL with the measured order",
    "measured-average": "the measured order's average, always",
}
PAIRS = {
    3: [("sti", "conv3d"), ("sti", "conv1d"), ("condition", "sti"), ("loss", "sti"), ("ddu", "sti"),
        ("ddu", "loss"), ("dcl", "ddu"), ("dcl", "sti"), ("condition-prior", "sti-prior"),
        ("loss-prior", "sti-prior"), ("ddu-prior", "sti-prior"), ("ddu-prior", "loss-prior")],
    4: [("linear", "constant"), ("linear", "reversed"), ("dcl", "ddu"), ("dcl", "linear"),
        ("dcl", "set-point"), ("dcl", "yoked"), ("measured", "dcl"), ("measured", "measured-average"),
        ("linear", "ddu"), ("reversed", "ddu"), ("constant", "ddu"), ("set-point", "ddu"), ("yoked", "ddu"),
        ("measured", "ddu"), ("measured-average", "ddu")],
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------------
# Numbers


LOGGED = "step", "probe", "G1", "G1_ranges", "G1_equal", "mean_k", "aim", "set_point", "difficulty"


def digest(log):
    """What arm.json keeps of a log with an entry per step: "log", the entries that looked at the fixed batch,
    their mean_k a mean since the one before; "swings", see signal_swings."""
    looks, since = [], []
    for entry in log:
        since.append(entry["mean_k"])
        if "probe" in entry:
            looks.append({name: entry[name] for name in LOGGED if name in entry})
            looks[-1]["mean_k"] = float(np.mean(since))
            since = []
    return dict(log=looks, swings=signal_swings(log))


def read_arm(folder):
    """What the tables and pictures need of a finished arm: its arm.json and "numbers"."""
    arm = json.loads((folder / "arm.json").read_text())
    log = arm["log"]
    seen = [entry for entry in log if "G1" in entry]
    probe = np.array([entry["probe"] for entry in log])
    scores = {task: rivals["network"] for task, rivals in arm["scores"].items()}
    numbers = {
        "loss": seen[-1]["G1"],
        "lowest loss": min(entry["G1"] for entry in seen),
        "jumps": jumps(probe),
        "swings": arm["swings"],
    }
    if "G1_equal" in seen[-1]:
        numbers["loss, equal frames"] = seen[-1]["G1_equal"]
    for task, loss in arm.get("losses", {}).items():
        if task != "image":  # that is "loss"
            numbers[f"{task}, loss"] = loss["mean"]
        elif "balanced" in loss:
            numbers["loss, balanced weights"] = loss["balanced"]
    weighting = "balanced" if "gaussian" in arm else "mean"  # that the row trained with
    for task, hidden in arm.get("hidden", {}).items():
        numbers[f"{task}, shown / hidden"] = arm["losses"][task][weighting] / hidden[weighting]
    for task, hidden in arm.get("gaussian hidden", {}).items():
        numbers[f"the same, Gaussian: {task}"] = arm["gaussian"][task][weighting] / hidden[weighting]
    if "gaussian" in arm:
        numbers["Gaussian alone"] = arm["gaussian"]["image"]["mean"]
    for task, score in scores.items():
        numbers[f"{task}, Frechet"] = score["frechet"]
        numbers[f"{task}, dB"] = score["psnr"]
    for quarter in (1, 2, 3):
        step = seen[-1]["step"] * quarter / 4
        numbers[f"loss at {quarter}/4"] = min(seen, key=lambda entry: abs(entry["step"] - step))["G1"]
    return dict(arm, numbers=numbers)


def signal_swings(log):
    """How much the loss that the controller reads swings: as simulate_curriculum.measure, of the L_s in the
    log, which every curriculum keeps, whether it acts on it or not. None of fewer steps than its horizon."""
    L_s, horizon = np.array([entry["p_term"] for entry in log]) / K_P, max(1, round(HORIZON * len(log)))
    return float(swings(L_s, horizon)[horizon:].std()) if len(L_s) > horizon else None


def jumps(probe):
    """How far the loss of the fixed batch jumps about its own course, as a share of it: the standard
    deviation of the log loss against the mean of its two neighbours in time, divided by that of white noise
    of unit deviation. Of the second half of a run, where the course is smooth."""
    x = np.log(np.maximum(probe[len(probe) // 2 :], 1e-12))
    return float((x[1:-1] - (x[:-2] + x[2:]) / 2).std() / 1.5**0.5) if len(x) > 3 else None


def spread(values):
    """{"mean", "se", "seeds"} of the numbers of runs; None without any."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    se = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return dict(mean=float(np.mean(values)), se=se, seeds=len(values))


def summarize(arms, pairs):
    """arms: {(row, clips, seed): of read_arm}. Returns {"rows": {"row, clips": {number: spread}}, "pairs":
    {"a - b, clips": {number: spread of a - b, seed by seed, and the smallest that could be seen; of "loss"
    also its error over clips}}}."""
    groups, by_clip = {}, {}
    for (row, clips, seed), arm in arms.items():
        groups.setdefault((row, clips), {})[seed] = arm["numbers"]
        by_clip[row, clips, seed] = arm.get("losses", {}).get("image", {}).get("by clip")
    rows, compared = {}, {}

    def place(key):  # in the table: by number of clips, then as in NAMES
        row, clips = key
        return clips == "all", clips, list(NAMES).index(row)

    for row, clips in sorted(groups, key=place):
        runs = groups[row, clips]
        names = dict.fromkeys(name for numbers in runs.values() for name in numbers)
        rows[f"{row}, {clips}"] = {name: spread([n.get(name) for n in runs.values()]) for name in names}
        for b in [b for a, b in pairs if a == row and (b, clips) in groups]:
            other = groups[b, clips]
            seeds = sorted(runs.keys() & other.keys())
            entry = {}
            for name in names:
                both = [(runs[s].get(name), other[s].get(name)) for s in seeds]
                difference = spread([x - y for x, y in both if x is not None and y is not None])
                if difference:
                    if difference["seeds"] > 1:
                        t = student_t.ppf(0.975, difference["seeds"] - 1)
                        difference["could be seen"] = float(t * difference["se"])
                    entry[name] = difference
            each = [[by_clip[r, clips, s] for s in seeds] for r in (row, b)]
            if seeds and all(map(all, each)):
                apart = np.subtract(*each).mean(axis=0)  # (clips,) of a mean over seeds
                entry["loss"]["se over clips"] = float(apart.std(ddof=1) / len(apart) ** 0.5)
            compared[f"{row} - {b}, {clips}"] = entry
    return dict(rows=rows, pairs=compared)


def summarize_order(arms):
    """{(task, k): spread of the loss over unknown frames relative to the mean level}, of rows without a
    curriculum, and the shares that these and others drew."""
    with_cells = {key: arm for key, arm in arms.items() if key[0] == "ddu" and "cells" in arm}
    cells = {}
    for task in TASKS:
        for k in LENGTHS:
            name = f"{task}, {k}"
            cells[name] = spread([arm["cells"][name]["relative"] for arm in with_cells.values()])
    drawn = {}
    for row in ("ddu", "linear", "dcl", "set-point", "measured"):
        shares = [dict(arm["drawn"]) for key, arm in arms.items() if key[0] == row]
        for share in shares:
            share["all with k = 8"] = sum(share.get(f"{task}, {NUM_FRAMES}", 0.0) for task in TASKS)
        names = dict.fromkeys(name for share in shares for name in share)
        drawn[row] = {name: spread([share.get(name, 0.0) for share in shares]) for name in names}
    return dict(cells=cells, drawn=drawn)


def common_share(arms):
    """How alike the feedback of the seeds of dcl was: the share, 0..1, of what their controllers added to the
    set point that is common to all; None of fewer than two."""
    runs = [arm["log"] for (row, *_), arm in arms.items() if row == "dcl"]
    if len(runs) < 2:
        return None
    added = np.array([[look["aim"] - look["set_point"] for look in log] for log in runs])
    apart = np.square(added - added.mean(axis=0)).mean()
    return float(1 - apart / max(np.square(added).mean(), 1e-12))


# ------------------------------------------------------------------------------------------------------------
# Pages

COLUMNS = {  # number -> digits
    3: {"loss": 4, "lowest loss": 4, "Gaussian alone": 4, "loss, balanced weights": 4,
        "loss, equal frames": 4, "image, Frechet": 2, "interpolation, dB": 2,
        "interpolation, Frechet": 2, "prediction, dB": 2, "prediction, Frechet": 2,
        "image, shown / hidden": 3, "interpolation, shown / hidden": 3, "prediction, shown / hidden": 3,
        "the same, Gaussian: image": 3, "the same, Gaussian: interpolation": 3,
        "the same, Gaussian: prediction": 3},
    4: {"loss at 1/4": 4, "loss at 2/4": 4, "loss at 3/4": 4, "loss": 4, "jumps": 4, "swings": 4,
        "interpolation, loss": 4, "prediction, loss": 4, "image, Frechet": 2, "interpolation, dB": 2,
        "prediction, dB": 2, "interpolation, shown / hidden": 3, "prediction, shown / hidden": 3},
}  # fmt: skip


def cell(entry, digits, sign=""):
    if entry is None:
        return "-"
    se = "" if entry["se"] is None else f" ± {entry['se']:.{digits}f}"
    return f"{entry['mean']:{sign}.{digits}f}{se}"


def number_table(number, result):
    """The rows of a table and their differences, as Markdown."""
    have = {name for row in result["rows"].values() for name in row}
    columns = {name: digits for name, digits in COLUMNS[number].items() if name in have}
    lines, differences = [], []
    for key, row in result["rows"].items():
        name, clips = key.rsplit(", ", 1)
        cells = [cell(row.get(column), digits) for column, digits in columns.items()]
        lines.append([clips, NAMES[name], row["loss"]["seeds"], *cells])
    for key, row in result["pairs"].items():
        cells = []
        for column, digits in columns.items():
            entry = row.get(column)
            seen = entry and entry.get("could be seen")
            cells.append(cell(entry, digits, "+") + (f" ({seen:.{digits}f})" if seen else ""))
            if entry and "se over clips" in entry:
                cells[-1] += f", over clips ± {entry['se over clips']:.{digits}f}"
        pair, clips = key.rsplit(", ", 1)
        differences.append([clips, pair, *cells])
    return [
        table(["clips", "row", "seeds", *columns], lines),
        "Differences, seed by seed: mean ± standard error, in brackets the smallest that so many seeds "
        "could tell from none (Student's t, 95 %); over clips: the standard error over held-out clips of the "
        "mean of the seeds:",
        table(["clips", "", *columns], differences),
    ]


def order_table(order):
    """The measured order of the levels, and what was drawn."""
    rows = [[task, *(cell(order["cells"][f"{task}, {k}"], 3) for k in LENGTHS)] for task in TASKS]
    names = dict.fromkeys(name for shares in order["drawn"].values() for name in shares)
    special = [name for name in names if not name.split(", ")[-1].isdigit()]
    shares = []
    for row, drawn in order["drawn"].items():
        if drawn:
            percent = (f"{100 * drawn[name]['mean']:.1f} %" if name in drawn else "-" for name in special)
            shares.append([NAMES[row], *percent])
    return [
        "Loss over unknown frames of every level, relative to the mean of all, after training without a "
        "curriculum; the same clips, noise and timesteps for each:",
        table(["", *(f"k = {k}" for k in LENGTHS)], rows),
        "Shares of the samples that were drawn:",
        table(["row", *special], shares),
    ]


def rivals_line(arms):
    """What needs no network, from the scores of the arm of most tasks."""
    parts, arm = [], max(arms, key=lambda arm: sum(map(len, arm["scores"].values())))
    for task, rivals in arm["scores"].items():
        for name, score in rivals.items():
            if name != "network":
                parts.append(f"{task}, {name}: Frechet {score['frechet']:.2f}, {score['psnr']:.2f} dB")
    floor = "A Frechet distance that is not above that of real clips is as low as so few clips can show."
    return "Without a network: " + "; ".join(parts) + f". {floor}"


def write_tables(number, arms, args):
    """Writes tableN.json, tableN.md and tableN.png of what is finished. arms: {(row, clips, seed): of
    read_arm}"""
    result = summarize(arms, PAIRS[number])
    stickers = Path(args.data).name if args.data else "the built-in stickers"
    about = (
        f"Table {number}: `{args.preset}` at {args.resolution} pixels, {args.max_train_steps} steps, "
        f"{stickers}. Loss: Eq. 1 over the unknown frames of image + text to video, k = 8, of held-out "
        "clips, after the last step."
    )
    if any("hidden" in arm for arm in arms.values()):
        about += " Shown / hidden: that loss, over the same unknown frames while given ones are hidden,"
        about += " by the weights that the row was trained with."
    parts = [about, *number_table(number, result)]
    parts.append(rivals_line(arms.values()))
    once = {key: arm for key, arm in arms.items() if key[1] == args.clips[0]}  # for what shows one number
    if number == 4 and any("cells" in arm for key, arm in once.items() if key[0] == "ddu"):
        result["order"] = summarize_order(once)
        parts += order_table(result["order"])
    if number == 4 and (share := common_share(once)) is not None:
        parts.append(
            f"What the controllers of dcl added to the set point is to {100 * share:.0f} % common to all "
            "seeds: a yoked run differs from dcl by the rest alone."
        )
    for name, text in (("json", json.dumps(result, indent=1)), ("md", "\n\n".join(parts) + "\n")):
        with replacing(args.output_dir / f"table{number}.{name}") as writing:
            writing.write_text(text, encoding="utf-8")
    figure = plot_table3(arms) if number == 3 else plot_table4(once)
    if figure:
        save_png(figure, args.output_dir / f"table{number}.png")
