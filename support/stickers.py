"""
Draws the built-in sticker set: real animated GIF files with captions, made of simple shapes, so that a
training run needs no download and goes through the very same path as a user's folder of GIFs.

    python stickers.py my_stickers --count 1200 --seed 0     # a folder of GIFs and its metadata.jsonl
    python stickers.py --sheet sheet.png                     # one picture of subjects, colours and motions
"""

import argparse
import json
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

VERSION = 1  # part of the cache folder's name: raise it whenever a drawing or a caption changes
CANVAS = 128  # pixels, width and height of a sticker

# -----------------------------------------------------------------------------
# Pen: a figure is drawn in four inks, large, and coloured later. It fills about [-1, 1] x [-1, 1], y down.

BODY, SHADE, LIGHT, DARK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)  # a channel is an amount of ink
LAYER = 256  # pixels of a finished layer; twice that while drawing, for smooth edges
EXTENT = 1.9  # a layer shows [-EXTENT, EXTENT]^2: there is room for arms
OUTLINE = 0.1  # width of the dark outline


class Pen:
    def __init__(self):
        self.image = Image.new("RGBA", (2 * LAYER, 2 * LAYER), LIGHT + (0,))
        self.draw = ImageDraw.Draw(self.image)

    def pixels(self, points):
        return [tuple(point) for point in ((np.asarray(points) + EXTENT) * (LAYER / EXTENT)).tolist()]

    def stroke(self, points, ink=DARK, width=0.09):
        """An open line with round ends and corners."""
        points, width = self.pixels(points), round(width * LAYER / EXTENT)
        self.draw.line(points, ink, width)
        for point in points:
            self.draw.circle(point, (width - 1) / 2, ink)

    def area(self, points, ink=BODY, outline=OUTLINE, rounding=0.0):
        """A filled shape, swollen by `rounding` so that its corners are round, in a dark outline."""
        loop = [*points, points[0]]
        for colour, swelling in ((DARK, rounding + outline), (ink, rounding)):
            if swelling:
                self.stroke(loop, colour, 2 * swelling)
            self.draw.polygon(self.pixels(points), colour)


def ellipse(x, y, rx, ry, start=0, stop=360):
    """Points of an ellipse or of an arc of it; angles in degrees, 0 to the right, 90 down."""
    angle = np.radians(np.linspace(start, stop, 49))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def face(pen, x, y, size, eyes, mouth="smile", cheeks=True):
    """Two dot eyes, two cheeks and a mouth. eyes: 1 open ... 0 closed."""
    at = lambda dx, dy, rx, ry, *arc: ellipse(x + dx * size, y + dy * size, rx * size, ry * size, *arc)
    for side in (-1, 1):
        if eyes:
            pen.area(at(side * 0.36, -0.08, 0.16, 0.23 * eyes), DARK, outline=0)
            pen.area(at(side * 0.36 + 0.04, -0.08 - 0.08 * eyes, 0.055, 0.065 * eyes), LIGHT, outline=0)
        else:
            pen.stroke(at(side * 0.36, -0.1, 0.18, 0.11, 15, 165), width=0.1 * size)
        if cheeks:
            pen.area(at(side * 0.62, 0.2, 0.13, 0.09), SHADE, outline=0)
        if mouth == "muzzle":
            pen.stroke(at(side * 0.13, 0.2, 0.13, 0.16, 0, 180), width=0.08 * size)
    if mouth in ("smile", "frown"):
        arc = (0.12, 0.22, 0.24, 15, 165) if mouth == "smile" else (0.62, 0.34, 0.3, 200, 340)
        pen.stroke(at(0, *arc), width=0.11 * size)
    elif mouth in ("laugh", "oh"):
        arc = (0.2, 0.42, 0.42, 0, 180) if mouth == "laugh" else (0.38, 0.13, 0.17)
        pen.area(at(0, *arc), DARK, outline=0, rounding=0.03)


# -----------------------------------------------------------------------------
# Subjects: a function each; what lies behind is drawn first


def heart(pen, eyes):
    left, right = ellipse(-0.49, -0.36, 0.5, 0.5, 140, 320), ellipse(0.49, -0.36, 0.5, 0.5, 220, 400)
    pen.area([*left, *right, (0, 0.92)], rounding=0.06)
    face(pen, 0, -0.15, 0.95, eyes)


def star(pen, eyes):
    angle, radius = np.radians(np.arange(10) * 36 - 90), np.where(np.arange(10) % 2, 0.55, 1.06)
    pen.area(np.stack([radius * np.cos(angle), radius * np.sin(angle) + 0.06], axis=1), rounding=0.12)
    face(pen, 0, 0.02, 0.85, eyes)


def cat(pen, eyes):
    for side in (-1, 1):
        pen.area([(side * 0.92, -0.95), (side * 0.9, 0), (side * 0.2, -0.55)], rounding=0.06)
    pen.area(ellipse(0, 0.18, 1.05, 0.82))
    for side in (-1, 1):
        pen.stroke([(side * 1.18, 0.26), (side * 0.78, 0.42), (side * 1.18, 0.56)], width=0.06)  # whiskers
    face(pen, 0, 0.12, 1, eyes, mouth="muzzle")
    pen.area([(-0.06, 0.26), (0.06, 0.26), (0, 0.32)], DARK, outline=0, rounding=0.04)


def fish(pen, eyes):
    pen.area([(-0.5, 0), (-1, -0.6), (-0.9, 0), (-1, 0.6)], rounding=0.08)  # tail
    pen.area([(0.3, -0.5), (-0.3, -0.88), (-0.45, -0.4)], rounding=0.06)  # fin on the back
    pen.area(ellipse(0.2, 0, 0.86, 0.7))
    if eyes:
        pen.area(ellipse(0.52, -0.16, 0.28, 0.28 * eyes), LIGHT, outline=0.06)
        pen.area(ellipse(0.58, -0.14, 0.15, 0.19 * eyes), DARK, outline=0)
    else:
        pen.stroke(ellipse(0.52, -0.2, 0.26, 0.14, 10, 170), width=0.11)
    pen.stroke(ellipse(0.74, 0.14, 0.28, 0.2, 80, 160))


def ghost(pen, eyes):
    x = np.linspace(0.85, -0.85, 60)
    hem = np.stack([x, 0.86 + 0.16 * np.cos(x / 0.85 * 3 * np.pi)], axis=1)
    pen.area([*ellipse(0, -0.15, 0.85, 0.9, 180, 360), *hem], rounding=0.04)
    face(pen, 0, -0.18, 1, eyes, mouth="oh")


def flower(pen, eyes):
    for angle in np.radians(np.arange(6) * 60 + 30):
        pen.area(ellipse(0.7 * np.cos(angle), 0.7 * np.sin(angle), 0.4, 0.4))
    pen.area(ellipse(0, 0, 0.62, 0.62), LIGHT)
    face(pen, 0, -0.05, 0.82, eyes, cheeks=False)


def balloon(pen, eyes):
    y = np.linspace(0.6, 1.15, 30)
    pen.stroke(np.stack([0.13 * np.sin((y - 0.6) * 11), y], axis=1), width=0.1)  # string
    pen.area([(0, 0.5), (-0.16, 0.74), (0.16, 0.74)], rounding=0.04)  # knot
    pen.area(ellipse(0, -0.28, 0.78, 0.82))
    pen.area(ellipse(-0.42, -0.76, 0.12, 0.18), LIGHT, outline=0)
    face(pen, 0, -0.25, 0.95, eyes)


def mushroom(pen, eyes):
    pen.area([(-0.42, 0), (0.42, 0), (0.52, 0.85), (-0.52, 0.85)], LIGHT, rounding=0.1)
    pen.area(ellipse(0, 0.05, 1.05, 1.05, 180, 360), rounding=0.08)
    for x, y, r in ((-0.62, -0.3, 0.17), (0.05, -0.62, 0.22), (0.66, -0.25, 0.15)):
        pen.area(ellipse(x, y, r, r), LIGHT, outline=0)
    face(pen, 0, 0.48, 0.78, eyes, cheeks=False)


def rabbit(pen, eyes):
    for side in (-1, 1):
        ear = ellipse(0, -0.55, 0.21, 0.5) @ np.array([[1, 0], [-side * 0.3, 1]]) + [side * 0.22, 0]
        pen.area(ear)
        pen.area((ear - ear.mean(axis=0)) * [0.4, 0.7] + ear.mean(axis=0), SHADE, outline=0)
    pen.area(ellipse(0, 0.4, 0.86, 0.66))
    pen.area([(-0.12, 0.72), (0.12, 0.72), (0.12, 0.88), (-0.12, 0.88)], LIGHT, outline=0.05)  # teeth
    face(pen, 0, 0.36, 0.95, eyes, mouth="muzzle")


def moon(pen, eyes):
    crescent = np.concatenate([ellipse(0, 0, 1, 1, -127, 127), ellipse(-0.55, 0, 0.8, 0.8, 94, -94)])
    pen.area(crescent @ np.array([[0.97, -0.26], [0.26, 0.97]]), rounding=0.06)  # tilted by 15 degrees
    face(pen, 0.57, -0.16, 0.6, eyes, cheeks=False)


def smiling_face(pen, eyes):
    pen.area(ellipse(0, 0, 1, 1))
    face(pen, 0, -0.18, 1.15, eyes, mouth="laugh")


def sad_face(pen, eyes):
    pen.area(ellipse(0, 0, 1, 1))
    face(pen, 0, -0.06, 1.15, eyes, mouth="frown", cheeks=False)
    for side in (-1, 1):
        pen.stroke([(side * 0.62, -0.42), (side * 0.24, -0.6)], width=0.1)  # brows
    pen.area([*ellipse(-0.55, 0.5, 0.15, 0.15, -20, 200), (-0.55, 0.2)], LIGHT, outline=0.06)  # tear


SUBJECTS = {
    "heart": heart,
    "star": star,
    "cat": cat,
    "fish": fish,
    "ghost": ghost,
    "flower": flower,
    "balloon": balloon,
    "mushroom": mushroom,
    "rabbit": rabbit,
    "moon": moon,
    "smiling face": smiling_face,
    "sad face": sad_face,
}


@lru_cache(maxsize=None)  # a set needs some 250
def figure(subject, eyes=1.0, arm=None, shaken=False):
    """A subject in a pose, in inks, with a white rim like a cut-out: (LAYER, LAYER), premultiplied "RGBa".

    eyes: 1 open ... 0 closed; arm: None or the angle in degrees at which a waving arm is raised.
    """
    pen = Pen()
    if shaken:
        for x in (-1.42, -1.22, 1.22, 1.42):
            pen.stroke([(x, -0.25), (1.05 * x, 0), (x, 0.25)])
    if arm is not None:
        x, y = 0.72 + 0.85 * np.cos(np.radians(arm)), 0.35 - 0.85 * np.sin(np.radians(arm))
        pen.stroke([(0.1, 0.35), (0.72, 0.35), (x, y)], width=0.24 + 2 * OUTLINE)
        pen.area(ellipse(x, y, 0.21, 0.21))
        pen.stroke([(0.1, 0.35), (0.72, 0.35), (x, y)], BODY, width=0.24)
    SUBJECTS[subject](pen, eyes)
    image = pen.image.reduce(2)
    rim = Image.new("RGBA", image.size, LIGHT + (0,))
    blurred = image.getchannel("A").filter(ImageFilter.GaussianBlur(4))
    rim.putalpha(blurred.point(lambda alpha: 255 * (alpha > 16)))
    return Image.alpha_composite(rim, image).convert("RGBa")


# -----------------------------------------------------------------------------
# Words: colours, motions, captions, and which combinations are never trained on

COLOURS = {
    "red": (232, 38, 48),
    "green": (52, 178, 70),
    "blue": (48, 118, 240),
    "yellow": (255, 214, 30),
    "purple": (150, 66, 214),
    "orange": (255, 136, 16),
}
MOTIONS = {  # the word every caption contains -> a longer way to say it, which contains it too
    "bouncing": "bouncing up and down",
    "spinning": "spinning around",
    "pulsing": "pulsing like a heartbeat",
    "sliding": "sliding from side to side",
    "shaking": "shaking all over",
    "blinking": "blinking sleepily",
    "waving": "waving hello",
    "growing": "growing bigger and bigger",
}
COMBINATIONS = [(subject, colour, motion) for subject in SUBJECTS for colour in COLOURS for motion in MOTIONS]

PROMPTS = (  # for sample sheets: every subject once, every colour twice, every motion; trained combinations
    "a red heart bouncing",
    "a green star spinning",
    "a blue cat blinking",
    "a yellow fish sliding",
    "a purple ghost shaking",
    "an orange flower waving",
    "a red balloon blinking",
    "a green mushroom growing",
    "a blue rabbit bouncing",
    "a yellow moon spinning",
    "a purple smiling face pulsing",
    "an orange sad face sliding",
)


def is_held_out(subject, colour, motion):
    """True for the ninth of all combinations that is kept for validation, whatever the seed.

    A sum modulo nine is fair: of each pair of words (subject and colour, and so on) it holds out at most two
    third words, so every word and every pair occurs in training.
    """
    s, c, m = list(SUBJECTS).index(subject), list(COLOURS).index(colour), list(MOTIONS).index(motion)
    return (s + 2 * c + 4 * m) % 9 == 5


def caption(subject, colour, motion, rng):
    """One English caption; half of the time the plain "a {colour} {subject} {motion}" that prompts use."""
    a = lambda words: ("an " if words[0] in "aeiou" else "a ") + words
    if rng.random() < 0.5:
        return f"{a(colour)} {subject} {motion}"
    return str(
        rng.choice(
            [
                f"{a(motion)} {colour} {subject}",
                f"{colour} {subject}, {motion}",
                f"a cute {colour} {subject} {motion}",
                f"{a(colour)} {subject} {MOTIONS[motion]}",
                f"a sticker of {a(colour)} {subject} that is {MOTIONS[motion]}",
            ]
        )
    )


# -----------------------------------------------------------------------------
# Motions: what moves or reaches far is drawn smaller, to stay on the canvas; pixels per unit of a big figure
UNIT = {
    "bouncing": 34,
    "spinning": 41,
    "pulsing": 46,
    "sliding": 34,
    "shaking": 37,
    "blinking": 45,
    "waving": 35,
    "growing": 47,
}


def pose_at(motion, phase, frame, unit):
    """How a figure of `unit` pixels stands at `phase`, in periods of the motion, in frame number `frame`.

    Returns (x, y, wide, high, turn, pose): offset in pixels, scales, degrees clockwise, keyword arguments of
    figure(). Reaches are large on purpose: they must be seen in a few frames of 48 x 48 pixels.
    """
    angle = 2 * np.pi * phase
    room = CANVAS / 2 - 3 - 1.25 * unit  # pixels that a figure can move to each side
    if motion == "bouncing":  # the parabola of a ball, flattened on the floor
        hop = 1 - (2 * (phase % 1) - 1) ** 2
        flat = max(0, 1 - 2.5 * hop)
        return 0, room * (1 - 2 * hop) + 0.3 * unit * flat, 1 + 0.2 * flat, 1 - 0.3 * flat, 0, {}
    if motion == "spinning":
        return 0, 0, 1, 1, 360 * phase, {}
    if motion == "pulsing":
        scale = 0.8 + 0.2 * np.cos(angle)
        return 0, 0, scale, scale, 0, {}
    if motion == "sliding":  # there and back, leaning a little
        return -room * np.cos(angle), 0, 1, 1, 8 * np.sin(angle), {}
    if motion == "shaking":  # to the other side with every frame, however many there are
        side = 1 - 2 * (frame % 2)
        return 0.11 * unit * side, 0.06 * unit * np.sin(2.4 * frame), 1, 1, 7 * side, {"shaken": True}
    if motion == "blinking":  # a breath keeps frames with equal eyes apart
        eyes = round(4 * np.clip(0.5 + 0.9 * np.cos(angle), 0, 1)) / 4
        breath = 0.025 * np.sin(angle)
        return 0, -unit * breath, 1, 1 + breath, 0, {"eyes": eyes}
    if motion == "waving":
        return -0.28 * unit, 0, 1, 1, -10 * np.cos(angle), {"arm": 5 * round(5 + 7 * np.cos(angle))}
    scale = 0.3 + 0.7 * phase**0.8  # growing: out of the floor
    return 0, unit * (1 - scale), scale, scale, 0, {}


# -----------------------------------------------------------------------------
# One clip


def draw_clip(subject, colour, motion, rng, num_frames=None):
    """Draws one sticker; size, place, speed, phase, shade and length vary with the generator `rng`.

    Returns (frames, delays): `num_frames` RGBA images of CANVAS x CANVAS pixels whose alpha is 0 or 255, and
    as many delays in milliseconds. Without `num_frames` the length has a long tail: 3..40, median 8. A clip
    covers one or two periods of its motion. Raises ValueError for a word that the set does not have.
    """
    for word, words in ((subject, SUBJECTS), (colour, COLOURS), (motion, MOTIONS)):
        if word not in words:
            raise ValueError(f"the sticker set has no {word!r}: use one of {', '.join(words)}")
    if num_frames is None:
        num_frames = int(np.clip(round(8 * np.exp(0.65 * rng.standard_normal())), 3, 40))
    periods = 2 if num_frames >= 10 and rng.random() < 0.4 else 1
    phases = rng.uniform(-0.1, 0.1) + periods * np.arange(num_frames) / num_frames  # (num_frames,)
    if motion == "growing":  # once, from the very start to the very end
        phases = np.linspace(0, 1, num_frames)
    unit = UNIT[motion] * rng.uniform(0.78, 1)
    centre = CANVAS / 2 + rng.uniform(-3, 3, size=2)
    delays = np.full(num_frames, np.clip(rng.uniform(900, 2000) * periods / num_frames, 40, 240))
    if rng.random() < 0.25:  # as in a quarter of real stickers
        delays = delays * rng.uniform(0.5, 1.8, size=num_frames)
    delays = [10 * max(2, round(delay / 10)) for delay in delays]  # GIF counts in hundredths of a second

    # The colours of the inks. They mix linearly, so one matrix colours smooth edges too.
    body = np.array(COLOURS[colour]) * rng.uniform(0.96, 1.04) * rng.uniform(0.97, 1.03, size=3)
    body, dark = np.clip(body, 0, 255), 18 + 0.12 * body
    inks = np.stack([body, 0.72 * body, [255, 255, 255]], axis=1)  # (RGB, ink)
    matrix = np.column_stack([(inks - dark[:, None]) / 255, dark]).ravel().tolist()

    frames = []
    for number, phase in enumerate(phases):
        x, y, wide, high, turn, pose = pose_at(motion, phase, number, unit)
        # Pillow asks where on the layer a canvas pixel lies: from the centre, turned back, scaled back
        zoom, cos, sin = LAYER / (2 * EXTENT) / unit, np.cos(np.radians(turn)), np.sin(np.radians(turn))
        inverse = zoom * np.array([[cos / wide, sin / wide], [-sin / high, cos / high]])
        inverse = np.column_stack([inverse, LAYER / 2 - inverse @ (centre + (x, y))])  # (2, 3)
        layer = (
            figure(subject, **pose)
            .transform(
                (CANVAS, CANVAS), Image.Transform.AFFINE, inverse.ravel().tolist(), Image.Resampling.BILINEAR
            )
            .convert("RGBA")
        )
        frame = layer.convert("RGB").convert("RGB", matrix)
        frame.putalpha(layer.getchannel("A").point(lambda alpha: 255 * (alpha > 127)))
        frames.append(frame)
    return frames, delays


def save_gif(frames, delays, path):
    """Writes frames of draw_clip() as an endless GIF with one palette, whose last entry is transparent."""
    strip = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames]))
    clear = strip.getchannel("A").point(lambda alpha: 255 - alpha)
    strip = strip.convert("RGB").quantize(63, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    strip.paste(63, mask=clear)
    pages = [strip.crop((0, top, CANVAS, top + CANVAS)) for top in range(0, strip.height, CANVAS)]
    pages[0].save(
        path, save_all=True, append_images=pages[1:], duration=delays, loop=0, disposal=2, transparency=63
    )


# -----------------------------------------------------------------------------
# The folder


def default_folder(count=1200, seed=0, root=None):
    """Where a set is kept between runs: in `root` (the user's cache), named by version, count and seed."""
    root = root or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdtf"
    return Path(root) / f"stickers-v{VERSION}-n{count}-s{seed}"


def draw_stickers(folder, count=1200, seed=0):
    """Writes `count` GIFs and metadata.jsonl into `folder`, unless they are there already; returns its Path.

    A line of metadata.jsonl has file_name, text, subject, colour, motion and split ("train" or "validation").
    Each round through the combinations shows all of them; sticker i depends on (seed, i) only, so a small set
    is the beginning of a larger one. A set is reused if its stickers.json names the same version, count and
    seed and no GIF is gone. Raises ValueError if `folder` holds anything else, or for numbers out of range.
    """
    folder, label = Path(folder), json.dumps({"version": VERSION, "count": count, "seed": seed})
    is_complete = lambda: (
        all((folder / name).is_file() for name in ("stickers.json", "metadata.jsonl"))
        and (folder / "stickers.json").read_text() == label
        and len(list(folder.glob("*.gif"))) == count
    )
    if count < 1 or seed < 0:
        raise ValueError(f"count must be at least 1 and seed at least 0, not {count} and {seed}")
    if is_complete():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} exists and is not the complete set of {count} stickers with seed {seed}: "
            "delete it or name another folder"
        )
    # Drawn beside its final place and renamed at the end: nobody ever finds half a set.
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        with open(part / "metadata.jsonl", "w") as metadata:
            for i in tqdm(range(count), desc="drawing stickers", unit="GIF", disable=None):
                lap, place = divmod(i, len(COMBINATIONS))
                order = np.random.default_rng((seed, lap, 1)).permutation(len(COMBINATIONS))
                subject, colour, motion = COMBINATIONS[order[place]]
                rng = np.random.default_rng((seed, i))
                split = "validation" if is_held_out(subject, colour, motion) else "train"
                line = {
                    "file_name": f"{i:05d}.gif",
                    "text": caption(subject, colour, motion, rng),
                    "subject": subject,
                    "colour": colour,
                    "motion": motion,
                    "split": split,
                }
                metadata.write(json.dumps(line) + "\n")
                save_gif(*draw_clip(subject, colour, motion, rng), part / line["file_name"])
        (part / "stickers.json").write_text(label)
        part.chmod(0o755)  # a temporary folder is private
        part.rename(folder)  # takes the place of an empty folder, never of a full one
    except OSError:
        if not is_complete():  # unless another process drew the same set meanwhile
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def draw_sheet(path):
    """Writes one picture: a row per colour with all subjects, then a filmstrip of 12 frames per motion."""
    draw = lambda *words: draw_clip(*words, np.random.default_rng(0), num_frames=12)[0]
    rows = [[draw(subject, colour, "blinking")[0] for subject in SUBJECTS] for colour in COLOURS]
    rows += [draw(subject, "red", motion) for subject, motion in zip(SUBJECTS, MOTIONS)]
    sheet = Image.new("RGB", (len(SUBJECTS) * CANVAS, len(rows) * CANVAS), "white")
    for row, frames in enumerate(rows):
        for column, frame in enumerate(frames):
            sheet.paste(frame, (column * CANVAS, row * CANVAS), frame)
    sheet.save(path)


def main():
    parser = argparse.ArgumentParser(description="Draw the built-in sticker set.")
    parser.add_argument("folder", nargs="?", help="where the GIFs go (default: a folder in the user's cache)")
    parser.add_argument("--count", type=int, default=1200, help="number of stickers")
    parser.add_argument("--seed", type=int, default=0, help="another number, another set")
    parser.add_argument("--sheet", metavar="PNG", help="write one picture of subjects and motions instead")
    args = parser.parse_args()
    folder = args.folder or default_folder(args.count, args.seed)
    try:
        draw_sheet(args.sheet) if args.sheet else draw_stickers(folder, args.count, args.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))  # one sentence, exit status 2
    print(f"wrote {args.sheet}" if args.sheet else f"{args.count} stickers are in {folder}")


if __name__ == "__main__":
    main()
