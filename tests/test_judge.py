"""The judge: right on real stickers, wrong on wrong ones."""

import numpy as np
import pytest

from lab import judge
from support import stickers
from tests.toys import FakeCodec, drawn_clips, grey


@pytest.fixture(scope="module")
def small_judge():
    """A judge of few words, trained in seconds, and clips it has not seen: (judge, clips, words)."""
    subjects, motions = ("heart", "fish", "moon"), ("bouncing", "spinning", "growing")
    kinds = [(subject, motion) for subject in subjects for motion in motions]
    colours = list(stickers.COLOURS)
    words = [(subject, colours[i % 6], motion) for i in range(24) for subject, motion in kinds]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "SIDE", 32)
        patch.setattr(judge, "BATCH", 16)
        patch.setattr(judge, "SPOILED", 0.4)
        trained = judge.train_judge(*drawn_clips(words, 7, 32), epochs=16, width=32)
        yield trained, *drawn_clips(words[: 6 * len(kinds)], 8, 32)


def share_right(trained, clips, words):
    return judge.accuracy(trained.read(clips), words)


def test_judge_is_right_on_real_stickers(small_judge):
    right = share_right(*small_judge)
    assert right["colour"] == 1 and right["subject"] > 0.9 and right["motion"] > 0.8


def test_judge_fails_recoloured_stickers(small_judge):
    trained, clips, words = small_judge
    right = share_right(trained, np.roll(clips, 1, axis=-1), words)  # red as green, green as blue, ...
    assert right["colour"] == 0 and right["subject"] > 0.9 and right["motion"] > 0.8  # the rest is as it was


def test_judge_fails_frozen_stickers(small_judge):
    trained, clips, words = small_judge
    frozen = clips[:, 4:5].repeat(8, axis=1)
    assert share_right(trained, frozen, words)["motion"] < 0.1
    assert np.mean([motion == judge.NONE for *_, motion in trained.read(frozen)]) > 0.9


def test_judge_fails_shuffled_stickers(small_judge):
    trained, clips, words = small_judge
    shuffled = np.stack([clip[np.random.default_rng(i).permutation(8)] for i, clip in enumerate(clips)])
    right, real = share_right(trained, shuffled, words), share_right(trained, clips, words)
    assert right["motion"] < 0.5 * real["motion"] and right["subject"] > 0.9


def test_judge_fails_another_subject(small_judge):
    trained, clips, words = small_judge
    others = {"heart": "fish", "fish": "moon", "moon": "heart"}
    wrong = [(colour, others[subject], motion) for colour, subject, motion in words]
    right = share_right(trained, clips, wrong)
    assert right["subject"] < 0.1 and right["colour"] == 1


def test_judge_sees_no_colour_where_there_is_none():
    assert judge.read_colour(grey(255, 128, 0)) == judge.NONE


def test_judge_is_trained_on_training_combinations_only():
    assert not any(stickers.is_held_out(*words) for words in judge.combinations(False))
    assert all(stickers.is_held_out(*words) for words in judge.combinations(True))
    assert len(judge.combinations(False)) + len(judge.combinations(True)) == len(stickers.COMBINATIONS)


def test_clips_for_the_judge_are_key_frames_of_new_stickers():
    words = judge.combinations(False)[:2]
    clips, read = judge.draw_clips(words, 3, 16)
    assert clips.shape == (2, 8, 16, 16, 3) and clips.dtype == np.uint8
    assert read == [(colour, subject, motion) for subject, colour, motion in words]
    assert all(len(np.unique(clip.reshape(8, -1), axis=0)) == 8 for clip in clips)
    assert np.array_equal(judge.draw_clips(words, 3, 16)[0], clips)
    assert not np.array_equal(judge.draw_clips(words, 4, 16)[0], clips)


def test_a_judge_is_trained_once(tmp_path, monkeypatch):
    codec, trained = FakeCodec(), []

    def train(clips, words):
        trained.append(len(clips))
        return judge.Judge().eval()

    monkeypatch.setattr(judge, "train_judge", train)
    monkeypatch.setattr(judge, "round_trip", lambda codec, clips: clips)
    monkeypatch.setattr(judge, "draw_clips", lambda wanted, *_: (np.zeros(len(wanted)), wanted))
    first, second = (judge.get_judge(codec, 16, tmp_path / "cache") for _ in range(2))
    assert trained == [judge.LAPS * len(judge.combinations(False))]
    for name, weight in first.state_dict().items():
        assert weight.equal(second.state_dict()[name])
    (path,) = (tmp_path / "cache").glob("judge-*.pt")
    path.write_bytes(path.read_bytes()[:100])  # a power cut
    judge.get_judge(codec, 16, tmp_path / "cache")
    assert len(trained) == 2
