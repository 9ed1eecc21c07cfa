"""
Draws the built-in sticker set: real animated GIF files with captions, made of simple shapes, so that a
training run needs no download and takes the very same path as with a user's folder of GIFs.

    python -m support.stickers my_stickers --count 1200 --seed 0    # a folder of GIFs and its metadata.jsonl
    python -m support.stickers --sheet sheet.png                    # all subjects, colours and motions
"""

import json
import shutil
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from support.common import UserError, default_cache, one_sentence, printable
from support.figures import EXTENT, LAYER, SUBJECTS, figure
from support.flags import SEED, Parser, number
from support.media import save_strip
from support.pictures import check_png, save_png

VERSION = 1  # part of the cache folder's name: raise it whenever a drawing or a caption changes
CANVAS = 128  # pixels, width and height of a sticker

# ------------------------------------------------------------------------------------------------------------
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
COMBINATIONS = list(product(SUBJECTS, COLOURS, MOTIONS))


def half(which):
    """The combinations of the first (1) or of the second (2) half of the subjects, colours and motions: two
    sets of stickers that share the pen and no word."""
    lists = ((list(words), len(words) // 2) for words in (SUBJECTS, COLOURS, MOTIONS))
    return list(product(*(words[:middle] if which == 1 else words[middle:] for words, middle in lists)))


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
    a_colour, a_motion = (f"an {word}" if word[0] in "aeiou" else f"a {word}" for word in (colour, motion))
    if rng.random() < 0.5:
        return f"{a_colour} {subject} {motion}"
    captions = [
        f"{a_motion} {colour} {subject}",
        f"{colour} {subject}, {motion}",
        f"a cute {colour} {subject} {motion}",
        f"{a_colour} {subject} {MOTIONS[motion]}",
        f"a sticker of {a_colour} {subject} that is {MOTIONS[motion]}",
    ]
    return str(rng.choice(captions))


# ------------------------------------------------------------------------------------------------------------
# Motions

# What moves or reaches far is drawn smaller, to stay on the canvas: pixels per unit of a big figure.
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
    figure(). Reaches are large on purpose: they must be seen in a few frames of 64 x 64 pixels.
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


# ------------------------------------------------------------------------------------------------------------
# One clip


def draw_clip(subject, colour, motion, rng, num_frames=None):
    """Draws one sticker; size, place, speed, phase, shade and length vary with the generator `rng`.

    Returns (frames, delays): `num_frames` RGBA images of CANVAS x CANVAS pixels whose alpha is 0 or 255, and
    as many delays in milliseconds. Without `num_frames` the length has a long tail: 3..40, median 8. A clip
    covers one or two periods of its motion. Raises UserError for a word that the set does not have.
    """
    for word, words in ((subject, SUBJECTS), (colour, COLOURS), (motion, MOTIONS)):
        if word not in words:
            raise UserError(f"the sticker set has no {word!r}: use one of {', '.join(words)}.")
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
    for place, phase in enumerate(phases):
        x, y, wide, high, turn, pose = pose_at(motion, phase, place, unit)
        # Pillow asks where on the layer a canvas pixel lies: from the centre, turned back, scaled back
        zoom, cos, sin = LAYER / (2 * EXTENT) / unit, np.cos(np.radians(turn)), np.sin(np.radians(turn))
        inverse = zoom * np.array([[cos / wide, sin / wide], [-sin / high, cos / high]])
        inverse = np.column_stack([inverse, LAYER / 2 - inverse @ (centre + (x, y))])  # (2, 3)
        affine = (Image.Transform.AFFINE, inverse.ravel().tolist(), Image.Resampling.BILINEAR)
        layer = figure(subject, **pose).transform((CANVAS, CANVAS), *affine).convert("RGBA")
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
    save_strip(path, strip, delays, disposal=2, transparency=63)


# ------------------------------------------------------------------------------------------------------------
# The folder


def default_folder(count=1200, seed=0, root=None):
    """Where a set is kept between runs: in `root` (the user's cache), named by version, count and seed."""
    return Path(root or default_cache()) / f"stickers-v{VERSION}-n{count}-s{seed}"


def draw_set(folder, kind, suffix, label, draw, captions=True):
    """Fills `folder` with a drawn set, unless it is there already; returns its Path.

    kind: what is drawn, in the plural; suffix: of its files; label: dict that tells this set from all others,
    with its count and seed; draw(path, i): writes file number i, whatever was drawn before, to `path` and
    returns its line of metadata.jsonl without the name, a dict; captions: whether there is a metadata.jsonl.
    A set is reused if its stickers.json is the same label and no file is gone. Raises UserError if `folder`
    holds anything else, or for numbers out of range.
    """
    folder, count, seed = Path(folder), label["count"], label["seed"]
    label, needed = json.dumps(label), ["stickers.json"] + ["metadata.jsonl"] * captions

    def is_complete():
        if not all((folder / name).is_file() for name in needed):
            return False
        same = (folder / "stickers.json").read_text() == label
        return same and len(list(folder.glob(f"*{suffix}"))) == count

    if count < 1 or seed < 0:
        raise UserError(f"count must be at least 1 and seed at least 0, not {count} and {seed}.")
    if is_complete():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = f"{printable(folder)} exists and is not the complete set of {count} {kind} with seed {seed}"
        raise UserError(f"{what}: delete it or name another folder.")
    # Drawn beside its final place and renamed at the end: nobody ever finds half a set.
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        lines = []
        for i in tqdm(range(count), desc=f"drawing {kind}", unit=suffix[1:].upper(), disable=None):
            name = f"{i:05d}{suffix}"
            lines.append(json.dumps({"file_name": name} | draw(part / name, i)) + "\n")
        if captions:
            (part / "metadata.jsonl").write_text("".join(lines))
        (part / "stickers.json").write_text(label)
        part.chmod(0o755)  # a temporary folder is private
        part.rename(folder)  # takes the place of an empty folder, never of a full one
    except OSError:
        if not is_complete():  # unless another process drew the same set meanwhile
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def in_rounds(words, seed, i):
    """Of a list of combinations the one of file number i: each round through the list shows all of them."""
    round_number, place = divmod(i, len(words))
    return words[np.random.default_rng((seed, round_number, 1)).permutation(len(words))[place]]


def draw_stickers(folder, count=1200, seed=0, words=None):
    """Writes `count` GIFs and metadata.jsonl into `folder`, unless they are there already; returns its Path.

    words: which (subject, colour, motion) to draw, a list such as half(1); all COMBINATIONS by default.
    A line of metadata.jsonl has file_name, text, subject, colour, motion and split ("train" or "validation").
    Each round through the combinations shows all of them; sticker i depends on (seed, i) and on `words` only,
    so a small set is the beginning of a larger one. Raises UserError as draw_set.
    """
    label = {"version": VERSION, "count": count, "seed": seed} | ({"words": words} if words else {})

    def draw(path, i):
        chosen, rng = in_rounds(words or COMBINATIONS, seed, i), np.random.default_rng((seed, i))
        line = {"text": caption(*chosen, rng)} | dict(zip(("subject", "colour", "motion"), chosen))
        save_gif(*draw_clip(*chosen, rng), path)
        return line | {"split": "validation" if is_held_out(*chosen) else "train"}

    return draw_set(folder, "stickers", ".gif", label, draw)


def draw_sheet(path):
    """Writes one picture: a row per colour with all subjects, then a filmstrip of 12 frames per motion."""

    def draw(*words):
        return draw_clip(*words, np.random.default_rng(0), num_frames=12)[0]

    rows = [[draw(subject, colour, "blinking")[0] for subject in SUBJECTS] for colour in COLOURS]
    rows += [draw(subject, "red", motion) for subject, motion in zip(SUBJECTS, MOTIONS)]
    sheet = Image.new("RGB", (len(SUBJECTS) * CANVAS, len(rows) * CANVAS), "white")
    for row, frames in enumerate(rows):
        for column, frame in enumerate(frames):
            sheet.paste(frame, (column * CANVAS, row * CANVAS), frame)
    save_png(sheet, path)


@one_sentence("support.stickers")
def main():
    parser = Parser(description="Draw the built-in sticker set.")
    add = parser.add_argument
    add("folder", nargs="?", help="where the GIFs go (default: a folder in the user's cache)")
    add("--count", type=number(int, 1), default=1200, help="number of stickers (default: %(default)s)")
    add("--seed", type=SEED, default=0, help="another number, another set (default: %(default)s)")
    halves = "draw the first (1) or second (2) half of all words alone, for two sets that share none"
    add("--half", type=number(int, 1, 2), help=halves)
    add("--sheet", metavar="PNG", help="write one picture of subjects and motions instead")
    args = parser.parse_args()
    if args.sheet:
        check_png("--sheet", args.sheet)
        draw_sheet(args.sheet)
        print(f"wrote {printable(args.sheet)}")
        return
    if args.half and not args.folder:
        raise UserError("--half needs a folder to draw into.")
    place = args.folder or default_folder(args.count, args.seed)
    folder = draw_stickers(place, args.count, args.seed, half(args.half) if args.half else None)
    print(f"{args.count} stickers are in {printable(folder)}")


if __name__ == "__main__":
    main()
