"""
Kills a toy training run with SIGKILL at random moments and inside its saves, resumes it each time, and
compares what comes out with an unbroken run:

    python tests/stress/kill.py --trials 20 --seed 0

A trial is one kill. Even trials kill at a random time after the first step, odd ones at a random writing,
renaming or removing call (halfway through the file, where a file is written).
"""

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

from support import checkpoint, stickers
from tests.runs import log, said, same, start, train_elsewhere, weights

CALLS_PER_SAVE = 15
FLAGS = dict(
    max_train_steps=90,
    train_batch_size=2,
    validation_steps=0,
    checkpoints_total_limit=2,
    resume_from_checkpoint="latest",
)


def steps(out):
    return [step for step, _ in checkpoint.list_checkpoints(out)]


def kill_inside_a_save(out, rng, flags):
    """Kills a run at one of its calls. Returns its exit status."""
    call = rng.integers(1, 2 * CALLS_PER_SAVE)
    return start(out, env=dict(TOY_KILL=str(call)), **flags).wait()


def kill_at_a_moment(out, rng, flags):
    """Kills a run within a second after its first save. Returns its exit status."""
    before, process = steps(out), start(out, **flags)
    while process.poll() is None and steps(out) == before:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1.0))
    process.send_signal(signal.SIGKILL)
    return process.wait()


def kill(out, trial, rng, flags):
    """One trial. Returns whether the run was killed. Raises SystemExit if it failed or left damage behind."""
    status = (kill_inside_a_save if trial % 2 == 1 else kill_at_a_moment)(out, rng, flags)
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(f"trial {trial}: exit status {status}\n{said(out)[-2000:]}")
    for _, path in checkpoint.list_checkpoints(out):
        if damage := checkpoint.find_damage(path):
            raise SystemExit(f"trial {trial}: {path.name}: {damage}")
    return status != 0


def main():
    parser = argparse.ArgumentParser(description="Kill a training run again and again, and see what is lost.")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        data = stickers.draw_stickers(root / "set", count=24)
        flags = dict(FLAGS, data=data, cache_dir=root / "cache")
        whole, out = train_elsewhere(root / "whole", **flags), root / "killed"
        kills = sum(kill(out, trial, rng, flags) for trial in tqdm(range(args.trials), desc="kills"))
        train_elsewhere(out, **flags)
        same_weights, same_log = same(weights(whole), weights(out)), log(whole) == log(out)
        leftovers = [path.name for path in out.glob("*.tmp")]
        print(f"{kills} kills, {args.trials - kills} runs ended before theirs; no checkpoint was damaged")
        print(f"final weights {'equal' if same_weights else 'DIFFER'}")
        print(f"{len(log(whole))} entries of the log {'equal' if same_log else 'DIFFER'}")
        print(f"left over: {leftovers or 'nothing'}")
    sys.exit(0 if same_weights and same_log and not leftovers else 1)


if __name__ == "__main__":
    main()
