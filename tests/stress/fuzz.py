"""
Damages good stickers in every way that comes to mind, and reads them as a training run would:

    python tests/stress/fuzz.py --cases 10000 --seed 0

A case (seed, number) is a good GIF, WebP, AVIF, PNG, APNG, MP4 or WebM after one or two mutations, under
a suffix that may be wrong. It must end as a clip or as a MediaError of one printable line, within SECONDS and
MEMORY, and its process must live. Then as many metadata files, a quarter of --cases, must end as stickers and
problems or as a DataError. A case that breaks this is kept under --keep, and the exit status is 1.
"""

import argparse
import io
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import time
import zlib
from functools import cache, partial
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageCms, features
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

from data import load_clip  # noqa: E402
from support import decode, folder, media  # noqa: E402
from support.captions import MAX_CAPTION, DataError  # noqa: E402
from support.common import printable  # noqa: E402
from support.workers import in_processes  # noqa: E402
from tests.clips import apng, chunk, clip, write  # noqa: E402

SECONDS = decode.MAX_SECONDS  # of one case; real: a process that hangs is ended after workers.HANG_SECONDS
MEMORY = 512  # MiB that a decoding process may grow by
RESOLUTION = 32
EXTREMES = (0, 1, 2, 255, 256, 4096, 2**15, *(2**bits - 1 for bits in (16, 24, 31, 32, 63, 64)), 2**31)

# ------------------------------------------------------------------------------------------------------------
# Cases


@cache
def good_files():
    """Bytes of small good files, of each format several kinds."""
    files, flat = [], clip(6, 48)
    noise = np.random.default_rng(0).integers(0, 256, flat.shape, np.uint8)
    with tempfile.TemporaryDirectory() as place:
        for frames in (flat, noise[:3]):
            for suffix in (".gif", ".webp", ".png", ".mp4", ".webm"):  # .png: an APNG
                write(Path(place, "a" + suffix), frames)
                files.append(Path(place, "a" + suffix).read_bytes())
    first, *rest = map(Image.fromarray, flat)
    everything = dict(save_all=True, append_images=rest)
    turned = Image.Exif()
    turned[0x0112] = 6
    says = dict(exif=turned, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for form, picture, options in (
        ("PNG", first, {}),
        ("PNG", first.quantize(16), dict(save_all=True, append_images=[r.quantize(16) for r in rest])),
        ("GIF", first, everything | dict(duration=[40, 80] * 3, disposal=2, interlace=1)),
        ("WEBP", first.convert("RGBA"), everything | dict(quality=60)),
        ("WEBP", first, {}),
        ("WEBP", first, everything | says),
        ("PNG", first, says),
        *[("AVIF", first, everything)] * features.check("avif"),
    ):
        file = io.BytesIO()
        picture.save(file, form, **options)
        files.append(file.getvalue())
    return files


def bombs():
    """{name: bytes} of small files whose tables and texts make FFmpeg allocate before decode.py sees it:
    1.7 GiB, 350 MiB and twice some 256 MiB, were the memory not limited."""
    files, frames = {}, clip(4, 64)
    with tempfile.TemporaryDirectory() as place:
        write(Path(place, "a.mp4"), frames)
        table = bytearray(Path(place, "a.mp4").read_bytes())
        fragments = dict(movflags="frag_keyframe+empty_moov+default_base_moof")
        with av.open(str(Path(place, "b.mp4")), "w", format="mp4", options=fragments) as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        run = bytearray(Path(place, "b.mp4").read_bytes())
    struct.pack_into(">II", table, table.find(b"stsz") + 8, 1, 30_000_000)  # samples of a byte each
    struct.pack_into(">II", table, table.find(b"stsc") + 12, 1, 30_000_000)  # all of them in one chunk
    struct.pack_into(">II", run, run.find(b"trun") + 4, 1, 10_000_000)  # samples of which nothing is said
    files["table.mp4"], files["run.mp4"] = bytes(table), bytes(run)
    packed = zlib.compress(b"x" * 2**28, 1)
    patches = [(0, 0, np.full((8, 8, 3), value), 0, 0, 1, 10) for value in (1, 50, 90)]
    for kind in (b"zTXt", b"iCCP"):
        files[f"{kind.decode()}.png"] = apng(8, 8, 2, patches, chunk(kind, b"a\0\0" + packed))
    return files


def block(rng, data):
    """Two places in the data, near one another more often than not."""
    start = int(rng.integers(len(data) + 1))
    return start, min(len(data), start + int(2 ** rng.uniform(0, 12)))


def flip(rng, data, other):
    for at in rng.integers(len(data), size=int(2 ** rng.uniform(0, 4))):
        data[at] ^= 1 << int(rng.integers(8))
    return data


def scramble(rng, data, other):
    start, stop = block(rng, data)
    return data[:start] + rng.bytes(stop - start) + data[stop:]


def delete(rng, data, other):
    start, stop = block(rng, data)
    return data[:start] + data[stop:]


def insert(rng, data, other):
    start, stop = block(rng, data)
    return data[:start] + rng.bytes(stop - start) + data[start:]


def repeat(rng, data, other):
    start, stop = block(rng, data)
    return data[:stop] + data[start:stop] * int(2 ** rng.uniform(0, 10)) + data[stop:]


def truncate(rng, data, other):
    return data[: int(rng.integers(len(data)))]


def splice(rng, data, other):
    return data[: int(rng.integers(len(data)))] + other[int(rng.integers(len(other))) :]


def extreme(rng, data, other):
    """A length, a size or a count: mostly in the header, or beside a name of four letters (MP4, PNG)."""
    names = [name.start() for name in re.finditer(rb"[A-Za-z]{4}", data)]
    beside = [start + int(rng.choice((-4, 4, 8, 12, 16))) for start in names]
    at = max(0, int(rng.choice([*beside, *range(min(64, len(data))), int(rng.integers(len(data)))])))
    size, order = int(rng.choice((1, 2, 4, 8))), str(rng.choice(("little", "big")))
    value = EXTREMES[int(rng.integers(len(EXTREMES)))] % 256**size
    data[at : at + size] = value.to_bytes(size, order)
    return data


MUTATIONS = (flip, scramble, delete, insert, repeat, truncate, splice, extreme, extreme, extreme)


def mend(data):
    """Right sums of PNG, size of WebP and end of GIF: without them the decoders would look no further."""
    at = 8
    while data[:4] == b"\x89PNG" and at + 12 <= len(data):
        end = at + 8 + struct.unpack_from(">I", data, at)[0]
        if end + 4 > len(data):
            break
        struct.pack_into(">I", data, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    if data[:4] == b"RIFF":
        data[4:8] = struct.pack("<I", max(0, len(data) - 8))
    return data + b";" if data[:3] == b"GIF" else data


def mutated(rng, files):
    """One of the files (bytes) after one or two mutations."""
    data, other = (bytearray(files[int(rng.integers(len(files)))]) for _ in range(2))
    for _ in range(int(rng.integers(1, 3))):
        data = bytearray(MUTATIONS[int(rng.integers(len(MUTATIONS)))](rng, data, other) or b"?")
    return data if rng.random() < 0.4 else mend(data)


# ------------------------------------------------------------------------------------------------------------
# What must hold


def is_sentence(text):
    return text.isprintable() and text.endswith(".") and len(text) < 1500


def memory(which):
    """MiB that this process holds ("VmRSS") or has held at most ("VmHWM"); 0 where there is no /proc."""
    status = Path("/proc/self/status")
    return int(re.search(rf"{which}:\s+(\d+)", status.read_text())[1]) // 1024 if status.exists() else 0


@cache
def memory_at_start(pid):
    """What a forked process has of its parent."""
    return memory("VmRSS")


def try_file(number, seed, place):
    """Reads case `number`, in a process of in_processes. Returns (what came of it, what is wrong or None,
    seconds, MiB by which the process grew); a good case leaves no file behind."""
    before = memory_at_start(os.getpid())
    rng = np.random.default_rng((seed, number))
    path = Path(place, f"{number}{media.SUFFIXES[int(rng.integers(len(media.SUFFIXES)))]}")
    path.write_bytes(mutated(rng, good_files()))
    start, fault = time.perf_counter(), None
    try:
        frames, durations = media.read_clip(path, RESOLUTION)
        outcome = "decoded"
        if not (frames.dtype == np.uint8 and frames.shape[1:] == (RESOLUTION, RESOLUTION, 3)):
            fault = f"frames {frames.dtype} {frames.shape}"
        if not (1 <= len(frames) == len(durations) <= decode.MAX_FRAMES and (durations > 0).all()):
            fault = f"{len(frames)} frames, durations {durations}"
        if not np.isfinite(durations).all():
            fault = f"durations {durations}"
    except media.MediaError as error:
        outcome = "refused"
        if not is_sentence(str(error)):
            fault = f"no sentence: {error!r}"
    except BaseException as error:  # also what is no Exception: the decoders may raise nothing else
        outcome, fault = "raised", repr(error)
    seconds = time.perf_counter() - start
    loaded = load_clip(folder.Sticker(path, path.name, "", "train"), RESOLUTION)
    if isinstance(loaded, str) and outcome == "decoded" and "distinct frames" not in loaded:
        fault = f"decoded once, and then: {loaded}"
    peak = memory("VmHWM") - before
    if seconds > SECONDS or peak > MEMORY:
        fault = fault or f"took {seconds:.1f} s, and up to here {peak} MiB"
    if not fault:
        path.unlink()
    return outcome, fault, seconds, peak


def metadata_folder(place):
    """A folder of five (empty) stickers; returns the good metadata files to mutate."""
    names = ["a.gif", "b/c.webp", "d e.png", "\u732b.mp4", "f.gif"]
    rows = [
        dict(file_name=name, text=f"caption of {name}, \u0645\u0631\u062d\u0628\u0627", split="train")
        for name in names
    ]
    for name in names:
        Path(place, name).parent.mkdir(parents=True, exist_ok=True)
        Path(place, name).touch()
    table = "file_name,caption\n" + "".join(f'{name},"quoted, ""caption"""\n' for name in names)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    array = json.dumps(rows, indent=1)
    return {
        "metadata.jsonl": [lines.encode(), array.encode(), lines.encode("utf-16")],
        "metadata.csv": [table.encode(), table.replace(",", ";").encode("utf-16")],
    }


def try_metadata(number, seed, place, files):
    """Scans a folder whose metadata is case `number`. Returns what is wrong, or None."""
    rng = np.random.default_rng((seed, number, 1))
    name = str(rng.choice(list(files)))
    for other in files:
        Path(place, other).unlink(missing_ok=True)
    Path(place, name).write_bytes(mutated(rng, files[name]))
    try:
        stickers, notes = folder.scan_folder(place)
    except DataError as error:
        return None if is_sentence(str(error)) else f"no sentence: {error!r}"
    except BaseException as error:
        return repr(error)
    if not all(note.isprintable() and len(note) < 1500 for note in notes):
        return f"notes {notes!r}"
    captions = [sticker.caption for sticker in stickers]
    if len(stickers) != 5 or max(map(len, captions)) > MAX_CAPTION:
        return f"{len(stickers)} stickers, captions of {[len(caption) for caption in captions]} characters"
    if any(re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", caption) for caption in captions):
        return f"captions {captions!r}"
    if any(sticker.split not in ("train", "validation") for sticker in stickers):
        return f"splits {[sticker.split for sticker in stickers]}"
    return None


def main():
    parser = argparse.ArgumentParser(description="Read damaged stickers and metadata.")
    add = parser.add_argument
    add("--cases", type=int, default=10000, help="files to try; a quarter as many metadata files")
    add("--seed", type=int, default=0, help="another number, other damage")
    add("--first", type=int, default=0, help="number of the first case, to try one again")
    add("--num_workers", type=int, default=os.cpu_count() or 1, help="decoding processes")
    add("--keep", type=Path, default="fuzz_faults", help="where the bad cases go")
    args = parser.parse_args()

    numbers, faults = range(args.first, args.first + args.cases), []
    outcomes, slowest, peak = {"decoded": 0, "refused": 0, "raised": 0, "lost": 0}, (0.0, None), 0
    good_files()  # once, before the processes begin
    with tempfile.TemporaryDirectory() as place:
        results = in_processes(partial(try_file, seed=args.seed, place=place), numbers, args.num_workers)
        for number, result in zip(numbers, tqdm(results, "files", len(numbers), unit="case")):
            if isinstance(result, str):  # the process died or hung
                result = "lost", result, 0.0, 0
            outcome, fault, seconds, most = result
            outcomes[outcome] += 1
            slowest, peak = max(slowest, (seconds, number), key=lambda pair: pair[0]), max(peak, most)
            if fault:
                faults.append(f"file {number}: {fault}")
                args.keep.mkdir(exist_ok=True)
                shutil.copy(next(Path(place).glob(f"{number}.*")), args.keep)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        files = metadata_folder(place)
        for number in tqdm(range(args.cases // 4), "metadata", unit="case"):
            fault = try_metadata(number, args.seed, place, files)
            if fault:
                faults.append(f"metadata {number}: {fault}")
                shutil.copytree(place, args.keep / f"metadata-{number}", dirs_exist_ok=True)

    print(f"{args.cases} files: " + ", ".join(f"{count} {name}" for name, count in outcomes.items()))
    print(f"slowest {slowest[0]:.2f} s (case {slowest[1]}), decoding processes grew by at most {peak} MiB")
    print(f"{args.cases // 4} metadata files in {time.perf_counter() - start:.0f} s")
    for fault in faults:
        print(f"FAULT {printable(fault)}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
