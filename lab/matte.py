"""
How well support/matte.py finds alpha: real stickers with an alpha of their own are laid on white, cut out
again and compared, beside two rivals that cut hard.

    python -m lab.matte stickers/                                       # a table
    python -m lab.matte stickers/ --resolution 64 --sheet sheet.png     # the worst and others for the eye

Prints, over all pixels and over those of the edge (where alpha changes by a tenth or more to a neighbour):
the mean error of alpha, and of the picture on black, in levels of 255, which is where a white halo shows; and
the percentage of pixels whose alpha is wrong by more than half: ground outside that stayed, holes that
stayed, figure that was cut away.
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter
from tqdm import tqdm

from support.common import UserError, evenly, one_sentence, printable, table
from support.flags import Parser, number
from support.matte import NEARLY, cut_out, find_ground, flood
from support.media import SUFFIXES, MediaError, pictures
from support.pictures import check_png, save_png, sheet

FRAMES = 4  # of a sticker, at most
CLEAR = 0.02  # share of transparent pixels from which on a sticker's alpha is real
DARK = (40, 40, 60)  # ground of the sheet
SHOWN = 5  # stickers on the sheet: the worst, and as many spread over the others
HEADER = ["", "alpha", "alpha, edge", "on black", "on black, edge"]
HEADER += ["outside stayed, %", "hole stayed, %", "figure cut, %"]


def any_white(frames):
    """All that is nearly white is cut out."""
    alpha = np.where((255 - frames).max(axis=-1) <= NEARLY, 0, 255).astype(np.uint8)
    return np.concatenate([frames, alpha[..., None]], axis=-1)


def hard_flood(frames):
    """The ground of support/matte.py without its edges."""
    alpha = np.where(find_ground(255 - frames), 0, 255).astype(np.uint8)
    return np.concatenate([frames, alpha[..., None]], axis=-1)


RIVALS = {"cut_out": cut_out, "flood, hard": hard_flood, "any white, hard": any_white}


def read_truth(path, resolution):
    """Frames of a sticker as they are: float (N, resolution, resolution, 4) of 0..1, colour times alpha and
    alpha, in the centre of a square. None without real alpha. Raises MediaError."""
    frames = []
    for picture, _ in pictures(path, stills=False, start=time.thread_time()):
        square = Image.new("RGBA", (max(picture.size),) * 2)
        square.paste(picture, ((square.width - picture.width) // 2, (square.height - picture.height) // 2))
        frames.append(square)
    x = torch.from_numpy(np.stack([np.array(frame) for frame in evenly(frames, FRAMES)])) / 255
    if (x[..., 3] < 0.5).float().mean() < CLEAR:
        return None
    x[..., :3] *= x[..., 3:]
    # Bilinear, since bicubic overshoots: alpha and colours of the truth would have to be clipped.
    x = F.interpolate(x.permute(0, 3, 1, 2), (resolution,) * 2, mode="bilinear", antialias=True)
    return x.permute(0, 2, 3, 1).numpy()


def on_ground(premultiplied, ground):
    """(..., 4) of 0..1 on a colour of 0..255: uint8 (..., 3)"""
    colour, alpha = premultiplied[..., :3], premultiplied[..., 3:]
    return (255 * colour + np.array(ground) * (1 - alpha)).round().clip(0, 255).astype(np.uint8)


def premultiply(rgba):
    """uint8 (..., 4) with straight alpha -> float of 0..1, colour times alpha"""
    x = rgba / 255
    x[..., :3] *= x[..., 3:]
    return x


def errors(found, truth):
    """Of two premultiplied (N, H, W, 4), 0..1: sums over pixels of the seven things that HEADER names, and
    how many pixels there are, in all and at the edge."""
    wanted = truth[..., 3]
    window = (1, 3, 3)
    edge = maximum_filter(wanted, window) - minimum_filter(wanted, window) > 0.1
    off = 255 * np.abs(found[..., 3] - wanted)
    black = 255 * np.abs(found[..., :3] - truth[..., :3]).mean(axis=-1)
    clear, wrong = wanted < 0.5, off > 127.5
    outside = flood(clear)
    kinds = (outside, clear & ~outside, ~clear)
    sums = [
        off.sum(),
        off[edge].sum(),
        black.sum(),
        black[edge].sum(),
        *((wrong & kind).sum() for kind in kinds),
    ]
    return np.array(sums), np.array([edge.size, edge.sum()])


def measure(paths, resolution):
    """Returns {name of a rival: seven means}, and [(error, path, truth, {name: RGBA})] from the worst on."""
    sums, pixels, seen, unread = dict.fromkeys(RIVALS, 0), 0, [], 0
    for path in tqdm(paths, desc="matting", unit="sticker"):
        try:
            truth = read_truth(path, resolution)
        except (MediaError, OSError, ValueError, EOFError):  # as of any damaged file
            unread += 1
            continue
        if truth is None:
            continue
        frames = on_ground(truth, (255, 255, 255))
        made = {name: cut(frames) for name, cut in RIVALS.items()}
        for name, rgba in made.items():
            found, size = errors(premultiply(rgba), truth)
            sums[name] = sums[name] + found
            if name == "cut_out":
                seen.append((found[0] / size[0], path, truth, made))
        pixels = pixels + size
    if not seen:
        raise UserError("no sticker there has an alpha of its own: give another folder.")
    print(f"{len(seen)} stickers with alpha of {len(paths)} files, {unread} not read, {resolution} pixels")
    every, edge = pixels
    per = np.array([every, edge, every, edge, every / 100, every / 100, every / 100])
    return {name: x / per for name, x in sums.items()}, sorted(seen, key=lambda one: -one[0])


def draw(seen):
    """PIL.Image: on a dark ground the truth, cut_out and the hard flood of some stickers."""
    rows, labels = [], []
    for error, path, truth, made in seen[:SHOWN] + evenly(seen[SHOWN:], SHOWN):
        shown = [truth] + [premultiply(made[name]) for name in ("cut_out", "flood, hard")]
        rows.append(np.concatenate([on_ground(x[::2], DARK) for x in shown]))
        labels.append(f"{printable(path.name, 60)}: {error:.1f}. Truth, cut_out, hard flood")
    return sheet(rows, labels, scale=max(1, 192 // rows[0].shape[1]))


def main():
    parser = Parser(description=__doc__.split("\n\n")[0].strip())
    add = parser.add_argument
    add("folder", type=Path, help="stickers; those without transparency are passed over")
    add("--resolution", type=number(int, 8, 1024), default=128, help="side in pixels (default %(default)s)")
    add("--sheet", type=Path, metavar="PNG", help="draw the worst and others on a dark ground")
    args = parser.parse_args()
    if args.sheet:
        check_png("--sheet", args.sheet)
    if not args.folder.is_dir():
        raise UserError(f"{printable(args.folder)} is no folder: give one of stickers.")
    paths = sorted(path for path in args.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    means, seen = measure(paths, args.resolution)
    print(table(HEADER, [[name, *(f"{x:.2f}" for x in row)] for name, row in means.items()]))
    if args.sheet:
        save_png(draw(seen), args.sheet)


if __name__ == "__main__":
    with one_sentence("lab.matte"):
        main()
