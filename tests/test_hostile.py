"""Stickers from anywhere: python -m pytest tests/test_hostile.py (tests/fuzz.py tries ten thousand more)"""

import faulthandler
import io
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pebble
import pytest
import torch
from PIL import Image

import data
from support import cache, folder, media
from support.common import printable
from support.encoders import PatchPCA
from support.folder import MAX_CAPTION, Clip, DataError, in_processes, load_clips, scan_folder
from tests import fuzz
from tests.test_media import clip, write

ROOT = Path(__file__).parents[1]


@pytest.fixture
def place(tmp_path):
    """A folder of one good sticker, good.gif."""
    (tmp_path / "stickers").mkdir()
    media.write_clip(tmp_path / "stickers" / "good.gif", clip(4, 32), 10)
    return tmp_path / "stickers"


def sticker(path):
    return folder.Sticker(path, path.name, "", "train")


def named(problems):
    """{name: reason}, after a check that each can be printed in any terminal."""
    for name, reason in problems:
        line = f"{printable(name)}: {reason}"
        assert line.isprintable() and line.encode() and len(line) < 1000
    return dict(problems)


# ------------------------------------------------------------------------------------------------------------
# Damaged files


def test_damaged_files_become_clips_or_sentences(tmp_path):
    outcomes = []
    for number, result in enumerate(in_processes(FuzzCase(tmp_path), range(300), 1)):
        assert not isinstance(result, str), f"case {number}: {result}"
        outcome, fault, *_ = result
        assert fault is None, f"case {number}: {fault}"
        outcomes.append(outcome)
    assert outcomes.count("decoded") > 30 and outcomes.count("refused") > 100
    assert not list(tmp_path.iterdir())


class FuzzCase:
    def __init__(self, place):
        self.place = place
        fuzz.good_files()

    def __call__(self, number):
        return fuzz.try_file(number, seed=100, place=self.place)


def test_damaged_metadata_becomes_captions_or_problems(tmp_path):
    files = fuzz.metadata_folder(tmp_path)
    faults = [fuzz.try_metadata(number, 100, tmp_path, files) for number in range(300)]
    assert not any(faults), [fault for fault in faults if fault]


def test_the_fuzzer_finds_faults(tmp_path, monkeypatch):
    """The checks can fail: a reader that lets an error through, or gives a wrong shape, is seen."""
    monkeypatch.setattr(media, "read_clip", lambda path, resolution: 1 / 0)
    monkeypatch.setattr(folder, "load_clip", lambda sticker, resolution: "unreadable")
    assert "ZeroDivisionError" in fuzz.try_file(0, 0, tmp_path)[1]
    monkeypatch.setattr(media, "read_clip", lambda *_: (np.zeros((1, 8, 8, 3), np.uint8), np.ones(1)))
    assert (
        "(1, 8, 8, 3)" in fuzz.try_file(0, 0, tmp_path)[1] or "unreadable" in fuzz.try_file(0, 0, tmp_path)[1]
    )
    assert len(list(tmp_path.iterdir())) == 1  # kept, to be tried again


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".mp4"])
def test_a_file_that_takes_long_is_refused_between_frames(tmp_path, monkeypatch, suffix):
    write(tmp_path / ("a" + suffix), clip())
    now = iter(range(0, 1000, 10))  # seconds: every look at the clock is ten later
    monkeypatch.setattr(media.time, "thread_time", lambda: next(now))
    with pytest.raises(media.MediaError, match=f"more than {media.MAX_SECONDS} seconds to decode; "):
        media.read_clip(tmp_path / ("a" + suffix), 8)
    assert next(now) <= media.MAX_SECONDS + 20  # at once, not at the end
    monkeypatch.setattr(media.time, "thread_time", lambda: 0)
    assert len(media.read_clip(tmp_path / ("a" + suffix), 8)[0]) == 8


# ------------------------------------------------------------------------------------------------------------
# Memory and time


def grown(path):
    """load_clip, and the MiB by which the process had grown at most."""
    before = fuzz.memory_at_start(os.getpid())
    return folder.load_clip(sticker(path), 16), fuzz.memory("VmHWM") - before


def test_small_files_do_not_take_all_memory(place, monkeypatch):
    monkeypatch.setattr(media, "MAX_MEMORY_BYTES", 2**27)  # forked processes inherit it
    paths = []
    for name, content in fuzz.bombs().items():
        (place / name).write_bytes(content)
        assert len(content) < 2**21
        paths += [place / name, place / "good.gif"]
    results = list(in_processes(grown, paths, 1))
    refused = 0
    for path, result in zip(paths, results):
        loaded, most = (result, 0) if isinstance(result, str) else result
        assert most < 220, f"{path.name}: {most} MiB"  # what is mapped from files counts too
        assert isinstance(loaded, Clip if path.name == "good.gif" else Clip | str)
        refused += isinstance(loaded, str) and media.NO_MEMORY in loaded and "run.mp4" in loaded
    assert refused == 1
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY  # of this process: as it was


def hungry(kind):
    if kind == "numpy":
        return np.ones(2**29, np.uint8)
    if kind == "torch":
        return torch.ones(2**29, dtype=torch.uint8)
    if kind == "python":
        return bytes(2**29)
    if kind == "result":  # fits, but not twice: on its way it is pickled
        return np.ones(2**27 * 3 // 4, np.uint8)
    return kind


def test_what_does_not_fit_into_memory_costs_one_item(monkeypatch, capfd):
    monkeypatch.setattr(media, "MAX_MEMORY_BYTES", 2**27)
    results = list(in_processes(hungry, ["numpy", 1, "torch", 2, "python", 3, "result", 4], 1))
    assert results[:6] == [media.NO_MEMORY, 1, media.NO_MEMORY, 2, media.NO_MEMORY, 3]
    assert len(results[6]) == 2**27 * 3 // 4 and results[7] == 4
    assert not capfd.readouterr().err


def full(path):
    """Has no memory left for any file at the first try."""
    if not path.exists():
        path.touch()
        raise MemoryError
    return path.name


def test_what_does_not_fit_is_tried_again_in_another_process(tmp_path):
    """What other files left behind in the process is not to decide about this one."""
    assert list(in_processes(full, [tmp_path / "a", tmp_path / "b"], 1)) == ["a", "b"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_no_memory_without_processes_is_a_reason_too(place, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(folder, "thumbnails", fail)
    assert list(load_clips(scan_folder(place)[0], 16, 0)) == [media.NO_MEMORY]
    monkeypatch.setattr(media, "on_white", fail)
    with pytest.raises(media.MediaError, match="good.gif does not fit into memory; shorten or resize it"):
        media.read_clip(place / "good.gif", 16)


def test_read_picture_is_read_image_in_a_process(place, monkeypatch):
    Image.new("RGB", (8, 8), (9, 99, 200)).save(place / "photo.jpg")
    for name in ("good.gif", "photo.jpg"):
        picture = folder.read_picture(place / name, 16)
        assert picture.dtype == np.uint8 and np.array_equal(picture, media.read_image(place / name, 16))
    (place / "text.gif").write_text("no sticker")
    with pytest.raises(media.MediaError, match="text.gif is no GIF.*take it out.$"):
        folder.read_picture(place / "text.gif", 16)
    monkeypatch.setattr(media, "on_white", lambda *_: bytes(2**31))
    with pytest.raises(media.MediaError, match="photo.jpg does not fit into memory; shorten"):
        folder.read_picture(place / "photo.jpg", 16)


@pytest.mark.parametrize("end, reason", [("crash", "process died"), ("hang", "longer than 0.5 seconds")])
def test_a_picture_that_ends_its_process_is_one_sentence(place, monkeypatch, end, reason):
    monkeypatch.setattr(folder, "HANG_SECONDS", 0.5)
    monkeypatch.setattr(folder.signal, "alarm", lambda seconds: None)
    monkeypatch.setattr(pebble.CONSTS, "term_timeout", 0.2)
    monkeypatch.setattr(media, "decoded", lambda *_, **__: iter([fate(end)]))
    with pytest.raises(media.MediaError) as error:
        folder.read_picture(place / "good.gif", 16)
    sentence = str(error.value)
    assert fuzz.is_sentence(sentence) and "good.gif cannot be decoded" in sentence and reason in sentence


def test_the_clock_is_looked_at_where_no_frame_comes_out(tmp_path, monkeypatch):
    """A packet may hold a frame that is never shown."""
    write(tmp_path / "a.webm", clip())
    content, looks = (tmp_path / "a.webm").read_bytes(), []
    monkeypatch.setattr(media, "check_time", looks.append)

    class Mute:
        width = height = 64
        name, decode = "mute", staticmethod(lambda packet: [])

    class Container:
        def __init__(self, *_, **__):
            self.streams = self

        video = property(lambda self: [SimpleNamespace(codec_context=Mute(), metadata={})])

        def demux(self, stream):
            return [SimpleNamespace(size=1)] * 8

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(media.av, "open", Container)
    with pytest.raises(EOFError):
        list(media.ffmpeg_pictures(content, "matroska", 0))
    assert len(looks) == 1 + 8  # after the header, and at each packet


# ------------------------------------------------------------------------------------------------------------
# Processes that die or hang


def fate(item):
    if item == "crash":
        faulthandler.disable()  # pytest's
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "exit":
        os._exit(3)
    if item == "exit as if all were well":
        os._exit(0)
    if item == "hang":  # as in C code: nothing in Python gets to run, and no polite signal ends it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGALRM})
        time.sleep(1000)
    if item == "fault of ours":
        raise RuntimeError("a bug")
    return item


@pytest.mark.parametrize(
    "end, workers",
    [("crash", 1), ("crash", 2), ("killed", 2), ("exit", 1), ("exit as if all were well", 1), ("hang", 2)],
)
def test_a_process_that_ends_costs_one_item(monkeypatch, end, workers):
    monkeypatch.setattr(folder, "HANG_SECONDS", 0.5)
    monkeypatch.setattr(folder.signal, "alarm", lambda seconds: None)  # it counts whole seconds
    monkeypatch.setattr(pebble.CONSTS, "term_timeout", 0.2)  # between a polite signal and SIGKILL
    items = [0, 1, end, *range(3, 12)] if workers == 2 else [end, 1]
    results = list(in_processes(fate, items, workers))
    reason = results.pop(items.index(end))
    items.remove(end)
    assert results == items  # all the others, in order
    slow = end in (
        "hang",
        "exit as if all were well",
    )  # what ends without an error is missed only by the clock
    assert ("took longer than 0.5 seconds" if slow else "process died") in reason


def once(path):
    """Dies over each file at the first try."""
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return path.name


def test_a_file_is_tried_again_before_it_is_dropped(tmp_path):
    assert list(in_processes(once, [tmp_path / "a", tmp_path / "b"], 1)) == ["a", "b"]


def test_a_fault_of_ours_is_not_blamed_on_the_file():
    with pytest.raises(RuntimeError, match="a bug"):
        list(in_processes(fate, [1, "fault of ours"], 1))


def test_only_so_many_files_are_read_ahead(tmp_path):
    results = in_processes(os.mkdir, [tmp_path / str(i) for i in range(100)], 1)
    next(results), next(results)
    time.sleep(0.3)
    assert len(list(tmp_path.iterdir())) <= 2 + folder.LOOK_AHEAD
    results.close()


def test_a_file_that_crashes_the_decoder_is_dropped_from_the_cache(place, tmp_path, monkeypatch):
    for name in ("bad.gif", "fine.gif"):
        media.write_clip(place / name, clip(5, 32)[:, ::-1] if name == "bad.gif" else clip(6, 32), 10)
    read = media.read_clip

    def crash(path, resolution):
        return fate("crash") if path.name == "bad.gif" else read(path, resolution)

    stickers, codec = scan_folder(place)[0], PatchPCA(patch_size=8, latent_channels=6)
    data.fit_codec(codec, stickers, 16, num_workers=0)
    monkeypatch.setattr(media, "read_clip", crash)  # forked processes inherit it
    dataset = cache.open_dataset(place, stickers, codec, 16, tmp_path / "cache", num_workers=1)
    assert [c.name for c in dataset.clips] == ["fine.gif", "good.gif"]
    assert dataset.dropped == [("bad.gif", "its decoding process died")]
    assert not list((tmp_path / "cache").glob("*/claims/*.txt"))
    again = cache.open_dataset(place, stickers, codec, 16, tmp_path / "cache", num_workers=1)
    assert again.dropped == dataset.dropped


def test_no_process_stays_when_the_encoder_fails(place, tmp_path, monkeypatch):
    stickers, codec = scan_folder(place)[0] * 40, PatchPCA(patch_size=8, latent_channels=6)
    data.fit_codec(codec, stickers, 16, num_workers=0)
    monkeypatch.setattr(PatchPCA, "encode", lambda self, frames: 1 / 0)
    monkeypatch.setattr(cache, "digest_files", lambda *_: [str(i) for i in range(40)])
    with pytest.raises(ZeroDivisionError) as error:  # `error` keeps every frame of the traceback alive
        cache.open_dataset(place, stickers, codec, 16, tmp_path / "cache", num_workers=2)
    assert not multiprocessing.active_children() and error.traceback
    assert not list((tmp_path / "cache").glob("*/claims/*.txt"))


RUN = """
import os
import sys
import time
from support import folder
from support import media

def slow(path, resolution):
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(float(sys.argv[1]))

media.read_clip = slow
try:
    list(folder.load_clips([folder.Sticker(None, "a", "", "train")] * 4, 16, 2))
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_run(number):
    command = [sys.executable, "-c", RUN, "100" if number == signal.SIGINT else "1"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell ignores it for what runs behind
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=heard)
    workers = [int(run.stdout.readline()) for _ in range(2)]
    start = time.monotonic()
    run.send_signal(number)
    rest = run.stdout.read()  # until the last process that could write is gone
    run.wait()
    assert time.monotonic() - start < 8 and len(workers) == 2
    assert ("interrupted" in rest) == (number == signal.SIGINT)


# ------------------------------------------------------------------------------------------------------------
# Folders


def test_links_folders_and_unreadable_files(place, tmp_path):
    media.write_clip(tmp_path / "store.gif", clip(4, 32), 10)
    (place / "loop").symlink_to(place)  # a folder in itself
    (place / "loop.gif").symlink_to(place / "loop.gif")  # a file that is itself
    (place / "dangling.webp").symlink_to(tmp_path / "nothing")
    (place / "link.gif").symlink_to(tmp_path / "store.gif")
    (place / "folder.gif").mkdir()
    media.write_clip(place / "folder.gif" / "inside.gif", clip(4, 32), 10)
    os.mkfifo(place / "pipe.png")
    deep = place
    for _ in range(folder.MAX_DEPTH + 1):
        deep = deep / "d"
        deep.mkdir()
    (deep / "deep.gif").write_bytes(b"")
    (place / "metadata.jsonl").write_text('{"file_name": "link.gif", "text": "from a store"}')
    stickers, problems = scan_folder(place)
    assert {s.name: s.caption for s in stickers} == {
        "folder.gif/inside.gif": "",
        "good.gif": "",
        "link.gif": "from a store",
    }
    names = named(problems)
    assert set(names) == {"loop.gif", "dangling.webp", "pipe.png", "/".join("d" * folder.MAX_DEPTH)}
    assert all(isinstance(loaded, Clip) for loaded in load_clips(stickers, 16, 0))


def test_what_may_not_be_read_is_named(place):
    for name in ("closed.gif", "good.txt"):
        (place / name).write_text("a")
        (place / name).chmod(0)
    if os.access(place / "closed.gif", os.R_OK):
        pytest.skip("root may read everything")
    (place / "closed").mkdir(mode=0)
    stickers, problems = scan_folder(place)
    assert set(named(problems)) == {"closed", "good.gif"} and len(stickers) == 2
    assert "Permission denied" in folder.load_clip(stickers[0], 16)
    (place / "metadata.jsonl").write_text("{}")
    (place / "metadata.jsonl").chmod(0)
    with pytest.raises(DataError, match="metadata.jsonl cannot be read .Permission denied."):
        scan_folder(place)


def test_metadata_that_cannot_be_read_is_one_sentence(place, monkeypatch):
    (place / "metadata.jsonl").write_text("{}")
    monkeypatch.setattr(folder, "open_text", lambda path, **_: open(place / "nothing"))
    with pytest.raises(DataError, match="nothing cannot be read .No such file"):
        scan_folder(place)


def test_a_folder_of_broken_links_says_so(tmp_path):
    (tmp_path / "a.gif").symlink_to("nowhere")
    with pytest.raises(
        DataError, match="holds no sticker.* a.gif is no file that can be read, or a link to none"
    ):
        scan_folder(tmp_path)


WILD_NAMES = [
    b"new\nline.gif",
    b"\x1b[31mred\x07.gif",
    b"no utf-8 \xff\xfe.gif",
    "right to left \u202e \u0645\u0631\u062d\u0628\u0627.gif".encode(),
    "\u732b \U0001f431.gif".encode(),
    b"-rf 'quoted\" \\ $(x).gif",
    b"x" * 251 + b".gif",
]


@pytest.mark.parametrize("name", WILD_NAMES)
def test_wild_file_names_are_read_and_can_be_printed(place, tmp_path, name, monkeypatch, capsys):
    path = place / os.fsdecode(name)
    path.write_bytes((place / "good.gif").read_bytes())
    (place / "good.gif").unlink()
    (found,), problems = scan_folder(place)
    assert not problems and isinstance(next(load_clips([found], 16, 1)), Clip)
    monkeypatch.setattr(
        sys, "argv", ["data.py", str(place), "--num_workers", "0", "--preview", f"{tmp_path}/a.png"]
    )
    data.main()  # the preview shows its name
    path.write_text("no sticker")
    reason = folder.load_clip(found, 16)
    assert reason.isprintable() and reason.encode() and "is no GIF" in reason
    with pytest.raises(SystemExit):
        data.main()
    printed = capsys.readouterr()
    line = next(line for line in printed.out.splitlines() if line.startswith("dropped"))
    assert line.isprintable() and line.endswith("take it out.") and "\x1b" not in printed.out + printed.err


def test_a_terminal_that_knows_ascii_alone(place, monkeypatch):
    (place / "\u732b.gif").write_text("no sticker")
    monkeypatch.setattr(sys, "argv", ["data.py", str(place), "--num_workers", "0"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    data.main()
    sys.stdout.flush()
    assert b"dropped \\u732b.gif: " in sys.stdout.buffer.getvalue()


def test_printable_keeps_what_can_be_read_and_escapes_the_rest():
    assert (
        printable("caf\u00e9 \u732b \u0645 \U0001f431 a\\b.gif")
        == "caf\u00e9 \u732b \u0645 \U0001f431 a\\b.gif"
    )
    assert printable("a\n\x1b[0m\udcff\u202e\u2028") == r"a\n\x1b[0m\udcff\u202e\u2028"
    assert len(printable("\0" * 10**6)) < 4 * 600


def test_names_that_metadata_may_not_use(place):
    outside = place.parent / "outside.gif"
    outside.write_bytes((place / "good.gif").read_bytes())
    (place / "way_out").symlink_to(place.parent)
    rows = [
        ["../outside.gif", "outside of the folder"],
        [str(outside), "outside of the folder"],
        [str(place / "good.gif"), "outside of the folder"],  # even one inside: names are relative
        ["a/../../outside.gif", "outside of the folder"],
        ["way_out/outside.gif", "no such file"],
        ["nul\0.gif", "no such file"],
        ["x" * 5000 + ".gif", "no such file"],
        ["x/" * 5000 + "a.gif", "no such file"],
        [".", "no such file"],
    ]
    unusable = [None, "", 7, [], {}, True]
    lines = [dict(file_name=name, text="x") for name in [*(name for name, _ in rows), *unusable]]
    lines += [[], 7, "good.gif", None]
    broken = ["[" * 100_000, '{"a":' * 100_000, "{", "1" * 10_000, "\0", '{"file_name": "good.gif"']
    good = dict(file_name="./good.gif", text="a good one", split="validation")
    text = "\n".join([*map(json.dumps, lines), *broken, json.dumps(good)])
    (place / "metadata.jsonl").write_text(text)
    (found,), problems = scan_folder(place)
    assert found[1:] == ("good.gif", "a good one", "validation")
    reasons = named(problems)
    assert len(problems) == len(rows) + len(unusable) + 4 + len(broken)
    for name, reason in rows:
        assert reason in reasons[printable(name)]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_beyond_its_limit_is_refused_unread(place, name):
    with open(place / name, "wb") as file:
        file.truncate(folder.MAX_METADATA_BYTES + 1)  # sparse
    start = time.perf_counter()
    with pytest.raises(DataError, match=f"{name} has more than 1024 MiB: shorten it.$"):
        scan_folder(place)
    assert time.perf_counter() - start < 1


def test_an_entry_beyond_its_limit_is_not_held(place, monkeypatch):
    """Neither a line without an end, nor a table's row of very many quoted lines."""
    monkeypatch.setattr(folder, "MAX_ENTRY", 200)
    line, table = (
        json.dumps(dict(file_name="good.gif", text="a caption")),
        "file_name,text\ngood.gif,a caption",
    )
    endless, quoted = line[:-1] + " " * 10**7 + "}", "good.gif," + '"\n",' * 10**5 + "end"
    for name, good, long in (
        ("metadata.jsonl", line, endless),
        ("metadata.csv", table, endless),
        ("metadata.csv", table, quoted),
    ):
        before = [f"{long}\n{good}"] * (long is endless)  # what follows a broken quote is anybody's guess
        for text in (*before, f"{good}\n{long}", f"{good}\r\n{long}\r\n{long}"):
            (place / name).write_text(text, newline="")
            tracemalloc.start()
            (found,), problems = scan_folder(place)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert found.caption == "a caption" and 1 <= len(named(problems)) and peak < 2**20
            assert "in at most 200 characters" in problems[0][1] and problems[0][0].startswith(name)
        (place / name).unlink()


def test_problems_of_metadata_are_named_up_to_a_number(place):
    count = folder.MAX_PROBLEMS + 50
    lines = [json.dumps(dict(file_name=f"{i}" + "x\n" * 10**3, text="x")) for i in range(count)]
    good = json.dumps(dict(file_name="good.gif", text="a caption", split="x" * 10**5))
    (place / "metadata.jsonl").write_text("\n".join([*lines, good]))
    (found,), problems = scan_folder(place)
    assert found.caption == "a caption" and found.split == "train"
    assert len(problems) == folder.MAX_PROBLEMS + 1 and named(problems)
    assert all(name.isprintable() and len(name) < 1100 for name, _ in problems)
    assert problems[-1] == ("metadata.jsonl", "and 50 more of its entries, which cannot be used either")


@pytest.mark.parametrize("key", ["text", "caption", "split"])
@pytest.mark.parametrize("value", [None, 7, 1.5, [], ["a"], {"a": 1}, True, "\ud800", "a" * 10**6])
def test_values_of_any_kind(place, key, value):
    (place / "metadata.jsonl").write_text(json.dumps({"file_name": "good.gif", key: value}))
    (found,), problems = scan_folder(place)
    assert not problems and found.split in ("train", "validation")
    expected = {"\ud800": "?", "a" * 10**6: "a" * MAX_CAPTION}.get(
        value if isinstance(value, str) else "", ""
    )
    assert found.caption == (expected if key != "split" else "")


def test_encodings_of_metadata(place):
    line = (
        json.dumps(dict(file_name="good.gif", text="caf\u00e9 \u2028 \u0085 one line"), ensure_ascii=False)
        + "\n"
    )
    for text, caption in (
        (b"\xef\xbb\xbf" + line.encode(), "caf\u00e9 one line"),  # a byte order mark
        (line.encode("latin-1", "replace"), "caf? ? ? one line"),
        (line.replace("\n", "\r\n").encode(), "caf\u00e9 one line"),
    ):
        (place / "metadata.jsonl").write_bytes(text)
        (found,), problems = scan_folder(place)
        assert found.caption == caption and not problems
    (place / "metadata.jsonl").write_bytes(line.encode("utf-16"))
    (found,), problems = scan_folder(place)
    assert found.caption == "" and named(problems)
    (place / "metadata.jsonl").unlink()
    (place / "metadata.csv").write_bytes(b"\xef\xbb\xbffile_name,text\ngood.gif,a caption\n")
    assert scan_folder(place)[0][0].caption == "a caption"
    (place / "metadata.jsonl").mkdir()  # no file: the table counts
    assert scan_folder(place)[0][0].caption == "a caption"


def test_metadata_names_files_whose_names_are_no_utf8(place):
    (place / "good.gif").rename(place / os.fsdecode(b"\xff.gif"))
    (place / "metadata.jsonl").write_bytes(b'{"file_name": "\xff.gif", "text": "a caption \xff"}')
    (found,), problems = scan_folder(place)
    assert found.caption == "a caption ?" and not problems


@pytest.mark.parametrize(
    "row",
    [b"nul\0.gif,x", b"good.gif", b'"' + b"a" * 200_000 + b'",x', b"a" * 200_000, b",,,,", b"../a.gif,x"],
)
def test_tables_with_broken_rows(place, row):
    (place / "metadata.csv").write_bytes(b"file_name,text\n" + row + b"\ngood.gif,a caption,and,more\n")
    (found,), problems = scan_folder(place)
    assert found.caption == "a caption" and len(named(problems)) == (row != b"good.gif")


@pytest.mark.parametrize(
    "table", [b"", b"\n\n", b"\0", b"a,b\n1,2\n", b'"' * 9, b"x" * 200_000 + b"\n", b'"open\ngood.gif,x']
)
def test_tables_without_a_header(place, table):
    (place / "metadata.csv").write_bytes(table)
    (found,), problems = scan_folder(place)
    assert found.caption == "" and named(problems) is not None


CAPTIONS = {
    "": "",
    " \n\t\0 ": "",
    "\x1b[31mred\x1b[0m \x07bell\x7f\x9b": "[31mred [0m bell",
    "\u0645\u0631\u062d\u0628\u0627 \u202eabc": "\u0645\u0631\u062d\u0628\u0627 \u202eabc",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u732b": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u732b",
    "a" * 100_000: "a" * MAX_CAPTION,
    "word " * 20_000: ("word " * 1000)[:MAX_CAPTION].strip(),
    "e" + "\u0301" * 100_000: "e" + "\u0301" * (MAX_CAPTION - 1),
}


@pytest.mark.parametrize("caption", CAPTIONS, ids=range(len(CAPTIONS)))
@pytest.mark.parametrize("where", ["metadata.jsonl", "good.txt"])
def test_captions(place, tmp_path, caption, where):
    text = caption if where == "good.txt" else json.dumps(dict(file_name="good.gif", text=caption))
    (place / where).write_bytes(text.encode())
    start = time.perf_counter()
    (found,), problems = scan_folder(place)
    assert found.caption == CAPTIONS[caption] and not problems
    loaded = next(load_clips([found], 16, 0))
    data.preview([loaded], [found.caption], [loaded.count]).save(io.BytesIO(), "PNG")
    assert time.perf_counter() - start < 3


def test_a_sidecar_that_is_no_text(place):
    (place / "good.txt").write_bytes(b"\xef\xbb\xbfa \xff\xfe caption\xed\xa0\x80" + b"\xff" * 10**6)
    (found,), problems = scan_folder(place)
    assert re.fullmatch(r"a \?\? caption\?+", found.caption) and len(found.caption) == MAX_CAPTION
    (place / "good.txt").unlink()
    (place / "good.txt").mkdir()
    assert scan_folder(place)[0][0].caption == ""


def test_nothing_of_a_file_reaches_the_terminal(tmp_path, monkeypatch):
    """The words of a decoder's error may be those of the file."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def fail(data, form, start):
        raise OSError("bad chunk \x1b[2J\n\udcff" + "x" * 10**6)

    monkeypatch.setattr(media, "pillow_pictures", fail)
    with pytest.raises(media.MediaError) as error:
        media.read_clip(tmp_path / "a.png", 8)
    assert fuzz.is_sentence(str(error.value)) and r"\x1b[2J\n\udcff" in str(error.value)
