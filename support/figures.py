"""
The subjects of the built-in stickers as line drawings: a heart, a cat, a sad face, nine more.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# ------------------------------------------------------------------------------------------------------------
# Pen: a figure is drawn in four inks, large, and coloured later. It fills about [-1, 1] x [-1, 1], y down.

BODY, SHADE, LIGHT, DARK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)  # a channel is an amount of ink
LAYER = 256  # pixels of a finished layer; twice that while drawing, for smooth edges
EXTENT = 1.9  # a layer shows [-EXTENT, EXTENT]^2: there is room for arms
OUTLINE = 0.1  # width of the dark outline


class Pen:
    """Draws on one layer."""

    def __init__(self):
        self.image = Image.new("RGBA", (2 * LAYER, 2 * LAYER), LIGHT + (0,))
        self.draw = ImageDraw.Draw(self.image)

    def pixels(self, points):
        """Units of a figure to pixels of the layer."""
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

    def at(dx, dy, rx, ry, *arc):
        return ellipse(x + dx * size, y + dy * size, rx * size, ry * size, *arc)

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


# ------------------------------------------------------------------------------------------------------------
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
