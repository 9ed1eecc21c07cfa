"""
Draws landscapes with captions that look like no sticker, as real video does: what a larger model may have
learnt before it meets stickers.

    python -m lab.scenes FOLDER --count 1200 --seed 0

A picture is computed, not painted: every pixel asks noise, shape and light. There is no outline, no face and
no white, and what moves moves a little from frame to frame, as through a camera.
"""

from functools import lru_cache
from itertools import product

import numpy as np

from masks import NUM_FRAMES
from support import media
from support.common import one_sentence, printable
from support.flags import SEED, Parser, number
from support.stickers import CANVAS, draw_set, in_rounds

VERSION = 1  # raise it whenever a drawing or a caption changes

# ------------------------------------------------------------------------------------------------------------
# Words. None of them is in a caption of the built-in stickers, but for "a"

# Colours, RGB of 0..1 and a little more: of the sky on top, the sky at the horizon, the sun, the shade. Then
# the sun's height.
LIGHTS = {
    "sunrise": ((0.42, 0.53, 0.74), (0.97, 0.75, 0.62), (1.10, 0.80, 0.58), (0.42, 0.40, 0.50), 0.3),
    "noon": ((0.20, 0.44, 0.80), (0.66, 0.80, 0.91), (1.02, 0.98, 0.88), (0.36, 0.42, 0.52), 1.0),
    "dusk": ((0.25, 0.18, 0.42), (0.92, 0.46, 0.28), (1.00, 0.52, 0.32), (0.32, 0.26, 0.40), 0.2),
    "night": ((0.03, 0.05, 0.15), (0.15, 0.21, 0.38), (0.36, 0.44, 0.66), (0.10, 0.13, 0.24), 0.7),
    "fog": ((0.60, 0.64, 0.67), (0.74, 0.77, 0.78), (0.50, 0.51, 0.52), (0.50, 0.52, 0.55), 0.8),
    "storm": ((0.17, 0.20, 0.25), (0.45, 0.49, 0.47), (0.58, 0.60, 0.54), (0.26, 0.29, 0.33), 0.5),
}
# Two colours of the ground, between which its texture lies; how far that is drawn out sideways; where one is.
PLACES = {
    "valley": ((0.28, 0.42, 0.16), (0.58, 0.60, 0.30), 1, "in"),
    "desert": ((0.85, 0.68, 0.44), (0.66, 0.46, 0.28), 0.3, "in"),
    "lake": ((0.12, 0.26, 0.34), (0.52, 0.66, 0.72), 0.25, "by"),
    "glacier": ((0.40, 0.53, 0.64), (0.66, 0.72, 0.76), 0.6, "on"),
    "steppe": ((0.66, 0.56, 0.32), (0.42, 0.36, 0.20), 1, "in"),
}
# Solids of revolution: half the width at a height of 0..1, colour, depth of the texture, its fineness
SOLIDS = {
    "marble": (lambda v: np.sqrt(np.clip(v - v * v, 0, None)), (0.80, 0.36, 0.30), 0.5, 1.0),
    "boulder": (lambda v: 0.9 * np.clip(v - v * v, 0, None) ** 0.45, (0.52, 0.47, 0.43), 0.9, 2.5),
    "pine": (lambda v: 0.36 * (1 - v) * (0.6 + 0.5 * (1 - 4 * v % 1)) + 0.02, (0.16, 0.36, 0.20), 1.2, 4.0),
    "tower": (lambda v: np.where(v > 0.82, 0.24, 0.2 - 0.04 * v), (0.62, 0.55, 0.46), 0.6, 3.0),
    "vase": (lambda v: 0.2 + 0.13 * np.sin(1.2 + 5.2 * v), (0.22, 0.44, 0.58), 0.3, 1.0),
    "tent": (lambda v: 0.62 * (1 - v) + 0.01, (0.78, 0.52, 0.22), 0.25, 0.6),
}
MOTIONS = {  # the word that every caption has -> how else it is said
    "panning": "camera panning along the horizon",
    "zooming": "camera zooming closer",
    "swaying": "swaying in the wind",
    "rolling": "rolling across the ground",
    "drifting": "clouds drifting overhead",
    "circling": "sunlight circling it",
}
ROUND = ("marble", "boulder")
COMBINATIONS = [w for w in product(SOLIDS, LIGHTS, MOTIONS) if w[2] != "rolling" or w[0] in ROUND]


def is_held_out(subject, light, motion):
    """True for about a ninth of the combinations, kept for validation as those of the stickers are."""
    places = (
        list(words).index(word) for words, word in ((SOLIDS, subject), (LIGHTS, light), (MOTIONS, motion))
    )
    return sum(factor * place for factor, place in zip((1, 2, 4), places)) % 9 == 5


def caption(subject, light, motion, place, rng):
    """One English caption; half of the time the plain "a {subject} at {light}, {motion}"."""
    if rng.random() < 0.5:
        return f"a {subject} at {light}, {motion}"
    where = f"a {subject} {PLACES[place][-1]} a {place}"
    captions = [
        f"{where} at {light}, {MOTIONS[motion]}",
        f"footage: {where}, {light}, {MOTIONS[motion]}",
        f"{place} at {light}: {subject}, {MOTIONS[motion]}",
    ]
    return str(rng.choice(captions))


# ------------------------------------------------------------------------------------------------------------
# What pixels ask. Arrays are float32; x is (1, CANVAS), y (CANVAS, 1), and what else is asked of a pixel
# broadcasts with them to (CANVAS, CANVAS)

Y, X = np.ogrid[-1 : 1 : CANVAS * 1j, -1 : 1 : CANVAS * 1j]  # the canvas, y down
Y, X = Y.astype(np.float32), X.astype(np.float32)
EDGE = CANVAS / 2  # pixels per unit: edges are a pixel wide
SIDE, UNIT = 2048, 128  # of the tile of noise; samples in one unit of it


@lru_cache(maxsize=1)
def tile():
    """Noise with more of the low frequencies, as clouds and rocks have, that repeats without a seam: (SIDE,
    SIDE), mean 0, standard deviation 1. It is so fine that nobody needs to interpolate."""
    waves = SIDE // 16  # up and down; what is finer is left out
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(2 * waves, 1 / (2 * waves))] * 2))
    white = np.fft.fft2(np.random.default_rng(19).standard_normal(frequency.shape))
    spectrum = np.zeros((SIDE, SIDE), np.complex64)
    middle = slice(SIDE // 2 - waves, SIDE // 2 + waves)
    spectrum[middle, middle] = np.fft.fftshift(white / np.maximum(frequency, 3) ** 1.7)
    noise = np.fft.ifft2(np.fft.ifftshift(spectrum)).real
    return ((noise - noise.mean()) / noise.std()).astype(np.float32).ravel()


def noise(x, y):
    """Noise at any place: about one unit is a bump, and 16 units pass until it repeats."""
    column, row = (np.floor(UNIT * place).astype(np.int64) % SIDE for place in (x, y))
    return tile()[row * SIDE + column]


def mix(a, b, share):
    """Between two colours, (3,) or (..., 3), by a share of 0..1, a number or (...)."""
    share = np.clip(share, 0, 1)
    return a + (b - a) * (share[..., None] if np.ndim(share) else share)


def sky(x, y, horizon, light, clouds, at):
    """A gradient with soft clouds. clouds: how far they have moved; at: place in the noise -> (..., 3)"""
    top, low, sun, _ = light.colours
    far = 1 / np.maximum(horizon - y + 0.35, 0.2)  # clouds grow flat towards the horizon
    cover = noise(x * far + clouds + at, 2.2 * far + at)
    cover = cover + 0.5 * noise(2.7 * x * far + 1.6 * clouds, 5 * far + at)
    return mix(mix(low, top, (horizon - y) / 1.2), 0.45 * low + 0.5 * sun * low + 0.06, 0.75 * cover)


def hills(colour, x, y, horizon, light, ground, pan, at):
    """Lays three chains of hills over a picture, far ones first. pan: how far the camera has moved"""
    for k, depth in enumerate((8, 5, 3)):
        along = x + pan / depth
        crest = horizon - (0.2 - 0.05 * k) * (1 + 0.7 * noise(1.3 * (k + 1) * along + at[k], at[k]))
        rough = 0.85 + 0.15 * noise(3 * along + at[k], 3 * y + at[k])
        side = rough[..., None] * ground * light.shine
        colour = mix(colour, mix(side, light.haze, 0.6 - 0.15 * k), (y - crest) * EDGE)
    return colour


def solid(colour, u, v, size, shape, light, sun, turn=0.0, at=0.0):
    """Lays a shaded solid of revolution over a picture.

    u, v: across and up, in heights of the solid, from its foot; size: its height on the canvas; shape: a row
    of SOLIDS; sun: direction (3,) to the light: right, up, to the viewer; turn: radians that it has rolled
    """
    width, paint, depth, fine = shape
    half, above, below = (np.maximum(width(np.clip(v + d, 0, 1)), 0.005) for d in (0, 0.02, -0.02))
    n = np.clip(u / half, -1, 1)
    normal = n, np.clip((below - above) / 0.04, -1.5, 1.5), np.sqrt(1.02 - n * n)
    lit = sum(s * part for s, part in zip(sun, normal)) / np.sqrt(sum(part * part for part in normal))
    a, b = np.arcsin(n) * half, v - 0.5  # where on the surface
    a, b = a * np.cos(turn) - b * np.sin(turn), a * np.sin(turn) + b * np.cos(turn)
    bump = depth * noise(4 * fine * a + at, 4 * fine * b + at)
    shade = light.colours[3] + light.colours[2] * np.clip(lit + 0.12 * bump, 0, 1)[..., None]
    cover = np.minimum(half - np.abs(u), np.minimum(v, 1 - v)) * size * EDGE + 0.5
    return mix(colour, paint * (1 + 0.3 * bump[..., None]) * shade, cover)


# ------------------------------------------------------------------------------------------------------------
# A landscape


class Light:
    """A row of LIGHTS, and what follows from it."""

    def __init__(self, name, rng):
        *colours, self.height = LIGHTS[name]
        self.colours = np.float32(colours) * np.float32(rng.uniform(0.93, 1.07, (4, 3)))
        self.haze = self.colours[1] * 0.7 + self.colours[0] * 0.3
        self.shine = self.colours[3] + 0.75 * self.colours[2]  # on what lies flat

    def sun(self, angle):
        """Direction (3,) to the light, for an angle of 0 (right) to pi (left)."""
        towards = np.array([np.cos(angle), 0.35 + 0.6 * self.height, 0.25 + 0.6 * np.sin(angle)])
        return (towards / np.linalg.norm(towards)).tolist()


def draw_scene(subject, light, motion, rng, num_frames=None):
    """One clip; place, size, speed, textures and length vary with the generator `rng`.

    Returns (frames, place): uint8 (N, CANVAS, CANVAS, 3) and a key of PLACES. Without `num_frames` N is
    8..24, more often small.
    """
    place = str(rng.choice(list(PLACES)))
    length = NUM_FRAMES * np.exp(0.5 * abs(rng.standard_normal()))
    count = num_frames or int(min(round(length), 24))
    light, (*grounds, drawn_out, _) = Light(light, rng), PLACES[place]
    ground, spots = np.float32(grounds) * np.float32(rng.uniform(0.9, 1.1, (2, 3)))
    width, paint, *texture = SOLIDS[subject]
    shape = (width, np.float32(paint) * np.float32(rng.uniform(0.75, 1.25, 3)), *texture)
    horizon, middle, phase, speed = rng.uniform((-0.3, -0.3, 0, 0.7), (0.1, 0.3, 6, 1.2)).tolist()
    size, foot = rng.uniform((0.65, horizon + 0.45), (0.95, horizon + 0.65)).tolist()
    side, way = rng.choice([-1, 1], 2).tolist()
    at = rng.uniform(0, 16, 8).tolist()
    frames = []
    for t in (np.linspace(-1, 1, count) * speed).tolist():
        move = {name: way * t if name == motion else 0 for name in MOTIONS}
        zoom = 1.2 + 0.25 * t * (motion == "zooming")
        pan = 0.45 * move["panning"] + 0.03 * float(np.sin(2 * t + phase))  # a hand holds the camera
        clouds, roll = 1.2 * move["drifting"] + 0.06 * t, 0.45 * move["rolling"]
        angle = float(np.arccos(0.75 * side))
        if motion == "circling":
            angle = np.pi / 2 * (1 - 0.8 * move["circling"])
        x, y = X / zoom, horizon + (Y - horizon) / zoom

        # from far to near: sky, hills, the ground with the shadows on it, the solid
        colour = sky(x + 0.1 * pan, y, horizon, light, clouds, at[0])
        colour = hills(colour, x, y, horizon, light, 0.4 * (ground + spots), pan, at[1:4])
        depth = 1 / np.maximum(y - horizon, 0.03)  # of the ground, from the eye
        across, ahead = drawn_out * (x * depth + pan), depth + at[4]  # in the world
        if place == "lake":
            ahead = ahead + 0.3 * t
        grain = noise(1.5 * across, 2 * ahead) + 0.6 * noise(5 * across, 7 * ahead)
        below = mix(ground, spots, 0.5 + 0.4 * grain * np.exp(-0.06 * depth))
        left, long = middle + roll - pan * (foot - horizon), 0.9 / (0.4 + light.height)  # of foot, of shadow
        u, v, lying = (x - left) / size, (foot - y) / size, float(np.cos(angle))
        slant = (u + lying * (0.3 + 0.3 * long)) / (0.22 + 0.3 * long * abs(lying))  # away from the sun
        shadow = 0.6 * np.exp(-(slant**2) - (v / 0.09) ** 2)
        shadow = np.maximum(shadow, 0.5 * np.exp(-((u / 0.3) ** 2) - (v / 0.05) ** 2))  # right below it
        passing = 0.4 * np.clip(noise(0.4 * across + 2 * clouds, 0.4 * ahead), 0, 1)  # the shadows of clouds
        dark = np.maximum(shadow * (0.4 + 0.6 * light.height), passing)[..., None]
        below = below * (light.colours[3] + 0.8 * (1 - dark) * light.colours[2]) * (1 - 0.4 * dark)
        below = mix(below, light.colours[1], np.exp(-6 * (y - horizon)))
        colour = mix(colour, below, (y - horizon) * EDGE)
        if motion == "swaying":
            u = u - 0.18 * float(np.sin(3 * t + phase)) * np.clip(v, 0, 1) ** 1.5
        colour = solid(colour, u, v, size * zoom, shape, light, light.sun(angle), 2 * roll / size, at[5])
        frames.append((255 * np.clip(colour, 0, 1)).astype(np.uint8))
    return np.stack(frames), place


# ------------------------------------------------------------------------------------------------------------
# Folders


def draw_scenes(folder, count=1200, seed=0):
    """Writes `count` WebPs and metadata.jsonl into `folder`, unless they are there already; returns its Path.

    A line of metadata.jsonl has file_name, text, subject, light, motion, place and split ("train" or
    "validation"). Each round through the COMBINATIONS shows all of them; scene i depends on (seed, i)
    only, so a small set is the beginning of a larger one. Raises UserError as stickers.draw_set.
    """

    def draw(path, i):
        words, rng = in_rounds(COMBINATIONS, seed, i), np.random.default_rng((seed, i, 2))
        frames, place = draw_scene(*words, rng)
        with media.new_file(path) as file:  # a GIF's palette would cut the gradients into steps
            media.save_webp(file, frames, rng.uniform(6, 12), lossless=False, quality=90)
        line = {"text": caption(*words, place, rng)} | dict(zip(("subject", "light", "motion"), words))
        return line | {"place": place, "split": "validation" if is_held_out(*words) else "train"}

    return draw_set(
        folder, "scenes", ".webp", dict(version=VERSION, kind="scenes", count=count, seed=seed), draw
    )


def command_line(draw, program, about):
    """The command line of a program that draws a set. draw: function (folder, count, seed)"""
    with one_sentence(program):
        parser = Parser(description=about)
        add = parser.add_argument
        add("folder", help="where the clips go")
        add("--count", type=number(int, 1), default=1200, help="number of clips (default: %(default)s)")
        add("--seed", type=SEED, default=0, help="another number, another set (default: %(default)s)")
        args = parser.parse_args()
        print(f"{args.count} clips are in {printable(draw(args.folder, args.count, args.seed))}")


def main():
    command_line(draw_scenes, "lab.scenes", "Draw landscapes with captions.")


if __name__ == "__main__":
    main()
