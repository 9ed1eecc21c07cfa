"""The built-in set: words, drawings, files, and that motions survive key-frame extraction."""

import itertools
import json
import sys

import numpy as np
import pytest
from PIL import Image, ImageSequence
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

from data import extract_key_frames, thumbnails
from support import stickers
from support.stickers import COLOURS, COMBINATIONS, MOTIONS, SUBJECTS, draw_clip, draw_stickers, is_held_out


def read(path):
    """Frames of a GIF file as RGBA images, and its delays in milliseconds."""
    with Image.open(path) as gif:
        frames = [(frame.convert("RGBA"), frame.info["duration"]) for frame in ImageSequence.Iterator(gif)]
    return [frame for frame, _ in frames], [delay for _, delay in frames]


def on_white(frame):
    """(128, 128, 3) whole numbers in 0..255"""
    white = Image.new("RGB", frame.size, "white")
    white.paste(frame, mask=frame)
    return np.asarray(white, np.int16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two thirds of a round, in which every combination comes once."""
    return draw_stickers(tmp_path_factory.mktemp("drawn") / "set", count=384, seed=1)


@pytest.fixture(scope="module")
def lines(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def clips(folder, lines):
    """(frames, delays) of every file, as read back."""
    return [read(folder / line["file_name"]) for line in lines]


# ------------------------------------------------------------------------------------------------------------
# Words


def test_held_out_share_and_pairs():
    trained = [words for words in COMBINATIONS if not is_held_out(*words)]
    assert 0.10 <= 1 - len(trained) / len(COMBINATIONS) <= 0.12
    for a, b in ((0, 1), (0, 2), (1, 2)):
        words = (SUBJECTS, COLOURS, MOTIONS)
        assert {(w[a], w[b]) for w in trained} == set(itertools.product(words[a], words[b]))
    held_out = [words for words in COMBINATIONS if is_held_out(*words)]
    for place, names in enumerate((SUBJECTS, COLOURS, MOTIONS)):
        assert {words[place] for words in held_out} == set(names)  # validation sees every word too


def test_prompts_are_plain_captions_of_trained_combinations():
    plain = {f"{words[1]} {words[0]} {words[2]}": words for words in COMBINATIONS}
    for prompt in stickers.PROMPTS:
        assert not is_held_out(*plain[prompt.split(" ", 1)[1]])


def test_captions_contain_the_words_and_half_are_plain(lines):
    for line in lines:
        assert all(line[key] in line["text"] for key in ("subject", "colour", "motion")), line
        assert not line["text"].startswith(("a orange", "an red"))
    plain = [line["text"].split(" ", 1)[1] == "{colour} {subject} {motion}".format(**line) for line in lines]
    assert 0.4 < np.mean(plain) < 0.6  # 384 fair coins: four standard deviations
    assert len({line["text"] for line in lines}) > 366


def test_every_combination_once_in_a_round_with_its_split(lines):
    words = [stickers.in_rounds(COMBINATIONS, 1, i) for i in range(len(COMBINATIONS))]
    assert sorted(words) == sorted(COMBINATIONS)
    assert words != COMBINATIONS  # shuffled, so that the head of the set is varied
    for line, combination in zip(lines, words):
        assert (line["subject"], line["colour"], line["motion"]) == combination
        assert line["split"] == ("validation" if is_held_out(*combination) else "train")


# ------------------------------------------------------------------------------------------------------------
# Drawings


@pytest.mark.parametrize("subject", SUBJECTS)
def test_frames_are_cut_out_inside_the_canvas_and_differ(subject):
    for motion in MOTIONS:
        for num_frames in (3, 9):
            frames, delays = draw_clip(subject, "red", motion, np.random.default_rng(num_frames), num_frames)
            assert len(frames) == len(delays) == num_frames
            assert len({frame.tobytes() for frame in frames}) == num_frames, motion
            for frame in frames:
                pixels = np.asarray(frame)  # (128, 128, 4)
                assert pixels.shape == (128, 128, 4) and set(np.unique(pixels[..., 3])) == {0, 255}
                drawn = on_white(frame).min(axis=-1) < 200  # the white rim may touch the border
                border = np.concatenate([drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]])
                assert not border.any(), (subject, motion)


def test_colour_words_name_the_hue(clips, lines):
    """The median of the saturated pixels is nearest to the colour that the caption names."""
    table = np.array(list(COLOURS.values()), float)  # (6, 3)
    for (frames, _), line in zip(clips, lines):
        pixels = on_white(frames[-1]).reshape(-1, 3)
        highest = pixels.max(axis=1)
        vivid = pixels[(highest - pixels.min(axis=1) > 100) & (highest > 120)]
        nearest = np.argmin(((np.median(vivid, axis=0) - table) ** 2).sum(axis=1))
        assert list(COLOURS)[nearest] == line["colour"]
        assert len(vivid) > 400  # of 16384: the colour is seen


def test_unknown_words_are_refused():
    for words in (("dragon", "red", "bouncing"), ("cat", "pink", "bouncing"), ("cat", "red", "flying")):
        with pytest.raises(ValueError, match="use one of"):
            draw_clip(*words, np.random.default_rng(0))


# ------------------------------------------------------------------------------------------------------------
# Files


def test_files_read_back_as_drawn(tmp_path):
    for motion in MOTIONS:
        frames, delays = draw_clip("mushroom", "purple", motion, np.random.default_rng(5), 12)
        stickers.save_gif(frames, delays, tmp_path / "a.gif")
        again, delays_again = read(tmp_path / "a.gif")
        assert delays_again == delays and len(again) == len(frames)
        with Image.open(tmp_path / "a.gif") as gif:
            assert gif.info["loop"] == 0
        for before, after in zip(frames, again):
            assert np.array_equal(np.asarray(before)[..., 3], np.asarray(after)[..., 3])
            error = np.abs(on_white(before) - on_white(after))
            assert error.mean() < 2 and error.max() < 70  # the palette's doing; a wrong frame gives 255


def test_lengths_have_a_long_tail_and_some_delays_vary(clips):
    lengths = np.array([len(frames) for frames, _ in clips])
    assert lengths.min() == 3 and 25 < lengths.max() <= 40
    assert 6 <= np.median(lengths) <= 10 and np.median(lengths) < lengths.mean()
    varied = np.mean([len(set(delays)) > 1 for _, delays in clips])
    assert 0.17 < varied < 0.33
    assert all(20 <= delay <= 500 and delay % 10 == 0 for _, delays in clips for delay in delays)


def test_a_sticker_depends_on_seed_and_index_only(tmp_path, folder):
    def content(path):
        gifs = [file.read_bytes() for file in sorted(path.glob("*.gif"))]
        return gifs, (path / "metadata.jsonl").read_text()

    small, text = content(draw_stickers(tmp_path / "small", count=12, seed=1))
    large, all_text = content(folder)
    assert small == large[:12] and all_text.startswith(text)
    assert content(draw_stickers(tmp_path / "other", count=12, seed=2))[0] != small


def test_a_complete_set_is_reused_and_anything_else_is_left_alone(tmp_path, monkeypatch):
    folder = draw_stickers(tmp_path / "set", count=4)
    with pytest.raises(ValueError, match="delete it or name another"):
        draw_stickers(folder, count=5)
    monkeypatch.setattr(stickers, "save_gif", lambda *_: pytest.fail("drawn again"))
    assert draw_stickers(folder, count=4) == folder
    (folder / "00002.gif").unlink()  # no longer complete
    with pytest.raises(ValueError, match="delete it or name another"):
        draw_stickers(folder, count=4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(ValueError, match="delete it or name another"):
        draw_stickers(tmp_path / "mine", count=4)


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    save_gif = stickers.save_gif

    def interrupted(frames, delays, path):
        if path.name == "00003.gif":
            raise KeyboardInterrupt
        save_gif(frames, delays, path)

    monkeypatch.setattr(stickers, "save_gif", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_stickers(tmp_path / "set", count=6)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "set").mkdir()  # an empty folder is as good as none
    assert len(list(draw_stickers(tmp_path / "set", count=6).glob("*.gif"))) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_two_processes_may_draw_the_same_set_at_once(tmp_path, monkeypatch):
    save_gif = stickers.save_gif

    def overtaken(frames, delays, path):  # the other process starts later and is done first
        monkeypatch.setattr(stickers, "save_gif", save_gif)
        draw_stickers(tmp_path / "set", count=3)
        save_gif(frames, delays, path)

    monkeypatch.setattr(stickers, "save_gif", overtaken)
    assert draw_stickers(tmp_path / "set", count=3) == tmp_path / "set"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_default_folder_follows_the_cache_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = {stickers.default_folder(), stickers.default_folder(5), stickers.default_folder(5, 1)}
    assert stickers.default_folder(root="there").parent.name == "there"
    assert len(folders) == 3 and all(folder.parent == tmp_path / "rdtf" for folder in folders)


def test_command_line(tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["stickers.py", *map(str, words)])
        stickers.main()

    run(tmp_path / "set", "--count", 3)
    assert len(list((tmp_path / "set").glob("*.gif"))) == 3
    for words, reason in (
        ((tmp_path / "set", "--count", 2), "delete it or name another folder."),
        ((tmp_path / "new", "--count", 0), "--count: 0 must be at least 1"),
        (("--sheet", tmp_path / "none" / "a.png"), "its folder cannot be written to"),
    ):
        with pytest.raises(SystemExit) as end:
            run(*words)
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.count("\n") <= 1 and reason in said
    run("--sheet", tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == (12 * 128, 14 * 128)


# ------------------------------------------------------------------------------------------------------------
# What a model can learn


def key_frames(frames, k):
    """At most k frames, as training sees them."""
    features = thumbnails(np.stack([on_white(frame) for frame in frames]).astype(np.uint8))
    k = min(k, len({feature.tobytes() for feature in features}))
    return [frames[i] for i in extract_key_frames(features, lengths=[k])[k]]


def motion_features(frames, rng):
    """What changes between frames, not what they show: place, extent, area, where the dark pixels are.

    All is measured in canvas pixels (a share in percent) and blurred by an error of one, because a difference
    that only a perfect drawing shows is none that a model could learn.
    """
    rows = []
    for frame in frames:
        y, x = np.nonzero(np.asarray(frame)[..., 3])
        dark_y, dark_x = np.nonzero(on_white(frame).max(axis=-1) < 90)
        extent = [np.ptp(x), np.ptp(y), y.max(), np.sqrt(len(x)), x.max() + x.min() - 2 * x.mean()]
        dark = [100 * len(dark_x) / len(x), dark_x.mean() - x.mean(), dark_y.mean() - y.mean()]
        rows.append([x.mean(), y.mean(), *extent, *dark])
    rows = np.array(rows) + rng.standard_normal((len(rows), 10))  # (frames, 10)
    steps = np.diff(rows, axis=0)
    each = np.abs(steps).mean(axis=0), steps.min(axis=0), steps.max(axis=0)
    return np.concatenate([rows.std(axis=0), *each, rows[-1] - rows[0]])


@pytest.mark.slow
def test_motions_are_told_apart_after_key_frame_extraction(clips, lines):
    """A random forest on crude features, tested on combinations it never saw, is right in 90 %."""
    rng, motion = np.random.default_rng(0), np.array([line["motion"] for line in lines])
    features = np.stack([motion_features(key_frames(frames, rng.integers(3, 9)), rng) for frames, _ in clips])
    test = np.arange(len(lines)) % 3 == 0
    forest = RandomForestClassifier(100, random_state=0).fit(features[~test], motion[~test])
    answers = forest.predict(features[test])
    wrong = [
        (line["text"], answer)
        for line, answer in zip(np.array(lines)[test], answers)
        if answer != line["motion"]
    ]
    assert len(wrong) <= 0.1 * test.sum(), (len(wrong), wrong)


def test_subjects_are_told_apart_at_48_pixels():
    """A linear classifier on still 48 x 48 pictures, tested on colours it never saw, is right in 90 %."""

    def pictures(colours, seed):
        images, names = [], []
        for n, (subject, colour) in enumerate(itertools.product(SUBJECTS, colours)):
            frames, _ = draw_clip(subject, colour, "blinking", np.random.default_rng((seed, n)), 3)
            small = frames[0].resize((48, 48), Image.Resampling.BOX)
            images.append(np.asarray(small.convert("LA"), float).ravel())
            names.append(subject)
        return np.array(images) / 255, names

    images, names = pictures(["red", "yellow", "blue"] * 4, seed=0)
    classifier = LogisticRegression(max_iter=200).fit(images, names)
    assert classifier.score(*pictures(["green", "purple", "orange"] * 2, seed=1)) >= 0.9
