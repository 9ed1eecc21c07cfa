"""
Kills a toy training run with SIGKILL at random moments and inside its saves, resumes it each time, and compares what
comes out with an unbroken run:

    python tests/kill.py --trials 20 --seed 0

A trial is one kill. Even trials kill at a random time after the first step, odd ones at a random writing, renaming or
removing call (halfway through the file, where a file is written).
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from support import (
    checkpoint,  # noqa: E402
    stickers,  # noqa: E402
)

STEPS, SAVE_EVERY, CALLS_PER_SAVE = 90, 3, 15


def start(out, data, cache, **env):
    words = [
        "tests/toy_train.py",
        "--data",
        data,
        "--cache_dir",
        cache,
        "--output_dir",
        out,
        "--max_train_steps",
        STEPS,
        "--train_batch_size",
        2,
        "--mixed_precision",
        "no",
        "--num_workers",
        0,
        "--validation_steps",
        0,
        "--checkpointing_steps",
        SAVE_EVERY,
        "--resume_from_checkpoint",
        "latest",
        "--validation_prompts",
        "a cat",
    ]
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **env, "TOY_NO_PICTURES": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def main():
    parser = argparse.ArgumentParser(description="Kill a training run again and again, and see what is lost.")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        data = stickers.draw_stickers(root / "set", count=24)
        whole = start(root / "whole", data, root / "cache")
        if whole.wait() != 0:
            raise SystemExit(whole.stderr.read()[-2000:])
        out, kills, finished = root / "killed", 0, 0
        for trial in tqdm(range(args.trials), desc="kills"):
            inside = trial % 2 == 1
            calls = str(rng.integers(1, 2 * CALLS_PER_SAVE))
            process = start(out, data, root / "cache", **(dict(TOY_KILL=calls) if inside else {}))
            if not inside:
                before = [step for step, _ in checkpoint.list_checkpoints(out)]
                while (
                    process.poll() is None
                    and [step for step, _ in checkpoint.list_checkpoints(out)] == before
                ):
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 1.0))
                process.send_signal(signal.SIGKILL)
            code = process.wait()
            if code not in (0, -signal.SIGKILL):
                raise SystemExit(f"trial {trial}: exit status {code}\n{process.stderr.read()[-2000:]}")
            kills, finished = kills + (code != 0), finished + (code == 0)
            for _, path in checkpoint.list_checkpoints(out):
                if damage := checkpoint.find_damage(path):
                    raise SystemExit(f"trial {trial}: {path.name}: {damage}")
        last = start(out, data, root / "cache")
        if last.wait() != 0:
            raise SystemExit(last.stderr.read()[-2000:])
        a, b = weights(root / "whole"), weights(out)
        same = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        logs = [
            [(entry["step"], entry["loss"]) for entry in checkpoint.read_log(root / name / "log.jsonl")]
            for name in ("whole", "killed")
        ]
        leftovers = [path.name for path in out.glob("*.tmp")]
        print(
            f"{kills} kills ({finished} runs ended before theirs); every checkpoint left behind was whole; final weights "
            f"{'equal' if same else 'DIFFER'}, {len(logs[0])} logged losses "
            f"{'equal' if logs[0] == logs[1] else 'DIFFER'}, leftovers: {leftovers or 'none'}"
        )
        sys.exit(0 if same and logs[0] == logs[1] and not leftovers else 1)


if __name__ == "__main__":
    main()
