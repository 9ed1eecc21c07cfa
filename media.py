"""
The one place where sticker files come in and go out.

    frames, durations = read_clip("stickers/heart.gif", 256)    # (N, 256, 256, 3) uint8, (N,) milliseconds
    picture = read_image("first.png", 256)                      # (256, 256, 3) uint8
    write_clip("out/heart.webp", frames, fps=8)                 # .gif .webp .mp4, or .png for a sheet
    sheet([given, made], labels=["given", "made"]).save("sheet.png")

On its way in, the bytes of a file tell its format (the suffix is not believed), its headers are held against
the limits below before a pixel is decoded, its frames are composed one by one on white, and only each frame's
resized result is kept: memory is bounded by one canvas, however long the animation.

A frame of a GIF or APNG is a patch: a rectangle, how it is drawn over the canvas, what happens to it after.
These files are taken apart here and Pillow decodes each patch as a still picture, because Pillow 13 itself
leaves residue of earlier frames in palette APNGs and counts a default image as a frame. WebP is composed by
libwebp (through Pillow), MP4 and WebM by FFmpeg (through PyAV).
"""
import io
import os
import struct
import textwrap
import warnings
import zlib
from collections import namedtuple
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

SUFFIXES = (".gif", ".webp", ".png", ".apng", ".mp4", ".webm")    # what a sticker folder is searched for
OUTPUTS = (".gif", ".webp", ".mp4", ".png")                       # what write_clip knows

# A sticker is small. Whatever exceeds these is no sticker, or a file made to exhaust the machine.
MAX_BYTES = 64 * 2**20      # of the file
MAX_SIDE = 4096             # pixels, of the canvas and of every patch
MAX_FRAMES = 1000
MAX_PIXELS = 400_000_000    # frames x canvas: some seconds of decoding
DEFAULT_DELAY = 100.0       # milliseconds: what browsers make of a missing delay and of one of at most 10 ms
WHITE = (255, 255, 255)

av.logging.set_level(av.logging.PANIC)    # FFmpeg would write to stderr; what matters comes as an exception


class MediaError(ValueError):
    """A file that cannot be read or written: one sentence with its name, the reason and the way out."""


def check_limits(width, height, frames=1, pixels=0):
    """Raises MediaError where the canvas, the number of frames, or all frames' pixels are out of bounds."""
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise MediaError(f"is {width} x {height} pixels, a side must be 1 to {MAX_SIDE}; resize it first")
    if not 0 < frames <= MAX_FRAMES:
        raise MediaError(f"has {frames} or more frames, it must be 1 to {MAX_FRAMES}; export it anew")
    if pixels > MAX_PIXELS:
        raise MediaError(f"has more than {MAX_PIXELS:,} pixels in all frames; shorten or resize it first")


# ------------------------------------------------------------------------- in: GIF and APNG, patch by patch

# A rectangle as a complete still picture file, its place, and its rules: blend is "over" (draw on what is
# there) or "source" (replace it); disposal "keep", "clear" or "restore"; delay in milliseconds.
Patch = namedtuple("Patch", "file x y width height blend disposal delay")


def gif_patches(data):
    """Bytes of a GIF -> (width, height, [Patch]). Walks over the blocks only; nothing is decompressed."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = table_end(flags, 13)
    shared, control, patches = data[10:at], None, []    # the colour table for pictures that bring none
    while data[at] != 0x3B:                        # the trailer; an IndexError means: cut short
        if data[at] == 0x21:                       # an extension; 0xF9 controls the next picture
            begin, at = at, skip_blocks(data, at + 2)
            if data[begin + 1] == 0xF9:
                control = data[begin:at]
        elif data[at] == 0x2C:                     # a picture
            x, y, w, h, flags = struct.unpack_from("<HHHHB", data, at + 1)
            body = table_end(flags, at + 10)
            # A picture's own table takes the place of the shared one: given both, Pillow mixes up grey ones.
            table = bytes((flags & 0x87, 0, 0)) + data[at + 10:body] if flags & 0x80 else shared
            at = skip_blocks(data, body + 1)
            file = b"".join((b"GIF89a", struct.pack("<HH", w, h), table, control or b"",
                             struct.pack("<BHHHHB", 0x2C, 0, 0, w, h, flags & 0x40), data[body:at], b";"))
            disposal, delay = struct.unpack_from("<BH", control, 3) if control else (0, 0)
            # A cleared area is transparent, never of the file's "background colour": so it is in browsers.
            disposal = {2: "clear", 3: "restore"}.get(disposal >> 2 & 7, "keep")
            patches.append(Patch(file, x, y, w, h, "over", disposal, 10.0 * delay))
            if len(patches) == 1:                  # a first frame larger than the screen enlarges it
                width, height = max(width, x + w), max(height, y + h)
            check_limits(width, height, len(patches))
            control = None
        elif data[at] == 0:                        # stray padding between blocks
            at += 1
        else:
            raise ValueError(f"unknown GIF block 0x{data[at]:02x}")
    return width, height, patches


def table_end(flags, start):
    """Position behind a GIF's colour table, if the flags say that there is one at start."""
    return start + (3 << (flags & 7) + 1 if flags & 0x80 else 0)


def skip_blocks(data, at):
    """Position behind a GIF's chain of length-prefixed blocks."""
    while data[at]:
        at += data[at] + 1
    return at + 1


def png_patches(data):
    """Bytes of a PNG or APNG -> (width, height, [Patch]); a still PNG is one patch."""
    width, height = struct.unpack_from(">II", data, 16)
    check_limits(width, height)
    still = width, height, 0, 0, 0, 0, 0, 0
    at, kind, animated, control, palette, pixels, patches = 8, b"", False, still, {}, [], []
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)       # a struct.error means: cut short
        body = data[at + 8:at + 8 + length]
        if zlib.crc32(kind + body) != struct.unpack_from(">I", data, at + 8 + length)[0]:
            raise ValueError("wrong checksum")
        at += 12 + length
        if kind in (b"fcTL", b"IEND") and pixels:                 # the picture before this chunk is complete
            w, h, x, y, delay, unit, disposal, blend = control
            header = png_chunk(b"IHDR", struct.pack(">II", w, h) + data[24:29])
            file = b"".join((data[:8], header, *palette.values(), *pixels, png_chunk(b"IEND", b"")))
            patches.append(Patch(file, x, y, w, h, "over" if blend else "source",
                                 ("keep", "clear", "restore")[disposal], 1000 * delay / (unit or 100)))
            check_limits(width, height, len(patches))
            pixels = []
        if kind == b"acTL":
            animated, control = True, None
        elif kind == b"fcTL" and animated:
            control = struct.unpack(">IIIIHHBB", body[4:26])
        elif kind in (b"PLTE", b"tRNS"):
            palette[kind] = png_chunk(kind, body[:768])           # every patch repeats it: keep it short
        elif kind == b"IDAT" and control:                         # else: a default image, no frame
            pixels.append(png_chunk(kind, body))
        elif kind == b"fdAT":                                     # begins with a sequence number
            pixels.append(png_chunk(b"IDAT", body[4:]))
    return width, height, patches


def png_chunk(kind, body):
    """Length, name, content, checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def compose(width, height, patches):
    """Yields (white square with the composed frame in its centre, delay in milliseconds) for every patch."""
    # Drawing on white at once equals drawing on a transparent canvas that is put on white at the end, since
    # "over" is associative: no alpha channel is carried along.
    pixels = sum(max(width * height, patch.width * patch.height) for patch in patches)
    check_limits(width, height, len(patches), pixels)
    canvas = Image.new("RGB", (width, height), WHITE)
    for patch in patches:
        check_limits(patch.width, patch.height)
        with Image.open(io.BytesIO(patch.file), formats=("GIF", "PNG")) as file:
            picture = rgb_or_rgba(file)
        box = patch.x, patch.y, patch.x + patch.width, patch.y + patch.height
        before = canvas.crop(box) if patch.disposal == "restore" else WHITE
        if patch.blend == "source":
            canvas.paste(WHITE, box)
        canvas.paste(picture, box, picture if picture.mode == "RGBA" else None)
        yield on_white(canvas), patch.delay if patch.delay > 10 else DEFAULT_DELAY
        if patch.disposal != "keep":
            canvas.paste(before, box)


# ------------------------------------------------------------------------- in: WebP and video

def webp_frames(data):
    """Yields (white square, delay in milliseconds) for every frame of a WebP."""
    if len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise EOFError
    with Image.open(io.BytesIO(data), formats=("WEBP",)) as file:    # reserves the canvas, touches no memory
        check_limits(*file.size, file.n_frames, file.n_frames * file.width * file.height)
        for index in range(file.n_frames):
            file.seek(index)
            file.load()
            delay = file.info.get("duration", 0)
            yield on_white(file), float(delay) if delay > 10 else DEFAULT_DELAY


def declared_size(data, container_format):
    """Bytes that an MP4 or WebM says it has. FFmpeg forgives a missing end, which would shorten the clip."""
    at = 0
    if container_format == "mp4":                              # a chain of boxes: size, name, content
        while data[at + 4:at + 8].isalnum() and (size := int.from_bytes(data[at:at + 4], "big")) >= 8:
            at += size
        return at
    for _ in ("header", "segment"):                            # WebM: name, size of variable length, content
        length = 9 - data[at + 4].bit_length()
        size = int.from_bytes(data[at + 4:at + 4 + length], "big") & (1 << 7 * length) - 1
        if size < (1 << 7 * length) - 1:                       # all ones: unknown, as in a live recording
            at += 4 + length + size
    return at


def video_frames(data, container_format):
    """Yields (white square, delay in milliseconds) for every frame of an MP4 or WebM; sound is ignored."""
    if declared_size(data, container_format) > len(data):
        raise EOFError
    options = {"max_pixels": str(MAX_SIDE**2)}    # FFmpeg then refuses larger frames before it allocates them
    # From memory, since FFmpeg would take a path that contains a colon for an address of its own.
    with av.open(io.BytesIO(data), format=container_format, options=options) as container:
        stream = next(iter(container.streams.video), None)
        decoder = stream and stream.codec_context
        if not decoder:
            raise MediaError("has no video that FFmpeg can decode; convert it")
        check_limits(decoder.width, decoder.height)
        libvpx = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(decoder.name)
        tags = {key.lower(): value for key, value in stream.metadata.items()}
        transparent = libvpx and tags.get("alpha_mode") == "1"
        if transparent:    # of these video stickers FFmpeg's own decoders drop the alpha channel
            decoder = av.CodecContext.create(libvpx, "r")
            decoder.extradata = stream.codec_context.extradata
        decoder.options = options
        decoder.thread_count = 1    # the callers run one process per core
        count, pixels, shown = 0, 0, None

        def finish(frame, end):    # end in units of the stream's time base
            delay = 1000 * float((end - frame.pts) * stream.time_base)
            picture = Image.fromarray(frame.to_ndarray(format="rgba" if transparent else "rgb24"))
            return on_white(picture), delay if delay > 0 else DEFAULT_DELAY

        for packet in container.demux(stream):
            for frame in decoder.decode(packet if packet.size else None):    # None gets the last frames out
                count, pixels = count + 1, pixels + frame.width * frame.height
                check_limits(frame.width, frame.height, count, pixels)
                if shown:    # a frame lasts until the next one begins
                    yield finish(shown, frame.pts)
                shown = frame
        if not shown:
            raise EOFError
        yield finish(shown, shown.pts + (shown.duration or 0))


# ------------------------------------------------------------------------- in: what all formats share

def rgb_or_rgba(picture):
    """Any Pillow picture -> mode RGBA if it has transparency of any kind, else RGB."""
    if picture.mode.startswith("I"):    # 16-bit grey: Pillow's own conversion clips instead of scaling
        return Image.fromarray((np.asarray(picture) // 257).astype(np.uint8)).convert("RGB")
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def on_white(picture):
    """RGB or RGBA picture -> RGB in the centre of the smallest white square around it."""
    width, height = picture.size
    if picture.mode == "RGB" and width == height:
        return picture
    square = Image.new("RGB", (max(width, height),) * 2, WHITE)
    corner = (square.width - width) // 2, (square.height - height) // 2
    square.paste(picture, corner, picture if picture.mode == "RGBA" else None)
    return square


def pictures(path, stills):
    """Yields (white square of the file's own size, delay in milliseconds) per frame; stills allows JPEG."""
    if not path.is_file():
        raise MediaError("is not a file; check the name")
    if path.stat().st_size > MAX_BYTES:
        raise MediaError(f"has more than {MAX_BYTES // 2**20} MiB; shorten or compress it first")
    data = path.read_bytes()
    if data[:6] in (b"GIF87a", b"GIF89a"):
        yield from compose(*gif_patches(data))
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        yield from compose(*png_patches(data))
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        yield from webp_frames(data)
    elif data[4:8] == b"ftyp":
        yield from video_frames(data, "mp4")
    elif data[:4] == b"\x1aE\xdf\xa3":
        yield from video_frames(data, "matroska")
    elif data[:3] == b"\xff\xd8\xff" and stills:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as file:
            check_limits(*file.size)
            yield on_white(rgb_or_rgba(ImageOps.exif_transpose(file))), DEFAULT_DELAY    # upright
    else:
        what = "is no GIF, WebP, PNG, APNG, MP4 or WebM" if data else "is empty"
        raise MediaError(f"{what}; convert it or take it out")


def decoded(path, resolution, stills=False):
    """Yields (frame (resolution, resolution, 3) uint8, delay in milliseconds) and no error but MediaError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")    # Pillow's remarks on odd metadata
            for square, delay in pictures(Path(path), stills):
                if square.width != resolution:
                    square = square.resize((resolution,) * 2, Image.Resampling.BICUBIC, reducing_gap=2.0)
                yield np.array(square), delay
    except MediaError as error:
        raise MediaError(f"{path} {error}.") from None
    # Broad on purpose: damaged bytes make Pillow and PyAV raise OSError, SyntaxError, ValueError, EOFError,
    # IndexError, MemoryError, struct.error, FFmpegError and more, none of it documented, and a folder of ten
    # thousand files must not stop at one. The error's own words stay in the sentence.
    except Exception as error:
        early = isinstance(error, (IndexError, EOFError, struct.error))
        reason = "it ends too early" if early else getattr(error, "strerror", None) or error
        raise MediaError(f"{path} cannot be decoded ({reason}); export or download it again.") from error


def read_clip(path, resolution):
    """Reads an animated (or still) sticker: GIF, WebP, PNG, APNG, MP4 or WebM, told by content.

    Returns frames (N, resolution, resolution, 3) uint8, on white, with white margins up to a square; and
    durations (N,) float milliseconds: as in browsers, no delay or one of at most 10 ms counts 100 ms (video
    keeps any positive one). A still picture gives N = 1. Raises MediaError.
    """
    frames, durations = zip(*decoded(path, resolution))
    return np.stack(frames), np.array(durations)


def read_image(path, resolution):
    """First frame of whatever read_clip reads, or a JPEG -> (resolution, resolution, 3) uint8. MediaError."""
    return next(decoded(path, resolution, stills=True))[0]


# ------------------------------------------------------------------------- out

def check_suffix(path):
    """Raises MediaError unless write_clip knows the suffix of path."""
    if Path(path).suffix.lower() not in OUTPUTS:
        raise MediaError(f"{path} has no known suffix; let the output end in {', '.join(OUTPUTS)}.")


def delays(count, fps, per_second, least):
    """Durations of count frames in whole 1 / per_second, rounded so that their running total is right."""
    edges = np.round(np.arange(count + 1) * per_second / fps).astype(int)
    return np.maximum(np.diff(edges), least).tolist()


def save_gif(file, frames, fps):
    """One palette for all frames and no dithering: flat areas stay flat and still.

    Of Pillow's ways to choose colours this one keeps small areas of a rare colour best: on real stickers its
    largest error is half of median cut's, its mean error the same.
    """
    count, height, width, _ = frames.shape
    tall = Image.fromarray(frames.reshape(count * height, width, 3))
    tall = tall.quantize(255, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    first, *rest = (tall.crop((0, top, width, top + height)) for top in range(0, count * height, height))
    first.save(file, "GIF", save_all=True, append_images=rest, loop=0,    # 0: for ever
               duration=[10 * delay for delay in delays(count, fps, 100, least=2)])


def save_webp(file, frames, fps):
    """Lossless: the lossy kind halves the resolution of colour, which shows on a sticker's hard edges."""
    first, *rest = map(Image.fromarray, frames)
    first.save(file, "WEBP", save_all=True, append_images=rest, loop=0, lossless=True,
               duration=delays(len(frames), fps, 1000, least=1))


def save_mp4(file, frames, fps):
    """H.264 where FFmpeg has it, else MPEG-4. Both want even sides: white fills an odd one up by a pixel."""
    frames = np.pad(frames, [(0, size % 2 * (axis in (1, 2))) for axis, size in enumerate(frames.shape)],
                    constant_values=255)
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.colorspace = 6    # BT.601, to which FFmpeg converts; else players have to guess
        stream.options = {"b": "4M", "crf": "14"}    # a bit rate; H.264 knows a quality: hardly visible loss
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_clip(path, frames, fps):
    """Writes frames (N, H, W, 3) uint8 at fps frames a second; the suffix says how.

    .gif, .webp and .mp4 are animations (the first two loop for ever), .png is a sheet of the frames side by
    side. GIF has delays in steps of 10 ms, at least 20, WebP of 1 ms: single ones are rounded, their sum is
    right. Missing folders are made; an old file is replaced only by a complete new one. Raises MediaError.
    """
    check_suffix(path)
    path = Path(path)
    save = {".gif": save_gif, ".webp": save_webp, ".mp4": save_mp4,
            ".png": lambda file, frames, fps: sheet([frames]).save(file, "PNG")}[path.suffix.lower()]
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            save(file, np.ascontiguousarray(frames), fps)
        os.replace(unfinished, path)
    except (OSError, av.error.FFmpegError) as error:
        reason = error.strerror or error
        raise MediaError(f"{path} cannot be written ({reason}); choose another output.") from error
    finally:
        if unfinished.exists():
            unfinished.unlink()


def sheet(rows, labels=None, scale=1, marks=None):
    """Clips under one another, frames side by side -> PIL.Image.

    rows: list of (N_i, H_i, W_i, 3) uint8; labels: a text per row, drawn above it; scale: integer factor of
    nearest enlargement; marks: a list of bools per row, True draws a border around a given frame (Figure 6).
    """
    gap, border, given, line = 4, 3, (230, 90, 20), 18    # pixels, and a colour
    font = ImageFont.load_default(14)
    width = gap + max(len(row) * (row.shape[2] * scale + gap) for row in rows)
    texts = [textwrap.wrap(label, max(8, width // 8)) for label in labels or [""] * len(rows)]
    heights = [gap + line * len(text) + row.shape[1] * scale for row, text in zip(rows, texts)]
    page = Image.new("RGB", (width, sum(heights) + gap), WHITE)
    draw, top = ImageDraw.Draw(page), 0
    for row, text, height, given_frames in zip(rows, texts, heights, marks or [()] * len(rows)):
        draw.text((gap, top + 1), "\n".join(text), (0, 0, 0), font, spacing=line - 14)
        top += height
        for column, frame in enumerate(row):
            picture = Image.fromarray(frame.repeat(scale, axis=0).repeat(scale, axis=1))
            x, y = gap + column * (picture.width + gap), top - picture.height
            if column < len(given_frames) and given_frames[column]:
                right, bottom = x + picture.width - 1, top - 1
                draw.rectangle((x - border, y - border, right + border, bottom + border), given)
            page.paste(picture, (x, y))
    return page
