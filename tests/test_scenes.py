"""Drawn clips beside the built-in stickers: landscapes, roads, the two halves of the stickers' words."""

import json
import re
import sys
from itertools import combinations

import numpy as np
import pytest

from data import load_clip
from lab import driving, scenes
from lab.scenes import COMBINATIONS, draw_scenes, is_held_out
from masks import NUM_FRAMES
from support import stickers
from support.folder import scan_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw_scenes(tmp_path_factory.mktemp("drawn") / "scenes", count=6, seed=1)


@pytest.fixture(scope="module")
def roads(tmp_path_factory):
    return driving.draw_driving(tmp_path_factory.mktemp("drawn") / "roads", count=2, seed=1)


def lines(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def content(folder):
    """The bytes of its files and, where it has one, its metadata."""
    return [
        path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".webp", ".mp4", ".gif")
    ]


@pytest.fixture(scope="module")
def clips(folder, roads):
    """The clips of both folders, as training reads them."""
    stickers, notes = zip(scan_folder(folder), scan_folder(roads))
    assert notes == ([], [])
    return [[load_clip(sticker, 64) for sticker in found] for found in stickers]


def words(texts):
    return {word for text in texts for word in re.findall("[a-z]+", text.lower())}


# ------------------------------------------------------------------------------------------------------------
# Words


def test_scenes_have_other_words_than_stickers():
    rng = np.random.default_rng(0)
    of_scenes = [scenes.caption(*w, place, rng) for w in COMBINATIONS for place in scenes.PLACES]
    of_stickers = [stickers.caption(*w, rng) for w in stickers.COMBINATIONS for _ in range(3)]
    assert words(of_scenes) & words(of_stickers) == {"a"}
    for place, names in enumerate((scenes.SOLIDS, scenes.LIGHTS, scenes.MOTIONS)):
        assert all(w[place] in scenes.caption(*w, "lake", rng) for w in COMBINATIONS)
        assert {w[place] for w in COMBINATIONS} == set(names)


def test_the_halves_of_the_stickers_share_no_word():
    near, target = stickers.half(1), stickers.half(2)
    assert len(near) == len(target) == 6 * 3 * 4
    assert not words(" ".join(w) for w in near) & words(" ".join(w) for w in target)
    assert {*near, *target} < {*stickers.COMBINATIONS}


@pytest.mark.parametrize(
    "all_words, held_out",
    [
        (COMBINATIONS, is_held_out),
        (stickers.half(1), stickers.is_held_out),
        (stickers.half(2), stickers.is_held_out),
    ],
)
def test_a_ninth_is_held_out_and_every_pair_of_words_is_trained(all_words, held_out):
    trained = [w for w in all_words if not held_out(*w)]
    assert 0.09 < 1 - len(trained) / len(all_words) < 0.14
    for a, b in combinations(range(3), 2):
        assert {(w[a], w[b]) for w in trained} == {(w[a], w[b]) for w in all_words}
    for place in range(3):  # validation sees every word too
        assert {w[place] for w in all_words if held_out(*w)} == {w[place] for w in all_words}


# ------------------------------------------------------------------------------------------------------------
# Files


def test_the_same_seed_draws_the_same_and_a_small_set_begins_a_larger_one(folder, roads, tmp_path):
    small = draw_scenes(tmp_path / "small", count=1, seed=1)
    assert content(small) == content(folder)[:1] and lines(small) == lines(folder)[:1]
    assert content(draw_scenes(tmp_path / "other", count=1, seed=2)) != content(small)
    assert content(driving.draw_driving(tmp_path / "roads", count=1, seed=1)) == content(roads)[:1]


def test_a_half_begins_a_larger_half_and_is_reused(tmp_path, monkeypatch):
    half = stickers.half(2)
    small, large = (stickers.draw_stickers(tmp_path / str(n), n, words=half) for n in (3, 6))
    assert content(small) == content(large)[:3]
    assert all((line["subject"], line["colour"], line["motion"]) in half for line in lines(large))
    monkeypatch.setattr(stickers, "save_gif", lambda *_: pytest.fail("drawn again"))
    assert stickers.draw_stickers(small, 3, words=half) == small
    with pytest.raises(ValueError, match="delete it or name another"):
        stickers.draw_stickers(small, 3)  # all words: another set


def test_a_complete_set_is_reused_and_another_one_is_left_alone(folder, roads, monkeypatch):
    monkeypatch.setattr(scenes, "draw_scene", lambda *_: pytest.fail("drawn again"))
    monkeypatch.setattr(driving, "draw_drive", lambda *_: pytest.fail("drawn again"))
    assert draw_scenes(folder, count=6, seed=1) == folder
    assert driving.draw_driving(roads, count=2, seed=1) == roads
    for wrong in (lambda: draw_scenes(folder, count=6), lambda: draw_scenes(roads, count=2, seed=1)):
        with pytest.raises(ValueError, match="delete it or name another"):
            wrong()


def test_metadata_names_words_and_split(folder):
    for line in lines(folder):
        w = line["subject"], line["light"], line["motion"]
        assert (
            w in COMBINATIONS and line["place"] in scenes.PLACES and all(word in line["text"] for word in w)
        )
        assert line["split"] == ("validation" if is_held_out(*w) else "train")
    assert len({(line["subject"], line["light"], line["motion"]) for line in lines(folder)}) == 6


def test_roads_have_no_captions(roads):
    found, notes = scan_folder(roads)
    assert len(found) == 2 and not notes and not any(sticker.caption for sticker in found)
    assert not (roads / "metadata.jsonl").exists()


def test_command_lines(tmp_path, monkeypatch, capsys):
    for module, suffix in ((scenes, ".webp"), (driving, ".mp4")):
        place = tmp_path / suffix[1:]
        monkeypatch.setattr(sys, "argv", ["scenes", str(place), "--count", "1", "--seed", "3"])
        module.main()
        assert [path.suffix for path in place.glob("00000.*")] == [suffix]
        assert "1 clips are in" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["stickers", str(tmp_path / "half"), "--count", "2", "--half", "1"])
    stickers.main()
    assert {line["subject"] for line in lines(tmp_path / "half")} <= {w[0] for w in stickers.half(1)}


# ------------------------------------------------------------------------------------------------------------
# Drawings


def test_every_clip_has_eight_distinct_frames(clips):
    for clip in sum(clips, []):
        assert len(clip.key_frames[NUM_FRAMES]) == len(set(clip.equal)) == NUM_FRAMES
    lengths, on_roads = ([clip.count for clip in some] for some in clips)
    assert len(set(lengths)) > 3 and min(lengths) >= NUM_FRAMES  # some are longer, as real clips are
    assert set(on_roads) == {NUM_FRAMES}


def test_borders_are_not_white(clips):
    for clip in sum(clips, []):
        x = clip.pixels.min(axis=-1)  # (M, 64, 64)
        border = np.concatenate([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], axis=1)
        assert (border > 240).mean() < 0.02 and border.mean() < 210


def test_neighbouring_frames_are_close(clips):
    """What moves moves a little: far less than from one clip to another."""
    pixels = [clip.pixels.astype(float) for clip in clips[0]]
    steps = [np.abs(np.diff(x, axis=0)).mean() for x in pixels]
    between = [np.abs(a[0] - b[0]).mean() for a, b in zip(pixels, pixels[1:])]
    assert 0.3 < min(steps) and max(steps) < 20 and np.mean(steps) < 0.25 * np.mean(between)
