"""Folders, captions, key frames, the latent cache, and the draws of a batch."""

import errno
import os
import shutil
import sys
import time
from collections import Counter
from multiprocessing import get_context
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
import masks
from curriculum import Curriculum
from data import load_clip, load_clips, open_dataset
from masks import NUM_FRAMES
from model import make_scheduler
from support import cache, media
from support.folder import scan_folder
from tests.clips import fill, is_locked, moving_square, square_folder
from tests.toys import FakeCodec

UNIFORM = Curriculum("none", 1).probabilities(0)


@pytest.fixture
def folder(tmp_path):
    return square_folder(tmp_path / "stickers")


def open_folder(folder, cache):
    codec = FakeCodec()
    return open_dataset(folder, scan_folder(folder)[0], codec, 16, cache), codec


# ------------------------------------------------------------------------------------------------------------
# Clips


def test_unusable_files_are_dropped_with_a_reason(folder):
    moving_square(folder / "still.gif", frames=1)
    (folder / "text.gif").write_text("hello")
    (folder / "cut.gif").write_bytes((folder / "10.gif").read_bytes()[:300])
    reasons = {s.name: load_clip(s, 16) for s in scan_folder(folder)[0]}
    dropped = {name: reason for name, reason in reasons.items() if isinstance(reason, str)}
    assert set(dropped) == {"still.gif", "text.gif", "cut.gif"}
    assert "distinct" in dropped["still.gif"]


# ------------------------------------------------------------------------------------------------------------
# Cache


def test_a_copy_of_a_held_out_file_is_held_out(folder, tmp_path):
    shutil.copy(folder / "10.gif", folder / "copy.gif")
    for said in folder.glob("metadata.*"):
        said.unlink()
    (folder / "metadata.jsonl").write_text('{"file_name": "10.gif", "text": "x", "split": "validation"}')
    dataset, _ = open_folder(folder, tmp_path / "cache")
    assert {clip.name for clip in dataset.split("validation")} == {"10.gif", "copy.gif"}
    assert len(dataset.split("train")) == len(dataset.clips) - 2 > 0


def test_cached_latents_are_those_of_the_key_frames(folder, tmp_path):
    dataset, codec = open_folder(folder, tmp_path / "cache")
    assert not dataset.dropped and len(dataset.clips) == 12
    for clip in dataset.clips:
        frames, _ = media.read_clip(folder / clip.name, 16)
        key_frames = data.extract_key_frames(data.thumbnails(frames))
        assert clip.longest == max(key_frames)
        for k, indices in key_frames.items():
            expected = codec.encode(torch.from_numpy(frames[indices])).numpy()
            # half precision on disk
            np.testing.assert_allclose(dataset.read(clip, k), expected, rtol=1e-3, atol=1e-2)
        assert clip.has_equal == (len(frames) >= NUM_FRAMES)
        if clip.has_equal:
            expected = codec.encode(torch.from_numpy(frames[data.equal_frames(len(frames))])).numpy()
            np.testing.assert_allclose(dataset.read(clip), expected, rtol=1e-3, atol=1e-2)


def encoded(monkeypatch, codec):
    """Counts the frames that go through the codec from now on."""
    counts, encode = [], type(codec).encode
    monkeypatch.setattr(
        type(codec), "encode", lambda self, frames: counts.append(len(frames)) or encode(self, frames)
    )
    return counts


def test_a_latent_is_stale_exactly_when_it_should_be(folder, tmp_path, monkeypatch):
    dataset, codec = open_folder(folder, tmp_path / "cache")
    counts = encoded(monkeypatch, codec)

    def clips_encoded(codec=codec, resolution=16):
        counts.clear()
        stickers, _ = scan_folder(folder)
        return open_dataset(folder, stickers, codec, resolution, tmp_path / "cache"), len(counts)

    os.utime(folder / "00.gif")  # modification time
    (folder / "metadata.jsonl").write_text("")  # captions
    (folder / "02.gif").rename(folder / "renamed.gif")
    shutil.copy(folder / "04.gif", folder / "copy.gif")
    again, count = clips_encoded()
    assert count == 0 and len(again.clips) == 13 and again.clips[0].caption == ""
    by_name = {clip.name: clip for clip in again.clips}
    assert np.array_equal(again.read(by_name["copy.gif"], 3), again.read(by_name["04.gif"], 3))

    moving_square(folder / "00.gif", frames=9)  # contents
    changed, count = clips_encoded()
    assert count == 1 and changed.clips[0].longest == 8 and changed.identity != again.identity
    assert clips_encoded(resolution=24)[1] == 12  # equal files are encoded once
    assert clips_encoded(FakeCodec(identity="other"))[1] == 12
    monkeypatch.setattr(cache, "CACHE_VERSION", cache.CACHE_VERSION + 1)  # key frames
    assert clips_encoded()[1] == 12


def test_a_dropped_file_keeps_its_reason_and_its_neighbours(folder, tmp_path):
    (folder / "text.gif").write_text("hello")
    for _ in range(2):  # built, then read
        dataset, _ = open_folder(folder, tmp_path / "cache")
        assert [name for name, _ in dataset.dropped] == ["text.gif"] and len(dataset.clips) == 12
    (folder / "text.gif").rename(folder / "other.gif")
    ((name, reason),) = open_folder(folder, tmp_path / "cache")[0].dropped
    assert name == "other.gif" and "text.gif" not in reason  # which the cache knows by its contents alone


def test_an_interrupted_build_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_CLIPS", 4)
    stickers, _ = scan_folder(folder)
    codec = FakeCodec()
    counts, encode = encoded(monkeypatch, codec), FakeCodec.encode

    def interrupt(self, frames):
        if len(counts) == 6:
            raise KeyboardInterrupt
        return encode(self, frames)

    monkeypatch.setattr(FakeCodec, "encode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_dataset(folder, stickers, codec, 16, tmp_path / "cache")
    monkeypatch.setattr(FakeCodec, "encode", encode)
    counts.clear()
    dataset = open_dataset(folder, stickers, codec, 16, tmp_path / "cache")
    assert len(dataset.clips) == 12 and len(counts) == 8  # the first shard of four was kept


def build(folder, codec, cache_dir, words):
    """Builds a cache in shards of two, slowly, and puts a word for each clip that it encodes."""
    cache.SHARD_CLIPS, encode = 2, FakeCodec.encode

    def slow(self, frames):
        time.sleep(0.1)
        words.put("encoded")
        return encode(self, frames)

    FakeCodec.encode = slow
    dataset = open_dataset(folder, scan_folder(folder)[0], codec, 16, cache_dir)
    words.put(f"{len(dataset.clips)} clips")


def test_processes_share_the_work_and_survive_each_other(folder, tmp_path):
    codec, fork = FakeCodec(), get_context("fork")

    def start():
        words = fork.SimpleQueue()
        process = fork.Process(target=build, args=(folder, codec, tmp_path / "cache", words))
        process.start()
        return process, words

    doomed, words = start()
    for _ in range(3):  # it has finished a shard of two and is inside the next
        words.get()
    doomed.kill()
    doomed.join()
    said = []
    for process, words in [start(), start()]:
        process.join(100)
        while not words.empty():
            said.append(words.get())
    # nothing twice, and the first two kept
    assert sorted(said) == ["12 clips", "12 clips", *["encoded"] * 10]
    assert not list((tmp_path / "cache").glob("latents-*/.*"))


def test_a_damaged_shard_is_encoded_again(folder, tmp_path, monkeypatch):
    dataset, codec = open_folder(folder, tmp_path / "cache")
    whole, counts = dataset.read(dataset.clips[0], 3), encoded(monkeypatch, codec)
    (shard,) = dataset.folder.glob("*.safetensors")
    content = shard.read_bytes()
    for damaged in (
        b"",
        content[:100],
        content[:-1],
        b"\xff" * 8 + content[8:],
        content.replace(b"}", b"?", 1),
    ):
        shard.write_bytes(damaged)
        counts.clear()
        again, _ = open_folder(folder, tmp_path / "cache")
        assert len(counts) == 12 and np.array_equal(again.read(again.clips[0], 3), whole)


def test_a_shard_is_written_under_its_lock_alone(folder, tmp_path):
    """Whoever waits for a lock finds the shard that its holder wrote, and encodes nothing."""

    def encode(items):
        (path,) = tmp_path.glob("*.lock")
        assert is_locked(path)
        yield from ((torch.ones(2, 4, 3, 3).half(), np.ones((7, 8), np.int8)) for _ in items)

    cache.fill(tmp_path, dict(a=1, b=2), encode)
    cache.fill(tmp_path, dict(b=2, a=1), lambda items: pytest.fail("encoded again"))
    assert {digest: start for digest, (_, start, _) in cache.read_entries(tmp_path).items()} == dict(a=0, b=2)


def test_a_folder_of_nothing_usable_is_cached_too(tmp_path):
    cache.fill(tmp_path, dict(a=1), lambda items: (reason for reason in ["it is bad"]))
    assert cache.read_entries(tmp_path) == dict(a="it is bad")


def test_several_processes_read_what_one_does(folder):
    stickers, _ = scan_folder(folder)
    one, two = (list(load_clips(stickers, 16, workers)) for workers in (0, 2))
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.pixels, b.pixels)


# ------------------------------------------------------------------------------------------------------------
# Draws


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """The data set of twelve clips that nothing is done to."""
    root = tmp_path_factory.mktemp("squares")
    return open_folder(square_folder(root / "stickers"), root / "cache")[0]


def draw(dataset, indices, step=0, seed=0, global_batch=8, ddu="on", probabilities=UNIFORM):
    return data.draw_batch(dataset, dataset.clips, probabilities, seed, step, indices, global_batch, ddu)


def test_two_halves_of_a_batch_are_the_whole(squares):
    whole, first, second = draw(squares, range(8)), draw(squares, range(4)), draw(squares, range(4, 8))
    for name in whole._fields:
        parts = getattr(first, name), getattr(second, name)
        if isinstance(parts[0], list):
            assert getattr(whole, name) == parts[0] + parts[1]
        else:
            assert torch.equal(getattr(whole, name), torch.cat(parts))
    other_step, other_seed = draw(squares, range(8), step=1), draw(squares, range(8), seed=1)
    assert not torch.equal(whole.noise, other_step.noise) and not torch.equal(whole.noise, other_seed.noise)


def test_an_epoch_shows_every_clip_once(squares, monkeypatch):
    seen = []
    monkeypatch.setattr(
        squares, "read", lambda clip, k=None: seen.append(clip.name) or np.zeros((k, 6, 2, 2), np.float32)
    )
    for step in range(6):  # two epochs of twelve, four samples a step
        draw(squares, range(4), step=step, global_batch=4)
    assert set(Counter(seen[:12]).values()) == {1} and sorted(seen[:12]) == sorted(seen[12:])
    assert seen[:12] != seen[12:]


def test_samples_obey_their_row(squares):
    by_length = {clip.longest: clip for clip in squares.clips}
    assert 3 in by_length
    for step in range(40):
        batch = draw(squares, range(8), step=step)
        for given, valid, latents, caption, task, k in zip(
            batch.given, batch.valid, batch.latents, batch.captions, batch.tasks, batch.lengths
        ):
            slots = len(valid)
            assert slots == max(batch.lengths) and valid.tolist() == masks.loss_mask(k)[:slots].tolist()
            assert (latents[k:] == 0).all() and latents[:k].abs().sum() > 0
            allowed = [masks.condition_mask(row, k)[:slots] for row in masks.admissible_rows(task, k)]
            assert not given.any() or any((given.numpy() == mask).all() for mask in allowed)
    batch = draw(squares, range(64), global_batch=64)
    assert 0.6 < sum(bool(caption) for caption in batch.captions) / 64 < 0.95


def test_timesteps_are_uniform_and_those_of_a_batch_spread_evenly(squares):
    batch = draw(squares, range(50), global_batch=50)
    assert sorted(t // 20 for t in batch.timesteps.tolist()) == list(range(50))  # one in each fiftieth
    one = np.array([draw(squares, [3], step=step, global_batch=8).timesteps[0].item() for step in range(200)])
    assert one.min() >= 0 and one.max() < 1000
    assert np.abs(np.histogram(one, 4, (0, 1000))[0] - 50).max() < 25  # whichever its place in the batch


@pytest.mark.parametrize("index, global_batch", [(0, 1), (0, 8), (3, 8), (7, 8)])
def test_a_timestep_does_not_tell_the_level(squares, index, global_batch):
    drawn = [draw(squares, [index], step=step, global_batch=global_batch) for step in range(300)]
    timesteps = np.array([batch.timesteps.item() for batch in drawn])
    task, k = [masks.TASKS.index(batch.tasks[0]) for batch in drawn], [batch.lengths[0] for batch in drawn]
    text, image = [bool(batch.captions[0]) for batch in drawn], [batch.given.any().item() for batch in drawn]
    for other in (task, k, text, image):
        assert abs(np.corrcoef(timesteps, other)[0, 1]) < 0.2


def test_k_shrinks_to_the_distinct_frames_before_the_row_is_drawn(squares):
    short = [clip for clip in squares.clips if clip.longest == 3]
    only_prediction_at_8 = np.zeros_like(UNIFORM)
    only_prediction_at_8[1, -1] = 1.0
    batch = data.draw_batch(squares, short, only_prediction_at_8, 0, 0, range(30), 30)
    assert set(batch.lengths) == {3}
    given = {tuple(row) for row in batch.given.int().tolist()}
    assert given == {(0, 0, 1), (0, 0, 0)}  # P2 cut at 3, or dropped; never P1, which leaves nothing


FIRST_ALONE = (1, 0, 0, 0, 0, 0, 0, 0)
NOTHING = (0,) * NUM_FRAMES


@pytest.fixture
def drawn(squares, monkeypatch):
    """drawn("loss") draws 200 samples as with --ddu loss. Returns (Batch, [(clip, k) that was read])."""
    reads, read = [], squares.read
    monkeypatch.setattr(squares, "read", lambda clip, k=None: reads.append((clip, k)) or read(clip, k))

    def drawn(ddu):
        clips = data.usable(squares.split("train"), ddu)
        batch = data.draw_batch(squares, clips, UNIFORM, 0, 0, range(200), 200, ddu)
        for latents, k, (clip, asked) in zip(batch.latents, batch.lengths, reads, strict=True):
            assert np.array_equal(latents[:k], read(clip, asked))
        return batch, reads

    return drawn


def patterns(batch):
    """The condition masks that occur in a batch of 8 slots."""
    return {tuple(given) for given in batch.given.int().tolist()}


def assert_captions_are_shown_but_for_dropout(batch):
    assert sum(map(bool, batch.captions)) / len(batch.captions) == pytest.approx(0.85, abs=0.08)


def test_both_masks_draw_all_tasks_at_all_lengths(drawn):
    batch, reads = drawn("on")
    assert set(batch.tasks) == set(masks.TASKS) and set(batch.lengths) == set(masks.LENGTHS)
    assert [k for _, k in reads] == batch.lengths


def test_condition_masks_alone_draw_all_tasks_on_eight_equally_spaced_frames(drawn):
    batch, reads = drawn("condition")
    assert {k for _, k in reads} == {None} and set(batch.lengths) == {NUM_FRAMES} and batch.valid.all()
    shares = {task: batch.tasks.count(task) / 200 for task in masks.TASKS}
    assert shares == pytest.approx(dict.fromkeys(masks.TASKS, 1 / 3), abs=0.12)
    for task in masks.TASKS:
        of_task = [tuple(x) for x, t in zip(batch.given.int().tolist(), batch.tasks) if t == task]
        assert set(of_task) == {row.given for row in masks.TABLE7 if row.task == task} | {NOTHING}


def test_a_loss_mask_alone_gives_first_frame_and_text_at_several_lengths(drawn):
    batch, reads = drawn("loss")
    assert [k for _, k in reads] == batch.lengths and set(batch.lengths) == set(masks.LENGTHS)
    assert batch.valid.sum(1).tolist() == batch.lengths and set(batch.tasks) == {"generation"}
    assert patterns(batch) == {FIRST_ALONE, NOTHING}
    assert batch.given.any(1).float().mean().item() == pytest.approx(0.9, abs=0.06)  # but for dropout
    assert_captions_are_shown_but_for_dropout(batch)


def test_without_dual_masks_first_frame_and_text_are_given_to_eight_equally_spaced_frames(drawn):
    batch, reads = drawn("off")
    assert {k for _, k in reads} == {None} and set(batch.lengths) == {NUM_FRAMES} and batch.valid.all()
    assert set(batch.tasks) == {"generation"} and patterns(batch) == {FIRST_ALONE, NOTHING}
    assert batch.given.any(1).float().mean().item() == pytest.approx(0.9, abs=0.06)
    assert_captions_are_shown_but_for_dropout(batch)


def test_the_probabilities_choose_the_length_with_a_loss_mask_and_the_task_with_condition_masks(squares):
    prediction_at_3 = np.zeros_like(UNIFORM)
    prediction_at_3[1, 0] = 1.0
    seen = {}
    for ddu in ("on", "condition", "loss", "off"):
        clips = data.usable(squares.clips, ddu)
        batch = data.draw_batch(squares, clips, prediction_at_3, 0, 0, range(20), 20, ddu)
        seen[ddu] = set(zip(batch.tasks, batch.lengths))
    assert seen == dict(
        on={("prediction", 3)},
        condition={("prediction", 8)},
        loss={("generation", 3)},
        off={("generation", 8)},
    )


@pytest.mark.parametrize("ddu, shortest", dict(on=3, loss=3, condition=8, off=8).items())
def test_clips_of_fewer_than_eight_frames_are_usable_with_a_loss_mask_alone(squares, ddu, shortest):
    usable = data.usable(squares.clips, ddu)
    frames = [int(clip.caption.split()[-1]) + 3 for clip in usable]  # as square_folder numbers them
    assert sorted(frames) == list(range(shortest, 15))
    assert usable == [clip for clip in squares.clips if clip in usable]  # in the order of the data set


def test_hashed_words():
    rng = np.random.default_rng(0)
    words = data.hash_words(" ".join(["word"] * 5000), rng).split()
    share = words.count("#") / 5000
    assert set(words) == {"word", "#"} and share == pytest.approx(data.HASH_PROBABILITY, abs=0.03)
    assert data.hash_words("", rng) == ""


# ------------------------------------------------------------------------------------------------------------
# data.py


def run(monkeypatch, capsys, *flags):
    """data.py with these flags. Returns (exit status, what it wrote to stderr)."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, flags)])
    try:
        data.main()
    except SystemExit as end:
        return end.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num_workers", "-1"], "--num_workers: -1 must lie in 0..1024"),
        (["--resolution", "-5"], "--resolution: -5 must lie in 8..4096"),
        (["--resolution", "0"], "--resolution: 0 must lie in 8..4096"),
        (["--resolution", "1000000"], "--resolution: 1000000 must lie in 8..4096"),
        (["--preview", "a.mp4"], "--preview a.mp4: the picture is a PNG, give it a name that ends in .png."),
        (["--preview", "/nonexistent/a.png"], "/nonexistent/a.png: its folder cannot be written to, make it"),
        (["--preview", "/proc/a.png"], "/proc/a.png"),  # may be written to, says root, but cannot
    ],
)
def test_wrong_flags_are_one_sentence(folder, monkeypatch, capsys, flags, words):
    status, written = run(monkeypatch, capsys, folder, "--num_workers", 0, *flags)
    assert status == 2 and words in written and written.endswith(".\n") and "Traceback" not in written


def test_what_is_not_used_is_said_and_not_counted_as_dropped(folder, monkeypatch, capsys):
    monkeypatch.setattr(data, "PretrainedVAE", lambda *_: FakeCodec())
    fill(folder, ".hidden/a.gif", "pack.tgs", "broken.gif")
    encode = ["--encode", "--vae", "x", "--resolution", 16, "--cache_dir", folder.parent]
    for flags, words in (([], "12 stickers used, 1 dropped"), (encode, ", 1 dropped\n")):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["data.py", str(folder), "--num_workers", "0", *map(str, flags)])
            data.main()
        said = capsys.readouterr().out
        assert "note: what is hidden" in said and "note: files with a suffix that is not read: .tgs" in said
        assert words in said


def test_one_usable_file_of_many_is_shown(folder, tmp_path, monkeypatch, capsys):
    for path in sorted(folder.rglob("*.gif"))[1:]:
        path.unlink()
    for i in range(47):
        (folder / f"x{i}.gif").write_text("no sticker")
    sheet = tmp_path / "sheet.PNG"
    assert run(monkeypatch, capsys, folder, "--num_workers", 0, "--preview", sheet) == (0, "")
    assert Image.open(sheet).format == "PNG"


def test_a_place_that_cannot_be_used_is_one_sentence(folder, monkeypatch, capsys):
    monkeypatch.setattr(data, "PretrainedVAE", lambda *_: FakeCodec())
    flags = [folder, "--encode", "--vae", "x", "--resolution", 16, "--num_workers", 0]
    status, written = run(monkeypatch, capsys, *flags, "--cache_dir", "/proc/x")
    assert status == 2 and written.startswith("data.py: /proc/x") and written.count("\n") == 1
    assert written.endswith("make room or choose another place.\n")
    for number in (errno.ENOSPC, errno.EDQUOT):
        monkeypatch.setattr(data, "open_dataset", Mock(side_effect=OSError(number, "it is full")))
        status, written = run(monkeypatch, capsys, *flags)
        assert status == 2 and "data.py: a file cannot be used (it is full): make room" in written
    monkeypatch.setattr(data, "open_dataset", Mock(side_effect=OSError("a fault of ours")))
    with pytest.raises(OSError, match="a fault of ours"):
        run(monkeypatch, capsys, *flags)


def test_a_folder_whose_name_is_no_utf8(folder, tmp_path, monkeypatch, capfd):
    odd = folder.rename(tmp_path / os.fsdecode(b"odd \xff"))
    assert run(monkeypatch, capfd, odd, "--num_workers", 0, "--preview", odd / "a.png") == (0, "")
    (odd / "metadata.jsonl").unlink()
    shutil.rmtree(odd / "deeper")
    for path in odd.glob("*.gif"):
        path.write_text("no sticker")
    status, written = run(monkeypatch, capfd, odd, "--num_workers", 0)
    assert status == 2 and r"odd \udcff holds no usable sticker" in written


def test_timesteps_are_those_of_the_schedule():
    assert data.NUM_TIMESTEPS == make_scheduler().config.num_train_timesteps


@pytest.mark.parametrize(
    "ddu, k", [("on", NUM_FRAMES), ("loss", NUM_FRAMES), ("condition", None), ("off", None)]
)
def test_the_gaussian_is_fitted_to_the_frames_that_are_trained_on(squares, ddu, k):
    fitted = {}
    prior = SimpleNamespace(fit=lambda latents, texts, no_text: fitted.update(latents))
    clips = [clip for clip in squares.clips if clip.longest == NUM_FRAMES and clip.has_equal]
    assert any((squares.read(clip) != squares.read(clip, NUM_FRAMES)).any() for clip in clips)
    data.fit_prior(prior, squares, clips, SimpleNamespace(text=lambda captions: []), ddu)
    for frames, clip in zip(fitted[NUM_FRAMES].numpy(), clips, strict=True):
        assert (frames == squares.read(clip, k)).all()
