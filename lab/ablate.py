"""
The paper's ablations: trains and measures the rows of Tables 3 and 4, equal seeds, steps and stickers.

    # tiny, some hours on two cores; two runs at a time; another size and folder
    python -m lab.ablate --output_dir runs/ablation --seeds 0 1 2
    python -m lab.ablate --output_dir runs/ablation --seeds 0 1 2 --jobs 2
    python -m lab.ablate --output_dir runs/real --preset small --data stickers/ --max_train_steps 20000

          row      Table 3                        Table 4             train.py
          conv3d   DFGN (3D-Conv)                                     --temporal conv3d --ddu off
          sti      DFGN                                               --ddu off
          none     DFGN w/ DDU                    w/o curriculum      --curriculum none
          linear                                  w/ linear           --curriculum linear
          dcl      DFGN w/ DDU & DCL              w/ DCL              --curriculum dcl

Each (row, seed) is a folder ROW-SEED: train.py, then lab.evaluate, called as programs. What is finished is
skipped and what was interrupted goes on, so the same command may be given again over days, with more --seeds
too. ablation.md, ablation.json and ablation.png are written anew after every run.

Models without dual masks know no given frames and only 8 equally spaced ones. They are measured on text
alone, on the same 8 key frames as the others: that change of frames is against them.
"""

import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
from tqdm import tqdm

from lab.evaluate import scale_flags
from lab.metrics import mean_se
from lab.pictures import plot_ablation, save
from lab.report import sampler_text
from model import SIZES
from support.common import UserError, default_cache, one_sentence, replacing, table
from support.flags import SEED, Parser, filled, number, work_flags
from support.log import read_log

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
# flags of lab.evaluate
SCALE = ("num_prompts", "num_clips", "num_samples", "loss_draws", "num_inference_steps", "batch_size")
TINY_STEPS = 400  # of a `tiny` run: about four minutes on two cores

# ------------------------------------------------------------------------------------------------------------
# Runs


class Stopped(Exception):
    """A program was told to stop: the user wants no further ones."""


def run(words, log, quiet):
    """Calls Python with `words`: one of our programs. quiet: its output goes to the file `log`, else to the
    screen.
    Raises RuntimeError if it fails, Stopped if it was told to stop."""
    command = [sys.executable, *words]
    with open(log, "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(shlex.join(command) + "\n")
        file.flush()
        target = file if quiet else None
        status = subprocess.run(command, stdout=target, stderr=target).returncode
    if status in (129, 130, 143, -1, -2, -15):  # Ctrl-C, SIGTERM, or a terminal that was closed
        raise Stopped
    if status:
        where = f", see {log}" if quiet else ""
        raise RuntimeError(f"{' '.join(words[:2])} for {log.stem} ended with status {status}{where}")


def finish(row, seed, args, quiet):
    """Trains and measures one (row, seed), as far as that is not done. Returns its report.json as a dict."""
    folder = args.output_dir / f"{row}-{seed}"
    report = folder / "evaluation" / "report.json"
    log = args.output_dir / f"{row}-{seed}.log"
    common = ["--num_workers", str(args.num_workers), "--cache_dir", str(args.cache_dir)]
    common += ["--data", args.data] if args.data else []
    if not (folder / "model_index.json").is_file():  # train.py writes it last
        flags = ["--preset", args.preset, "--output_dir", str(folder), "--seed", str(seed)]
        flags += ["--max_train_steps", str(args.max_train_steps)] if args.max_train_steps else []
        flags += ["--validation_steps", "0", "--checkpoints_total_limit", "1"]
        flags += [] if args.data else ["--validation_prompts", "a red heart bouncing"]  # a short sheet
        flags += ["--resume_from_checkpoint", "latest", *TRAIN_FLAGS[row]]
        run([str(ROOT / "train.py"), *flags, *common, *shlex.split(args.train_flags)], log, quiet)
    if not report.is_file():
        flags = ["--checkpoint", str(folder), "--ddu", "off" if "off" in TRAIN_FLAGS[row] else "on"]
        for name in SCALE:
            flags += [f"--{name}", str(getattr(args, name))]
        run(["-m", "lab.evaluate", *flags, *common], log, quiet)
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
    "Frechet (ours)": (("rivals", "text", "network", "frechet"), 2, "lower"),
    "motion of samples": (("motion", "text", "without_grain", "mean"), 2, "near the real one"),
}


def mean_and_std(values):
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


def differences(reports):
    """{"A - B": {metric: mean, standard error and number of seeds}} of PAIRS, seed by seed: what all runs of
    a seed have in common drops out."""
    pairs = {}
    for a, b in PAIRS:
        seeds = sorted({s for r, s in reports if r == a} & {s for r, s in reports if r == b})
        entry = {}
        for name, (path, _, _) in METRICS.items():
            both = [(value(reports[a, s], *path), value(reports[b, s], *path)) for s in seeds]
            both = [x - y for x, y in both if x is not None and y is not None]
            if len(both) > 1:
                entry[name] = dict(mean_se(both), seeds=len(both))
        if entry:
            pairs[f"{a} - {b}"] = entry
    return pairs


def summarize(reports, logs):
    """reports: {(row, seed): report}; logs: {(row, seed): list of entries of log.jsonl}.
    Returns the content of ablation.json."""
    rows = {}
    for row in TRAIN_FLAGS:
        mine = {seed: report for (r, seed), report in reports.items() if r == row}
        if mine:
            entry = {}
            for name, (path, _, _) in METRICS.items():
                entry[name] = mean_and_std([value(report, *path) for report in mine.values()])
            entry["unsteadiness"] = mean_and_std([unsteadiness(logs[row, seed]) for seed in mine])
            rows[row] = dict(seeds=sorted(mine), metrics=entry)
    return dict(rows=rows, differences=differences(reports))


def markdown(result, about, references):
    """ablation.md: a table per table of the paper, the differences between rows, and how all was made."""
    measured = result["rows"]
    names = [name for name in METRICS if any(row["metrics"][name] for row in measured.values())]
    header = ["row", "seeds", *(f"{name} ({METRICS[name][2]})" for name in names), "unsteadiness"]
    parts = [about]
    for title, members in TABLES.items():
        rows = []
        for row in members:
            if row in measured:
                entry = measured[row]["metrics"]
                cells = [cell(entry[name], METRICS[name][1]) for name in names]
                seeds = len(measured[row]["seeds"])
                rows.append([NAMES[row], seeds, *cells, cell(entry["unsteadiness"], 3)])
        if rows:
            parts += [f"**{title}** (mean ± standard deviation over seeds)", table(header, rows)]
    rows = []
    for pair, entry in result["differences"].items():
        cells = []
        for name in names:
            d, digits = entry.get(name), METRICS[name][1]
            cells.append(f"{d['mean']:+.{digits}f} ± {d['se']:.{digits}f}" if d else "-")
        rows.append([pair, *cells])
    if rows:
        parts += ["**Differences, seed by seed** (mean ± standard error)", table(["", *names], rows)]
    parts.append("\n".join(f"- {line}" for line in references))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def references(report):
    """Lines on what the numbers are measured with and against, from one report of a run with dual masks."""
    about = report["about"]
    draws = f"Losses are balanced ones of {about['loss_draws']} held-out draws per (task, k)."
    lines = [f"{draws} {sampler_text(about)}."]
    for task in ("interpolation", "prediction"):
        compared = value(report, "quality", task, "unknown") or {}
        baselines = [f"{name} {e['psnr']['mean']:.2f} dB" for name, e in compared.items() if name != "model"]
        if baselines:
            lines.append(f"Baselines, {task}, unknown frames: {', '.join(baselines)}.")
    if value(report, "text"):
        chance = {name: entry["chance"] for name, entry in report["text"]["all"].items()}
        lines.append("Chance: " + ", ".join(f"{name} {p:.3f}" for name, p in chance.items()) + ".")
    floor = value(report, "rivals", "text", "real clips", "frechet")
    if floor is not None:
        lines.append(f"Frechet distance of as many real held-out clips: {floor:.2f}.")
    if value(report, "motion"):
        real = report["motion"]["real held-out clips"]["without_grain"]["mean"]
        lines.append(f"Motion is that without grain; real held-out clips have {real:.2f}.")
    return lines


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(words=None):
    about = "Train and measure the rows of the paper's Tables 3 and 4."
    parser = Parser("python -m lab.ablate", description=about)
    add = parser.add_argument
    steps = f"of every run (default: {TINY_STEPS} for tiny, else by preset)"
    count, jobs = number(int, 1), "runs at a time; from 2 on their output goes to ROW-SEED.log (default 1)"
    add("--output_dir", type=Path, required=True, help="where runs, logs and tables go")
    add("--seeds", type=SEED, nargs="+", default=[0, 1, 2], help="of every row (default 0 1 2)")
    add("--rows", nargs="+", choices=TRAIN_FLAGS, default=[*TRAIN_FLAGS], help="which rows (default: all)")
    add("--preset", choices=SIZES, default="tiny", help="size, and defaults of the training (default tiny)")
    add("--max_train_steps", type=count, help=steps)
    add("--data", metavar="DIR", type=filled, help="folder of stickers (default: the built-in set)")
    add("--train_flags", default="", metavar="TEXT", help="further flags of train.py, in one text")
    add("--jobs", type=count, default=1, help=jobs)
    scale_flags(add)
    work_flags(add, num_workers=2)
    args = parser.parse_args(words)
    args.cache_dir = args.cache_dir or default_cache()
    if args.max_train_steps is None and args.preset == "tiny":
        args.max_train_steps = TINY_STEPS
    args.seeds, args.rows = list(dict.fromkeys(args.seeds)), list(dict.fromkeys(args.rows))
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
                made = f"the runs in {args.output_dir} were made with {before.get(name)}"
                raise UserError(f"--{name} is {now[name]}, but {made}: give another --output_dir.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with replacing(path) as writing:
        writing.write_text(json.dumps(now, indent=1))
    return now


def write_tables(reports, args, settings):
    """Writes ablation.json, ablation.md and ablation.png of what is finished. reports: {(row, seed):
    report}"""
    logs = {(row, seed): read_log(args.output_dir / f"{row}-{seed}" / "log.jsonl") for row, seed in reports}
    result = summarize(reports, logs)
    dual = [report for report in reports.values() if report["about"]["dual_masks"]]
    budget = f"{args.max_train_steps} steps" if args.max_train_steps else "the preset's steps"
    seeds = " ".join(map(str, sorted({seed for _, seed in reports})))
    about = f"Preset {args.preset}, {budget}, {args.data or 'the built-in stickers'}, seeds {seeds}."
    lines = references((dual or list(reports.values()))[0])
    for name, text in (
        ("ablation.json", json.dumps(dict(settings=settings, **result), indent=1)),
        ("ablation.md", markdown(result, about, lines)),
    ):
        with replacing(args.output_dir / name) as writing:
            writing.write_text(text, encoding="utf-8")
    if figure := plot_ablation(logs):
        save(figure, args.output_dir / "ablation.png")


def ablate(args):
    """Every (row, seed) that is not finished, and the tables. Raises UserError at the end if some failed."""
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
        print("lab.ablate: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    if problems:
        failed = f"{len(problems)} of {len(jobs)} runs failed, the first: {problems[0]}"
        raise UserError(f"{failed}. The same command tries again.")


def main():
    with one_sentence("lab.ablate"):
        args = parse_args()
        ablate(args)
        print(f"wrote {args.output_dir}/ablation.md, ablation.json and ablation.png")


if __name__ == "__main__":
    main()
