"""
From the bytes of a sticker file to RGBA pictures as a browser would show them, within limits.

Pillow decodes GIF, WebP, AVIF and still pictures; FFmpeg (through PyAV) decodes MP4, WebM and APNG, since
Pillow 13 leaves residue of earlier frames in many APNGs. Both give pictures that stand upright, have square
pixels and the colours of sRGB: what a file says of its camera and colours is applied here.
"""

import io
import re
import struct
import time
from functools import lru_cache
from itertools import chain, islice, pairwise

import av
import numpy as np
from av.stream import Disposition
from PIL import AvifImagePlugin, Image, ImageCms, ImageFilter, ImageOps, ImageSequence

from support.common import UserError

# A sticker is small. Whatever exceeds these is no sticker, or a file made to exhaust the machine.
MAX_SIDE = 4096  # pixels, of the canvas
MAX_FRAMES = 1000
MAX_PIXELS = 400_000_000  # frames x the square around the canvas (on_white): some ten seconds of decoding
MAX_SECONDS = 30  # of processor time, for a file: a busy machine refuses nothing that an idle one takes
MAX_MEMORY_BYTES = 2**30  # that a decoding process takes (workers.py): 1000 frames of 256 x 256 take 400 MB
DEFAULT_DELAY = 100.0  # milliseconds: what browsers make of a missing delay and of one of at most 10 ms
TOO_LARGE = f"has a side that is not 1 to {MAX_SIDE} pixels long; resize it first"

Image.MAX_IMAGE_PIXELS = MAX_SIDE**2 // 2  # Pillow raises beyond twice that, before it allocates
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # as for FFmpeg below; and check_time sees this thread alone
av.logging.set_level(av.logging.PANIC)  # FFmpeg would write to stderr; what matters comes as an exception


class MediaError(UserError):
    """A file that cannot be read or written: one sentence with its name, the reason and the way out."""


def check_limits(width, height, count=1):
    """Raises MediaError where the canvas, the frames so far, or their pixels are out of bounds.

    What counts is the square around the canvas: a frame that is 4096 x 1 pixels costs what 4096 x 4096 do.
    """
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise MediaError(TOO_LARGE)
    if count > MAX_FRAMES:
        raise MediaError(f"has more than {MAX_FRAMES} frames; shorten it first")
    if count * max(width, height) ** 2 > MAX_PIXELS:
        raise MediaError(
            f"has more than {MAX_PIXELS:,} pixels in all frames, made square; shorten or resize it first"
        )


def check_time(start):
    """Raises MediaError MAX_SECONDS of processor time after `start` (a time.thread_time())."""
    if time.thread_time() - start > MAX_SECONDS:
        raise MediaError(f"takes more than {MAX_SECONDS} seconds to decode; shorten or resize it first")


# ------------------------------------------------------------------------------------------------------------
# Colours as sRGB

UNSPECIFIED, BT2020 = 2, 9  # primaries, numbered as in ITU-T H.273
PQ, HLG = 16, 18  # transfer functions of high dynamic range
WHITE_NITS = 203  # BT.2408: how bright white paper is in HDR
BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
)


@lru_cache(maxsize=4)  # once for all frames of a file
def icc_transform(icc, mode):
    """What makes sRGB of pictures of a mode ("RGB", "L" or "CMYK") with a colour profile (bytes)."""
    profiles = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(*profiles, mode, "RGB")


@lru_cache(maxsize=4)
def tone_map(primaries, transfer):
    """The filter that makes sRGB of colours with these code points; None where they are close to it already.

    HDR white becomes white, and so does what is brighter; colours that sRGB lacks are cut at its edge.
    """
    if transfer not in (PQ, HLG) and primaries != BT2020:
        return None
    blue, green, red = np.meshgrid(*[np.linspace(0, 1, 33)] * 3, indexing="ij")
    rgb = np.stack([red, green, blue], -1)  # (33, 33, 33, 3): signal, then light where white is 1
    if transfer == PQ:
        power = rgb ** (1 / 78.84375)
        light = np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)
        rgb = light ** (1 / 0.1593017578125) * 10_000 / WHITE_NITS
    elif transfer == HLG:
        rgb = np.where(rgb <= 0.5, rgb**2 / 3, (np.exp((rgb - 0.55991073) / 0.17883277) + 0.28466892) / 12)
        rgb *= (rgb @ [0.2627, 0.678, 0.0593])[..., None] ** 0.2 * 1000 / WHITE_NITS  # a screen of 1000 nits
    else:
        rgb = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    if primaries in (BT2020, UNSPECIFIED):
        rgb = rgb @ BT2020_TO_BT709.T
    rgb = rgb.clip(0, 3)  # beyond white: cut after the interpolation, else white itself would be darkened
    rgb = np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055)
    return ImageFilter.Color3DLUT(33, rgb.reshape(-1))


def in_srgb(picture, icc, primaries, transfer):
    """Any picture -> RGBA in sRGB.

    icc: its colour profile (bytes), passed over where empty, broken or made for another kind of picture;
    primaries, transfer: code points of H.273, as of tone_map
    """
    rgba = picture.convert("RGBA")
    if mapping := tone_map(primaries, transfer):
        return rgba.filter(mapping)
    if not icc:
        return rgba
    mode = {"L": "L", "LA": "L", "CMYK": "CMYK"}.get(picture.mode)
    flat = picture.convert(mode) if mode else rgba.convert("RGB")
    try:
        flat = ImageCms.applyTransform(flat, icc_transform(icc, flat.mode))
    except Exception:  # broad on purpose, as in media.decoded: the profile is foreign bytes
        return rgba
    flat.putalpha(rgba.getchannel("A"))
    return flat


# ------------------------------------------------------------------------------------------------------------
# Pillow


def upright(picture):
    """The picture, turned as its EXIF data say."""
    picture.load()  # what is wrong with its pixels is raised here
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # broken EXIF data, which Pillow reports in many ways
        return picture


def eight_bits(picture):
    """16-bit grey -> 8 bits: Pillow's own conversion clips instead of scaling."""
    pixels = np.asarray(picture)  # (H, W)
    opaque = pixels != picture.info.get("transparency", -1)
    return Image.fromarray(np.stack([pixels // 257, 255 * opaque], -1).astype(np.uint8))


def pillow_pictures(data, form, start):
    """Yields (RGBA picture, delay in milliseconds) for every frame; form is Pillow's name of the format,
    start that of check_time."""
    # Pillow passes over the code points of AVIF and PNG: primaries and transfer function.
    points = re.search(rb"(?:colrnclx\0|cICP)(.)\0?(.)", data[: 2**16], re.DOTALL)
    points = (points[1][0], points[2][0]) if points else (UNSPECIFIED, UNSPECIFIED)
    with Image.open(io.BytesIO(data), formats=(form,)) as file:
        width, height = file.size
        for count, frame in enumerate(ImageSequence.Iterator(file), 1):
            check_limits(*frame.size, count)  # nothing of this frame is decoded yet
            picture = upright(frame)
            delay = float(frame.info.get("duration", 0))  # WebP, AVIF: known only once the frame is decoded
            if picture.mode.startswith("I"):
                picture = eight_bits(picture)
            picture = in_srgb(picture, frame.info.get("icc_profile"), *points)
            if form == "GIF":  # Pillow enlarges the canvas for what lies outside, browsers do not show it
                picture = picture.crop((0, 0, width, height))
            check_time(start)
            yield picture, delay if delay > 10 else DEFAULT_DELAY


# ------------------------------------------------------------------------------------------------------------
# FFmpeg

OPTIONS = {
    "max_pixels": str(MAX_SIDE**2),  # FFmpeg then allocates no larger frames
    "max_fps": "99",
    "default_fps": "10",  # of APNG, as DEFAULT_DELAY
}


def open_file(data, form):
    """An FFmpeg container; form is FFmpeg's name of the format."""
    # From memory, since FFmpeg would take a path that contains a colon for an address of its own.
    return av.open(io.BytesIO(data), format=form, options=OPTIONS)


def film(container):
    """Its first stream of moving pictures: a cover is a stream, too. Raises MediaError."""
    for stream in container.streams.video:
        if stream.codec_context and not stream.disposition & Disposition.attached_pic:
            return stream
    raise MediaError("has no video that FFmpeg can decode; convert it")


def packets(container, stream, start):
    """Its packets; the clock is looked at for each, since one may hold a frame that is never shown."""
    for packet in container.demux(stream):
        check_time(start)
        yield packet


def stride(data, form, start):
    """The least n for which every n-th frame of a video is within the limits: ordinary ones have hundreds in
    full HD. The header may lie about their number, so packets are counted, which is fast."""
    with open_file(data, form) as container:
        stream = film(container)
        side = max(shape(stream.codec_context, stream.sample_aspect_ratio))
        count = sum(packet.size > 0 for packet in packets(container, stream, start))
    most = max(1, min(MAX_FRAMES, MAX_PIXELS // max(1, side) ** 2))
    return max(1, -(-count // most))


def decoder_of(stream):
    """A decoder for the stream."""
    decoder = stream.codec_context
    # FFmpeg's own decoders drop the alpha channel of video stickers.
    libvpx = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(decoder.name)
    if libvpx and "1" in (stream.metadata.get("alpha_mode"), stream.metadata.get("ALPHA_MODE")):
        decoder = av.CodecContext.create(libvpx, "r")
    decoder.options = OPTIONS
    decoder.thread_count = 1  # the callers run one process per core
    return decoder


def shape(frame, ratio):
    """(width, height) of a frame once its pixels are square: as in browsers, their shorter side grows.

    ratio: of a pixel's width to its height; 0 or None if unknown
    """
    ratio = float(ratio or 1)
    return (
        (round(frame.width * ratio), frame.height)
        if ratio > 1
        else (frame.width, round(frame.height / ratio))
    )


def is_mirrored(data, track):
    """Whether an MP4 shows this track in a mirror, as of front cameras: PyAV tells its rotation alone."""
    for box in re.finditer(b"tkhd", data):
        body = data[box.end() : box.end() + 96]
        number, matrix = (12, 40) if body[:1] == b"\0" else (20, 52)  # its times have 32 bits, or 64
        if len(body) == 96 and struct.unpack_from(">I", body, number) == (track,):
            a, b, _, c, d = struct.unpack_from(">5i", body, matrix)
            return a * d < b * c
    return False


def turns_of(rotation, mirrored):
    """What is done to a frame until it stands upright. rotation: degrees counterclockwise, any number."""
    turns = [Image.Transpose.FLIP_TOP_BOTTOM] if mirrored else []
    quarters = [[], [Image.Transpose.ROTATE_90], [Image.Transpose.ROTATE_180], [Image.Transpose.ROTATE_270]]
    return turns + quarters[round(rotation / 90) % 4]


def apng_info(data):
    """What Pillow reads before the first frame of an APNG, such as its EXIF data and colour profile."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as file:
            return file.info
    except Exception:  # damaged: FFmpeg has the say
        return {}


def rgba_pixels(frame, size):
    """An FFmpeg frame -> uint8 (height, width, 4), resized to size (width, height)."""
    # Without a word on it a large video has the matrix of HDTV, as players assume; FFmpeg takes that of DVD.
    hdtv = frame.format.name.startswith("yuv") and frame.colorspace == UNSPECIFIED and max(size) >= 1280
    return frame.reformat(*size, "rgba", src_colorspace="ITU709" if hdtv else None).to_ndarray()


def ffmpeg_pictures(data, form, start):
    """Yields (RGBA picture, delay in milliseconds) for every frame, of a long video for every n-th (stride);
    form is FFmpeg's name of the format, start that of check_time."""
    apng = form == "apng"
    info, step = (apng_info(data), 1) if apng else ({}, stride(data, form, start))
    with open_file(data, form) as container:
        check_time(start)
        stream = film(container)
        coded, decoder = stream.codec_context, decoder_of(stream)
        check_limits(coded.width, coded.height)  # 0 x 0 where it is beyond max_pixels
        ratio = 1 if apng else stream.sample_aspect_ratio  # an APNG's pixels are square, whatever it says
        mirrored = form == "mp4" and is_mirrored(data, stream.id)

        def decode():
            for packet in packets(container, stream, start):
                yield from decoder.decode(packet if packet.size else None)  # None: the last ones

        count = 0
        kept = islice(decode(), 0, None, step)
        for count, (frame, following) in enumerate(pairwise(chain(kept, [None])), 1):
            size = shape(frame, ratio)
            check_limits(*size, count)
            # How long until the next one begins.
            ticks = following.pts - frame.pts if following else (frame.duration or 0) * step
            delay = 1000 * float(ticks * stream.time_base)
            picture = Image.fromarray(rgba_pixels(frame, size))
            picture = in_srgb(picture, info.get("icc_profile"), coded.color_primaries, coded.color_trc)
            if apng:
                picture.info = info
                picture = upright(picture)
            else:
                for turn in turns_of(frame.rotation, mirrored):
                    picture = picture.transpose(turn)
            yield picture, delay if delay > 0 else DEFAULT_DELAY
        if not count:
            raise EOFError
