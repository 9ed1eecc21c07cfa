"""
Stops a toy run inside an epoch, at its end and after it, resumes it, and compares all that is saved, logged
and drawn with the unbroken run, bit for bit:

    python tests/stress/matrix.py                           every combination on one rank
    torchrun --nproc_per_node 2 tests/stress/matrix.py      on two
    python tests/stress/matrix.py --pairwise                so few that every pair of values is met
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from itertools import combinations, product
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

import data
import train
from curriculum import STRATEGIES
from support import stickers
from tests.runs import NO_PICTURES, QUICK, log, same, state, train_here

RANK, WORLD_SIZE = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
CLIPS, GLOBAL_BATCH, STEPS = 16, 4, 6  # an epoch has 4 steps
FACTORS = dict(
    stop=(3, 4, 5),  # inside an epoch, at its end, after it
    gradient_accumulation_steps=(1, 2),
    use_ema=(True, False),
    mixed_precision=("no", "fp16"),
    curriculum=STRATEGIES,
)


def all_cases():
    return [dict(zip(FACTORS, values)) for values in product(*FACTORS.values())]


def few_cases(size):
    """A few cases in which every value of a factor occurs (size 1), or every pair of values of two factors
    (2): greedily, always the case with most new ones."""
    met, chosen = set(), []
    found = {str(case): set(combinations(case.items(), size)) for case in all_cases()}
    while met != set.union(*found.values()):
        case = max(all_cases(), key=lambda case: len(found[str(case)] - met))
        met |= found[str(case)]
        chosen.append(case)
    return chosen


def draw_folder(root):
    """A set of stickers of which just CLIPS are trained on."""
    folder = stickers.draw_stickers(root / "set", count=CLIPS + 4)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    entries = [dict(line, split="train" if i < CLIPS else "validation") for i, line in enumerate(lines)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def run(out, folder, case, save_every=1):
    """Trains to the end. Returns what was drawn: {(step, samples): digest}."""
    drawn, draw_batch = {}, data.draw_batch

    def watched(dataset, clips, probabilities, seed, step, indices, *args):
        batch = draw_batch(dataset, clips, probabilities, seed, step, indices, *args)
        seen = [x.numpy().tobytes() if torch.is_tensor(x) else repr(x).encode() for x in batch]
        if len(clips) == CLIPS:  # not validation
            drawn[step, tuple(indices)] = hashlib.sha256(b"".join(seen)).hexdigest()
        return batch

    flags = {name: value for name, value in case.items() if name != "stop"}
    flags["train_batch_size"] = GLOBAL_BATCH // case["gradient_accumulation_steps"] // WORLD_SIZE
    flags |= dict(max_train_steps=STEPS, checkpointing_steps=save_every, resume_from_checkpoint="latest")
    if WORLD_SIZE > 1:
        # The ranks of this run must not find the addresses of the run before, which torchrun's store keeps:
        # it counts as a restart.
        count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(count + 1)
    with mock.patch.object(data, "draw_batch", watched):
        train_here(out, data=folder, cache_dir=folder.parent / "cache", **flags)
    return drawn


def everything(out):
    """What a finished run leaves, but for the clock: weights, averages and fitted parts, in the folder itself
    and in the last checkpoint; moments, schedule and loss scale; the rest of the state; the log."""
    last = out / f"checkpoint-{STEPS}"
    files = [*out.glob("*/*.safetensors"), *last.glob("*/*.safetensors")]
    return dict(
        weights={path.relative_to(out).as_posix(): load_file(path) for path in files},
        optimizer=torch.load(last / "optimizer.pt", weights_only=True),
        state=state(out, STEPS),
        log=log(out),
    )


def differences(case, root, folder, unbroken):
    """Names of what a resumed run leaves or draws otherwise. unbroken: runs that may be used again, by
    settings."""
    settings = str({name: value for name, value in case.items() if name != "stop"})
    if settings not in unbroken:
        whole = root / f"whole-{len(unbroken)}"
        unbroken[settings] = whole, run(whole, folder, case)
    whole, drawn = unbroken[settings]
    out = root / "broken"
    if RANK == 0:  # as if killed before the next save: finished parts and later lines of the log lie about
        later = [f"checkpoint-{step}" for step in range(case["stop"] + 1, STEPS + 1)]
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out, ignore=shutil.ignore_patterns(*later))
    wait(root, f"{case} is laid out")
    again = run(out, folder, case, save_every=STEPS)
    wrong = [] if again and all(drawn[key] == digest for key, digest in again.items()) else ["draws"]
    wrong += [] if min(again)[0] == case["stop"] else ["first step"]
    if RANK == 0:
        a, b = everything(whole), everything(out)
        wrong += [name for name in a if not same(a[name], b[name])]
    wait(root, f"{case} is compared")
    return wrong


def wait(root, name):
    """Until all ranks are here: between two runs there is no process group."""
    if WORLD_SIZE > 1:
        store = torch.distributed.FileStore(str(root / "store"), WORLD_SIZE)
        store.add(name, 1)
        while store.add(name, 0) < WORLD_SIZE:
            pass


def main():
    parser = argparse.ArgumentParser(description="Compare resumed runs with unbroken ones.")
    parser.add_argument("--pairwise", action="store_true", help="a selection that meets every pair of values")
    cases = few_cases(2) if parser.parse_args().pairwise else all_cases()
    torch.set_num_threads(1)
    vars(train).update(NO_PICTURES, **QUICK)
    root = Path(tempfile.gettempdir()) / f"matrix-{os.environ.get('TORCHELASTIC_RUN_ID', os.getpid())}"
    root.mkdir(exist_ok=True)
    if RANK == 0:
        draw_folder(root)
    wait(root, "drawn")
    unbroken, failed = {}, 0
    for case in tqdm(cases, desc="resumed runs", disable=RANK > 0):
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            wrong = differences(case, root, root / "set", unbroken)
        if wrong:
            failed += 1
            tqdm.write(f"rank {RANK}: {case}: {', '.join(wrong)} DIFFER")
    print(f"rank {RANK}: {len(cases)} resumed runs, {failed} differ from the unbroken one")
    if RANK == 0:
        shutil.rmtree(root)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
