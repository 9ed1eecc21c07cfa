"""Clips and files that several tests start from. GIFs and APNGs are written byte by byte: what is tested
takes no part in it."""

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from support import media
from support.folder import scan_folder

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
PALETTE = [(0, 0, 0), RED, GREEN, BLUE]  # index 0 is transparent in a patch that says so


def clip(count=8, side=64, seed=0):
    """A sticker-like clip: a disc and a square of flat colours that move on white. (count, side, side, 3)"""
    y, x = np.mgrid[:side, :side]
    frames = np.full((count, side, side, 3), 255, np.uint8)
    for i in range(count):
        frames[i][(x - 8 - 4 * i) ** 2 + (y - side // 2) ** 2 < 150] = (250, 200, 30)
        frames[i, 4:16, side - 20 - 3 * i : side - 6 - 3 * i] = (30, 80, 200)
    return frames


def lzw(pixels):
    """Pixels as GIF data without compression: a clear code before each pair keeps every code 3 bits long."""
    codes = [code for i in range(0, len(pixels), 2) for code in (4, *pixels[i : i + 2])] + [5]
    bits = "".join(f"{code:03b}"[::-1] for code in codes)
    data = bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))
    blocks = (data[i : i + 255] for i in range(0, len(data), 255))
    return b"\2" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


def gif(width, height, patches, background=0):
    """patches: (x, y, indices (h, w), transparent or not, disposal, delay in 1/100 s or None: no control)"""
    out = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x81, background, 0) + np.uint8(PALETTE).tobytes()
    for x, y, pixels, transparent, disposal, delay in patches:
        h, w = pixels.shape
        if delay is not None:
            out += b"!\xf9\x04" + struct.pack("<BHBB", disposal << 2 | transparent, delay, 0, 0)
        out += b"," + struct.pack("<HHHHB", x, y, w, h, 0) + lzw(pixels.ravel().tolist())
    return out + b";"


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def apng(width, height, colour_type, patches, extra=b"", default=None):
    """patches: (x, y, pixels (h, w[, channels]) uint8, dispose, blend, delay numerator, denominator)"""

    def packed(pixels):
        return zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels.astype(np.uint8)))

    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra
    out += chunk(b"acTL", struct.pack(">II", len(patches), 0))
    if default is not None:
        out += chunk(b"IDAT", packed(default))
    sequence = 0
    for index, (x, y, pixels, dispose, blend, numerator, denominator) in enumerate(patches):
        h, w = pixels.shape[:2]
        control = struct.pack(">IIIIIHHBB", sequence, w, h, x, y, numerator, denominator, dispose, blend)
        out, sequence = out + chunk(b"fcTL", control), sequence + 1
        data = packed(pixels)
        if index == 0 and default is None:
            out += chunk(b"IDAT", data[:20]) + chunk(b"IDAT", data[20:])  # split, as large files are
        else:
            out, sequence = out + chunk(b"fdAT", struct.pack(">I", sequence) + data), sequence + 1
    return out + chunk(b"IEND", b"")


def write(path, frames):
    """Any of the formats that read_clip knows."""
    if path.suffix == ".png":
        path.write_bytes(apng(*frames.shape[2:0:-1], 2, [(0, 0, frame, 0, 0, 1, 10) for frame in frames]))
    elif path.suffix == ".webm":
        with av.open(str(path), "w", format="webm") as container:
            stream = container.add_stream("libvpx", rate=10)
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    else:
        media.write_clip(path, frames, 10)


def moving_square(path, frames=10, colour=(220, 30, 30), size=40):
    """A GIF of a square that moves to the right."""
    pictures = []
    for i in range(frames):
        picture = Image.new("RGB", (size, size), "white")
        x = 2 + (size - 16) * i // max(1, frames - 1)
        ImageDraw.Draw(picture).rectangle([x, 8, x + 10, 30], fill=colour)
        pictures.append(picture)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=80, loop=0)


def square_folder(folder):
    """A folder of twelve moving squares of 3 to 14 frames, every second one in a subfolder, with captions."""
    (folder / "deeper").mkdir(parents=True)
    lines = []
    for i in range(12):
        name = f"{'deeper/' if i % 2 else ''}{i:02}.gif"
        moving_square(folder / name, frames=3 + i, colour=(20 * i, 250 - 20 * i, 90))
        lines.append(json.dumps(dict(file_name=name, text=f"square number {i}")))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def good_folder(folder):
    """A folder of one good sticker, good.gif."""
    media.write_clip(folder / "good.gif", clip(4, 32), 10)
    return folder


def fill(folder, *names):
    """Files without content, and the folders that they lie in. Returns the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def scan(folder):
    """({name: Sticker}, notes) of a folder; each note is a line that any terminal can print."""
    stickers, notes = scan_folder(folder)
    for note in notes:
        assert note.isprintable() and note.encode() and len(note) < 1000
    return {sticker.name: sticker for sticker in stickers}, notes


def is_locked(path):
    """Whether another process finds the lock on `path` taken."""
    code = "import sys; from support.common import locked\nwith locked(sys.argv[1]) as alone: print(alone)"
    command = [sys.executable, "-c", code, str(path)]
    return subprocess.check_output(command, text=True, cwd=Path(__file__).parents[1]) == "False\n"
