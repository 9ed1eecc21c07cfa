"""
The pictures that lab/train_vae.py trains on, all of them free to share: frames of the built-in stickers,
drawn pictures of many kinds (shapes, lines, fills, letters, faces), and the real stickers in lab/stickers/.

    frames, drawn, real = banks(cache_dir)      # uint8 (N, 128, 128, 3) each, made once and kept in the cache
    batch(banks, seed, step, count=8)           # float (8, 3, 64, 64) in [-1, 1]
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from support import media, stickers
from support.common import evenly, locked, replacing
from support.figures import SUBJECTS, figure

VERSION = 1  # raise it whenever a drawing changes: banks in the cache are then drawn anew
SIDE = 128  # pixels, of a picture in a bank
REAL = Path(__file__).parent / "stickers"  # with their licences
COUNTS = dict(stickers=1200, drawn=5000)  # what the shipped VAE was trained on
SHARES = (0.45, 0.43, 0.12)  # of built-in stickers, drawn pictures, real ones in a batch
PER_CLIP = 4  # frames taken of a sticker

# ------------------------------------------------------------------------------------------------------------
# Drawing. A picture is drawn at twice its size and reduced, for smooth edges.

BIG = 2 * SIDE
GRID = np.stack(np.meshgrid(*[np.linspace(-1, 1, BIG, dtype=np.float32)] * 2))  # x, y: (2, BIG, BIG)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!?&@#%+*"


def some_colour(rng):
    """Black, white, grey, or any colour, more often a strong one: uint8 (3,)."""
    kind, grey = rng.random(), rng.integers(256)
    if kind < 0.3:
        return np.uint8([(0, 255, 30, grey)[rng.integers(4)]] * 3)
    colour = rng.random(3) if kind < 0.6 else np.clip(rng.normal(0.5, 0.6, size=3), 0, 1)
    return np.uint8(255 * colour)


def fill(rng, colours):
    """A surface, uint8 (BIG, BIG, 3): one colour, a gradient, stripes, dots or squares of two."""
    a, b = (colours[i].astype(np.float32) for i in rng.integers(len(colours), size=2))
    kind, angle, period = rng.random(), rng.uniform(0, 2 * np.pi), 8 ** rng.uniform(0.4, 1.6)
    if kind < 0.5:
        return np.broadcast_to(a.astype(np.uint8), (BIG, BIG, 3))
    along = np.cos(angle) * GRID[0] + np.sin(angle) * GRID[1]
    across = np.cos(angle) * GRID[1] - np.sin(angle) * GRID[0]
    if kind < 0.7:  # linear
        amount = (1 + along * rng.uniform(0.6, 2)) / 2
    elif kind < 0.85:  # radial
        centre = rng.uniform(-0.5, 0.5, size=(2, 1, 1))
        amount = np.square(GRID - centre).sum(axis=0) * rng.uniform(0.5, 4)
    elif kind < 0.91:
        amount = np.sin(along * period) > rng.uniform(-0.6, 0.6)
    elif kind < 0.96:
        amount = np.sin(along * period) * np.sin(across * period) > rng.uniform(0.1, 0.6)
    else:
        amount = (np.sin(along * period) > 0) ^ (np.sin(across * period) > 0)
    amount = np.clip(amount, 0, 1).astype(np.float32)[..., None]
    return (a + (b - a) * amount).astype(np.uint8)


def outline(rng):
    """Points of a closed shape around the origin, of radius about 1: (N, 2)."""
    kind = rng.random()
    if kind < 0.3:  # a smooth blob, an ellipse
        angle = np.linspace(0, 2 * np.pi, 65)[:-1]
        waves = np.arange(2, 6)[:, None]
        radius = 1 + (
            rng.normal(0, 0.12, size=(4, 1)) * np.sin(waves * angle + rng.uniform(0, 6, (4, 1)))
        ).sum(0)
        radius = np.ones(64) if rng.random() < 0.5 else radius
    elif kind < 0.6:  # a regular polygon, or a star
        count = rng.integers(3, 9)
        angle = np.arange(2 * count) * np.pi / count
        radius = np.where(np.arange(2 * count) % 2, rng.uniform(0.3, 1), 1)
        if rng.random() < 0.5:
            angle, radius = angle[::2], radius[::2]
    else:  # any polygon
        count = rng.integers(3, 10)
        angle, radius = np.sort(rng.uniform(0, 2 * np.pi, size=count)), rng.uniform(0.3, 1.2, size=count)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    turn = rng.uniform(0, 2 * np.pi)
    stretch = np.diag([1, rng.uniform(0.3, 1)]) @ [
        [np.cos(turn), np.sin(turn)],
        [-np.sin(turn), np.cos(turn)],
    ]
    return points @ stretch


def draw_loop(draw, points, width, ink=255):
    """A closed line with round corners; width in pixels."""
    points = [tuple(point) for point in points]
    draw.line([*points, *points[:2]], ink, width, joint="curve")


def draw_shape(rng, picture, colours):
    """A filled shape, with an outline most of the time."""
    radius = BIG * rng.uniform(0.04, 0.45) ** rng.uniform(1, 1.5)
    points = outline(rng) * radius + rng.uniform(0.1, 0.9, size=2) * BIG
    mask = Image.new("L", (BIG, BIG))
    ImageDraw.Draw(mask).polygon([tuple(point) for point in points], 255)
    width = int(BIG * rng.uniform(0.005, 0.05))
    if rng.random() < 0.3:  # round corners
        draw_loop(ImageDraw.Draw(mask), points, 2 * width)
    picture.paste(Image.fromarray(fill(rng, colours)), (0, 0), mask)
    if rng.random() < 0.65:
        ink = tuple(map(int, colours[rng.integers(len(colours))]))
        draw_loop(ImageDraw.Draw(picture), points, width, ink if rng.random() < 0.5 else (20, 20, 20))


def draw_line(rng, picture, colours):
    """A curve, an arc or a straight line."""
    t = np.linspace(0, 1, 33)[:, None]
    a, b, c = rng.uniform(0.05, 0.95, size=(3, 2)) * BIG
    b = b if rng.random() < 0.7 else (a + c) / 2
    points = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
    ink = tuple(map(int, colours[rng.integers(len(colours))]))
    draw, width = ImageDraw.Draw(picture), int(BIG * rng.uniform(0.006, 0.06))
    draw.line([tuple(point) for point in points], ink, width, joint="curve")
    for end in points[[0, -1]]:
        draw.circle(tuple(end), width / 2, ink)


def draw_word(rng, picture, colours):
    """One to six letters, with a border half of the time."""
    word = "".join(rng.choice(list(LETTERS), size=rng.integers(1, 7)))
    font = ImageFont.load_default(BIG * rng.uniform(0.09, 0.5) / len(word) ** 0.4)
    ink, edge = (tuple(map(int, colours[i])) for i in rng.integers(len(colours), size=2))
    border = rng.integers(1, 9) if rng.random() < 0.5 else 0
    place = tuple(rng.uniform(0.2, 0.8, size=2) * BIG)
    ImageDraw.Draw(picture).text(place, word, ink, font, "mm", stroke_width=border, stroke_fill=edge)


def draw_figure(rng, picture, colours):
    """One of the built-in figures in colours, places and sizes that its stickers do not have."""
    subject, eyes = list(SUBJECTS)[rng.integers(len(SUBJECTS))], rng.integers(5) / 4
    layer = figure(subject, eyes, arm=5 * int(rng.integers(-4, 13)) if rng.random() < 0.2 else None)
    dark = (rng.uniform(0, 60, size=3)) if rng.random() < 0.8 else some_colour(rng).astype(float)
    inks = np.stack([some_colour(rng) for _ in range(3)], axis=1).astype(float)  # (RGB, ink)
    if rng.random() < 0.7:
        inks[:, 1], inks[:, 2] = rng.uniform(0.5, 0.9) * inks[:, 0], 255
    matrix = np.column_stack([(inks - dark[:, None]) / 255, dark]).ravel().tolist()
    turn = rng.uniform(0, 2 * np.pi) if rng.random() < 0.4 else rng.normal(0, 0.15)
    zoom = 1 / rng.uniform(0.5, 2.2)
    inverse = zoom * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    inverse[:, 0] *= rng.choice([-1, 1]) * rng.uniform(0.85, 1.15)
    centre = (0.5 + rng.normal(0, 0.15, size=2)) * BIG
    inverse = np.column_stack([inverse, 128 - inverse @ centre])
    layer = layer.transform(
        (BIG, BIG), Image.Transform.AFFINE, inverse.ravel().tolist(), Image.Resampling.BILINEAR
    )
    layer = layer.convert("RGBA")
    picture.paste(layer.convert("RGB").convert("RGB", matrix), (0, 0), layer.getchannel("A"))


def draw_face(rng, picture, colours):
    """Two eyes and a mouth, small or large."""
    size, centre = BIG * rng.uniform(0.08, 0.3), rng.uniform(0.2, 0.8, size=2) * BIG
    draw, ink = ImageDraw.Draw(picture), tuple(map(int, some_colour(rng) // 4))
    eye = np.array([rng.uniform(0.1, 0.3), rng.uniform(0.1, 0.4)]) * size

    def circle(x, y, radii, colour):
        middle = centre + np.array([x, y]) * size
        draw.ellipse((*(middle - radii), *(middle + radii)), colour)

    white, glint = rng.random() < 0.4, rng.random() < 0.5
    for side in (-0.5, 0.5):
        if white:
            circle(side, -0.2, 1.6 * eye, (255, 255, 255))
        circle(side, -0.2, eye, ink)
        if glint:
            circle(side + 0.05, -0.3, 0.35 * eye, (255, 255, 255))
    high, start = rng.uniform(0.1, 0.5), 180 * (rng.random() < 0.3)
    box = (*(centre + np.array([-0.4, 0.5 - high]) * size), *(centre + np.array([0.4, 0.5 + high]) * size))
    if rng.random() < 0.6:
        draw.arc(box, start + 10, start + 170, ink, max(2, int(0.12 * size)))
    else:
        draw.chord(box, start, start + 180, ink)


KINDS = (draw_shape, draw_line, draw_word, draw_figure, draw_face)


def draw_picture(seed, index):
    """One picture, uint8 (SIDE, SIDE, 3), that depends on (seed, index) only."""
    rng = np.random.default_rng((seed, index))
    colours = [some_colour(rng) for _ in range(rng.integers(2, 6))]
    picture = Image.new("RGB", (BIG, BIG), "white")
    if rng.random() < 0.3:
        picture = Image.fromarray(fill(rng, colours))
    weights = rng.dirichlet((0.8, 0.4, 0.4, 0.7, 0.3))
    for kind in rng.choice(len(KINDS), p=weights, size=rng.integers(2, 9)):
        KINDS[kind](rng, picture, colours)
    look = rng.random()
    if look < 0.1:  # pixel art
        coarse = int(rng.integers(16, 65))
        return np.asarray(picture.resize((coarse, coarse), rng.integers(2)).resize((SIDE, SIDE), 0))
    picture = picture.reduce(2)
    if look < 0.3:  # as in a GIF
        dither = Image.Dither.FLOYDSTEINBERG if look < 0.15 else Image.Dither.NONE
        few = picture.quantize(int(rng.integers(8, 128)), Image.Quantize.FASTOCTREE)
        picture = picture.quantize(palette=few, dither=dither).convert("RGB")
    return np.asarray(picture)


# ------------------------------------------------------------------------------------------------------------
# Banks


def clip_frames(path, most=PER_CLIP):
    """Some frames of a sticker, spread over it: uint8 (n, SIDE, SIDE, 3)."""
    return np.stack(evenly(list(media.read_clip(path, SIDE)[0]), most))


def sticker_frames(cache_dir, split, most=None):
    """Frames of the built-in stickers of a split, "train" or "validation", of at most `most` stickers:
    uint8 (N, SIDE, SIDE, 3)."""
    count = COUNTS["stickers"]
    folder = stickers.draw_stickers(stickers.default_folder(count, root=cache_dir), count)
    lines = map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())
    files = [folder / line["file_name"] for line in lines if line["split"] == split]
    files = tqdm(evenly(files, most or len(files)), desc=f"reading {split}", unit="GIF")
    return np.concatenate([clip_frames(path) for path in files])


def drawn_pictures():
    """uint8 (N, SIDE, SIDE, 3)"""
    return np.stack([draw_picture(0, i) for i in tqdm(range(COUNTS["drawn"]), desc="drawing")])


def banks(cache_dir):
    """What is trained on: built-in stickers, drawn pictures, real stickers, uint8 (N, SIDE, SIDE, 3)
    each. The first two are mapped from .npy files in `cache_dir`, made unless they are there."""
    makers = dict(stickers=partial(sticker_frames, cache_dir, "train"), drawn=drawn_pictures)
    made = []
    for name, make in makers.items():
        path = Path(cache_dir) / f"vae-{name}-v{VERSION}-s0-n{COUNTS[name]}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock"), wait=True):
            if not path.is_file():
                with replacing(path) as writing, open(writing, "wb") as file:
                    np.save(file, make())
        made.append(np.load(path, mmap_mode="r"))
    return *made, np.concatenate([clip_frames(path) for path in sorted(REAL.glob("*.gif"))])


# ------------------------------------------------------------------------------------------------------------
# Batches


def view(picture, rng, size):
    """PIL.Image -> (size, size): all of it made small, a piece as it is, or a piece of any size."""
    look = rng.random()
    if look < 0.4:
        side, x, y = SIDE, 0, 0
    elif look < 0.65:
        side, (x, y) = size, rng.integers(SIDE - size + 1, size=2).tolist()
    else:
        side = rng.uniform(size / 2, SIDE)
        x, y = rng.uniform(0, SIDE - side, size=2)
    return picture.resize((size, size), Image.Resampling.BICUBIC, (x, y, x + side, y + side))


def sample(banks, seed, step, index, size=64):
    """One training picture, uint8 (size, size, 3), that depends on (seed, step, index) only."""
    rng = np.random.default_rng((seed, step, index))
    bank = banks[rng.choice(len(banks), p=SHARES)]
    for _ in range(3):  # until there is something to see
        pixels = np.asarray(view(Image.fromarray(bank[rng.integers(len(bank))]), rng, size))
        if pixels.std() > 20:
            break
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if rng.random() < 0.25:
        pixels = np.rot90(pixels, rng.integers(1, 4))
    if rng.random() < 0.4:
        pixels = pixels[..., rng.permutation(3)]
    return pixels


def batch(banks, seed, step, count, size=64):
    """The batch of a step: float (count, 3, size, size) in [-1, 1]; sample i depends on (seed, step, i)."""
    pixels = np.stack([sample(banks, seed, step, i, size) for i in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
