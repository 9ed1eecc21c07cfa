"""The front page's pictures: what they show is what was given and what was made."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from lab import gallery
from support import stickers
from support.encoders import PretrainedVAE
from tests.checkpoints import CHANNELS, SETTINGS, toy_model, write_model
from tests.toys import FakeCodec

SIDE = SETTINGS["resolution"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A finished run of a random toy network with a random VAE."""
    return write_model(tmp_path_factory.mktemp("run"), *toy_model(preconditioned=True))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return stickers.draw_stickers(tmp_path_factory.mktemp("stickers"), count=90)


@pytest.fixture
def run(checkpoint, drawn, monkeypatch, capsys):
    """Runs the program on the toy network and a small set. Returns (exit status, stdout, stderr)."""
    # a random VAE gives each pixel a colour of its own, and a palette for them takes seconds
    monkeypatch.setattr(PretrainedVAE, "decode", FakeCodec(4, CHANNELS).decode)
    monkeypatch.setattr(stickers, "draw_stickers", lambda folder: drawn)

    def main(*arguments, checkpoint=checkpoint):
        monkeypatch.setattr(sys, "argv", ["gallery.py", "--checkpoint", *map(str, (checkpoint, *arguments))])
        try:
            gallery.main()
        except SystemExit as stop:
            return stop.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return main


@pytest.mark.parametrize("suffix", [".webp", pytest.param(".gif", marks=pytest.mark.slow)])
def test_picture_moves_and_is_light(run, tmp_path, suffix):
    path = tmp_path / "new" / f"stickers{suffix}"
    status, printed, _ = run("--output", path)
    assert status == 0 and str(path) in printed
    assert path.stat().st_size < 1.5e6
    with Image.open(path) as picture:
        assert picture.n_frames == 8 and picture.info["loop"] == 0
        assert 500 < picture.width <= 800 and picture.height < 900  # as wide as a README shows it


def test_an_output_that_cannot_be_written_is_said_before_sampling(run, monkeypatch, tmp_path):
    monkeypatch.setattr("sample.load", lambda *args: pytest.fail("said too late"))
    (tmp_path / "there.gif").mkdir()
    for place in (tmp_path / "there.gif", "/proc/new/a.gif"):
        status, _, said = run("--output", place)
        assert status == 2 and f"--output {place}" in said


def test_sheet_has_a_row_per_task(run, tmp_path):
    assert run("--sheet", tmp_path / "tasks.png")[0] == 0
    rows = len(gallery.TASKS) + 1
    with Image.open(tmp_path / "tasks.png") as sheet:
        assert sheet.width > 8 * SIDE and sheet.height > rows * SIDE


def test_frames_are_framed_where_they_are_given_and_nowhere_else():
    given = np.array([1, 0, 0, 1, 0, 0, 1, 0], bool)
    cells = [gallery.Cell("a cell", "", None, np.zeros(8, bool)) for _ in range(4)]
    cells[2] = cells[2]._replace(given=given)
    frames = gallery.draw_picture(cells, np.full((4, 8, SIDE, SIDE, 3), 90, np.uint8))
    row = frames[:, SIDE]  # through the pictures, above marks and captions
    framed = (row == gallery.GIVEN).all(-1)
    column = row.shape[1] // 4
    assert np.array_equal(framed[:, 2 * column : 3 * column].any(1), given)
    assert not framed[:, : 2 * column].any() and not framed[:, 3 * column :].any()


def test_captions_are_whole():
    captions = [*stickers.PROMPTS, *(caption(*words) for words in stickers.COMBINATIONS[::25])]
    captions = [text for prompt in captions for text in (prompt, f"text and image: {prompt}")]
    cells = [gallery.Cell(text, "", None, np.zeros(8, bool)) for text in captions]
    cells = cells[: len(cells) // 4 * 4]
    frames = gallery.draw_picture(cells, np.zeros((len(cells), 8, 48, 48, 3), np.uint8))[0]
    assert (frames[-3:] == 255).all()  # the last line has room below it
    for column in np.split(frames, 4, axis=1):
        assert (column[:, [0, -1]] == 255).all()  # and every line beside it


def caption(subject, colour, motion):
    return f"a sticker of an {colour} {subject} that is {stickers.MOTIONS[motion]}"


def test_held_out_stickers_are_never_trained_ones(drawn):
    real = gallery.held_out_stickers(drawn, SIDE, 4)
    assert len({text for text, _ in real}) == 4
    assert all(frames.shape == (8, SIDE, SIDE, 3) for _, frames in real)
    for text, _ in real:
        subject = next(word for word in stickers.SUBJECTS if word in text)
        colour = next(word for word in stickers.COLOURS if word in text.replace(subject, ""))
        motion = next(word for word in stickers.MOTIONS if word in text)
        assert stickers.is_held_out(subject, colour, motion)


def test_only_given_frames_reach_the_network(monkeypatch):
    seen = {}
    _, encoders = toy_model()
    latents = torch.ones(CHANNELS, SIDE // 4, SIDE // 4)
    monkeypatch.setattr(encoders.codec, "encode", lambda pixels: latents.expand(len(pixels), -1, -1, -1))
    monkeypatch.setattr(gallery.sample, "generate", lambda *args, **options: seen.update(args=args))
    real = np.zeros((8, SIDE, SIDE, 3), np.uint8)
    cells = [gallery.task_cell(row, "a red heart bouncing", real) for row in gallery.STRIP]
    gallery.sample_cells(None, encoders, SETTINGS, cells)
    _, _, prompts, latents, given = seen["args"]
    assert prompts == ["a red heart bouncing"] * 2 + [""] * 2
    assert np.array_equal(given.sum(1), [0, 1, 3, 5])
    assert torch.equal(latents.flatten(2).any(-1), given)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--output, --sheet, or both"),
        (["--output", "still.png"], "--output still.png"),
        (["--sheet", "tasks.gif"], "--sheet tasks.gif"),
    ],
)
def test_bad_flags_get_one_sentence(run, arguments, words):
    status, _, message = run(*arguments)
    assert status == 2 and words in message and message.count("\n") == 1


def test_bad_checkpoints_get_one_sentence(run, tmp_path):
    status, _, message = run("--output", tmp_path / "x.webp", checkpoint=tmp_path / "absent")
    assert status == 2 and "absent" in message and message.count("\n") == 1
    assert not (tmp_path / "x.webp").exists()
