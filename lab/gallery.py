"""
The moving picture of the front page, and the sheet of every task, from a checkpoint.

    python -m lab.gallery --checkpoint pretrained --output docs/stickers.webp      # or .gif, .mp4
    python -m lab.gallery --checkpoint pretrained --sheet docs/tasks.png

The picture shows the twelve prompts of `stickers.PROMPTS` (every subject once, every motion; combinations of
words that were trained on) and below them a strip of text, image, interpolation and prediction. Captions and
given frames of the strip are those of held-out stickers, whose combinations of words were never trained on.
A rule chooses these, not the eye: of the held-out stickers with 8 key frames, evenly spread over the set. The
sheet shows the last and the first of them.
Everything has seed 0.
"""

import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import sample
from data import load_clip
from masks import NUM_FRAMES
from support import media, stickers
from support.common import UserError, check_output, evenly, one_sentence
from support.flags import Parser
from support.folder import scan_folder
from support.machine import device
from support.pictures import GIVEN, check_png, save_png, sheet

# The commands of the README: which frames of how many are given, and whether the caption is.
#    task                    given frames        frames  text
TASKS = (
    ("text",                 (),                 8,      True),
    ("text and image",       (0,),               8,      True),
    ("interpolation",        (0, 3, 6),          8,      False),
    ("between two pictures", (0, 3),             4,      False),
    ("prediction, forwards", (0, 1, 2, 3, 4),    8,      False),
    ("prediction, backwards", (2, 3, 4, 5, 6, 7), 8,     False),
)  # fmt: skip
STRIP = (TASKS[0], TASKS[1], TASKS[2], TASKS[4])  # a column of the picture each

COLUMNS = 4
CELL = 150  # pixels: frames are enlarged by the largest whole number that keeps them within
LINE, GAP, BORDER, MARK = 16, 10, 4, 5  # pixels
GREY = (215, 215, 215)
TEXT = dict(fill=(0, 0, 0), font=ImageFont.load_default(13), anchor="ma", align="center", spacing=LINE - 13)


class Cell(NamedTuple):
    """One sticker of a picture."""

    label: str
    prompt: str  # "" = none
    real: np.ndarray | None  # uint8 (F, R, R, 3), where given frames come from
    given: np.ndarray  # bool (F,)


def task_cell(row, caption, real):
    """A row of TASKS with the frames (8, R, R, 3) and caption of a real sticker -> Cell."""
    task, given, count, text = row
    label = f"{task}: {caption}" if text else task
    return Cell(label, caption if text else "", real[:count], np.isin(np.arange(count), given))


def prompt_cells():
    """The Cells of the twelve prompts, nothing given."""
    return [Cell(prompt, prompt, None, np.zeros(NUM_FRAMES, bool)) for prompt in stickers.PROMPTS]


def held_out_stickers(folder, resolution, count):
    """`count` held-out stickers of a drawn folder that have 8 key frames, evenly spread over the set.

    Returns [(caption, uint8 (8, R, R, 3))]."""
    found = [sticker for sticker in scan_folder(folder)[0] if sticker.split == "validation"]
    clips = []
    for sticker in evenly(found, 4 * count):
        clip = load_clip(sticker, resolution)
        if NUM_FRAMES in clip.key_frames:
            clips.append((sticker.caption, clip.pixels[clip.key_frames[NUM_FRAMES]]))
    return evenly(clips, count)


def sample_cells(denoiser, encoders, settings, cells):
    """Samples cells of equal numbers of frames, as one batch. Returns uint8 (len(cells), F, R, R, 3)."""
    codec, frames = encoders.codec, len(cells[0].given)
    latents, _ = sample.nothing_given(encoders, settings["resolution"], len(cells), frames)
    for b, cell in enumerate(cells):
        if cell.given.any():
            latents[b, cell.given] = codec.encode(torch.from_numpy(cell.real[cell.given])).float().cpu()
    return sample.generate(
        denoiser,
        encoders,
        [cell.prompt for cell in cells],
        latents,
        torch.from_numpy(np.stack([cell.given for cell in cells])),
        **{name: settings[name] for name in sample.SAMPLING},
        mixed_precision=settings["mixed_precision"],
        progress=sys.stderr.isatty(),
    )


def draw_cell(cell, lines, frame, now, height):
    """Frame number `now` of a cell, (side, side, 3) uint8: outlined if it is given, the caption below.

    Where any frame of the clip is given, each has a mark below the picture: in the colour of the border if it
    is given, taller while it is shown. Returns uint8 (height, side + GAP, 3)."""
    side = len(frame)
    page = Image.new("RGB", (side + GAP, height), media.WHITE)
    draw, left, top = ImageDraw.Draw(page), GAP // 2, GAP // 2
    if cell.given[now]:
        right, bottom = left + side - 1 + BORDER, top + side - 1 + BORDER
        draw.rectangle((left - BORDER, top - BORDER, right, bottom), GIVEN)
    page.paste(Image.fromarray(frame), (left, top))
    floor = top + side + GAP
    width = side // len(cell.given)
    for f, given in enumerate(cell.given if cell.given.any() else ()):
        x, high = left + f * width, MARK if f == now else MARK // 2
        draw.rectangle((x + 1, floor - high, x + width - 2, floor), GIVEN if given else GREY)
    draw.text((left + side // 2, floor + 2), "\n".join(lines), **TEXT)
    return np.asarray(page)


def draw_picture(cells, clips):
    """Cells in full rows of COLUMNS, enlarged. Returns an animation, uint8 (8, H, W, 3).

    cells: a list of Cell; clips: what was made of them, uint8 (len(cells), 8, R, R, 3)."""
    scale = max(1, CELL // clips.shape[2])
    clips = clips.repeat(scale, axis=2).repeat(scale, axis=3)  # nearest
    texts = [textwrap.wrap(cell.label, max(8, clips.shape[2] // 7)) for cell in cells]
    pages = []
    for f in range(NUM_FRAMES):
        rows = []
        for start in range(0, len(cells), COLUMNS):
            row = range(start, start + COLUMNS)
            height = clips.shape[2] + 2 * GAP + LINE * max(len(texts[i]) for i in row)
            drawn = [draw_cell(cells[i], texts[i], clips[i, f], f, height) for i in row]
            rows.append(np.concatenate(drawn, axis=1))
        pages.append(np.concatenate(rows))
    return np.stack(pages)


def draw_sheet(model, sticker):
    """Every row of TASKS below the real sticker (caption, frames) -> PIL.Image."""
    caption, real = sticker
    cells = [task_cell(row, caption, real) for row in TASKS]
    made = [sample_cells(*model, [cell])[0] for cell in cells]
    marks = [[False] * NUM_FRAMES, *(cell.given.tolist() for cell in cells)]
    return sheet([real, *made], [f"real: {caption}", *(row[0] for row in TASKS)], marks=marks)


def parse_args():
    parser = Parser(description="Draw the front page's pictures from a checkpoint.")
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a finished run, or a checkpoint-N folder in it")
    add("--output", metavar="FILE", help="the moving picture: .webp, .gif or .mp4")
    add("--sheet", metavar="FILE.png", help="a sheet of every task, from two held-out stickers")
    args = parser.parse_args()
    if not args.output and not args.sheet:
        raise UserError("nothing to draw: give --output, --sheet, or both.")
    if args.output and Path(args.output).suffix.lower() not in (".webp", ".gif", ".mp4"):
        raise UserError(f"--output {args.output}: let the moving picture end in .webp, .gif or .mp4.")
    if args.output:
        check_output("--output", args.output)
    if args.sheet:
        check_png("--sheet", args.sheet)
    return args


def main():
    with one_sentence("lab.gallery"):
        args = parse_args()
        model = sample.load(args.checkpoint, device())  # denoiser, encoders, settings
        folder = stickers.draw_stickers(stickers.default_folder())
        real = held_out_stickers(folder, model[2]["resolution"], len(STRIP))
        if args.output:
            cells = prompt_cells() + [task_cell(row, *sticker) for row, sticker in zip(STRIP, real)]
            media.write_clip(args.output, draw_picture(cells, sample_cells(*model, cells)), sample.FPS)
            print(f"wrote {args.output}, {Path(args.output).stat().st_size / 2**20:.2f} MB")
        if args.sheet:
            halves = [np.asarray(draw_sheet(model, sticker)) for sticker in (real[-1], real[0])]
            save_png(Image.fromarray(np.concatenate(halves, axis=1)), args.sheet)
            print(f"wrote {args.sheet}")


if __name__ == "__main__":
    main()
