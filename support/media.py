"""
The one place where sticker files come in and go out.

    frames, durations = read_clip("stickers/heart.gif", 256)    # (N, 256, 256, 3) uint8, (N,) milliseconds
    picture = read_image("first.png", 256)                      # (256, 256, 3) uint8
    write_clip("out/heart.webp", frames, fps=8)                 # by its suffix, .png is a sheet

On its way in, the bytes of a file tell its format (the suffix is not believed), its header is held against
limits (decode.py) before a pixel is decoded, and of every frame only the resized result is kept: memory is
bounded by a few canvases, however long the animation; the clock is looked at between frames.
"""

import time
import warnings
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError, features

from support.common import out_of_memory, printable, replacing
from support.decode import TOO_LARGE, MediaError, ffmpeg_pictures, pillow_pictures
from support.pictures import sheet

SUFFIXES = (".gif", ".webp", ".png", ".apng", ".mp4", ".webm")  # what a sticker folder is searched for
# How files of the kind of HEIC name themselves.
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"avci", b"avcs", b"jpeg")
OPAQUE = 128  # alpha from which on a pixel of a GIF, which knows no half ones, is there

MAX_BYTES = 64 * 2**20  # of a file; the other limits stand in decode.py
WHITE = (255, 255, 255)
NO_MEMORY = "does not fit into memory; shorten or resize it first"


# ------------------------------------------------------------------------------------------------------------
# In


def gif_is_whole(data):
    """Whether a GIF ends after a frame. Its last byte, the trailer, may be missing, anything may follow it,
    as in browsers: no frame is lost by that."""

    def after_table(at, flags):  # of colours, which flags may announce
        return at + (flags >> 7) * (6 << (flags & 7))

    def after_blocks(at):  # of at most 255 bytes; an empty one is the last
        while data[at]:
            at += data[at] + 1
        return at + 1

    whole = False
    try:
        at = after_table(13, data[10])
        while at < len(data) and data[at] != ord(";"):
            if data[at] == ord(","):
                at, whole = after_blocks(after_table(at + 10, data[at + 9]) + 1), True
            elif data[at] == ord("!"):
                whole = whole and data[at + 1] != 0xF9  # which announces a frame
                at = after_blocks(at + 2)
            else:
                at += 1  # Pillow, too, passes over what it does not know
    except IndexError:
        return False
    return whole


def heif_form(data):
    """Pillow's name of a file that starts with "ftyp", or None if it is a video. Raises MediaError."""
    major, brands = data[8:12], data[8 : int.from_bytes(data[:4], "big")]
    if major not in (b"avif", b"avis", b"mif1", b"msf1", b"miaf", *HEIC):
        return None
    if b"avif" not in brands and b"avis" not in brands:
        raise MediaError("is HEIC, which is not read; export it as JPEG or PNG")
    if not features.check("avif"):
        raise MediaError("is AVIF, which this Pillow does not read; export it as PNG or WebP")
    return "AVIF"


def pictures(path, stills, start):
    """Yields (RGBA picture, delay in milliseconds) for every frame of a file; stills allows JPEG,
    start is that of check_time."""
    if not path.is_file():
        raise MediaError("is not a file; check the name")
    if path.stat().st_size > MAX_BYTES:
        raise MediaError(f"has more than {MAX_BYTES // 2**20} MiB; shorten or compress it first")
    data = path.read_bytes()
    decode, complete = pillow_pictures, True
    if data[:6] in (b"GIF87a", b"GIF89a"):
        form, complete = "GIF", data.rstrip(b"\0 \r\n").endswith(b";") or gif_is_whole(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        form, complete = "PNG", b"IEND\xaeB`\x82" in data
        if b"acTL" in data[: data.find(b"IDAT")]:
            decode, form = ffmpeg_pictures, "apng"
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        form, complete = "WEBP", len(data) >= 8 + int.from_bytes(data[4:8], "little")
    elif data[4:8] == b"ftyp":
        form = heif_form(data)
        if not form:
            decode, form = ffmpeg_pictures, "mp4"
    elif data[:4] == b"\x1aE\xdf\xa3":
        decode, form = ffmpeg_pictures, "matroska"
    elif data[:3] == b"\xff\xd8\xff" and stills:
        form = "JPEG"
    else:
        what = "is no GIF, WebP, PNG, APNG, MP4 or WebM" if data else "is empty"
        raise MediaError(f"{what}; convert it or take it out")
    if not complete:  # the libraries forgive a missing end, which shortens the clip (a WebM: still so)
        raise EOFError
    yield from decode(data, form, start)


def on_white(picture, resolution):
    """RGBA picture -> uint8 (resolution, resolution, 3): in the centre of the smallest white square around
    it, resized (bicubic, as Pillow's to within two levels, but by torch, which is faster)."""
    width, height = picture.size
    square = Image.new("RGB", (max(width, height),) * 2, WHITE)
    square.paste(picture, ((square.width - width) // 2, (square.height - height) // 2), picture)
    pixels = np.array(square)
    if square.width == resolution:
        return pixels
    x = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # (1, 3, side, side), channels last
    x = F.interpolate(x, (resolution, resolution), mode="bicubic", antialias=True)
    return x[0].permute(1, 2, 0).numpy()


def decoded(path, resolution, stills=False):
    """Yields (frame (resolution, resolution, 3) uint8, delay in milliseconds) and no error but MediaError.

    MAX_SECONDS is checked between frames and packets: a decoder that is lost within one, or takes all memory,
    can only be ended from outside of its process (workers.py does).
    """
    name, start = printable(path), time.thread_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
            for picture, delay in pictures(Path(path), stills, start):
                yield on_white(picture, resolution), delay
    except MediaError as error:
        raise MediaError(f"{name} {error}.") from None
    except Image.DecompressionBombError:  # Pillow's own limit: far beyond ours, but the first to be checked
        raise MediaError(f"{name} {TOO_LARGE}.") from None
    # Broad on purpose: damaged bytes make Pillow and PyAV raise OSError, SyntaxError, ValueError, EOFError,
    # IndexError, MemoryError, FFmpegError and more, none of it documented, and a folder of ten thousand files
    # must not stop at one. The error's own words stay in the sentence.
    except Exception as error:
        if out_of_memory(error):
            raise MediaError(f"{name} {NO_MEMORY}.") from None
        vague = isinstance(error, (EOFError, IndexError, UnidentifiedImageError))
        reason = "it is damaged or ends too early" if vague else getattr(error, "strerror", None) or error
        reason = printable(reason, 200)  # it may quote the file
        raise MediaError(f"{name} cannot be decoded ({reason}); export or download it again.") from error


def read_clip(path, resolution):
    """Reads an animated (or still) sticker: GIF, WebP, PNG, APNG, MP4 or WebM, told by content.

    Returns frames (N, resolution, resolution, 3) uint8, on white, with white margins up to a square; and
    durations (N,) float milliseconds: as in browsers, no delay or one of at most 10 ms counts 100 ms (video
    keeps any positive one). A still picture gives N = 1. Raises MediaError.
    """
    frames, durations = zip(*decoded(path, resolution))
    return np.stack(frames), np.array(durations)


def read_image(path, resolution):
    """First frame of whatever read_clip reads, or a JPEG -> (resolution, resolution, 3) uint8. MediaError.

    For a file that came from anywhere there is workers.read_picture: it bounds the memory, too.
    """
    return next(decoded(path, resolution, stills=True))[0]


# ------------------------------------------------------------------------------------------------------------
# Out


def check_suffix(path, alpha=False):
    """Raises MediaError unless write_clip knows the suffix of path and, with `alpha`, can write that."""
    if alpha and Path(path).suffix.lower() == ".mp4":
        raise MediaError(f"{printable(path)} cannot be transparent; let the output end in .webm or .webp.")
    if Path(path).suffix.lower() not in OUTPUTS:
        raise MediaError(
            f"{printable(path)} has no known suffix; let the output end in {', '.join(OUTPUTS)}."
        )


def delays(count, fps, per_second, least):
    """Durations of count frames in whole 1 / per_second, rounded so that their running total is right.
    least: of each; browsers take up to 10 ms for 100"""
    edges = np.round(np.arange(count + 1) * per_second / fps).astype(int)
    return np.maximum(np.diff(edges), least).tolist()


def save_strip(file, strip, durations, **options):
    """Writes an endless GIF.

    strip: palette picture, the frames below one another; durations: milliseconds of each; options: Pillow's
    """
    height = strip.height // len(durations)
    first, *rest = (strip.crop((0, top, strip.width, top + height)) for top in range(0, strip.height, height))
    first.save(file, "GIF", save_all=True, append_images=rest, loop=0, duration=durations, **options)


def save_gif(file, frames, fps):
    """One palette for all frames and no dithering: flat areas stay flat and still. A pixel is there or not.

    Of Pillow's ways to choose colours this one keeps small areas of a rare colour best: on real stickers its
    largest error is half of median cut's, its mean error the same.
    """
    count, height, width, channels = frames.shape
    tall, options = frames.reshape(count * height, width, channels), {}
    clear = tall[..., 3] < OPAQUE if channels == 4 else np.zeros(tall.shape[:2], bool)
    picture = Image.fromarray(np.where(clear[..., None], 255, tall[..., :3]).astype(np.uint8))
    picture = picture.quantize(255, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    if clear.any():
        picture.paste(255, mask=Image.fromarray(clear))
        # optimize=False: Pillow would drop the clear colour of frames without it, which disposal clears to.
        options = dict(transparency=255, disposal=2, optimize=False)
    save_strip(file, picture, [10 * delay for delay in delays(count, fps, 100, least=2)], **options)


def save_webp(file, frames, fps, **options):
    """Lossless: the lossy kind halves the resolution of colour, which shows on a sticker's hard edges."""
    options = dict(lossless=True, loop=0, duration=delays(len(frames), fps, 1000, least=11)) | options
    if frames.shape[-1] == 4 and np.isin(frames[..., 3], (0, 255)).all():
        options["kmax"] = 1  # whole frames: of parts, if all are opaque, libwebp notes that nothing is clear
    imageio.imwrite(file, frames, extension=".webp", plugin="pillow", **options)


def save_apng(file, frames, fps, colours=None, loop=0):
    """colours: of one palette for all frames, at most 256, None = all; loop: times it plays, 0 = for ever."""
    count, height, width, channels = frames.shape
    tall = Image.fromarray(frames.reshape(count * height, width, channels))
    if colours:
        tall = tall.quantize(colours, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    first, *rest = (tall.crop((0, top, width, top + height)) for top in range(0, tall.height, height))
    durations = delays(len(frames), fps, 1000, least=11)
    options = dict(duration=durations, loop=loop, blend=0)  # blend=0: what changes is replaced, alpha too
    first.save(file, "PNG", save_all=True, append_images=rest, **options)


def save_mp4(file, frames, fps):
    """H.264 where FFmpeg has it, else MPEG-4. Both want even sides: white fills an odd one up by a pixel."""
    _, height, width, _ = frames.shape
    frames = np.pad(frames, [(0, 0), (0, height % 2), (0, width % 2), (0, 0)], constant_values=255)
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with imageio.imopen(file, "w", plugin="pyav", extension=".mp4", container="mp4") as video:
        video.init_video_stream(codec, fps=fps, pixel_format="yuv420p")
        # imageio hands on no options of FFmpeg, and its default quality costs 2.5 dB on real stickers.
        stream = video._video_stream
        stream.options = {"b": "4M", "crf": "14"}  # a bit rate; H.264 knows a quality: hardly visible loss
        stream.codec_context.colorspace = 6  # BT.601, to which FFmpeg converts; else players have to guess
        video.write(frames)


def save_webm(file, frames, fps, quality=18):
    """VP9, with alpha if the frames have it. quality: 0 (best) to 63, FFmpeg's crf."""
    _, height, width, channels = frames.shape
    with av.open(file, "w", format="webm") as video:
        stream = video.add_stream("libvpx-vp9", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuva420p" if channels == 4 else "yuv420p"
        stream.options = {"crf": str(quality), "b": "0", "cpu-used": "4"}
        stream.codec_context.colorspace = 6  # BT.601, as above
        if channels == 4:
            stream.metadata["alpha_mode"] = "1"  # else players take no notice of it
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, "rgba" if channels == 4 else "rgb24")
            video.mux(stream.encode(picture))
        video.mux(stream.encode(None))


def save_png(file, frames, fps):
    """A sheet: the frames side by side."""
    sheet([frames]).save(file, "PNG")


SAVERS = {  # by suffix
    ".gif": save_gif,
    ".webp": save_webp,
    ".apng": save_apng,
    ".mp4": save_mp4,
    ".webm": save_webm,
    ".png": save_png,
}
OUTPUTS = tuple(SAVERS)


@contextmanager
def new_file(path):
    """A binary file to write, which takes its place once it is complete; missing folders are made. Raises
    MediaError."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            yield file
    except (OSError, av.error.FFmpegError) as error:
        reason = error.strerror or error
        raise MediaError(f"{printable(path)} cannot be written ({reason}); choose another output.") from error


def write_clip(path, frames, fps):
    """Writes frames, (N, H, W, 3) uint8 or with alpha (N, H, W, 4), at fps frames a second; the suffix says
    how.

    .gif, .webp, .apng, .mp4 and .webm are animations (the first three loop for ever), .png is a sheet of the
    frames side by side. A GIF's alpha is all or nothing; an .mp4 has none. GIF has delays in steps of 10 ms,
    at least 20, WebP and APNG of 1 ms, at least 11: single ones are rounded, their sum is right. Missing
    folders are made; an old file is replaced only by a complete new one. Raises MediaError.
    """
    check_suffix(path, alpha=frames.shape[-1] == 4)
    with new_file(path) as file:
        SAVERS[Path(path).suffix.lower()](file, np.ascontiguousarray(frames), fps)
