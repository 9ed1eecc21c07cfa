"""
Measures a checkpoint: samples a fixed test list with fixed seeds, and writes report.json and report.md.

    # built-in stickers, minutes on two cores; a folder of yours; and what needs weights you provide
    python -m lab.evaluate --checkpoint runs/tiny
    python -m lab.evaluate --checkpoint runs/mine --data stickers/
    python -m lab.evaluate --checkpoint runs/mine --data stickers/ --i3d i3d.pt --clip_score DIR \\
        --vqa_command "python vqa.py -v {video}"

Every table shows trivial rivals beside the network, and real clips. What is sampled goes to
OUTPUT_DIR/items/, a file per batch, whole or not at all: an interrupted call goes on where it stopped, and
its report is the one of an unbroken call. The test list, all of held-out clips and of 8 frames:

    text             48 prompts: half of them combinations of words that were trained on, half held out; of a
                     folder of yours, held-out captions
    image            24 held-out clips, first frame and caption given (row G1; the paper's I&T->V)
    interpolation    24 clips, rows I1, I2, I3 in turn
    prediction       24 clips, rows P1, P2 in turn

Ground truth is always the clip as the codec gives it back: what a perfect model would make. Nothing is
downloaded.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import masks
import sample
from data import load_clip, open_dataset
from lab import metrics, pretrained_metrics
from lab.heldout import measure_loss
from lab.items import make_test_list, word_table
from lab.judge import examine, get_judge
from lab.report import write_report
from lab.sampling import open_items, sample_items, sampler_settings
from lab.summary import Clips, summarize
from masks import NUM_FRAMES
from support import machine, stickers
from support.checkpoint import list_checkpoints
from support.common import UserError, default_cache, evenly, one_sentence
from support.finished import local_folder
from support.flags import SEED, Parser, filled, number, part_flags, work_flags
from support.folder import scan_folder

REAL_CLIPS = 400  # training clips that the Frechet distance compares with


def real_clips(codec, dataset, clips):
    """The 8 key frames of cached clips as the codec gives them back: {name: uint8 (8, R, R, 3)}."""
    real = {}
    for clip in tqdm(clips, "decoding real clips", unit="clip"):
        latents = torch.from_numpy(dataset.read(clip, NUM_FRAMES)).to(machine.device())  # (8, C, h, w)
        real[clip.name] = codec.decode(latents).cpu().numpy()
    return real


# ------------------------------------------------------------------------------------------------------------
# Command line


def scale_flags(add):
    """How much is measured."""
    size = "(default %(default)s)"
    add("--num_prompts", type=number(int, 2), default=48, help=f"text prompts {size}")
    add("--num_clips", type=number(int, 2), default=24, help=f"clips of each task with given frames {size}")
    samples = f"samples of a clip whose mean is compared with a cross-fade; 1 = none {size}"
    add("--num_samples", type=number(int, 1, 100), default=8, help=samples)
    draws = f"draws behind each (task, k) of the held-out loss {size}"
    add("--loss_draws", type=number(int, 1, 1000), default=48, help=draws)
    steps = f"DDIM steps; half of them for interpolation and prediction {size}"
    add("--num_inference_steps", type=number(int, 1, 1000), default=12, help=steps)
    add("--batch_size", type=number(int, 1, 1000), default=16, help=f"clips sampled at a time {size}")


def parse_args(words=None):
    parser = Parser(description="Measure a trained checkpoint and write a report.")
    add = parser.add_argument
    scale = number(float, -sample.MAX_SCALE, sample.MAX_SCALE)
    recorded = "(default: as recorded for text and image, 1 for interpolation and prediction)"
    ddu = "the dual masks that it was trained with (default: as its last checkpoint records, else on)"
    vqa = "a program, such as FAST-VQA: {video} becomes an MP4, the last number that it prints is the score"
    add("--checkpoint", type=Path, required=True, help="a finished run, or a checkpoint-N folder in it")
    add(
        "--data",
        metavar="DIR",
        type=filled,
        help="the folder of stickers it was trained on (default: the built-in set)",
    )
    add("--output_dir", type=Path, help="where the report goes (default: evaluation in or beside it)")
    scale_flags(add)
    add("--eta", type=number(float, 0, 1), help="of DDIM (default: 1; 0 for interpolation and prediction)")
    add("--guidance_scale", type=scale, help=f"text guidance {recorded}")
    add("--image_guidance_scale", type=scale, help=f"guidance by given frames {recorded}")
    add("--seed", type=SEED, default=0, help="another seed, other samples (default %(default)s)")
    add("--ddu", choices=["on", "condition", "loss", "off"], help=ddu)
    part_flags(add, vae="what the checkpoint records", text="what the checkpoint records")
    add("--i3d", metavar="FILE.pt", help="FVD with this I3D TorchScript, the usual one of 400 features")
    add("--clip_score", metavar="DIR", help="CLIP similarity with this CLIPModel; not the model's own CLIP")
    add("--vqa_command", metavar="COMMAND", help=vqa)
    work_flags(add)
    args = parser.parse_args(words)
    args.cache_dir = args.cache_dir or default_cache()
    if args.output_dir is None:
        inside = (args.checkpoint / "state.json").is_file()  # a checkpoint-N, which stays as it was saved
        beside = args.checkpoint.parent / f"evaluation-of-{args.checkpoint.name}"
        args.output_dir = beside if inside else args.checkpoint / "evaluation"
    return args


def has_dual_masks(args):
    """Whether it was trained with condition masks. Raises UserError if its state.json does not say."""
    if args.ddu:
        return args.ddu in masks.CONDITION_MASK_ON
    for folder in [args.checkpoint, *(path for _, path in reversed(list_checkpoints(args.checkpoint)))]:
        state = folder / "state.json"
        if state.is_file():
            try:
                return json.loads(state.read_text())["schedule"]["ddu"] in (True, *masks.CONDITION_MASK_ON)
            except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
                unclear = "does not say whether the model was trained with dual masks"
                raise UserError(f"{state} {unclear}: give --ddu.") from error
    return True


def weights_identity(checkpoint):
    """Changes with the weights that sample.load reads."""
    state = hashlib.sha256()
    for path in sorted(checkpoint.glob("*/*.safetensors")):
        with open(path, "rb") as file:
            state.update(hashlib.file_digest(file, "sha256").digest())
    return state.hexdigest()[:16]


def raw_key_frames(sticker, resolution):
    """The 8 key frames of a sticker file, never coded: uint8 (8, R, R, 3)."""
    clip = load_clip(sticker, resolution)
    return clip.pixels[clip.key_frames[NUM_FRAMES]]


def examine_judge(codec, resolution, held_out, args):
    """The judge, and its accuracy, which is said. held_out: [(Sticker, its words)]. Returns (judge, exam)"""
    judge = get_judge(codec, resolution, args.cache_dir, args.num_workers)
    frames = [raw_key_frames(sticker, resolution) for sticker, _ in held_out]
    known = (np.stack(frames), [words for _, words in held_out]) if held_out else None
    exam = examine(judge, codec, resolution, known, args.num_workers)
    for name in ("raw", "round trip"):
        shares = ", ".join(f"{attribute} {share:.1%}" for attribute, share in exam[name].items())
        print(f"the judge on {exam['clips']} real held-out clips, {name}: {shares}")
    if min(exam["round trip"].values()) < 0.95:
        print("warning: the judge is right on less than 95 % of real clips: its readings mean little")
    return judge, exam


def describe(model, args):
    """The first fields of the report's "about"."""
    denoiser, _, recorded = model
    return dict(
        checkpoint=str(args.checkpoint),
        step=recorded.get("step"),
        preset=recorded.get("preset"),
        resolution=recorded["resolution"],
        parameters=sum(p.numel() for p in denoiser.parameters()),
        seed=args.seed,
        loss_draws=args.loss_draws,
    )


def open_stickers(codec, resolution, args):
    """(folder, {name: Sticker}, LatentDataset) of --data or of the built-in set."""
    built_in = stickers.default_folder(root=args.cache_dir)
    folder = Path(args.data) if args.data else stickers.draw_stickers(built_in)
    found, _ = scan_folder(folder)
    dataset = open_dataset(folder, found, codec, resolution, args.cache_dir, args.num_workers)
    return folder, {sticker.name: sticker for sticker in found}, dataset


def evaluate(args):
    """Everything, in order. Returns the report, a dict that JSON can hold, which report.json is."""
    pretrained_metrics.check_files(args)  # what is missing is said before an hour of sampling
    metrics.structural_similarity()
    model = sample.load(args.checkpoint, machine.device(), args.vae, args.clip, args.t5)
    _, encoders, recorded = model
    codec, resolution = encoders.codec, recorded["resolution"]
    pretrained_metrics.check_clip(args, recorded)
    folder, found, dataset = open_stickers(codec, resolution, args)

    dual_masks, words = has_dual_masks(args), word_table(folder, [clip.name for clip in dataset.clips])
    items = make_test_list(dataset, words, args.num_prompts, args.num_clips, dual_masks)
    if not items:
        nothing = f"holds no held-out clip of {NUM_FRAMES} distinct frames"
        raise UserError(f"--data {folder} {nothing}: there is nothing to measure with.")
    samplers = {task: sampler_settings(task, args, recorded) for task in dict.fromkeys(i.task for i in items)}
    kept = open_items(
        args.output_dir,
        dict(
            weights=weights_identity(local_folder(args.checkpoint)),
            stickers=dataset.identity,
            seed=args.seed,
            ddu=dual_masks,
            sampler=samplers,
            batch_size=args.batch_size,
            num_samples=args.num_samples,
            loss_draws=args.loss_draws,
            items=items,
        ),
    )

    named = {item.clip for item in items}
    held_out, train = (
        [clip for clip in dataset.split(split) if clip.longest == NUM_FRAMES]
        for split in ("validation", "train")
    )
    train = evenly(train, REAL_CLIPS)
    wanted = {clip.name: clip for clip in (*held_out, *train, *(c for c in dataset.clips if c.name in named))}
    real = real_clips(codec, dataset, wanted.values())
    judge = exam = None
    if words:
        known = [(found[clip.name], words[clip.name]) for clip in held_out]
        judge, exam = examine_judge(codec, resolution, known, args)

    loss = measure_loss(model, dataset, args, kept, dual_masks)
    made = sample_items(model, dataset, items, args, kept)  # the network's and its rivals'
    clips = Clips(items, made, real, [clip.name for clip in held_out], [clip.name for clip in train])
    latents = [dataset.read(clip, NUM_FRAMES) for clip in train[:64]]
    about = describe(model, args) | dict(
        data=str(folder),
        built_in=bool(words),
        dual_masks=dual_masks,
        sampler=samplers,
        held_out_clips=len(held_out),
        latent_std=float(np.std(np.stack(latents))) if latents else 1.0,
    )
    report = summarize(about, clips, loss, judge, exam) | pretrained_metrics.measure(args, clips)
    write_report(args.output_dir, report, clips)
    return report


def main():
    with one_sentence("lab.evaluate"):
        args = parse_args()
        evaluate(args)
        print(f"wrote {args.output_dir}/report.json and report.md")


if __name__ == "__main__":
    main()
