"""
Draws a road from the driver's seat: clips of 8 frames, MP4 files, no captions. A stand-in for real videos
from cars, to see the method outside of stickers (Tables 9 and 10).

    python -m lab.driving FOLDER --count 1200 --seed 0
"""

import numpy as np

from lab.scenes import EDGE, LIGHTS, PLACES, SOLIDS, Light, X, Y, command_line, hills, mix, noise, sky, solid
from masks import NUM_FRAMES
from support import media
from support.stickers import draw_set

VERSION = 1  # raise it whenever a drawing changes
FPS = 8
COUNT, HIGH = 14, 1.7  # of the trees, and how high they are; the road reaches from -1 to 1
TAR, PAINT, DARK = np.float32([[0.3, 0.3, 0.32], [0.85, 0.83, 0.75], [0.04, 0.04, 0.05]])


def car(colour, u, v, z, paint, coming):
    """Lays a car over a picture, seen from behind or `coming`. u, v: across and up from its foot, in units of
    the road at the distance z"""

    def box(left, right, low, high):
        return np.minimum(np.minimum(u - left, right - u), np.minimum(v - low, high - v)) * EDGE / z + 0.5

    colour = mix(colour, 0.3 * colour, np.exp(-((u / 0.4) ** 2) - (v / 0.08) ** 2))  # its shadow
    colour = mix(colour, DARK, box(-0.3, 0.3, 0, 0.2))  # wheels
    glow = (0.75 + 0.5 * v)[..., None]  # more light from above
    colour = mix(colour, paint * glow, box(-0.34, 0.34, 0.09, 0.34))
    colour = mix(colour, paint * glow, box(-0.25, 0.25, 0.3, 0.54))
    colour = mix(colour, 0.25 * paint + 0.06, box(-0.21, 0.21, 0.34, 0.5))
    lamp = np.float32([1.0, 0.95, 0.7] if coming else [0.85, 0.1, 0.08])
    for left in (-0.31, 0.2):
        colour = mix(colour, lamp, box(left, left + 0.11, 0.22, 0.29))
    return colour


def road(colour, horizon, light, grounds, eye, bend, ahead):
    """Lays the ground with the road over a picture.

    grounds: two colours (2, 3); eye: how far left of the middle the camera is; bend: how much the road turns;
    ahead: how far it has driven
    """
    depth = 1 / np.maximum(Y - horizon, 0.02)  # of a row, (CANVAS, 1)
    across, along = X * depth - eye - bend * depth**2, depth + ahead
    wide, fade = EDGE / depth, np.exp(-0.06 * depth)  # pixels per unit; contrast
    ground = mix(*grounds, 0.5 + 0.5 * noise(2 * across, 2 * along) * fade)
    tar = TAR * (1 + 0.12 * noise(6 * across, 3 * along) * fade)[..., None]
    ground = mix(ground, tar, (1 - np.abs(across)) * wide)
    middle = np.where(along % 1 < 0.5, np.abs(across), 1)  # distance to a line: dashes, two at the sides
    line = np.minimum(middle, np.abs(np.abs(across) - 0.9))
    ground = mix(ground, PAINT, (0.04 - line) * wide + 0.3) * light.shine
    ground = mix(ground, light.colours[1], np.exp(-8 * (Y - horizon)))
    return mix(colour, ground, (Y - horizon) * EDGE)


def draw_drive(rng):
    """One clip from the driver's seat: uint8 (NUM_FRAMES, CANVAS, CANVAS, 3). Light, bend, speed, trees along
    the road and cars on it vary with the generator `rng`."""
    light = Light(str(rng.choice(list(LIGHTS))), rng)
    grounds = np.float32(PLACES[str(rng.choice(["valley", "steppe", "desert"]))][:2])
    horizon, bend, speed, eye = rng.uniform((-0.2, -0.02, 0.12, -0.1), (0.05, 0.02, 0.3, 0.1)).tolist()
    at, sun = rng.uniform(0, 16, 5).tolist(), light.sun(rng.uniform(0.4, 2.7))
    width, leaf, *texture = SOLIDS["pine"]
    pine = (width, np.float32(leaf), *texture)
    beside = (rng.choice([-1, 1], COUNT) * rng.uniform(1.4, 2.5, COUNT)).tolist()
    # one car drives ahead on the right, one may come on the left: distance, place across, speed, paint
    cars = [(rng.uniform(2, 4), 0.5, 0.04), (rng.uniform(4, 7), -0.5, -0.35)][: rng.integers(1, 3)]
    cars = [(*row, np.float32(rng.uniform(0.1, 0.9, 3))) for row in cars]
    frames = []
    for frame in range(NUM_FRAMES):
        gone = speed * frame
        colour = sky(X, Y, horizon, light, 0.02 * frame, at[0])
        colour = hills(colour, X + bend * gone, Y, horizon, light, 0.4 * grounds.sum(axis=0), 0, at[1:4])
        colour = road(colour, horizon, light, grounds, eye, bend, gone + at[4])
        things = [((z - gone) % COUNT + 0.6, x, None) for z, x in enumerate(beside)]
        things += [(z + v * frame, x, paint) for z, x, v, paint in cars]
        for z, x, paint in sorted(things, key=lambda thing: -thing[0]):  # far ones first
            if z < 0.4:  # beside the driver, or behind
                continue
            u, v = X * z - x - eye - bend * z * z, 1 - (Y - horizon) * z  # across and up, from its foot
            rows, columns = np.flatnonzero((v > -0.2) & (v < HIGH)), np.flatnonzero(np.abs(u) < 0.8)
            if not (len(rows) and len(columns)):
                continue
            part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # of the canvas: it is faster
            u, v = u[:, part[1]], v[part[0]]
            if paint is None:
                thing = solid(colour[part], u / HIGH, v / HIGH, HIGH / z, pine, light, sun, at=x)
            else:
                thing = car(colour[part], u, v, z, paint * light.shine, coming=x < 0)
            colour[part] = thing
        frames.append((255 * np.clip(colour, 0, 1)).astype(np.uint8))
    return np.stack(frames)


def draw_driving(folder, count=1200, seed=0):
    """Writes `count` MP4s into `folder`, unless they are there already; returns its Path. Clip i depends on
    (seed, i) only. No metadata, no captions. Raises UserError as stickers.draw_set."""

    def draw(path, i):
        media.write_clip(path, draw_drive(np.random.default_rng((seed, i))), FPS)
        return {}

    label = dict(version=VERSION, kind="driving", count=count, seed=seed)
    return draw_set(folder, "driving clips", ".mp4", label, draw, captions=False)


def main():
    command_line(draw_driving, "lab.driving", "Draw a road from the driver's seat.")


if __name__ == "__main__":
    main()
