"""
What messengers demand of an animated sticker, and a file that keeps to it.

    data, note = fit(frames, fps=8, name="telegram")    # frames uint8 (N, R, R, 4); the bytes of a .webm

The figure fills the canvas but for its margin. A sticker that is too long plays faster, one of too many bytes
is encoded more coarsely and at last with fewer frames; `note` says in one line what was given up. Limits as
published in November 2026:

    whatsapp    github.com/WhatsApp/stickers, StickerPackValidator.java and Android/README.md
    telegram    core.telegram.org/stickers, "Video stickers"
    discord     docs.discord.com/developers/resources/sticker, "Create Guild Sticker"
    line        creator.line.me/en/guideline/animationsticker
"""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from support.common import UserError
from support.media import save_apng, save_webm, save_webp


class Platform(NamedTuple):
    """One messenger's limits."""

    suffix: str
    canvas: int  # pixels, width and height
    margin: int  # pixels kept clear on every side
    max_bytes: int  # 1 KB is counted as 1000, the stricter reading
    max_seconds: float
    max_fps: float  # WhatsApp's is 125, but browsers play more than 90 slowly
    frames: tuple  # fewest and most
    whole_seconds: bool  # the length is a whole number of them, and the file says how often it plays


#                       suffix   canvas margin  bytes    sec  fps  frames    whole seconds
PLATFORMS = {
    "whatsapp": Platform(".webp", 512, 16, 500_000, 10.0,  90.0, (2,  900), False),
    "telegram": Platform(".webm", 512,  0, 256_000,  3.0,  30.0, (2,   90), False),
    "discord":  Platform(".png",  320,  0, 512_000,  5.0,  60.0, (2,  300), False),
    "line":     Platform(".png",  270,  0, 300_000,  4.0,  20.0, (5,   20), True),
}  # fmt: skip
QUALITIES = {  # what is tried, from the best on: what it is called, and what the encoder takes
    ".webp": [("lossless", dict(lossless=True))]
    + [(f"WebP {q}", dict(lossless=False, quality=q, alpha_quality=q)) for q in (90, 75, 60, 45, 30)],
    ".webm": [(f"VP9 {q} of 63", dict(quality=q)) for q in (18, 26, 34, 42, 50)],
    ".png": [("all colours", {})] + [(f"{n} colours", dict(colours=n)) for n in (256, 128, 64, 32)],
}


def place(frames, platform):
    """The figure, as far as it reaches in any frame, scaled to fill the canvas within its margin.

    frames: uint8 (N, H, W, 4). Returns uint8 (N, canvas, canvas, 4). Raises UserError if there is none."""
    shown = frames[..., 3].any(axis=0)
    if not shown.any():
        raise UserError("the sticker is white all over: nothing is left of it without its ground.")
    top, bottom = np.flatnonzero(shown.any(axis=1))[[0, -1]]
    left, right = np.flatnonzero(shown.any(axis=0))[[0, -1]]
    room = platform.canvas - 2 * platform.margin
    height, width = bottom + 1 - top, right + 1 - left
    scale = room / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    corner = (platform.canvas - size[0]) // 2, (platform.canvas - size[1]) // 2
    placed = []
    for frame in frames[:, top : bottom + 1, left : right + 1]:
        # Colours weigh by their alpha while they are resized: none comes in from where nothing is shown.
        figure = Image.fromarray(frame).convert("RGBa").resize(size, Image.Resampling.BICUBIC).convert("RGBA")
        page = Image.new("RGBA", (platform.canvas, platform.canvas))
        page.paste(figure, corner)
        placed.append(np.asarray(page))
    return np.stack(placed)


def thin_out(frames, fps, count):
    """`count` of the frames, evenly spread over the same time. Returns (frames, fps)."""
    kept = np.arange(count) * len(frames) // count
    return frames[kept], fps * count / len(frames)


def keep_time(frames, fps, platform):
    """Frames and fps within the platform's numbers of frames, length and rate, and what was given up."""
    notes, most = [], min(platform.frames[1], int(platform.max_seconds * platform.max_fps))
    if len(frames) > most:
        notes.append(f"{len(frames) - most} of {len(frames)} frames")
        frames, fps = thin_out(frames, fps, most)
    seconds = len(frames) / fps
    kept = np.clip(seconds, len(frames) / platform.max_fps, platform.max_seconds)
    if platform.whole_seconds:
        kept = np.ceil(kept) if np.round(kept) * platform.max_fps < len(frames) else max(1, np.round(kept))
    if abs(kept - seconds) > 0.01:
        notes.append(f"its speed, {kept:.3g} seconds instead of {seconds:.3g}")
    return frames, len(frames) / float(kept), notes


def encode(frames, fps, platform, options):
    """The bytes of a file, with the options of one of QUALITIES."""
    save = {".webp": save_webp, ".webm": save_webm, ".png": save_apng}[platform.suffix]
    if platform.whole_seconds:
        options = options | dict(loop=int(platform.max_seconds * fps / len(frames) + 1e-6))
    file = io.BytesIO()
    save(file, frames, fps, **options)
    return file.getvalue()


def check_motion(data, name):
    """Raises UserError if a file for the messenger `name` has too few frames left: of equal neighbours
    encoders make one, but for WebM."""
    platform = PLATFORMS[name]
    if platform.suffix != ".webm":
        with Image.open(io.BytesIO(data)) as picture:
            count = getattr(picture, "n_frames", 1)
        if count < platform.frames[0]:
            wants = f"--for {name} wants {platform.frames[0]} frames that differ"
            raise UserError(f"{wants}, these have {count}: give another --seed or --prompt.")


def fit(frames, fps, name):
    """A file of a sticker for the messenger `name`, one of PLATFORMS.

    frames: uint8 (N, H, W, 4), straight alpha; fps: of frames. Returns (bytes, note): the file in the
    platform's format and, in one line, its size and what was given up. Raises UserError if nothing fits.
    """
    platform, count = PLATFORMS[name], len(frames)
    fewest, limit = platform.frames[0], f"{platform.max_bytes // 1000} KB"
    if count < fewest:
        raise UserError(f"--for {name} wants {fewest} frames or more, these are {count}: see --num_frames.")
    frames, fps, notes = keep_time(place(frames, platform), fps, platform)
    qualities, whole = QUALITIES[platform.suffix], len(frames)
    while len(frames) >= fewest:
        for i, (quality, options) in enumerate(qualities):
            data = encode(frames, fps, platform, options)
            if len(data) <= platform.max_bytes:
                check_motion(data, name)
                notes += [f"quality, {quality}"] if i else []
                notes += [f"{whole - len(frames)} of {whole} frames"] if len(frames) < whole else []
                size = f"{-(-len(data) // 1000)} of {limit}"
                return data, f"{size}; given up: {' and '.join(notes) or 'nothing'}"
        frames, fps = thin_out(frames, fps, len(frames) // 2)
    raise UserError(f"--for {name}: the sticker stays above {limit}; give fewer --num_frames.")
