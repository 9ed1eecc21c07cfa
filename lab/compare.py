"""
Tables 1 and 2 at laptop size: DFGN from scratch with dual masks, against adapters on a larger network that
was trained elsewhere (lab/peers.py).

    python -m lab.compare --output_dir runs/compare --clips 300             # hours to days on two CPU cores
    python -m lab.compare --output_dir runs/compare --clips 300 1200        # goes on from there

Elsewhere is `far`: landscapes (lab.scenes), or `near`: stickers of other words. The target is stickers of the
other half of the words. All networks have the same VAE, text vectors, loss, sampler and clips, of which those
without loss mask can use the half that has 8 frames; each has a Gaussian fitted to what it can use. All take
as many steps: the peers as many for each task as RDTF for all together, which favours them. The base is
trained with every row of Table 7 at 8 frames, which I2VGen-XL is not. DFGN learns with Muon, as `tiny` does,
everything else with AdamW, as adapters are published; each arm tries the same rates on the fewest clips, seed
0, by the held-out loss of its tasks, or of image + text to video if it has one network for each.

    A     DFGN, dual masks, DCL              from scratch, one network for all tasks
    D     DFGN                               from scratch, one for each task, 8 frames: A without dual masks
    B     base + adapters: cav, i2v, simda   the base was trained elsewhere; one for each task
    C1    base, condition masks              from scratch, one for all tasks: A without DFGN and loss mask
    C2    base, all of it learns             trained elsewhere; one for each task
    C3    base, nothing learns               trained elsewhere
    C4    simda on a base of random weights  is it the training elsewhere that helps?

The rules of the verdict, written down before the first run: A is better if its held-out loss is below that of
the best B by two standard errors of the difference, seed by seed, in two of three tasks at the largest number
of clips, and its lead there is larger than at the smallest; B is better likewise, lead and growth; anything
else is undecided.

    peers.json, peers.md, peers.png    written anew after every run; runs are resumed as lab.ablate resumes
"""

import json
import os
import shlex
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lab import scenes
from lab.ablate import Stopped, check_settings, run
from lab.ablation_tables import cell, spread
from lab.items import CONDITIONED
from lab.pictures import save
from model import SIZES
from support import stickers
from support.common import UserError, default_cache, one_sentence, replacing, table
from support.flags import SEED, Parser, number, work_flags
from support.pictures import pyplot

plt = pyplot()
ARMS = {  # arm: (what it is, flags of lab.arm, a network for each task?, a trained base?)
    "A": ("DFGN, dual masks, DCL", "--curriculum dcl", False, False),
    "D": ("DFGN, no dual masks", "--network dfgn", True, False),
    "B-cav": ("base + Customize-A-Video", "--network cav", True, True),
    "B-i2v": ("base + I2V-Adapter", "--network i2v", True, True),
    "B-simda": ("base + SimDA", "--network simda", True, True),
    "C1": ("base, condition masks", "--network base --ddu condition", False, False),
    "C2": ("base, all of it learns", "--network base", True, True),
    "C3": ("base as it is", "--network base --ddu condition", False, True),
    "C4": ("random base + SimDA", "--network simda", True, False),
}
TASK_FLAGS = {  # one task at k = 8
    "image": "--ddu off",
    "interpolation": "--ddu condition --course interpolation",
    "prediction": "--ddu condition --course prediction",
}
RATES = 3e-4, 1e-3, 3e-3  # peak rates that are tried for each arm: as many for each
NOTHING = 1e-12  # the rate of C3
LOOKS = 48  # of every run at a fixed batch; every fourth also at held-out clips
SETTINGS = "preset", "resolution", "max_train_steps"  # equal for all runs in a folder
SETTINGS += "source", "base_clips", "base_steps", "base_rate", "target_clips"

# ------------------------------------------------------------------------------------------------------------
# Runs


def draw_sets(args):
    """The folders (source, target), each drawn once. A ninth of the target is held out."""
    root, count = args.output_dir / "data", args.target_clips
    if args.source == "far":
        source = scenes.draw_scenes(root / f"far-{args.base_clips}", args.base_clips)
    else:
        words = stickers.half(1)
        source = stickers.draw_stickers(root / f"near-{args.base_clips}", args.base_clips, words=words)
    return source, stickers.draw_stickers(root / f"target-{count}", count, words=stickers.half(2))


def call_arm(args, folder, flags, data, seed, rate=None, steps=None, clips=None):
    """Runs lab.arm unless it is finished. Returns its arm.json."""
    if not (folder / "arm.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        words = ["-m", "lab.arm", *shlex.split(flags), "--data", str(data), "--output_dir", str(folder)]
        words += ["--preset", args.preset, "--resolution", str(args.resolution), "--seed", str(seed)]
        steps = steps or args.max_train_steps
        words += ["--max_train_steps", str(steps), "--validation_steps", str(max(1, steps // LOOKS))]
        words += ["--learning_rate", str(rate)] if rate else []
        words += ["--max_train_samples", str(clips)] if clips else []
        words += ["--checkpointing_steps", "300", "--checkpoints_total_limit", "1"]
        words += ["--resume_from_checkpoint", "latest", "--num_workers", str(args.num_workers)]
        words += ["--cache_dir", str(args.cache_dir)]
        run(words, folder.with_name(f"{folder.name}.log"), quiet=True, threads=os.cpu_count() or 1)
    return json.loads((folder / "arm.json").read_text())


def best_rate(args, arm, task, flags, data):
    """The rate of RATES with the lowest held-out loss after a quarter of the steps, fewest clips, seed 0."""
    losses = {}
    for rate in RATES:
        folder = args.output_dir / "rates" / f"{arm}-{rate:g}-{min(args.clips)}"
        result = call_arm(
            args, folder, flags, data, 0, rate, max(1, args.max_train_steps // 4), min(args.clips)
        )
        losses[rate] = np.mean([result["losses"][task]["mean"] for task in tasks_of(task)])
    return min(losses, key=losses.get)


def tasks_of(trained):
    """The tasks of a network that was trained for one, or for "all"."""
    return list(CONDITIONED) if trained == "all" else [trained]


def compare(args):
    """Every run that is not finished, and the table after each."""
    check_settings(args, SETTINGS)
    source, target = draw_sets(args)
    base = args.output_dir / f"base-{args.source}"
    every = "--network base --ddu condition --course constant"
    call_arm(args, base, every, source, 0, args.base_rate, args.base_steps)
    base = base / f"checkpoint-{args.base_steps}"
    jobs = []
    for arm in args.arms:
        about, flags, for_each, needs = ARMS[arm]
        flags += f" --base {shlex.quote(str(base))}" if needs else ""
        flags += f" --away {shlex.quote(str(source))}"
        for task in TASK_FLAGS if for_each else ("all",):
            jobs.append((arm, task, f"{flags} {TASK_FLAGS[task]}" if for_each else flags))
    runs = [(seed, clips, *job) for clips in sorted(args.clips) for seed in args.seeds for job in jobs]
    found, rates = {}, {}
    for seed, clips, arm, task, flags in tqdm(runs, "comparison", unit="run"):
        if arm == "C3":
            rate, steps = NOTHING, 1
        else:  # the rate of the first of an arm's tasks is that of all
            if arm not in rates:
                rates[arm] = best_rate(args, arm, task, flags, target)
            rate, steps = rates[arm], None
        folder = args.output_dir / f"{arm}-{task}-{clips}-{seed}"
        result = call_arm(args, folder, flags, target, seed, rate, steps, clips)
        curve = [(look["step"], look["G1"]) for look in result["log"] if "G1" in look]
        found[arm, task, clips, seed] = dict(result, curve=curve)
        write_report(args, found, rates)


# ------------------------------------------------------------------------------------------------------------
# Report


def numbers(found):
    """{(arm, task, clips): {number: {seed: value}}} of every task that an arm was trained for."""
    rows = {}
    for (arm, trained, clips, seed), result in found.items():
        for task in tasks_of(trained):
            network = result["scores"].get(task, {}).get("network", {})
            values = dict(loss=result["losses"][task]["mean"], dB=network.get("psnr"))
            values |= dict(frechet=network.get("frechet"), away=network.get("away"))
            values |= {"loss, trained clips": result.get("fit", {}).get(task, {}).get("mean")}
            for name, value in values.items():
                rows.setdefault((arm, task, clips), {}).setdefault(name, {})[seed] = value
    return rows


def leads(rows, clips):
    """{task: spread of the held-out loss of the best B less that of A, seed by seed}: above 0, A is ahead."""
    lead = {}
    for task in CONDITIONED:
        own = rows.get(("A", task, clips), {}).get("loss", {})
        others = [rows.get((arm, task, clips), {}).get("loss", {}) for arm in ARMS if arm.startswith("B-")]
        if own and all(losses.keys() >= own.keys() for losses in others):
            best = min(others, key=lambda losses: np.mean([losses[seed] for seed in own]))
            lead[task] = spread([best[seed] - own[seed] for seed in own])
    return lead


def verdict(rows, counts):
    """A sentence, as the rules at the top of this file give it."""
    small, large = leads(rows, min(counts)), leads(rows, max(counts))
    if len(large) < len(CONDITIONED) or any(lead["se"] is None for lead in large.values()):
        return "No verdict yet: runs or seeds are missing."
    for sign, better, other in ((1, "A", "the best B"), (-1, "the best B", "A")):
        ahead = [task for task, lead in large.items() if sign * lead["mean"] > 2 * lead["se"]]
        if len(ahead) >= 2:
            grows = len(counts) > 1 and all(
                task in small and sign * (large[task]["mean"] - small[task]["mean"]) > 0 for task in ahead
            )
            lead = f"{better} is better than {other} at {max(counts)} clips in {' and '.join(ahead)}"
            if grows:
                return f"{lead}."
            return f"Undecided: {lead}, but no lead that grows with the number of clips was seen."
    return f"Undecided: at {max(counts)} clips neither A nor the best B leads in two tasks."


def write_report(args, found, rates):
    """peers.json, peers.md and peers.png of what is finished."""
    rows, lines = numbers(found), []
    names = ("loss", "loss, trained clips", "dB", "frechet", "away")
    for (arm, task, clips), values in sorted(rows.items(), key=lambda item: (item[0][2], item[0][1])):
        cells = [cell(spread(list(values[n].values())), 4 if "loss" in n else 2) for n in names]
        lines.append([clips, task, arm, ARMS[arm][0], f"{rates.get(arm, 0):g}", len(values["loss"]), *cells])
    about = (
        f"`{args.preset}` at {args.resolution} pixels, {args.max_train_steps} steps; base: {args.base_steps} "
        f"steps on {args.base_clips} clips, {args.source}. Loss over unknown frames at k = 8, of held-out "
        "clips; dB: of unknown frames; frechet: to the target, away: to what the base was trained on; mean "
        "± standard error of the seeds."
    )
    text = [about, table(["clips", "task", "arm", "", "rate", "seeds", *names], lines)]
    text.append(verdict(rows, args.clips))
    result = {", ".join(map(str, key)): values for key, values in rows.items()}
    for name, content in (("json", json.dumps(result, indent=1)), ("md", "\n\n".join(text) + "\n")):
        with replacing(args.output_dir / f"peers.{name}") as writing:
            writing.write_text(content, encoding="utf-8")
    save(plot(rows, found, args.clips), args.output_dir / "peers.png")


def plot(rows, found, counts):
    """Above the held-out loss of each arm by task and number of clips, a point per seed; below the curves of
    the first task, at the fewest clips."""
    figure, axes = plt.subplots(2, len(CONDITIONED), figsize=(13, 7), dpi=100)
    colours = dict(zip(ARMS, plt.get_cmap("tab10").colors))
    for axis, task in zip(axes[0], CONDITIONED):
        for i, arm in enumerate(ARMS):
            for place, clips in enumerate(sorted(counts)):
                losses = list(rows.get((arm, task, clips), {}).get("loss", {}).values())
                axis.plot([place + i / 12] * len(losses), losses, "o", color=colours[arm], alpha=0.7)
        axis.set_title(f"held-out loss, {task}", fontsize=10)
        axis.set_xticks(
            [place + 1 / 3 for place in range(len(counts))], [f"{c} clips" for c in sorted(counts)]
        )
        axis.grid(alpha=0.3, axis="y")
    for (arm, task, clips, seed), result in found.items():
        if task in ("image", "all") and clips == min(counts) and len(result["curve"]) > 1:
            axes[1, 0].plot(*zip(*result["curve"]), color=colours[arm], linewidth=1)
    axes[1, 0].set(xlabel="step")
    axes[1, 0].set_title(f"held-out loss, image, {min(counts)} clips", fontsize=10)
    axes[1, 0].grid(alpha=0.3)
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=colours[arm]) for arm in ARMS]
    axes[1, 1].legend(handles, [f"{arm}: {ARMS[arm][0]}" for arm in ARMS], fontsize=9, loc="center")
    for axis in axes[1, 1:]:
        axis.set_axis_off()
    figure.tight_layout()
    return figure


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(words=None):
    parser = Parser(
        "python -m lab.compare", description="DFGN from scratch against adapters (Tables 1 and 2)."
    )
    add, count, default = parser.add_argument, number(int, 1), "(default %(default)s)"
    add("--output_dir", type=Path, required=True, help="where sets, runs, logs and the report go")
    add(
        "--clips",
        type=number(int, 8),
        nargs="+",
        default=[300, 1200],
        help="of the target (default 300 1200)",
    )
    add("--seeds", type=SEED, nargs="+", default=[0, 1, 2], help="of every arm (default 0 1 2)")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="which arms (default: all)")
    add("--source", choices=("far", "near"), default="far", help=f"what the base was trained on {default}")
    add("--base_clips", type=number(int, 8), default=1200, help=f"drawn of the source {default}")
    add("--base_steps", type=count, default=3000, help=f"of the base's training {default}")
    add(
        "--base_rate",
        type=number(float, 1e-12),
        default=1e-3,
        help=f"peak rate of the base's training {default}",
    )
    add("--target_clips", type=number(int, 64), default=1500, help=f"drawn of the target {default}")
    add("--max_train_steps", type=count, default=1200, help=f"of every run {default}")
    add("--preset", choices=SIZES, default="tiny", help=f"size of DFGN {default}")
    add("--resolution", type=number(int, 8, 4096), default=32, help=f"side of the frames in pixels {default}")
    work_flags(add, num_workers=0)
    args = parser.parse_args(words)
    args.cache_dir, args.output_dir = args.cache_dir or default_cache(), args.output_dir.resolve()
    if max(args.clips) > 0.85 * args.target_clips:
        raise UserError(
            f"--clips {max(args.clips)} is more than --target_clips {args.target_clips} leave: draw more."
        )
    return args


def main():
    with one_sentence("lab.compare"):
        args = parse_args()
        try:
            compare(args)
        except Stopped:
            print("lab.compare: stopped; the same command goes on", file=sys.stderr)
            sys.exit(130)
        except RuntimeError as error:
            raise UserError(f"{error}. The same command tries again.") from error
        print(f"wrote {args.output_dir}/peers.md, .json and .png")


if __name__ == "__main__":
    main()
