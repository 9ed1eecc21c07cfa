"""Decoding processes: what a file may cost them in memory and time, and what becomes of the others."""

import faulthandler
import multiprocessing
import os
import signal
import time
from functools import partial

import numpy as np
import pebble
import pytest
import torch
from PIL import Image

import data
from data import load_clips
from support import cache, decode, media, workers
from support.folder import scan_folder
from support.workers import in_processes
from tests.clips import clip, good_folder, is_locked
from tests.stress import fuzz
from tests.toys import FakeCodec


@pytest.fixture
def place(tmp_path):
    return good_folder(tmp_path / "stickers")


# ------------------------------------------------------------------------------------------------------------
# Memory


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
    monkeypatch.setattr(decode, "MAX_MEMORY_BYTES", 2**27)
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

    monkeypatch.setattr(data, "thumbnails", fail)
    assert list(load_clips(scan_folder(place)[0], 16, 0)) == [media.NO_MEMORY]
    monkeypatch.setattr(media, "on_white", fail)
    with pytest.raises(media.MediaError, match="good.gif does not fit into memory; shorten or resize it"):
        media.read_clip(place / "good.gif", 16)


def test_read_picture_is_read_image_in_a_process(place, monkeypatch):
    Image.new("RGB", (8, 8), (9, 99, 200)).save(place / "photo.jpg")
    for name in ("good.gif", "photo.jpg"):
        picture = workers.read_picture(place / name, 16)
        assert picture.dtype == np.uint8 and np.array_equal(picture, media.read_image(place / name, 16))
    (place / "text.gif").write_text("no sticker")
    with pytest.raises(media.MediaError, match="text.gif is no GIF.*take it out.$"):
        workers.read_picture(place / "text.gif", 16)
    monkeypatch.setattr(media, "on_white", lambda *_: bytes(2**31))
    with pytest.raises(media.MediaError, match="photo.jpg does not fit into memory; shorten"):
        workers.read_picture(place / "photo.jpg", 16)


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


@pytest.fixture
def impatient(monkeypatch):
    """Processes that hang are ended soon."""
    monkeypatch.setattr(workers, "HANG_SECONDS", 1)
    monkeypatch.setattr(workers.signal, "alarm", lambda seconds: None)  # the pool's clock is what is tested
    monkeypatch.setattr(pebble.CONSTS, "term_timeout", 0.2)  # between a polite signal and SIGKILL


# What ends without an error is missed only by the clock.
@pytest.mark.parametrize(
    "end, count, reason",
    [
        ("crash", 1, "process died"),
        ("crash", 2, "process died"),
        ("killed", 2, "process died"),
        ("exit", 1, "process died"),
        pytest.param("exit as if all were well", 1, "took longer than 1 seconds", marks=pytest.mark.slow),
        ("hang", 2, "took longer than 1 seconds"),
    ],
)
def test_a_process_that_ends_costs_one_item(impatient, end, count, reason):
    items = [0, 1, end, *range(3, 12)] if count == 2 else [end, 1]
    results = list(in_processes(fate, items, count))
    assert reason in results.pop(items.index(end))
    items.remove(end)
    assert results == items  # all the others, in order


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
    assert len(list(tmp_path.iterdir())) <= 2 + workers.LOOK_AHEAD
    results.close()


def test_a_file_that_crashes_the_decoder_is_dropped_from_the_cache(place, tmp_path, monkeypatch):
    for name in ("bad.gif", "fine.gif"):
        media.write_clip(place / name, clip(5, 32)[:, ::-1] if name == "bad.gif" else clip(6, 32), 10)
    read = media.read_clip

    def crash(path, resolution):
        return fate("crash") if path.name == "bad.gif" else read(path, resolution)

    stickers, codec = scan_folder(place)[0], FakeCodec()
    monkeypatch.setattr(media, "read_clip", crash)  # forked processes inherit it
    dataset = data.open_dataset(place, stickers, codec, 16, tmp_path / "cache", num_workers=1)
    assert [c.name for c in dataset.clips] == ["fine.gif", "good.gif"]
    assert dataset.dropped == [("bad.gif", "its decoding process died")]
    again = data.open_dataset(place, stickers, codec, 16, tmp_path / "cache", num_workers=1)
    assert again.dropped == dataset.dropped


def test_no_process_stays_when_the_encoder_fails(place, tmp_path, monkeypatch):
    stickers, codec = scan_folder(place)[0] * 40, FakeCodec()
    monkeypatch.setattr(FakeCodec, "encode", lambda self, frames: 1 / 0)
    monkeypatch.setattr(cache, "digest_files", lambda *_: [str(i) for i in range(40)])
    with pytest.raises(ZeroDivisionError) as error:  # `error` keeps every frame of the traceback alive
        data.open_dataset(place, stickers, codec, 16, tmp_path / "cache", num_workers=2)
    assert not multiprocessing.active_children() and error.traceback
    (lock,) = (tmp_path / "cache").glob("*/*.lock")
    assert not is_locked(lock) and not list(lock.parent.glob("*.safetensors"))


def linger(pipe, seconds, item):
    os.write(pipe, b"at work\n")
    time.sleep(seconds)


def run_over_items(pipe, seconds):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs behind
    try:
        list(in_processes(partial(linger, pipe, seconds), range(4), 2))
    except KeyboardInterrupt:
        os.write(pipe, b"interrupted\n")


@pytest.mark.parametrize("number, seconds", [(signal.SIGINT, 100), (signal.SIGKILL, 1)])
def test_no_process_outlives_the_run(number, seconds):
    reading, writing = os.pipe()
    run = multiprocessing.get_context("fork").Process(target=run_over_items, args=(writing, seconds))
    run.start()
    os.close(writing)
    with open(reading) as pipe:
        assert [pipe.readline() for _ in range(2)] == ["at work\n"] * 2
        start = time.monotonic()
        os.kill(run.pid, number)
        rest = pipe.read()  # until the last process that could write is gone
    run.join()
    assert time.monotonic() - start < 8
    assert ("interrupted" in rest) == (number == signal.SIGINT)


@pytest.mark.parametrize("end, reason", [("crash", "process died"), ("hang", "longer than 1 seconds")])
def test_a_picture_that_ends_its_process_is_one_sentence(impatient, place, monkeypatch, end, reason):
    monkeypatch.setattr(media, "decoded", lambda *_, **__: iter([fate(end)]))
    with pytest.raises(media.MediaError) as error:
        workers.read_picture(place / "good.gif", 16)
    sentence = str(error.value)
    assert fuzz.is_sentence(sentence) and "good.gif cannot be decoded" in sentence and reason in sentence
