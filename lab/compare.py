"""
Tables 1 and 2 at laptop size: DFGN from scratch with dual masks, against adapters on a larger network that
was trained elsewhere (lab/peers.py).

    python -m lab.compare --output_dir runs/compare --clips 300             # hours to days on two CPU cores
    python -m lab.compare --output_dir runs/compare --clips 300 1200        # goes on from there
    python -m lab.compare --output_dir runs/roads --clips 300 --target roads   # another domain: Tables 9, 10
    python -m lab.compare --output_dir runs/eps --clips 300 --arms A B-cav --no-prior  # without the Gaussian

Elsewhere is `far`: landscapes (lab.scenes), or `near`: stickers of other words. The target is stickers of the
other half of the words, or roads (lab.driving): 8 frames each, no captions. All networks have the same VAE,
text vectors, loss, sampler and clips, of which those without loss mask can use the ones of 8 frames, half of
the stickers; each has a Gaussian fitted to what it can use. All take as many steps: the peers as many for
each task as RDTF for all together, which favours them. The base is trained with every row of Table 7 at 8
frames, which I2VGen-XL is not. Where a whole network learns, Muon takes its matrices, as `tiny` has it;
adapters learn with AdamW, as published. Each arm tries the same rates in runs of a quarter of the steps, on
the fewest clips, seed 0, by the held-out loss of its tasks, or of image + text to video if it has one network
for each.

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
else is undecided, so one number of clips always is. The loss is that of unknown frames, by the weights of the
training: plain Eq. 1 is mostly about the smallest timesteps, where the Gaussian does the work.

    peers.json, peers.md, peers.png, samples.png    written anew after every run; runs are resumed as those of
                                                    lab.ablate. The base is trained when a run needs it
"""

import json
import os
import shlex
import sys
from argparse import BooleanOptionalAction
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import ScalarFormatter

import masks
from lab import driving, scenes
from lab.ablate import check_settings, finished_first, in_parallel, run
from lab.ablation_tables import cell, rivals_line, spread
from lab.eight_frames import draw_test_stickers
from lab.items import CONDITIONED
from lab.pictures import read_samples
from masks import NUM_FRAMES, ROWS
from model import SIZES
from support import stickers
from support.common import UserError, default_cache, one_sentence, replacing, table
from support.flags import SEED, Parser, number, work_flags
from support.pictures import pyplot, save_png, sheet

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
RATES = 3e-4, 1e-3, 3e-3, 1e-2  # peak rates that are tried for each arm: the same for each
WARM_UP = 12  # a run is as many times as long as its warm-up
NOTHING = 1e-12  # the rate of C3
LOOKS = 24  # of every run at a fixed batch; every fourth also at held-out clips
SETTINGS = "preset", "resolution", "prior", "max_train_steps"  # equal for all runs in a folder
SETTINGS += "source", "base_clips", "base_steps", "base_rate", "target", "target_clips"

# ------------------------------------------------------------------------------------------------------------
# Runs


class Job(NamedTuple):
    folder: Path
    arm: str  # or "base"
    task: str  # or "all"
    flags: str  # of lab.arm
    clips: int | None  # None: all
    seed: int
    rate: float | None = None  # of a trial and of the base


def find_sets(args):
    """The folders (source, target), drawn or not."""
    root = args.output_dir / "data"
    return root / f"{args.source}-{args.base_clips}", root / f"{args.target}-{args.target_clips}"


def draw_sets(args):
    """Draws what is missing of both. What is held out of the target has exactly 8 frames: key frames, equal
    frames and all frames are the same there, whatever an arm was trained on."""
    source, target = find_sets(args)
    if args.source == "far":
        scenes.draw_scenes(source, args.base_clips)
    else:
        stickers.draw_stickers(source, args.base_clips, words=stickers.half(1))
    if args.target == "roads":
        driving.draw_driving(target, args.target_clips)
    else:
        words = [w for w in stickers.half(2) if not stickers.is_held_out(*w)]
        stickers.draw_stickers(target / "train", args.target_clips, words=words)
        draw_test_stickers(target, half=2)


def call_arm(args, job, data, rate, steps, jobs):
    """Runs lab.arm unless it is finished. jobs: at a time. Returns its arm.json."""
    folder = job.folder
    if not (folder / "arm.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        words = ["-m", "lab.arm", *shlex.split(job.flags), "--data", str(data), "--output_dir", str(folder)]
        words += ["--preset", args.preset, "--resolution", str(args.resolution), "--seed", str(job.seed)]
        words += ["--max_train_steps", str(steps), "--validation_steps", str(max(1, steps // LOOKS))]
        words += ["--learning_rate", str(rate), "--lr_warmup_steps", str(max(1, steps // WARM_UP))]
        words += ["--mixed_precision", "no"]  # as every machine has it: runs may come from several
        words += [] if args.prior else ["--no-prior"]
        words += ["--max_train_samples", str(job.clips)] if job.clips else []
        words += ["--checkpointing_steps", "300", "--checkpoints_total_limit", "1"]
        words += ["--resume_from_checkpoint", "latest", "--num_workers", str(args.num_workers)]
        words += ["--cache_dir", str(args.cache_dir)]
        threads = max(1, (os.cpu_count() or 1) // jobs)
        run(words, folder.with_name(f"{folder.name}.log"), quiet=True, threads=threads)
    return json.loads((folder / "arm.json").read_text())


def tasks_of(trained):
    """The tasks of a network that was trained for one, or for "all"."""
    return list(CONDITIONED) if trained == "all" else [trained]


def list_jobs(args, base, source):
    """Trials of rates, then the runs: fewest clips first, then seed by seed."""
    trials, runs = [], []
    for arm in args.arms:
        _, flags, for_each, needs_base = ARMS[arm]
        flags += f" --base {shlex.quote(str(base))}" if needs_base else ""
        flags += f" --away {shlex.quote(str(source))}"
        tasks = {task: f"{flags} {more}" for task, more in TASK_FLAGS.items()} if for_each else {"all": flags}
        first, fewest = next(iter(tasks)), min(args.clips)
        for rate in RATES if arm != "C3" else ():  # the rate of the first task is that of all
            folder = args.output_dir / "rates" / f"{arm}-{rate:g}-{fewest}"
            trials.append(Job(folder, arm, first, f"{tasks[first]} --no_samples", fewest, 0, rate))
        for clips, seed in product(args.clips, args.seeds):
            for task in tasks:
                folder = args.output_dir / f"{arm}-{task}-{clips}-{seed}"
                runs.append(Job(folder, arm, task, tasks[task], clips, seed))
    return trials, sorted(runs, key=lambda job: (job.clips, job.seed))


def compare(args):
    """Every run that is not finished, and the report of all that are, anew after each. Raises UserError if
    some failed."""
    check_settings(args, SETTINGS)
    source, target = find_sets(args)
    every = "--network base --ddu condition --course linear --average --no_samples"
    base = Job(args.output_dir / f"base-{args.source}", "base", "all", every, None, 0, args.base_rate)
    trained = base.folder / f"checkpoint-{args.base_steps}"
    trials, runs = list_jobs(args, trained, source)
    finished = [job for job in (*trials, *runs) if (job.folder / "arm.json").is_file()]
    wanted = any(ARMS[job.arm][3] for job in (*trials, *runs) if job not in finished)
    if len(finished) < len(trials) + len(runs):
        draw_sets(args)
    if wanted and not trained.is_dir():  # what was found may have come from another machine, without it
        (base.folder / "arm.json").unlink(missing_ok=True)
        if any(ARMS[job.arm][3] and job in finished for job in runs):
            print(
                f"{trained} is gone and is trained again; finished arms stood on the old one", file=sys.stderr
            )
    losses, found = {arm: {} for arm in args.arms}, {}
    first = sum(job in finished for job in runs)  # of the runs: with them begins the report

    def work(job):
        if job is base:
            return call_arm(args, job, source, job.rate, args.base_steps, jobs=1)
        if job.rate:
            try:
                return call_arm(args, job, target, job.rate, max(1, args.max_train_steps // 4), args.jobs)
            except RuntimeError as error:  # too high a rate is an answer, too
                print(f"rate {job.rate:g} is out for {job.arm}: {error}", file=sys.stderr)
                return None
        if job.arm == "C3":
            return call_arm(args, job, target, NOTHING, 1, args.jobs)
        if not np.isfinite(min(losses[job.arm].values(), default=np.inf)):
            raise RuntimeError(f"{job.folder.name} has no rate: see the logs in {args.output_dir}/rates")
        rate = min(losses[job.arm], key=losses[job.arm].get)
        return call_arm(args, job, target, rate, args.max_train_steps, args.jobs)

    def done(job, result):
        if job is base:
            return
        if job.rate:
            tasks = tasks_of(job.task) if result else ()
            loss = np.mean([result["losses"][task][args.weights] for task in tasks] or np.inf)
            losses[job.arm][job.rate] = loss if np.isfinite(loss) else np.inf
            return
        curve = [(look["step"], look["G1"]) for look in result["log"] if "G1" in look]
        key = job.arm, job.task, job.clips, job.seed
        found[key] = dict(result, curve=curve, folder=job.folder)
        if len(found) >= first:
            rates = {arm: min(tried, key=tried.get) for arm, tried in losses.items() if tried}
            write_report(args, found, rates)

    waves = finished_first([[base] * wanted, trials, runs], finished)
    in_parallel(waves, work, done, args, "comparison")


# ------------------------------------------------------------------------------------------------------------
# Report


def numbers(found, weights):
    """{(arm, task, clips): {number: {seed: value}}} of every task that an arm was trained for. weights: those
    of the loss, "balanced" or, for Eq. 1, "mean" """
    rows = {}
    for (arm, trained, clips, seed), result in found.items():
        for task in tasks_of(trained):
            network = result["scores"].get(task, {}).get("network", {})
            values = dict(loss=result["losses"][task][weights], dB=network.get("psnr"))
            values |= dict(frechet=network.get("frechet"), away=network.get("away"))
            values |= {"of Eq. 1": result["losses"][task]["mean"]}
            values |= {"of its Gaussian": result.get("gaussian", {}).get(task, {}).get(weights)}
            values |= {"on trained clips": result.get("fit", {}).get(task, {}).get(weights)}
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
    found = dict(sorted(found.items()))  # finished in any order
    rows, lines = numbers(found, args.weights), []
    names = {"loss": 4, "of its Gaussian": 4, "on trained clips": 4, "of Eq. 1": 4}
    names |= {"dB": 2, "frechet": 2, "away": 2}
    order = {name: place for place, name in enumerate((*CONDITIONED, *ARMS))}
    for arm, task, clips in sorted(rows, key=lambda key: (key[2], order[key[1]], order[key[0]])):
        values = rows[arm, task, clips]
        cells = [cell(spread(list(values[n].values())), digits) for n, digits in names.items()]
        lines.append([clips, task, arm, ARMS[arm][0], f"{rates.get(arm, 0):g}", len(values["loss"]), *cells])
    about = (
        f"`{args.preset}` at {args.resolution} pixels, {args.max_train_steps} steps"
        f"{', without the Gaussian' * (not args.prior)}; base: {args.base_steps} "
        f"steps on {args.base_clips} clips, {args.source}; target: {args.target}. Loss over unknown frames "
        "at k = 8, of held-out clips, by the weights of the training (of Eq. 1: without weights), beside "
        "that of the Gaussian that the arm starts from; dB: of unknown frames; frechet: to the target's key "
        "frames, away: to what the base was trained on; mean ± standard error of the seeds."
    )
    text = [about, table(["clips", "task", "arm", "", "rate", "seeds", *names], lines)]
    text += [verdict(rows, args.clips), rivals_line(found.values())]
    result = {", ".join(map(str, key)): values for key, values in rows.items()}
    for name, content in (("json", json.dumps(result, indent=1)), ("md", "\n\n".join(text) + "\n")):
        with replacing(args.output_dir / f"peers.{name}") as writing:
            writing.write_text(content, encoding="utf-8")
    save_png(plot(rows, found, args.clips), args.output_dir / "peers.png")
    if page := draw_samples(found, min(args.clips), args.seeds[0]):
        save_png(page, args.output_dir / "samples.png")


def plot(rows, found, counts):
    """Above the held-out loss of each arm by task and number of clips, a point per seed, and a dash for the
    Gaussian that it starts from; below the curves of the first task, at the fewest clips."""
    figure, axes = plt.subplots(2, len(CONDITIONED), figsize=(13, 7), dpi=100)
    colours = dict(zip(ARMS, plt.get_cmap("tab10").colors))
    for axis, task in zip(axes[0], CONDITIONED):
        for i, arm in enumerate(ARMS):
            for place, clips in enumerate(sorted(counts)):
                values = rows.get((arm, task, clips), {})
                for name, marker in (("loss", "o"), ("of its Gaussian", "_")):
                    losses = [x for x in values.get(name, {}).values() if x is not None]
                    axis.plot([place + i / 12] * len(losses), losses, marker, color=colours[arm], alpha=0.7)
        axis.set_title(f"held-out loss, {task}", fontsize=10)
        letters = [(place + i / 12, arm) for place in range(len(counts)) for i, arm in enumerate(ARMS)]
        axis.set_xticks(*zip(*letters), fontsize=7, rotation=60)
        axis.set_xlabel(" | ".join(f"{clips} clips" for clips in sorted(counts)), fontsize=8)
    for (arm, task, clips, seed), result in found.items():
        if task in ("image", "all") and clips == min(counts) and len(result["curve"]) > 1:
            axes[1, 0].plot(*zip(*result["curve"]), color=colours[arm], linewidth=1)
    axes[1, 0].set(xlabel="step")
    axes[1, 0].set_title(f"held-out loss, image, {min(counts)} clips", fontsize=10)
    for axis in (*axes[0], axes[1, 0]):
        axis.set_yscale("log")  # a base of random weights is far above all others
        axis.yaxis.set_minor_formatter(ScalarFormatter())
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.grid(alpha=0.3, axis="y", which="both")
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=colours[arm]) for arm in ARMS]
    handles.append(plt.Line2D([], [], marker="_", linestyle="", color="grey"))
    names = [*(f"{arm}: {ARMS[arm][0]}" for arm in ARMS), "the Gaussian alone"]
    axes[1, 1].legend(handles, names, fontsize=9, loc="center")
    for axis in axes[1, 1:]:
        axis.set_axis_off()
    figure.tight_layout()
    return figure


def draw_samples(found, clips, seed):
    """PIL.Image, or None without samples: for each task two real clips side by side, and below them what
    every arm that was trained for the task made of them, with the same noise."""
    rows, labels, marks = [], [], []
    for task in CONDITIONED:
        for arm, (about, *_) in ARMS.items():
            result = found.get((arm, task, clips, seed)) or found.get((arm, "all", clips, seed))
            if not (result and (result["folder"] / "samples.png").is_file()):
                continue
            mine = [i for i, (other, _) in enumerate(result["samples"]) if other == task]
            real, made = (np.concatenate(x[mine]) for x in read_samples(result["folder"] / "samples.png"))
            given = [masks.condition_mask(ROWS[result["samples"][i][1]], NUM_FRAMES) for i in mine]
            if f"{task}: real clips" not in labels:
                rows, labels, marks = [*rows, real], [*labels, f"{task}: real clips"], [*marks, ()]
            rows, labels = [*rows, made], [*labels, f"{arm}: {about}"]
            marks.append(np.concatenate(given).tolist())
    return sheet(rows, labels, marks=marks) if rows else None


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(words=None):
    parser = Parser(description="DFGN from scratch against adapters (Tables 1 and 2).")
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
    add("--target", choices=("stickers", "roads"), default="stickers", help=f"what all arms learn {default}")
    add("--target_clips", type=number(int, 64), default=1500, help=f"drawn of the target {default}")
    add("--max_train_steps", type=count, default=1200, help=f"of every run {default}")
    beside = "all networks stand beside the Gaussian; without it all learn plain Eq. 1 (default: they do)"
    add("--prior", action=BooleanOptionalAction, default=True, help=beside)
    add("--preset", choices=SIZES, default="tiny", help=f"size of DFGN {default}")
    add("--resolution", type=number(int, 8, 4096), default=32, help=f"side of the frames in pixels {default}")
    add("--jobs", type=count, default=2, help=f"runs at a time, which share the CPU's cores {default}")
    work_flags(add, num_workers=0)
    args = parser.parse_args(words)
    args.cache_dir, args.output_dir = args.cache_dir or default_cache(), args.output_dir.resolve()
    args.weights = "balanced" if args.prior else "mean"  # of timesteps in the loss of the training
    for name in ("clips", "seeds", "arms"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    if max(args.clips) > 0.85 * args.target_clips:
        raise UserError(
            f"--clips {max(args.clips)} is more than --target_clips {args.target_clips} leave: draw more."
        )
    return args


def main():
    with one_sentence("lab.compare"):
        args = parse_args()
        compare(args)
        print(f"the report is in {args.output_dir}: peers.md, peers.json, peers.png")


if __name__ == "__main__":
    main()
