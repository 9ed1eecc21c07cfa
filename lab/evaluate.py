"""
Measures a checkpoint: samples a fixed test list with fixed seeds, and writes report.json and report.html.

    python evaluate.py --checkpoint runs/tiny                      # built-in stickers: minutes on two cores
    python evaluate.py --checkpoint runs/mine --data stickers/     # a folder of yours
    python evaluate.py --checkpoint runs/mine --data stickers/ --i3d i3d_torchscript.pt --clip_score DIR \\
        --vqa_command "python vqa.py -v {video}"                       # and what needs weights you have

What is sampled goes to OUTPUT_DIR/items/, a file per batch, whole or not at all: an interrupted call goes on
where it stopped, and its report is the one of an unbroken call. The test list, all of held-out clips and of 8
frames:

    text             48 prompts: half of them combinations of words that were trained on, half held out; of a
                     folder of yours, held-out captions
    image            24 held-out clips, first frame and caption given (row G1; the paper's I&T->V)
    interpolation    24 clips, rows I1, I2, I3 in turn
    prediction       24 clips, rows P1, P2 in turn

Ground truth is always the clip as the codec gives it back: what a perfect model would make. Nothing is
downloaded.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import masks
import sample
from data import load_clip, open_dataset
from lab import pretrained_metrics
from lab.heldout import kept, measure_loss
from lab.judge import examine, get_judge
from lab.report import write_report
from lab.summary import summarize
from masks import NUM_FRAMES
from support import media, stickers
from support.checkpoint import list_checkpoints
from support.common import UserError, default_cache
from support.folder import DataError, metadata_rows, scan_folder
from support.pretrained import EncoderError

ROWS = {row.name: row for row in masks.TABLE7}
CONDITIONED = {"image": ("G1",), "interpolation": ("I1", "I2", "I3"), "prediction": ("P1", "P2")}
FIDELITY = (
    "interpolation",
    "prediction",
)  # sampled without chance and guidance: as near to the truth as it gets
REAL_CLIPS = 400  # training clips that the Frechet distance compares with

# ------------------------------------------------------------------------------------------------------------
# The test list


class Item(NamedTuple):
    task: str  # "text" or a key of CONDITIONED
    row: str  # of Table 7
    prompt: str
    clip: str  # name of the clip that gives the frames and is the ground truth; "" = none
    words: tuple  # (colour, subject, motion) of a built-in sticker; () elsewhere
    held_out: bool  # whether this combination of words was kept from the training


def spread(things, count):
    """`count` of a list, evenly spread over it; all of it where it is shorter."""
    return [
        things[i] for i in np.unique(np.linspace(0, len(things) - 1, min(count, len(things))).astype(int))
    ]


def word_table(folder, names):
    """{file name: (colour, subject, motion)} of a folder that stickers.py drew; {} for another, such as one
    without the words of all the stickers `names`."""
    if not (Path(folder) / "stickers.json").is_file():
        return {}
    table = {}
    for _, entry in metadata_rows(Path(folder)):
        entry = entry if isinstance(entry, dict) else {}
        name, *words = (entry.get(key) for key in ("file_name", "subject", "colour", "motion"))
        if isinstance(name, str) and tuple(words) in stickers.COMBINATIONS:
            subject, colour, motion = words
            table[name] = colour, subject, motion
    return table if set(names) <= set(table) else {}


def make_test_list(dataset, words, num_prompts, num_clips, ddu):
    """The Items, task by task. `words`: of word_table. Without dual masks (`ddu`) a model knows no given
    frames, and only text is sampled."""
    held_out = [clip for clip in dataset.split("validation") if clip.longest == NUM_FRAMES]
    items = []
    if words:
        order = np.random.default_rng(0).permutation(len(stickers.COMBINATIONS))
        combinations = [stickers.COMBINATIONS[i] for i in order]
        for kept in (False, True):
            chosen = [c for c in combinations if stickers.is_held_out(*c) == kept][: num_prompts // 2]
            for subject, colour, motion in chosen:
                a = "an" if colour[0] in "aeiou" else "a"
                same = [
                    clip.name
                    for clip in dataset.clips
                    if clip.longest == NUM_FRAMES and words[clip.name] == (colour, subject, motion)
                ]
                items.append(
                    Item(
                        "text",
                        "G0",
                        f"{a} {colour} {subject} {motion}",
                        (same or [""])[0],
                        (colour, subject, motion),
                        kept,
                    )
                )
    else:
        for clip in spread([clip for clip in held_out if clip.caption], num_prompts):
            items.append(Item("text", "G0", clip.caption, clip.name, (), True))
    for task, rows in CONDITIONED.items() if ddu else ():
        for i, clip in enumerate(spread(held_out, num_clips)):
            items.append(
                Item(task, rows[i % len(rows)], clip.caption, clip.name, words.get(clip.name, ()), True)
            )
    return items


# ------------------------------------------------------------------------------------------------------------
# Kept results


def open_items(output_dir, identity):
    """The folder of kept results. What lies there must come from the same weights, data and settings:
    otherwise UserError names the first difference."""
    folder, label = output_dir / "items", output_dir / "settings.json"
    if label.is_file():
        before = json.loads(label.read_text())
        now = json.loads(json.dumps(identity))
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                raise UserError(
                    f"--output_dir {output_dir} holds an evaluation with another {name}: give another one, "
                    "or "
                    "remove it."
                )
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    writing = label.with_suffix(".tmp")
    writing.write_text(json.dumps(identity, indent=1))
    os.replace(writing, label)
    return folder


# ------------------------------------------------------------------------------------------------------------
# Samples


def sampler_settings(task, args, recorded):
    """What `generate` is called with for a task: flags where given, else the recorded scales and eta 1; for
    interpolation and prediction no guidance and eta 0."""
    exact = task in FIDELITY
    default = dict(
        eta=0.0 if exact else 1.0,
        guidance_scale=1.0 if exact else recorded["guidance_scale"],
        image_guidance_scale=1.0 if exact else recorded["image_guidance_scale"],
    )
    chosen = {
        name: value if getattr(args, name) is None else getattr(args, name) for name, value in default.items()
    }
    return dict(chosen, num_inference_steps=args.num_inference_steps)


def given_frames(item):
    """bool (8,)"""
    return masks.condition_mask(ROWS[item.row], NUM_FRAMES)


def sample_items(unet, encoders, dataset, items, args, recorded, folder):
    """Samples every item, in fixed batches of one task. Returns a list of clips uint8 (8, R, R, 3) beside
    `items`."""
    by_name = {clip.name: clip for clip in dataset.clips}
    codec = encoders.codec
    side = recorded["resolution"] // codec.factor
    batches = []
    for task in ("text", *CONDITIONED):
        mine = [item for item in items if item.task == task]
        batches += [mine[i : i + args.batch_size] for i in range(0, len(mine), args.batch_size)]

    def sample_batch(number, batch):
        latents = np.zeros((len(batch), NUM_FRAMES, codec.latent_channels, side, side), np.float32)
        given = torch.from_numpy(np.stack([given_frames(item) for item in batch]))
        for b, item in enumerate(batch):
            if given[b].any():
                latents[b] = dataset.read(by_name[item.clip], NUM_FRAMES)
        made = sample.generate(
            unet,
            encoders,
            [item.prompt for item in batch],
            torch.from_numpy(latents),
            given,
            seed=1000 * args.seed + number,  # its own noise for every batch, the same at every call
            mixed_precision=recorded["mixed_precision"],
            progress=sys.stderr.isatty(),
            **sampler_settings(batch[0].task, args, recorded),
        )
        return dict(frames=made)

    clips = []
    for number, batch in enumerate(tqdm(batches, "sampling the test list", unit="batch")):
        path = folder / f"samples-{number:03d}-{batch[0].task}.npz"
        clips += list(kept(path, lambda: sample_batch(number, batch))["frames"])
    return clips


def real_clips(encoders, dataset, clips):
    """The 8 key frames of cached clips as the codec gives them back: {name: uint8 (8, R, R, 3)}."""
    decode = lambda clip: encoders.codec.decode(torch.from_numpy(dataset.read(clip, NUM_FRAMES)).to(device()))
    return {clip.name: decode(clip).cpu().numpy() for clip in tqdm(clips, "decoding real clips", unit="clip")}


# ------------------------------------------------------------------------------------------------------------
# Command line


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def add_scale_flags(add):
    """How much is measured; ablate.py has the same flags."""
    add("--num_prompts", type=int, default=48, help="text prompts (default 48)")
    add("--num_clips", type=int, default=24, help="clips of each task with given frames (default 24)")
    add(
        "--loss_draws",
        type=int,
        default=96,
        help="draws behind each (task, k) of the held-out loss (default 96)",
    )
    add("--num_inference_steps", type=int, default=25, help="DDIM steps (default 25)")
    add("--batch_size", type=int, default=16, help="clips sampled at a time (default 16)")


def check_scale_flags(args):
    for name in ("num_inference_steps", "batch_size", "loss_draws"):
        if not 0 < getattr(args, name) <= 1000:
            raise UserError(f"--{name} {getattr(args, name)}: must lie in 1..1000.")
    for name in ("num_prompts", "num_clips"):
        if getattr(args, name) < 2:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 2.")


def parse_args():
    parser = argparse.ArgumentParser(description="Measure a trained checkpoint and write a report.")
    # fmt: off
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a finished run, or a checkpoint-N folder in it")
    add("--data", metavar="DIR", help="the folder of stickers it was trained on (default: the built-in set)")
    add("--output_dir", help="where the report goes (default: RUN/evaluation, beside a checkpoint-N)")
    add("--cache_dir", help=f"where stickers, latents and the judge are kept (default: {default_cache()})")
    add_scale_flags(add)
    add("--eta", type=float, help="of DDIM (default: 1; 0 for interpolation and prediction)")
    add("--guidance_scale", type=float,
        help="text guidance (default: as recorded for text and image, 1 for interpolation and prediction)")
    add("--image_guidance_scale", type=float, help="guidance by given frames (default: the same)")
    add("--seed", type=int, default=0, help="another seed, other samples (default 0)")
    add("--ddu", choices=["on", "off"],
        help="whether it was trained with dual masks (default: as its last checkpoint records, else on)")
    for name, what in (("vae", "AutoencoderKL"), ("clip", "CLIP text model"), ("t5", "T5 encoder")):
        add(f"--{name}", metavar="DIR_OR_ID", help=f"{what} (default: what the checkpoint records)")
    add("--i3d", metavar="FILE.pt", help="FVD with this I3D TorchScript, the usual one of 400 features")
    add("--clip_score", metavar="DIR", help="CLIP similarity with this CLIPModel; not the model's own CLIP")
    add("--vqa_command", metavar="COMMAND",
        help="an external program, such as FAST-VQA or DOVER: {video} in it becomes an MP4, the last number "
        "that it prints is the score")
    add("--num_workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode and draw")
    # fmt: on
    args = parser.parse_args()
    check_scale_flags(args)
    if args.seed < 0 or args.num_workers < 0:
        raise UserError("--seed and --num_workers must not be negative.")
    if not 0 <= (args.eta or 0) <= 1:
        raise UserError(f"--eta {args.eta}: must lie in 0..1.")
    for name in ("guidance_scale", "image_guidance_scale"):
        if not abs(getattr(args, name) or 0) < sample.MAX_SCALE:
            raise UserError(
                f"--{name} {getattr(args, name)}: must lie within -{sample.MAX_SCALE}..{sample.MAX_SCALE}."
            )
    args.checkpoint = Path(args.checkpoint)
    inside = (args.checkpoint / "state.json").is_file()  # a checkpoint-N folder, which stays as it was saved
    beside = args.checkpoint.parent / f"evaluation-of-{args.checkpoint.name}"
    args.output_dir = Path(args.output_dir or (beside if inside else args.checkpoint / "evaluation"))
    args.cache_dir = Path(args.cache_dir or default_cache())
    return args


def has_dual_masks(args):
    """Whether the checkpoint was trained with dual masks.
    Raises UserError if its state.json does not say."""
    if args.ddu:
        return args.ddu == "on"
    for folder in [args.checkpoint, *(path for _, path in reversed(list_checkpoints(args.checkpoint)))]:
        if (folder / "state.json").is_file():
            try:
                return bool(json.loads((folder / "state.json").read_text())["schedule"]["ddu"])
            except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
                raise UserError(
                    f"{folder / 'state.json'} does not say whether the model was trained with dual masks: "
                    "give --ddu."
                ) from error
    return True


def weights_identity(checkpoint):
    """Changes with the weights that sample.load reads."""
    folder = checkpoint / ("unet_ema" if (checkpoint / "unet_ema").is_dir() else "unet")
    state = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            state.update(hashlib.file_digest(file, "sha256").digest())
    return state.hexdigest()[:16]


def evaluate(args):
    """Everything, in order. Returns the report, a dict that JSON can hold, which report.json is."""
    pretrained_metrics.check_files(args)  # what is missing is said before an hour of sampling
    unet, encoders, recorded = sample.load(args.checkpoint, device(), args.vae, args.clip, args.t5)
    pretrained_metrics.check_clip(args, recorded)
    folder = (
        Path(args.data) if args.data else stickers.draw_stickers(stickers.default_folder(root=args.cache_dir))
    )
    found, _ = scan_folder(folder)
    dataset = open_dataset(
        folder, found, encoders.codec, recorded["resolution"], args.cache_dir, args.num_workers
    )
    ddu, words = has_dual_masks(args), word_table(folder, [clip.name for clip in dataset.clips])
    items = make_test_list(dataset, words, args.num_prompts, args.num_clips, ddu)
    if not items:
        raise UserError(
            f"--data {folder} holds no held-out clip of {NUM_FRAMES} distinct frames: there is nothing to "
            "measure with."
        )
    settings = {
        task: sampler_settings(task, args, recorded)
        for task in ("text", *CONDITIONED)
        if any(item.task == task for item in items)
    }
    identity = dict(
        weights=weights_identity(args.checkpoint),
        stickers=dataset.identity,
        seed=args.seed,
        ddu=ddu,
        sampler=settings,
        batch_size=args.batch_size,
        loss_draws=args.loss_draws,
        items=items,
    )
    kept_folder = open_items(args.output_dir, identity)

    held_out = [clip for clip in dataset.split("validation") if clip.longest == NUM_FRAMES]
    train = spread([clip for clip in dataset.split("train") if clip.longest == NUM_FRAMES], REAL_CLIPS)
    named = {item.clip for item in items}
    wanted = {clip.name: clip for clip in [*held_out, *train, *(c for c in dataset.clips if c.name in named)]}
    real = real_clips(encoders, dataset, list(wanted.values()))

    judge = exam = None
    if words:
        judge = get_judge(encoders.codec, recorded["resolution"], args.cache_dir, args.num_workers)
        places = {sticker.name: sticker for sticker in found}
        raw = [raw_key_frames(places[clip.name], recorded["resolution"]) for clip in held_out]
        known = np.stack(raw) if raw else np.zeros(0), [words[clip.name] for clip in held_out]
        exam = examine(judge, encoders.codec, recorded["resolution"], known, args.num_workers)
        for name in ("raw", "round trip"):
            shares = ", ".join(f"{attribute} {share:.1%}" for attribute, share in exam[name].items())
            print(f"the judge on {exam['clips']} real held-out clips, {name}: {shares}")
        if min(exam["round trip"].values()) < 0.95:
            print("warning: the judge is right on less than 95 % of real clips: its readings mean little")

    loss = measure_loss(unet, encoders, dataset, args, recorded, kept_folder, ddu)
    made = sample_items(unet, encoders, dataset, items, args, recorded, kept_folder)
    latents = [dataset.read(clip, NUM_FRAMES) for clip in train[:64]]
    about = dict(
        checkpoint=str(args.checkpoint),
        step=recorded.get("step"),
        preset=recorded.get("preset"),
        resolution=recorded["resolution"],
        parameters=sum(p.numel() for p in unet.parameters()),
        data=str(folder),
        built_in=bool(words),
        dual_masks=ddu,
        seed=args.seed,
        sampler=settings,
        held_out_clips=len(held_out),
        loss_draws=args.loss_draws,
        latent_std=float(np.std(np.stack(latents))) if latents else 1.0,
    )
    report = summarize(
        about, items, made, real, [c.name for c in held_out], [c.name for c in train], loss, judge, exam
    )
    report.update(pretrained_metrics.measure(args, items, made, real, [c.name for c in held_out]))
    write_report(args.output_dir, report, items, made, real)
    return report


def raw_key_frames(sticker, resolution):
    """The 8 key frames of a sticker file, never coded: uint8 (8, R, R, 3)."""
    clip = load_clip(sticker, resolution)
    return clip.pixels[clip.key_frames[NUM_FRAMES]]


def main():
    try:
        args = parse_args()
        evaluate(args)
    except (
        UserError,
        pretrained_metrics.MetricError,
        sample.CheckpointError,
        DataError,
        EncoderError,
        media.MediaError,
        OSError,
    ) as error:
        print(f"evaluate.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {args.output_dir}/report.json and report.html")


if __name__ == "__main__":
    main()
