"""
The paper's ablations: trains and measures the rows of Tables 3 and 4, equal seeds, steps and stickers.

    python ablate.py --output_dir runs/ablation --seeds 0 1 2              # tiny, on two cores: some hours
    python ablate.py --output_dir runs/ablation --seeds 0 1 2 --jobs 2     # two runs at a time
    python ablate.py --output_dir runs/real --preset small --data stickers/ --max_train_steps 20000

          row      Table 3                        Table 4             train.py
          conv3d   DFGN (3D-Conv)                                     --temporal conv3d --ddu off
          sti      DFGN                                               --ddu off
          none     DFGN w/ DDU                    w/o curriculum      --curriculum none
          linear                                  w/ linear           --curriculum linear
          dcl      DFGN w/ DDU & DCL              w/ DCL              --curriculum dcl

Each (row, seed) is a folder ROW-SEED: train.py, then evaluate.py, called as programs. What is finished is
skipped and what was interrupted goes on, so the same command may be given again over days, with more --seeds
too. ablation.md, ablation.json and ablation.png are written anew after every run.

Models without dual masks know no given frames and only 8 equally spaced ones. They are measured on text
alone, on the same 8 key frames as the others: that change of frames is against them.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import matplotlib
import numpy as np
from tqdm import tqdm

from curriculum import HORIZON, target_difficulty
from lab.evaluate import add_scale_flags, check_scale_flags
from lab.heldout import mean_se
from lab.report import sampler_text, write_whole
from masks import TASKS
from model import SIZES
from support.common import UserError
from support.log import read_log

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[1]
TRAIN_FLAGS = {
    "conv3d": ["--temporal", "conv3d", "--ddu", "off"],
    "sti": ["--ddu", "off"],
    "none": ["--curriculum", "none"],
    "linear": ["--curriculum", "linear"],
    "dcl": ["--curriculum", "dcl"],
}
NAMES = {
    "conv3d": "DFGN (3D-Conv)",
    "sti": "DFGN",
    "none": "DFGN w/ DDU, no curriculum",
    "linear": "DFGN w/ DDU, linear",
    "dcl": "DFGN w/ DDU & DCL",
}
TABLES = {
    "Table 3: modules": ("conv3d", "sti", "none", "dcl"),
    "Table 4: curriculum": ("none", "linear", "dcl"),
}
PAIRS = (("sti", "conv3d"), ("none", "sti"), ("linear", "none"), ("dcl", "none"), ("dcl", "linear"))
SCALE = (
    "num_prompts",
    "num_clips",
    "loss_draws",
    "num_inference_steps",
    "batch_size",
)  # flags of evaluate.py
TINY_STEPS = 400  # of a `tiny` run: about four minutes on two cores

# ------------------------------------------------------------------------------------------------------------
# Runs


class Stopped(Exception):
    """A program was told to stop: the user wants no further ones."""


def run(program, flags, log, quiet):
    """Calls one of our programs. quiet: its output goes to the file `log`, else to the screen. RuntimeError
    if it fails."""
    command = [sys.executable, *program, *flags]
    here = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with open(log, "a") as file:
        file.write(shlex.join(command) + "\n")
        file.flush()
        target = file if quiet else None
        status = subprocess.run(
            command, stdout=target, stderr=target, env=dict(os.environ, PYTHONPATH=here)
        ).returncode
    if status in (130, 143, -2, -15):  # Ctrl-C or SIGTERM
        raise Stopped
    if status:
        where = f", see {log}" if quiet else ""
        raise RuntimeError(f"{program} for {log.stem} ended with status {status}{where}")


def finish(row, seed, args, quiet):
    """Trains and measures one (row, seed), as far as that is not done. Returns its report.json as a dict."""
    folder = args.output_dir / f"{row}-{seed}"
    report = folder / "evaluation" / "report.json"
    log = args.output_dir / f"{row}-{seed}.log"
    common = ["--num_workers", str(args.num_workers)]
    common += ["--data", args.data] if args.data else []
    common += ["--cache_dir", args.cache_dir] if args.cache_dir else []
    if not (folder / "model_index.json").is_file():  # train.py writes it last
        flags = ["--preset", args.preset, "--output_dir", str(folder), "--seed", str(seed)]
        flags += ["--max_train_steps", str(args.max_train_steps)] if args.max_train_steps else []
        flags += ["--validation_steps", "0", "--checkpoints_total_limit", "1"]
        flags += [] if args.data else ["--validation_prompts", "a red heart bouncing"]  # a short sheet
        flags += [
            "--resume_from_checkpoint",
            "latest",
            *TRAIN_FLAGS[row],
            *common,
            *shlex.split(args.train_flags),
        ]
        run([str(ROOT / "train.py")], flags, log, quiet)
    if not report.is_file():
        flags = ["--checkpoint", str(folder), "--ddu", "off" if "off" in TRAIN_FLAGS[row] else "on"]
        for name in SCALE:
            flags += [f"--{name}", str(getattr(args, name))]
        run(["-m", "lab.evaluate"], [*flags, *common], log, quiet)
    return json.loads(report.read_text())


# ------------------------------------------------------------------------------------------------------------
# The tables


def value(report, *path):
    """A number of a report, or None where it has no such section (another data set, no dual masks)."""
    for name in path:
        if not isinstance(report, dict) or name not in report:
            return None
        report = report[name]
    return report


# name -> (path in report.json, digits, which way is better)
METRICS = {
    "loss, text only": (("loss", "balanced", "text only, k = 8", "mean"), 4, "lower"),
    "loss, all tasks": (("loss", "balanced", "mean", "mean"), 4, "lower"),
    "colour": (("text", "all", "colour", "share"), 3, "higher"),
    "subject": (("text", "all", "subject", "share"), 3, "higher"),
    "motion word": (("text", "all", "motion", "share"), 3, "higher"),
    "interpolation, dB": (("quality", "interpolation", "unknown", "model", "psnr", "mean"), 2, "higher"),
    "prediction, dB": (("quality", "prediction", "unknown", "model", "psnr", "mean"), 2, "higher"),
    "Frechet (ours)": (("frechet", "text", "model"), 2, "lower"),
    "motion of samples": (("motion", "text", "without_grain", "mean"), 2, "near the real one"),
}


def spread(values):
    """{"mean", "std", "count"} over seeds, None without any."""
    values = [v for v in values if v is not None]
    if not values:
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return dict(mean=float(np.mean(values)), std=std, count=len(values))


def cell(entry, digits):
    if entry is None:
        return "-"
    return f"{entry['mean']:.{digits}f}" + ("" if entry["std"] is None else f" ± {entry['std']:.{digits}f}")


def unsteadiness(log):
    """Standard deviation of the logarithm of the logged training loss around its own running mean over a
    tenth of the run: Figure 7's "steadily" as a number. None for a short log."""
    loss = np.log([max(entry["loss"], 1e-12) for entry in log])
    width = len(loss) // 10
    if width < 3:
        return None
    trend = np.convolve(loss, np.ones(width) / width, mode="valid")
    inner = loss[(width - 1) // 2 :][: len(trend)]
    return float((inner - trend).std())


def summarize(reports, logs):
    """reports: {(row, seed): report}; logs: {(row, seed): list of entries of log.jsonl}.
    Returns the content of ablation.json."""
    rows = {}
    for row in TRAIN_FLAGS:
        mine = {seed: report for (r, seed), report in reports.items() if r == row}
        if mine:
            entry = {
                name: spread([value(report, *path) for report in mine.values()])
                for name, (path, _, _) in METRICS.items()
            }
            entry["unsteadiness"] = spread([unsteadiness(logs[row, seed]) for seed in mine])
            rows[row] = dict(seeds=sorted(mine), metrics=entry)
    pairs = {}
    for a, b in PAIRS:  # seed by seed: what all runs of a seed have in common drops out
        seeds = sorted({s for r, s in reports if r == a} & {s for r, s in reports if r == b})
        entry = {}
        for name, (path, _, _) in METRICS.items():
            both = [(value(reports[a, s], *path), value(reports[b, s], *path)) for s in seeds]
            both = [x - y for x, y in both if x is not None and y is not None]
            if len(both) > 1:
                entry[name] = dict(mean_se(both), seeds=len(both))
        if entry:
            pairs[f"{a} - {b}"] = entry
    return dict(rows=rows, differences=pairs)


def markdown(result, about, references):
    """ablation.md: a table per table of the paper, the differences between rows, and how all was made."""
    names = [name for name in METRICS if any(row["metrics"][name] for row in result["rows"].values())]
    lines = [about, ""]
    for title, rows in TABLES.items():
        if not set(rows) & set(result["rows"]):
            continue
        lines += [f"**{title}** (mean ± standard deviation over seeds)", ""]
        columns = " | ".join(f"{n} ({METRICS[n][2]})" for n in names)
        lines += [f"| row | seeds | {columns} | unsteadiness |", "|---" * (len(names) + 3) + "|"]
        for row in rows:
            if row in result["rows"]:
                entry = result["rows"][row]
                cells = [cell(entry["metrics"][n], METRICS[n][1]) for n in names]
                cells.append(cell(entry["metrics"]["unsteadiness"], 3))
                lines.append(f"| {NAMES[row]} | {len(entry['seeds'])} | " + " | ".join(cells) + " |")
        lines.append("")
    if result["differences"]:
        lines += ["**Differences, seed by seed** (mean ± standard error)", ""]
        lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for pair, entry in result["differences"].items():
            cells = []
            for name in names:
                d, digits = entry.get(name), METRICS[name][1]
                cells.append(f"{d['mean']:+.{digits}f} ± {d['se']:.{digits}f}" if d else "-")
            lines.append(f"| {pair} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, *(f"- {line}" for line in references)]) + "\n"


def references(report):
    """Lines on what the numbers are measured with and against, from one report of a run with dual masks."""
    about = report["about"]
    samplers = "; ".join(sampler_text(about, task) for task in about["sampler"])
    lines = [f"Losses are balanced ones of {about['loss_draws']} held-out draws per (task, k). {samplers}."]
    for task in ("interpolation", "prediction"):
        rivals = value(report, "quality", task, "unknown") or {}
        rivals = [f"{who} {e['psnr']['mean']:.2f} dB" for who, e in rivals.items() if who != "model"]
        if rivals:
            lines.append(f"Baselines, {task}, unknown frames: {', '.join(rivals)}.")
    if value(report, "text"):
        chance = {name: entry["chance"] for name, entry in report["text"]["all"].items()}
        lines.append("Chance: " + ", ".join(f"{name} {p:.3f}" for name, p in chance.items()) + ".")
    if value(report, "frechet", "text"):
        floor = report["frechet"]["text"]["real_held_out"]
        lines.append(f"Frechet distance of as many real held-out clips: {floor:.2f}.")
    if value(report, "motion"):
        real = report["motion"]["real held-out clips"]["without_grain"]["mean"]
        lines.append(f"Motion is that without grain; real held-out clips have {real:.2f}.")
    return lines


# ------------------------------------------------------------------------------------------------------------
# The plot: the counterpart of the paper's Figure 7


def plot(logs, path):
    """Training loss, task probabilities and, of dcl, the target difficulty, over steps; a column per
    curriculum."""
    shown = [
        row for row in ("none", "linear", "dcl") if any(r == row and log for (r, _), log in logs.items())
    ]
    if not shown:
        return
    figure, axes = plt.subplots(
        3,
        len(shown),
        figsize=(4.3 * len(shown), 8),
        dpi=100,
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for column, row in zip(axes.T, shown):
        runs = {seed: log for (r, seed), log in sorted(logs.items()) if r == row and log}
        for seed, log in runs.items():
            steps = [entry["step"] for entry in log]
            loss = np.array([entry["loss"] for entry in log])
            width = max(1, len(loss) // 25)
            smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
            line = column[0].plot(steps[width - 1 :], smooth, linewidth=1, label=f"seed {seed}")[0]
            column[0].plot(steps, loss, linewidth=0.4, alpha=0.3, color=line.get_color())
            # u of the feedback, from the logged terms; under none and linear: what it would have asked for
            p_star = np.array([entry["p_term"] + entry["i_term"] + entry["d_term"] for entry in log])
            mean, means = 0.0, []
            for count, p in enumerate(p_star, start=1):
                mean += (p - mean) / min(count, max(1, HORIZON * len(log) // max(steps[-1], 1)))
                means.append(mean)
            column[2].plot(
                steps, target_difficulty(p_star, np.array(means)), linewidth=0.8, color=line.get_color()
            )
        for i, task in enumerate(TASKS):
            for seed, log in runs.items():
                label = task if seed == min(runs) else None
                share = [entry[f"p_{task}"] for entry in log]
                column[1].plot([e["step"] for e in log], share, color=f"C{i}", linewidth=0.8, label=label)
        column[0].set(title=f"{row}: training loss", yscale="log")
        column[1].set(title="P(task)", ylim=(0, 0.75))
        column[2].set(
            title="target difficulty u" + ("" if row == "dcl" else " (not used)"), ylim=(0, 1), xlabel="step"
        )
        for axis in column:
            axis.grid(alpha=0.3)
        column[0].legend(fontsize=8)
        column[1].legend(fontsize=8)
    writing = path.with_suffix(".tmp.png")
    figure.savefig(writing)
    plt.close(figure)
    writing.replace(path)


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse_args():
    parser = argparse.ArgumentParser(description="Train and measure the rows of the paper's Tables 3 and 4.")
    # fmt: off
    add = parser.add_argument
    add("--output_dir", required=True, help="where runs, logs and tables go")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the same for every row (default 0 1 2)")
    add("--rows", nargs="+", choices=TRAIN_FLAGS, default=list(TRAIN_FLAGS), help="which rows (default: all)")
    add("--preset", choices=SIZES, default="tiny", help="size, and defaults of the training (default tiny)")
    add("--max_train_steps", type=int, help=f"of every run (default: {TINY_STEPS} for tiny, else by preset)")
    add("--data", metavar="DIR", help="folder of stickers (default: the built-in set)")
    add("--cache_dir", help="as of train.py")
    add("--train_flags", default="", metavar="TEXT", help="further flags of train.py, in one text")
    add("--jobs", type=int, default=1, help="runs at a time; from 2 on their output goes to ROW-SEED.log")
    add("--num_workers", type=int, default=2, help="processes that decode and draw, per run (default 2)")
    add_scale_flags(add)
    # fmt: on
    args = parser.parse_args()
    check_scale_flags(args)
    if args.max_train_steps is None and args.preset == "tiny":
        args.max_train_steps = TINY_STEPS
    for name in ("jobs", "max_train_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1.")
    if min(args.seeds) < 0 or args.num_workers < 0:
        raise UserError("--seeds and --num_workers must not be negative.")
    args.seeds, args.rows = list(dict.fromkeys(args.seeds)), list(dict.fromkeys(args.rows))
    args.output_dir = Path(args.output_dir)
    if args.data:
        if not Path(args.data).is_dir():
            raise UserError(f"--data {args.data} is not a folder: give a folder of stickers.")
        args.data = str(Path(args.data).resolve())
    return args


def check_settings(args):
    """All rows of a table have the same budget: other settings in the same folder are refused. Seeds and rows
    may grow."""
    names = ("preset", "max_train_steps", "data", "train_flags", *SCALE)
    now = {name: getattr(args, name) for name in names}
    path = args.output_dir / "settings.json"
    if path.is_file():
        before = json.loads(path.read_text())
        for name in names:
            if before.get(name) != now[name]:
                raise UserError(
                    f"--{name} is {now[name]}, but the runs in {args.output_dir} were made with "
                    f"{before.get(name)}: give another --output_dir."
                )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(now, indent=1))
    return now


def write_tables(reports, args, settings):
    logs = {}
    for row, seed in reports:
        logs[row, seed] = read_log(args.output_dir / f"{row}-{seed}" / "log.jsonl")
    result = summarize(reports, logs)
    dual = [report for report in reports.values() if report["about"]["dual_masks"]]
    budget = f"{args.max_train_steps} steps" if args.max_train_steps else "the preset's steps"
    about = (
        f"Preset {args.preset}, {budget}, {args.data or 'the built-in stickers'}, seeds "
        f"{' '.join(map(str, sorted({s for _, s in reports})))}."
    )
    lines = references((dual or list(reports.values()))[0])
    write_whole(args.output_dir / "ablation.json", json.dumps(dict(settings=settings, **result), indent=1))
    write_whole(args.output_dir / "ablation.md", markdown(result, about, lines))
    plot(logs, args.output_dir / "ablation.png")


def ablate(args):
    settings = check_settings(args)
    jobs = [(row, seed) for seed in args.seeds for row in args.rows]  # a whole table early, more seeds later
    reports, problems, stopped, lock = {}, [], [], Lock()
    bar = tqdm(desc="ablation", total=len(jobs), unit="run")

    def work(job):
        if stopped:
            return
        try:
            report = finish(*job, args, quiet=args.jobs > 1)
        except Stopped:
            stopped.append(job)
            return
        except RuntimeError as error:
            problems.append(str(error))
            return
        with lock:
            reports[job] = report
            write_tables(reports, args, settings)
            bar.update()

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            list(pool.map(work, jobs))
        except KeyboardInterrupt:  # the programs heard it too: each saves and ends, and no other is started
            stopped.append(None)
    bar.close()
    if stopped:
        print("ablate.py: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    if problems:
        raise UserError(
            f"{len(problems)} of {len(jobs)} runs failed, the first: {problems[0]}. The same command tries "
            "again."
        )


def main():
    try:
        args = parse_args()
        ablate(args)
    except (UserError, OSError) as error:
        print(f"ablate.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {args.output_dir}/ablation.md, ablation.json and ablation.png")


if __name__ == "__main__":
    main()
