"""
Stops a toy run inside an epoch, at its end and after it, resumes it, and compares all that is saved, logged and
drawn with the unbroken run, bit for bit:

    python tests/matrix.py                                     every combination on one rank
    torchrun --nproc_per_node 2 tests/matrix.py                on two
    python tests/matrix.py --pairwise                          so few that every pair of values is met
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from itertools import combinations, product
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

import model  # noqa: E402
import train  # noqa: E402
from curriculum import STRATEGIES  # noqa: E402
from support import (
    options,  # noqa: E402
    stickers,  # noqa: E402
)
from tests.toy_train import NO_PICTURES, shrink  # noqa: E402

CLIPS, GLOBAL_BATCH, STEPS = 16, 4, 6  # an epoch has 4 steps
FACTORS = dict(
    stop=(3, 4, 5),  # inside an epoch, at its end, after it
    gradient_accumulation_steps=(1, 2),
    ema=("use_ema", "no-use_ema"),
    mixed_precision=("no", "fp16"),
    curriculum=STRATEGIES,
)


def all_cases():
    return [dict(zip(FACTORS, values)) for values in product(*FACTORS.values())]


def pairwise_cases():
    """A few cases in which every pair of values of two factors occurs: greedily, always the case with most new pairs."""
    met, chosen = set(), []
    pairs = {str(case): set(combinations(case.items(), 2)) for case in all_cases()}
    while met != set.union(*pairs.values()):
        case = max(all_cases(), key=lambda case: len(pairs[str(case)] - met))
        met |= pairs[str(case)]
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
    world, drawn, draw_batch = int(os.environ.get("WORLD_SIZE", 1)), {}, train.data.draw_batch

    def watched(dataset, clips, probabilities, seed, step, indices, *args):
        batch = draw_batch(dataset, clips, probabilities, seed, step, indices, *args)
        seen = [x.numpy().tobytes() if torch.is_tensor(x) else repr(x).encode() for x in batch]
        if len(clips) == CLIPS:  # not validation
            drawn[step, tuple(indices)] = hashlib.sha256(b"".join(seen)).hexdigest()
        return batch

    accumulation = case["gradient_accumulation_steps"]
    flags = dict(
        data=folder,
        cache_dir=folder.parent / "cache",
        output_dir=out,
        max_train_steps=STEPS,
        train_batch_size=GLOBAL_BATCH // accumulation // world,
        gradient_accumulation_steps=accumulation,
        mixed_precision=case["mixed_precision"],
        curriculum=case["curriculum"],
        num_workers=0,
        validation_steps=0,
        checkpointing_steps=save_every,
        checkpoints_total_limit=0,
        validation_prompts="a red heart",
        resume_from_checkpoint="latest",
    )
    sys.argv = [
        "train.py",
        f"--{case['ema']}",
        *(str(w) for name, x in flags.items() for w in (f"--{name}", x)),
    ]
    train.data.draw_batch = watched
    # The ranks of this run must not find the addresses of the run before, which torchrun's store keeps: it counts as
    # a restart.
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(1 + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    try:
        train.main()
    finally:
        train.data.draw_batch = draw_batch
    return drawn


def same(a, b):
    """Equality of nested dicts, lists and tensors, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def everything(out):
    """What a finished run leaves, but for the clock."""
    last = out / f"checkpoint-{STEPS}"
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return dict(
        weights={
            str(path.relative_to(out)): load_file(path) for path in sorted(out.glob("unet/*.safetensors"))
        },
        checkpoint={path.parent.name: load_file(path) for path in sorted(last.glob("unet*/*.safetensors"))},
        optimizer=torch.load(last / "optimizer.pt", weights_only=True),  # moments, schedule, loss scale
        state=json.loads((last / "state.json").read_text()),
        log=[{name: value for name, value in entry.items() if name != "clips_per_second"} for entry in log],
    )


def differences(case, root, folder, unbroken):
    """Names of what a resumed run leaves or draws otherwise. unbroken: runs that may be used again, by settings."""
    settings = {name: value for name, value in case.items() if name != "stop"}
    if str(settings) not in unbroken:
        whole = root / f"whole-{len(unbroken)}"
        unbroken[str(settings)] = whole, run(whole, folder, case)
    whole, drawn = unbroken[str(settings)]
    out, main_process = root / "broken", os.environ.get("RANK", "0") == "0"
    if main_process:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(
            whole,
            out,
            ignore=lambda _, names: {
                name for name in names if name.startswith("checkpoint-") and int(name[11:]) > case["stop"]
            },
        )  # as if killed before the next save: finished parts and later lines of the log lie about
    wait(root, f"{case} is laid out")
    again = run(out, folder, case, save_every=STEPS)
    wrong = [] if again and all(drawn[key] == digest for key, digest in again.items()) else ["draws"]
    wrong += [] if min(again)[0] == case["stop"] else ["first step"]
    if main_process:
        a, b = everything(whole), everything(out)
        wrong += [name for name in a if not same(a[name], b[name])]
    wait(root, f"{case} is compared")
    return wrong


def wait(root, name):
    """Until all ranks are here: between two runs there is no process group."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        store = torch.distributed.FileStore(str(root / "store"), world)
        store.add(name, 1)
        while store.add(name, 0) < world:
            pass


def main():
    parser = argparse.ArgumentParser(description="Compare resumed runs with unbroken ones.")
    parser.add_argument("--pairwise", action="store_true", help="a selection that meets every pair of values")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = model.SIZES
    shrink(options.PRESETS, sizes, None)
    vars(train).update(NO_PICTURES, LOG_EVERY=1)
    main_process = os.environ.get("RANK", "0") == "0"
    root = Path(tempfile.gettempdir()) / f"matrix-{os.environ.get('TORCHELASTIC_RUN_ID', os.getpid())}"
    root.mkdir(exist_ok=True)
    if main_process:
        draw_folder(root)
    wait(root, "drawn")
    folder, unbroken, failed = root / "set", {}, 0
    cases = pairwise_cases() if args.pairwise else all_cases()
    sys_argv, stdout = sys.argv, sys.stdout
    for case in tqdm(cases, desc="resumed runs", disable=not main_process):
        with open(os.devnull, "w") as sys.stdout:  # what train.py says each time
            wrong = differences(case, root, folder, unbroken)
        sys.stdout = stdout
        if wrong:
            failed += 1
            tqdm.write(f"rank {os.environ.get('RANK', 0)}: {case}: {', '.join(wrong)} DIFFER")
    sys.argv = sys_argv
    print(
        f"rank {os.environ.get('RANK', 0)}: {len(cases)} resumed runs, {failed} differ from the unbroken one"
    )
    if main_process:
        shutil.rmtree(root)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
