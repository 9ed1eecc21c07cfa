"""What a file says of its camera, its colours and its streams is applied, as browsers do; what cannot be is
one sentence. Files of every kind are made here."""

import struct
import time
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, features

from support import decode, media
from tests.clips import BLUE, GREEN, RED, WHITE, apng, chunk, gif

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow is built without AVIF")


def scene(width=64, height=48, count=4):
    """Frames without any symmetry: red upper left, blue line at the lower edge. (count, height, width, 3)"""
    frames = np.full((count, height, width, 3), 255, np.uint8)
    frames[:, : height // 2, : width // 4], frames[:, -8:] = RED, BLUE
    return frames


def on_square(frames):
    side = max(frames.shape[1:3])
    up, left = (side - frames.shape[1]) // 2, (side - frames.shape[2]) // 2
    square = np.full((len(frames), side, side, 3), 255, np.uint8)
    square[:, up : up + frames.shape[1], left : left + frames.shape[2]] = frames
    return square


def film(path, frames, form="mp4", times=None, **settings):
    """Writes frames as MPEG-4 at 10 fps; settings: of the encoder; times: of frames, in 1/10 s."""
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for name, value in (dict(bit_rate=4_000_000) | settings).items():
            setattr(stream.codec_context, name, value)
        for pts, pixels in zip(times or range(len(frames)), frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def alike(a, b):
    """Up to what lossy coding does."""
    return a.shape == b.shape and np.abs(a.astype(float) - b).mean() < 6


def centre(path, side=16):
    """The colour in the middle of the first frame."""
    return media.read_image(path, side)[side // 2, side // 2].astype(int)


def near(colour, other, most=4):
    return np.abs(np.asarray(colour).astype(int) - other).max() <= most


# ------------------------------------------------------------------------------------------------------------
# Video: which stream, which way up, which shape


TURNS = {  # a, b, c, d: (x, y) is shown at (a x + c y, b x + d y)
    "as it is": ((1, 0, 0, 1), lambda f: f),
    "a phone held upright": ((0, 1, -1, 0), lambda f: np.rot90(f, -1, (1, 2))),
    "upside down": ((-1, 0, 0, -1), lambda f: f[:, ::-1, ::-1]),
    "the other way": ((0, -1, 1, 0), lambda f: np.rot90(f, 1, (1, 2))),
    "a mirror": ((-1, 0, 0, 1), lambda f: f[:, :, ::-1]),
    "a lake": ((1, 0, 0, -1), lambda f: f[:, ::-1]),
    "a mirror, upright": ((0, 1, 1, 0), lambda f: f.transpose(0, 2, 1, 3)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_video_is_shown_as_its_display_matrix_says(tmp_path, turn):
    (a, b, c, d), shown = TURNS[turn]
    data = bytearray(film(tmp_path / "a.mp4", scene()).read_bytes())
    matrix = [a * 2**16, b * 2**16, 0, c * 2**16, d * 2**16]
    struct.pack_into(">5i", data, data.find(b"tkhd") + 4 + 40, *matrix)
    (tmp_path / "a.mp4").write_bytes(data)
    expected = on_square(shown(scene()))
    assert alike(media.read_clip(tmp_path / "a.mp4", 64)[0], expected)
    assert alike(media.read_image(tmp_path / "a.mp4", 64), expected[0])


@pytest.mark.parametrize("form", ["mp4", "matroska"])
@pytest.mark.parametrize("ratio", [Fraction(2, 1), Fraction(1, 2)])
def test_pixels_that_are_not_square_become_so(tmp_path, form, ratio):
    wide, tall = (2, 1) if ratio > 1 else (1, 2)
    film(tmp_path / "a", scene(32, 32), form, sample_aspect_ratio=ratio)
    expected = scene(32, 32).repeat(tall, axis=1).repeat(wide, axis=2)
    assert alike(media.read_clip(tmp_path / "a", 64)[0], on_square(expected))


def test_a_pixel_shape_that_makes_a_frame_too_large_is_refused(tmp_path):
    film(tmp_path / "a.mp4", scene(128, 128), sample_aspect_ratio=Fraction(100, 1))
    with pytest.raises(media.MediaError, match="a side that is not 1 to 4096 pixels"):
        media.read_clip(tmp_path / "a.mp4", 64)


def boxes(data):
    """[(kind, bytes)] of the boxes of an MP4, or within one."""
    found, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at : at + size]))
        at += size
    return found


def test_a_cover_picture_is_not_the_video(tmp_path):
    """FFmpeg lists the cover first where its box stands first, as here."""
    with av.open(str(tmp_path / "a.mp4"), "w", format="mp4") as container:
        cover, stream = container.add_stream("mjpeg"), container.add_stream("mpeg4", rate=10)
        cover.disposition = decode.Disposition.attached_pic.value
        cover.pix_fmt, stream.pix_fmt = "yuvj420p", "yuv420p"
        cover.width = cover.height = stream.width = stream.height = 32
        for each, colours in ((cover, [GREEN]), (stream, [RED] * 4)):
            for colour in colours:
                pixels = np.full((32, 32, 3), colour, np.uint8)
                container.mux(each.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(each.encode())
    parts = []
    for kind, part in boxes((tmp_path / "a.mp4").read_bytes()):
        if kind == b"moov":
            inner = sorted(boxes(part[8:]), key=lambda box: box[0] != b"udta")
            part = part[:8] + b"".join(box for _, box in inner)
        parts.append(part)
    (tmp_path / "a.mp4").write_bytes(b"".join(parts))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].disposition & decode.Disposition.attached_pic
    frames, _ = media.read_clip(tmp_path / "a.mp4", 32)
    assert len(frames) == 4 and near(frames[0, 16, 16], RED, 12)


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(media.MediaError, match="has no video"):
        media.read_clip(tmp_path / "a.mp4", 8)


def test_frames_out_of_order_and_of_unequal_length_come_out_whole(tmp_path):
    """B-frames: frames are stored in another order, and an edit list hides the delay that this costs."""
    frames, times = scene(count=7), [0, 1, 3, 4, 8, 9, 10]
    for i in range(7):
        frames[i, :24, 8 * i : 8 * i + 16] = (0, 40 * i, 0)
    film(tmp_path / "a.mp4", frames, times=times, max_b_frames=2)
    again, durations = media.read_clip(tmp_path / "a.mp4", 64)
    assert durations[:-1].tolist() == [100, 200, 100, 400, 100, 100] and alike(again, on_square(frames))


# ------------------------------------------------------------------------------------------------------------
# Video of many frames, or of many pixels


@pytest.mark.parametrize("limit, value", [("MAX_FRAMES", 4), ("MAX_PIXELS", 4 * 64 * 64 + 1)])
@pytest.mark.parametrize("form", ["mp4", "matroska"])
def test_of_a_video_beyond_the_limits_every_nth_frame_is_read(tmp_path, monkeypatch, form, limit, value):
    frames = scene(count=10)
    for i in range(10):
        frames[i, 10:30, 20:60] = 25 * i
    film(tmp_path / "a", frames, form)
    monkeypatch.setattr(decode, limit, value)
    again, durations = media.read_clip(tmp_path / "a", 64)
    assert again[:, 32, 40].mean(-1).round(-1).tolist() == pytest.approx([0, 75, 150, 225], abs=10)
    assert np.allclose(durations, 300)


def test_five_seconds_of_full_hd_are_not_too_much(tmp_path):
    """150 frames have 553 million pixels, made square. Here one frame is stored 150 times."""
    with av.open(str(tmp_path / "a.mp4"), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((1080, 1920, 3), RED, np.uint8), format="rgb24")
        (packet,) = stream.encode(frame) + stream.encode()
        for i in range(150):
            packet.pts = packet.dts = 512 * i
            container.mux(packet)
    assert decode.stride((tmp_path / "a.mp4").read_bytes(), "mp4", time.thread_time()) == 2


# ------------------------------------------------------------------------------------------------------------
# Colours


@pytest.mark.parametrize("transfer, white", [(decode.HLG, 191), (decode.PQ, 148)])
def test_the_white_of_hdr_is_white(tmp_path, transfer, white):
    """BT.2408: white paper has 75 % of HLG's signal and 58 % of PQ's, a grey card in both 38 %, 26 nits."""
    frames = np.full((3, 48, 64, 3), white, np.uint8)
    frames[:, :, 32:] = 97
    frames[:, 32:, :32] = 255  # the sun
    film(tmp_path / "a.mp4", frames, color_trc=transfer, color_primaries=9, colorspace=9)
    frame = media.read_clip(tmp_path / "a.mp4", 64)[0][0]
    assert near(frame[16, 16], WHITE, 6) and near(frame[50, 16], WHITE) and near(frame[30, 50], 101, 6)


def test_tone_mapping_keeps_grey_grey_and_in_order():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, -1))
    for primaries, transfer in ((9, decode.PQ), (9, decode.HLG), (2, decode.HLG), (9, 14)):
        mapped = np.asarray(ramp.filter(decode.tone_map(primaries, transfer)))[0].astype(int)
        assert np.ptp(mapped, axis=-1).max() <= 2 and (np.diff(mapped, axis=0) >= 0).all()
        assert mapped[0].max() == 0 and mapped[255].min() == 255
    assert np.abs(mapped[:, 0] - np.arange(256)).max() <= 2  # no HDR: greys stay
    assert decode.tone_map(1, 13) is decode.tone_map(2, 2) is None


def test_large_video_without_a_word_on_its_matrix_has_that_of_hdtv(tmp_path):
    pixels = np.full((8, 1280, 3), (200, 60, 30), np.uint8)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    frame = frame.reformat(format="yuv444p", dst_colorspace="ITU709")
    frame.colorspace = decode.UNSPECIFIED
    assert near(decode.rgba_pixels(frame, (1280, 8))[0, 0, :3], (200, 60, 30))
    assert decode.rgba_pixels(frame, (640, 8))[0, 0, 0] < 195  # small ones: of DVD, as before


def display_p3():
    """Its profile, from its primaries (already adapted to D50) and the curve of sRGB."""

    def number(value):
        return struct.pack(">i", round(value * 65536))

    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0)
    curve += b"".join(map(number, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
    tags = {b"wtpt": (0.9642, 1.0, 0.8249), b"rXYZ": (0.5151, 0.2412, -0.0011)}
    tags |= {b"gXYZ": (0.292, 0.6922, 0.0419), b"bXYZ": (0.1571, 0.0666, 0.7841)}
    bodies = {name: b"XYZ " + bytes(4) + b"".join(map(number, xyz)) for name, xyz in tags.items()}
    bodies |= {name: curve for name in (b"rTRC", b"gTRC", b"bTRC")}
    table, body, at = b"", b"", 128 + 4 + 12 * len(bodies)
    for name, content in bodies.items():
        table += name + struct.pack(">II", at + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"lcms", 0x04000000, b"mntr", b"RGB ", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + b"".join(map(number, (0.9642, 1.0, 0.8249))) + bytes(48)
    return head + struct.pack(">I", len(bodies)) + table + body


P3, SAME_IN_SRGB = (200, 80, 80), (218, 67, 74)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG", "AVIF"])
def test_a_colour_profile_is_applied(tmp_path, form):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow is built without AVIF")
    Image.new("RGB", (16, 16), P3).save(tmp_path / "a", form, icc_profile=display_p3(), quality=100)
    assert near(centre(tmp_path / "a"), SAME_IN_SRGB)


def test_a_colour_profile_keeps_transparency_and_is_applied_to_animations(tmp_path):
    Image.new("RGBA", (16, 16), (*P3, 102)).save(tmp_path / "a.png", icc_profile=display_p3())
    assert near(centre(tmp_path / "a.png"), 255 * 0.6 + np.array(SAME_IN_SRGB) * 0.4)
    profile = chunk(b"iCCP", b"p3\0\0" + zlib.compress(display_p3()))
    patches = [(0, 0, np.full((4, 4, 3), P3), 0, 0, 1, 10)] * 3
    (tmp_path / "a.apng").write_bytes(apng(4, 4, 2, patches, profile))
    frames, _ = media.read_clip(tmp_path / "a.apng", 4)
    assert frames.shape == (3, 4, 4, 3) and near(frames, SAME_IN_SRGB)


def test_a_profile_that_is_broken_or_of_other_pictures_is_passed_over(tmp_path):
    for mode, colour in (("RGB", P3), ("L", 77), ("LA", (77, 255))):
        for profile in (display_p3()[:200], b"rubbish", display_p3() if mode != "RGB" else b""):
            Image.new(mode, (16, 16), colour).save(tmp_path / "a.png", icc_profile=profile)
            assert near(centre(tmp_path / "a.png"), P3 if mode == "RGB" else 77)


def test_cmyk_is_read(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert near(centre(tmp_path / "a.jpg"), RED)


def test_sixteen_bits_and_one_transparent_grey(tmp_path):
    pixels = np.full((16, 16), 257 * 90, np.uint16)
    pixels[4:12, 4:12] = 12345
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=12345)
    frame = media.read_clip(tmp_path / "a.png", 16)[0][0]
    assert (frame[8, 8] == 255).all() and (frame[0, 0] == 90).all()


# ------------------------------------------------------------------------------------------------------------
# Pictures: which way up; HEIF


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_a_photo_is_turned_upright(tmp_path, form):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow is built without AVIF")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.fromarray(scene()[0]).save(tmp_path / "a", form, exif=exif, quality=95)
    expected = on_square(np.rot90(scene(), -1, (1, 2)))[0]
    assert alike(media.read_image(tmp_path / "a", 64), expected)


def test_an_apng_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    patches = [(0, 0, frame, 0, 0, 1, 10) for frame in scene()]
    (tmp_path / "a.png").write_bytes(apng(64, 48, 2, patches, chunk(b"eXIf", exif.tobytes()[6:])))
    frames, _ = media.read_clip(tmp_path / "a.png", 64)
    assert np.array_equal(frames, on_square(np.rot90(scene(), -1, (1, 2))))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0\x2a\xff\xff\xff\xf0", b"no EXIF at all"])
def test_broken_exif_data_are_passed_over(tmp_path, form, exif):
    Image.new("RGB", (16, 16), RED).save(tmp_path / "a", form, exif=exif)
    assert near(centre(tmp_path / "a"), RED, 20)


@pytest.mark.parametrize(
    "brands", [b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heix", b"hevc\0\0\0\0msf1hevc"]
)
def test_heic_is_refused_with_the_way_out(tmp_path, brands):
    """FFmpeg takes it for a video: of a photo, one tile of many is all that it shows."""
    (tmp_path / "a.heic").write_bytes(struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(99))
    for read in (media.read_clip, media.read_image):
        with pytest.raises(media.MediaError, match="a.heic is HEIC, .* export it as JPEG or PNG"):
            read(tmp_path / "a.heic", 8)


@needs_avif
def test_avif_is_on_white_and_moves(tmp_path):
    colours = ((*RED, 255), (*GREEN, 0), (*BLUE, 102))
    first, *rest = (Image.new("RGBA", (16, 16), colour) for colour in colours)
    first.save(tmp_path / "a.avif", save_all=True, append_images=rest, duration=[40, 10, 170], quality=100)
    frames, durations = media.read_clip(tmp_path / "a.avif", 16)
    assert durations.tolist() == [40, 100, 170]
    assert near(frames[:, 8, 8], (RED, WHITE, (153, 153, 255)))


@needs_avif
def test_the_white_of_an_hdr_picture_is_white(tmp_path):
    Image.new("RGB", (16, 16), (148, 148, 148)).save(tmp_path / "a.avif", quality=100)
    data = (tmp_path / "a.avif").read_bytes()
    at = data.index(b"colrnclx") + 8
    (tmp_path / "a.avif").write_bytes(data[:at] + struct.pack(">HH", 9, decode.PQ) + data[at + 4 :])
    assert near(centre(tmp_path / "a.avif"), WHITE, 6)
    Image.new("RGB", (16, 16), (191, 191, 191)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[:33] + chunk(b"cICP", bytes((9, decode.HLG, 0, 1))) + data[33:])
    assert near(centre(tmp_path / "a.png"), WHITE, 6)


@needs_avif
def test_a_pillow_without_avif_says_so(tmp_path, monkeypatch):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.avif")
    monkeypatch.setattr(media.features, "check", lambda name: False)
    with pytest.raises(media.MediaError, match="is AVIF, which this Pillow does not read; export it as PNG"):
        media.read_clip(tmp_path / "a.avif", 8)


# ------------------------------------------------------------------------------------------------------------
# The end of a GIF


SQUARES = [(0, 0, np.full((8, 8), i % 4), 0, 0, 5) for i in range(4)]


@pytest.mark.parametrize(
    "end", [b";made by a tool; that says so", b";" + bytes(9), b"", bytes(3), b"!\xfe\2hi\0"]
)
def test_a_gif_is_whole_when_its_last_frame_is(tmp_path, end):
    (tmp_path / "a.gif").write_bytes(gif(8, 8, SQUARES)[:-1] + end)
    assert len(media.read_clip(tmp_path / "a.gif", 8)[0]) == 4


def test_a_gif_that_announces_a_frame_more_is_refused(tmp_path):
    data = gif(8, 8, SQUARES)
    last = data.rindex(b"!\xf9")
    for size in range(last + 1, len(data) - 1):
        (tmp_path / "a.gif").write_bytes(data[:size])
        with pytest.raises(media.MediaError, match="cannot be decoded"):
            media.read_clip(tmp_path / "a.gif", 8)
