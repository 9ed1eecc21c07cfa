"""
The paper's ablations: trains and measures the rows of Tables 3 and 4, equal seeds, steps and stickers.

    python -m lab.ablate --table 3 --output_dir runs/ablation            # some hours, two runs at a time
    python -m lab.ablate --table 4 --output_dir runs/ablation            # takes over the runs of Table 3
    python -m lab.ablate --table 3 --output_dir runs/real --data stickers/

Each (row, number of clips, seed) is a folder ROW-CLIPS-SEED of lab.arm, called as a program. What is finished
(has an arm.json) is skipped and what was interrupted goes on, so the same command may be given again over
days. Rows that need more --seeds than others get them by --rows: a table has all that are finished. It is
written anew, as tableN.md, .json and .png, after every run. The runs behind docs/ablations.md are in
docs/ablation and, of real stickers, -real: given as --output_dir, with the flags of that page, the tables
come out without training.

All is small, to be repeated on a laptop, and built so that the masks and the curriculum can show: few clips,
most of them shorter than 8 frames; the loss over unknown frames of image + text to video, the task that the
paper's tables are of. The rows of the paper have no Gaussian beside the network (--prior): with it a network
starts from a good guess. But without it given frames are not used within so few steps (docs/ablations.md), so
the masks are told apart beside it, too. These rows and the 3D convolutions have the first number of clips
alone.
"""

import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
from tqdm import tqdm

from lab.ablation_tables import NAMES, read_arm, write_tables
from masks import LENGTHS, TASKS
from model import SIZES
from support.common import UserError, default_cache, one_sentence, replacing
from support.flags import SEED, Parser, filled, number, work_flags

ROOT = Path(__file__).parents[1]
FLAGS = {  # of lab.arm
    "conv3d": "--ddu off --temporal conv3d --no-prior",
    "conv1d": "--ddu off --temporal conv1d --no-prior",
    "sti": "--ddu off --no-prior",
    "condition": "--ddu condition --no-prior",
    "loss": "--ddu loss --no-prior",
    "ddu": "--curriculum none --no-prior",
    "dcl": "--curriculum dcl --no-prior",
    "sti-prior": "--ddu off --prior",
    "condition-prior": "--ddu condition --prior",
    "loss-prior": "--ddu loss --prior",
    "ddu-prior": "--curriculum none --prior",
    "constant": "--course linear --average --no-prior",
    "linear": "--curriculum linear --no-prior",
    "reversed": "--course reversed --no-prior",
    "set-point": "--course set_point --no-prior",
    "yoked": "--course {yoke} --no-prior",
    "measured": "--order {order} --curriculum dcl --no-prior",
    "measured-average": "--order {order} --course {measured} --average --no-prior",
}
BESIDE_GAUSSIAN = ("sti-prior", "condition-prior", "loss-prior", "ddu-prior")
TABLES = {
    3: ("conv3d", "conv1d", "sti", "condition", "loss", "ddu", "dcl", *BESIDE_GAUSSIAN),
    4: ("ddu", "constant", "linear", "reversed", "dcl", "set-point", "yoked", "measured", "measured-average"),
}
AT_ONE_COUNT = ("conv3d", "conv1d", *BESIDE_GAUSSIAN)  # at the first number of clips alone
WAVE = {"yoked": 1, "measured": 1, "measured-average": 2}  # these take over what runs of a wave before found
SETTINGS = ("preset", "resolution", "max_train_steps", "data")  # equal for all runs in a folder

# ------------------------------------------------------------------------------------------------------------
# Runs


class Stopped(Exception):
    """A program was told to stop: the user wants no further ones."""


def run(words, log, quiet, threads):
    """Calls Python with `words`: one of our programs. quiet: its output goes to the file `log`, else to the
    screen.
    Raises RuntimeError if it fails, Stopped if it was told to stop."""
    command = [sys.executable, *words]
    with open(log, "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(shlex.join(command) + "\n")
        file.flush()
        target, env = file if quiet else None, dict(os.environ, OMP_NUM_THREADS=str(threads))
        status = subprocess.run(command, stdout=target, stderr=target, env=env, cwd=ROOT).returncode
    if status in (129, 130, 143, -1, -2, -15):  # Ctrl-C, SIGTERM, or a terminal that was closed
        raise Stopped
    if status:
        where = f", see {log}" if quiet else ""
        raise RuntimeError(f"lab.arm for {log.stem} ended with status {status}{where}")


def in_parallel(waves, work, done, args, what):
    """Calls work(job) for every job of every wave, --jobs at a time, and done(job, what it returned) one at a
    time; a wave begins when the one before is done. A stop ends the program with 130; failures are collected,
    and at the end one UserError tells of them."""
    problems, stopped, count = [], [], sum(map(len, waves))
    bar, lock = tqdm(desc=what, total=count, unit="run"), Lock()

    def call(job):
        if stopped:
            return
        try:
            result = work(job)
        except Stopped:
            stopped.append(job)
        except RuntimeError as error:
            problems.append(str(error))
        else:
            with lock:
                done(job, result)
                bar.update()

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for wave in waves:
                list(pool.map(call, wave))
        except KeyboardInterrupt:  # the programs heard it too: each saves and ends, and no other is started
            stopped.append(None)
    bar.close()
    if stopped:
        print(f"{what}: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    if problems:
        failed = f"{len(problems)} of {count} runs failed, the first: {problems[0]}"
        raise UserError(f"{failed}. The same command tries again.")


def finished_first(waves, finished):
    """The same waves, those jobs of them before all else that are finished: a report shows at once all there
    is."""
    missing = [[job for job in wave if job not in finished] for wave in waves]
    return [finished, *missing]


def measured_order(folders):
    """The difficulty of every (task, k) as the rank of its measured loss, 0..1 (3, 6), a mean over runs."""
    cells = [json.loads((folder / "arm.json").read_text())["cells"] for folder in folders]
    loss = [[np.mean([c[f"{task}, {k}"]["relative"] for c in cells]) for k in LENGTHS] for task in TASKS]
    ranks = np.argsort(np.argsort(loss, axis=None)).reshape(len(TASKS), len(LENGTHS))
    return ranks / (ranks.size - 1)


def folder_of(job, args):
    row, clips, seed = job
    return args.output_dir / f"{row}-{clips}-{seed}"


def finish(job, args, quiet):
    """Trains and measures one (row, clips, seed), as far as that is not done. Returns its folder."""
    folder, (row, clips, seed) = folder_of(job, args), job
    if (folder / "arm.json").is_file():
        return folder
    other = args.seeds[(args.seeds.index(seed) + 1) % len(args.seeds)]
    order = args.output_dir / f"order-{clips}.json"
    if row.startswith("measured") and not order.is_file():
        runs = [args.output_dir / f"ddu-{clips}-{s}" for s in args.seeds]
        if not all((path / "arm.json").is_file() for path in runs):
            raise RuntimeError(f"{row}-{clips}-{seed} needs the runs of ddu-{clips} first")
        with replacing(order) as writing:
            writing.write_text(json.dumps(measured_order(runs).tolist()))
    jobs = dict(yoke=("dcl", clips, other), measured=("measured", clips, seed))
    followed = {name: folder_of(job, args) for name, job in jobs.items()}
    for name, run_folder in followed.items():
        if f"{{{name}}}" in FLAGS[row] and not (run_folder / "arm.json").is_file():
            raise RuntimeError(f"{row}-{clips}-{seed} needs the run {run_folder.name} first")
    flags = [word.format(order=order, **followed) for word in FLAGS[row].split()]
    flags += ["--preset", args.preset, "--resolution", str(args.resolution), "--seed", str(seed)]
    flags += ["--max_train_steps", str(args.max_train_steps), "--validation_steps", str(args.look_every)]
    flags += ["--mixed_precision", "no"]  # as every machine has it: runs may come from several
    flags += ["--data", args.data] if args.data else []
    flags += [] if clips == "all" else ["--max_train_samples", str(clips)]
    flags += ["--checkpointing_steps", "300", "--checkpoints_total_limit", "1"]
    flags += ["--resume_from_checkpoint", "latest", "--output_dir", str(folder)]
    flags += ["--num_workers", str(args.num_workers), "--cache_dir", str(args.cache_dir)]
    log, threads = folder.with_name(f"{folder.name}.log"), max(1, (os.cpu_count() or 1) // args.jobs)
    run(["-m", "lab.arm", *flags], log, quiet, threads)
    return folder


def list_jobs(args):
    """Every (row, clips, seed), in waves: seed by seed, a whole table early, then those that need a finished
    run."""
    waves = [], [], []
    for seed in args.seeds:
        for clips in args.clips:
            for row in args.rows:
                if row not in AT_ONE_COUNT or clips == args.clips[0]:
                    waves[WAVE.get(row, 0)].append((row, clips, seed))
    return waves


# ------------------------------------------------------------------------------------------------------------
# Command line


def clip_count(text):
    """A number of clips, or "all"."""
    return text if text == "all" else number(int, 8)(text)


def parse_args(words=None):
    parser = Parser(description="Train and measure the paper's Tables 3 and 4.")
    add, count, default = parser.add_argument, number(int, 1), "(default %(default)s)"
    look = "steps between two looks at the fixed batch; every fourth time also at held-out clips"
    clips = "numbers of clips to train on (default: 300 100 all for Table 3, all for Table 4)"
    add("--table", type=int, choices=TABLES, required=True, help="of the paper")
    add("--output_dir", type=Path, required=True, help="where runs, logs and tables go")
    add("--seeds", type=SEED, nargs="+", default=[0, 1, 2], help="of every row (default 0 1 2)")
    add("--rows", nargs="+", choices=NAMES, help="which rows (default: all of the table)")
    add("--clips", nargs="+", type=clip_count, help=clips)
    add("--preset", choices=SIZES, default="tiny", help=f"size {default}")
    add("--resolution", type=number(int, 8, 4096), default=32, help=f"side of the frames in pixels {default}")
    add("--max_train_steps", type=count, default=1200, help=f"of every run {default}")
    add("--look_every", type=count, default=25, help=f"{look} {default}")
    add("--data", metavar="DIR", type=filled, help="folder of stickers (default: the built-in set)")
    add("--jobs", type=count, default=2, help=f"runs at a time, which share the CPU's cores {default}")
    work_flags(add, num_workers=0)
    args = parser.parse_args(words)
    args.cache_dir = args.cache_dir or default_cache()
    args.rows = list(dict.fromkeys(args.rows or TABLES[args.table]))
    args.clips = list(dict.fromkeys(args.clips or ([300, 100, "all"] if args.table == 3 else ["all"])))
    args.seeds = list(dict.fromkeys(args.seeds))
    args.output_dir = args.output_dir.resolve()
    if "yoked" in args.rows and len(args.seeds) < 2:
        raise UserError("row yoked replays the course of another seed: give at least two --seeds.")
    if args.data:
        if not Path(args.data).is_dir():
            raise UserError(f"--data {args.data} is not a folder: give a folder of stickers.")
        args.data = str(Path(args.data).resolve())
    return args


def check_settings(args, names):
    """All runs of a folder have the same budget: other settings of these names are refused. Seeds, rows and
    numbers of clips may grow. Of --data the name counts: a folder may stand elsewhere on another machine."""
    path, now = args.output_dir / "settings.json", {name: getattr(args, name) for name in names}
    if now.get("data"):
        now["data"] = Path(now["data"]).name
    if path.is_file():
        before = json.loads(path.read_text())
        for name in names:
            if before.get(name) != now[name]:
                made = f"the runs in {args.output_dir} were made with {before.get(name)}"
                raise UserError(f"--{name} is {now[name]}, but {made}: give another --output_dir.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with replacing(path) as writing:
        writing.write_text(json.dumps(now, indent=1))


def finished_runs(args):
    """Every finished (row, clips, seed) of this table and these numbers of clips."""
    found, rows = [], {*TABLES[args.table], *args.rows}
    for path in sorted(args.output_dir.glob("*-*-*/arm.json")):
        row, clips, seed = path.parent.name.rsplit("-", 2)
        if row in rows and clips in map(str, args.clips) and seed.isdecimal():
            found.append((row, clips if clips == "all" else int(clips), int(seed)))
    return found


def ablate(args):
    """Every run that is not finished, and the table of all that are, of other rows and seeds too, anew after
    each. Raises UserError if some failed."""
    check_settings(args, SETTINGS)
    wanted, found = list_jobs(args), finished_runs(args)
    finished = [job for wave in wanted for job in wave if job in found]
    arms = {job: read_arm(folder_of(job, args)) for job in found if job not in finished}

    def done(job, folder):
        arms[job] = read_arm(folder)
        if len(arms) >= len(found):
            write_tables(args.table, arms, args)

    work = partial(finish, args=args, quiet=args.jobs > 1)
    in_parallel(finished_first(wanted, finished), work, done, args, f"Table {args.table}")


def main():
    with one_sentence("lab.ablate"):
        args = parse_args()
        ablate(args)
        print(f"wrote {args.output_dir}/table{args.table}.md, .json and .png")


if __name__ == "__main__":
    main()
