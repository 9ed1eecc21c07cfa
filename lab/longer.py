"""
Longer than 8 frames, and without an end: does one see where the network started anew?

    python -m lab.longer --checkpoint pretrained --output_dir runs/longer
    python -m lab.longer --checkpoint pretrained --output_dir runs/longer --picture docs/longer.webp

Twelve prompts and two seeds give 24 stickers of each kind. A seam is the change of the picture where a window
begins, the wrap that from the last frame to the first; both are divided by the mean of the other changes of
the same sticker, so 1 is an ordinary change. `motion` says whether it goes on: the change between frames
beyond the eighth, divided by that among the first eight; of loops, and of the cross-fade, their change from
frame to frame, divided by that of the sticker of 8 frames without --loop. Their rivals need no network.

    report.json    the table below, with every sticker's values
    longer.png     a row of 20 frames for each prompt, seed 0
    loops.png      loops of 8 frames, and after them the first one again
"""

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

import sample
from lab import metrics
from lab.gallery import held_out_stickers
from masks import NUM_FRAMES
from support import media, stickers
from support.common import check_output, one_sentence, replacing, table
from support.flags import Parser
from support.machine import device
from support.pictures import save_png, sheet

LENGTH = 20
SEEDS = (0, 1)


def cut_in(clips, length):
    """The trivial rival of a longer sticker: the same frames again. (B, F, ...) -> (B, length, ...)"""
    return clips[:, np.arange(length) % clips.shape[1]]


def cross_fade(clips):
    """The trivial rival of a loop: the last two frames fade into the first. uint8 (B, F, R, R, 3)"""
    faded = clips.astype(np.float32)
    for frame, share in ((-2, 1 / 3), (-1, 2 / 3)):
        faded[:, frame] = (1 - share) * clips[:, frame] + share * clips[:, 0]
    return faded.round().astype(np.uint8)


def scores(clips, places=(), against=None):
    """Medians over clips, and all values: {"wrap"}, with `places`, the frames with which windows begin,
    {"seam"}, and with `against`, clips whose motion is 1, {"motion"}."""
    values = dict(wrap=[metrics.seam(clip) for clip in clips])
    if places:
        values["seam"] = [metrics.seam(clip, places) for clip in clips]
    if against is not None:
        pairs = zip(clips, against)
        values["motion"] = [metrics.motion(clip) / max(metrics.motion(other), 1e-6) for clip, other in pairs]
    return {name: dict(median=float(np.median(x)), values=x) for name, x in values.items()}


def measure(draw, real):
    """draw: function of (frames, loop, seed) that samples the prompts, (B, F, R, R, 3); real: as many real
    clips. Returns ({kind: clips of all seeds}, {kind: scores})."""
    kinds = {  # frames, loop
        "8 frames": (NUM_FRAMES, False),
        "20 frames": (LENGTH, False),
        "8 frames, loop": (NUM_FRAMES, True),
        "20 frames, loop": (LENGTH, True),
    }
    made = {}
    with tqdm(desc="sampling", total=len(kinds) * len(SEEDS), unit="batch") as bar:
        for name, (count, loop) in kinds.items():
            parts = []
            for seed in SEEDS:
                parts.append(draw(count, loop, seed))
                bar.update()
            made[name] = np.concatenate(parts)
    short, long = made["8 frames"], made["20 frames"]
    begins = [window.frames[1] for window in sample.windows(LENGTH)[1:]]  # after the frame that is given
    again = list(range(NUM_FRAMES, LENGTH, NUM_FRAMES))
    later, first = long[:, NUM_FRAMES - 1 :], long[:, :NUM_FRAMES]
    return made, {
        "8 frames": scores(short),
        "20 frames": scores(long, begins) | dict(motion=scores(later, against=first)["motion"]),
        "20 frames: the 8 again": scores(cut_in(short, LENGTH), again),
        "8 frames, loop": scores(made["8 frames, loop"], against=short),
        "20 frames, loop": scores(made["20 frames, loop"], against=short),
        "8 frames: the last two fade into the first": scores(cross_fade(short), against=short),
        "8 key frames of real stickers": scores(real),
    }


def parse_args():
    parser = Parser(description="Look for seams in longer stickers and in loops.")
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a finished run, a checkpoint-N folder, or a hub id",
    )
    add("--output_dir", required=True, type=Path, help="where the report and its sheets go")
    add("--picture", metavar="FILE", help="twelve endless stickers of 20 frames: .webp, .gif or .mp4")
    args = parser.parse_args()
    if args.picture:
        media.check_suffix(args.picture)
        check_output("--picture", args.picture)
    return args


def main():
    with one_sentence("lab.longer"):
        args = parse_args()
        denoiser, encoders, settings = sample.load(args.checkpoint, device())
        args.output_dir.mkdir(parents=True, exist_ok=True)
        chosen = {name: settings[name] for name in (*sample.SAMPLING, "mixed_precision")}
        prompts, n = list(stickers.PROMPTS), len(stickers.PROMPTS)

        def draw(count, loop, seed):
            inputs = sample.nothing_given(encoders, settings["resolution"], n, count)
            return sample.generate(denoiser, encoders, prompts, *inputs, loop=loop, seed=seed, **chosen)

        folder = stickers.draw_stickers(stickers.default_folder())
        real = held_out_stickers(folder, settings["resolution"], len(SEEDS) * n)
        made, report = measure(draw, np.stack([clip for _, clip in real]))
        rows = []
        for name, entry in report.items():
            medians = (f"{entry[x]['median']:.2f}" if x in entry else "-" for x in ("seam", "motion", "wrap"))
            rows.append((name, *medians))
        print(table((f"median of {len(SEEDS) * n}", "seam", "motion", "wrap"), rows))
        with replacing(args.output_dir / "report.json") as writing:
            writing.write_text(json.dumps(report, indent=1))
        save_png(sheet(list(made["20 frames"][:n]), prompts), args.output_dir / "longer.png")
        loops = made["8 frames, loop"][:n, np.arange(NUM_FRAMES + 1) % NUM_FRAMES]
        save_png(sheet(list(loops), prompts), args.output_dir / "loops.png")
        if args.picture:
            page = draw(LENGTH, True, SEEDS[0]).repeat(2, axis=2).repeat(2, axis=3)  # (12, 20, 2R, 2R, 3)
            rows = [np.concatenate(page[start : start + 6], axis=2) for start in range(0, n, 6)]
            media.write_clip(args.picture, np.concatenate(rows, axis=1), sample.FPS)


if __name__ == "__main__":
    main()
