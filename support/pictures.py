"""
Pictures for the eye: sheets of clips, the preview of a folder, and the log of a run as curves.
"""

import os
import textwrap
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from support.common import UserError, check_output, printable, replacing
from support.log import read_log

GAP, BORDER, LINE = 4, 3, 18  # pixels: between pictures, around a given frame, of a line of text
GIVEN = (230, 90, 20)  # colour of that border
# Fonts of Chinese, Japanese and Korean that systems have: Linux, then macOS.
CJK = ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf")
CJK += ("Arial Unicode.ttf", "Hiragino Sans GB.ttc")


def pyplot():
    """matplotlib.pyplot for files, imported on demand: that takes longer than most drawings."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot

    return matplotlib.pyplot


def check_png(flag, path):
    """Raises UserError, naming the flag, unless a PNG file can be written at `path`."""
    shown, folder = f"{flag} {printable(path)}", Path(path).parent
    if not str(path).lower().endswith(".png"):
        raise UserError(f"{shown}: the picture is a PNG, give it a name that ends in .png.")
    if not os.path.isdir(folder):
        raise UserError(f"{shown}: its folder cannot be written to, make it or choose another.")
    check_output(flag, path)


@cache
def fonts():
    """Pillow's own font, which has the letters of English; DejaVu Sans, which comes with matplotlib and has
    most alphabets; and what the system has for Chinese, Japanese and Korean."""
    found = [ImageFont.load_default(14)]
    for font in (Path(find_spec("matplotlib").origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf", *CJK):
        with suppress(OSError):  # there is none
            found.append(ImageFont.truetype(font, 13))
    return found


@cache
def has_letter(font, letter):
    """Whether a font draws a letter as itself: not as it draws one that no font has, as a box."""
    return bytes(font.getmask(letter)) != bytes(font.getmask("\U0010fffd"))


def lettering(text):
    """The font that has most letters of a text, and the text as it can draw it: letters that it lacks come
    out as escapes such as \\u4e2d, signs that only join or vary emoji are left out."""
    text = printable(text.replace("\u200d", "").replace("\ufe0f", ""), most=len(text))
    lacking = {font: {letter for letter in set(text) if not has_letter(font, letter)} for font in fonts()}
    font = min(lacking, key=lambda font: len(lacking[font]))
    shown = (c.encode("unicode_escape").decode() if c in lacking[font] else c for c in text)
    return font, "".join(shown)


def wrap(text, font, width):
    """The lines of a text, none wider than `width` pixels, as far as they have more than 8 letters."""
    most = max(8, width // 8)
    while lines := textwrap.wrap(text, most):
        if most == 8 or max(map(font.getlength, lines)) <= width:
            break
        most = max(8, most * 9 // 10)
    return lines


def sheet(rows, labels=None, scale=1, marks=None):
    """Clips under one another, frames side by side -> PIL.Image.

    rows: list of (N_i, H_i, W_i, 3) uint8, or all of 4 channels with alpha: then the ground is clear, too;
    labels: a text per row, drawn above it; scale: integer factor of nearest enlargement; marks: a list of
    bools per row, True draws a border around a given frame (Figure 6).
    """
    width = GAP + max(len(row) * (row.shape[2] * scale + GAP) for row in rows)
    lettered = [lettering(label) for label in labels or [""] * len(rows)]
    texts = [(font, wrap(text, font, width - GAP)) for font, text in lettered]
    heights = [GAP + LINE * len(lines) + row.shape[1] * scale for row, (_, lines) in zip(rows, texts)]
    mode, ground = ("RGBA", (255, 255, 255, 0)) if rows[0].shape[-1] == 4 else ("RGB", "white")
    page = Image.new(mode, (width, sum(heights) + GAP), ground)
    draw, top = ImageDraw.Draw(page), 0
    for row, (font, lines), height, given in zip(rows, texts, heights, marks or [()] * len(rows)):
        for i, line in enumerate(lines):
            draw.text((GAP, top + 1 + LINE * i), line, (0, 0, 0), font)
        top += height
        for column, frame in enumerate(row):
            picture = Image.fromarray(frame.repeat(scale, axis=0).repeat(scale, axis=1))
            x, y = GAP + column * (picture.width + GAP), top - picture.height
            if column < len(given) and given[column]:
                right, bottom = x + picture.width - 1, top - 1
                draw.rectangle((x - BORDER, y - BORDER, right + BORDER, bottom + BORDER), GIVEN)
            page.paste(picture, (x, y))
    return page


def preview(rows, captions, counts):
    """A data set at a glance: a histogram of lengths above rows of key frames with captions -> PIL.Image.

    rows, captions: as of `sheet`, of some clips; counts: frames in the file, for every clip
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 2.2), dpi=100)
    axes.hist(counts, bins=np.arange(0.5, max(counts) + 1.5, max(1, max(counts) // 60)), color="#4c72b0")
    axes.set(xlabel="frames in the file", ylabel="clips")
    figure.tight_layout()
    figure.canvas.draw()
    histogram = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    plt.close(figure)

    clips = sheet(rows, captions)
    picture = Image.new("RGB", (max(clips.width, histogram.width), clips.height + histogram.height), "white")
    picture.paste(histogram, (0, 0))
    picture.paste(clips, (0, histogram.height))
    return picture


def save_png(image, path):
    """Writes a PIL.Image, or a matplotlib figure, which is closed, as a PNG, whole or not at all. Raises
    UserError."""
    try:
        with replacing(path) as writing:
            if hasattr(image, "savefig"):
                image.savefig(writing, format="png")
                pyplot().close(image)
            else:
                image.save(writing, "PNG")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{printable(path)} cannot be written ({reason}); choose another place.") from error


def plot_progress(log_path, picture_path):
    """Draws log.jsonl into progress.png: loss, task probabilities, mean k, the three terms of Eq. 4, and the
    difficulty that the curriculum aimed at."""
    log = read_log(log_path)
    if not log:
        return
    plt, terms = pyplot(), ["p_term", "i_term", "d_term"]
    panels = {
        "loss": ["loss", "validation_loss"],
        "P(task)": [
            name for name in dict.fromkeys(chain(*log)) if name.startswith("p_") and name not in terms
        ],
        "difficulty": ["set_point", "aim", "difficulty"],
        "mean k of the batch": ["mean_k"],
        "feedback, Eq. 4": terms,
    }
    figure, axes = plt.subplots(2, 3, figsize=(15, 6.5), dpi=100, sharex=True, layout="constrained")
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for name in names:
            points = [(entry["step"], entry[name]) for entry in log if name in entry]
            style = dict(marker="o", linestyle="--") if name == "validation_loss" else dict(linewidth=1)
            if points:
                axis.plot(
                    *zip(*points), label=name.removeprefix("p_") if name not in terms else name, **style
                )
        axis.set_title(title)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    axes[0, 0].set_yscale("log")
    for axis in axes[1]:
        axis.set_xlabel("step")
    axes[1, 2].set_axis_off()
    axes[1, 0].set_xlim(0, max(entry["step"] for entry in log) + 1)
    save_png(figure, picture_path)
