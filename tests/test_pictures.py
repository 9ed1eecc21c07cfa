"""Labels of sheets: no letter becomes a box, no line leaves the picture; and files that are whole."""

import numpy as np
import pytest
from PIL import Image

from support import pictures
from support.common import UserError

TEXTS = (
    "a red heart",
    "ein hüpfender Bär",
    "красное сердце",
    "καρδιά",
    "一颗红心 a heart",
    "한글",
    "😀 👩\u200d❤\ufe0f\u200d👩",
    "\ud83d \x1b",
)


@pytest.fixture(params=[True, False], ids=["with system fonts", "without"])
def system_fonts(request, monkeypatch):
    pictures.fonts.cache_clear()
    if not request.param:
        monkeypatch.setattr(pictures, "CJK", ())
    yield
    pictures.fonts.cache_clear()


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_every_letter_is_drawn_as_itself_or_as_an_escape(system_fonts, text):
    font, shown = pictures.lettering(text)
    assert all(pictures.has_letter(font, letter) for letter in shown)
    assert pictures.sheet([np.zeros((3, 16, 16, 3), np.uint8)], [text]).height > 16


def test_alphabets_stay_as_they_are(system_fonts):
    for text in TEXTS[:4]:
        assert pictures.lettering(text)[1] == text
    assert not pictures.has_letter(pictures.fonts()[0], "ж")  # so this is not Pillow's own font's doing


def test_without_a_font_letters_come_out_as_escapes(monkeypatch):
    monkeypatch.setattr(pictures, "has_letter", lambda font, letter: letter.isascii())
    assert pictures.lettering("a 心")[1] == "a \\u5fc3"


@pytest.mark.parametrize("text", ["W" * 200, "a red heart " * 9, "ЖЩЮ " * 40])
def test_lines_stay_within_the_picture(text):
    font, shown = pictures.lettering(text)
    assert all(font.getlength(line) <= 200 for line in pictures.wrap(shown, font, 200))


def test_a_picture_that_cannot_be_written_keeps_the_old_one(tmp_path, monkeypatch):
    page = Image.new("RGB", (4, 4))
    pictures.save_png(page, tmp_path / "a.png")
    old = (tmp_path / "a.png").read_bytes()

    def disk_full(self, path, form):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(UserError, match="a.png cannot be written .No space left"):
        pictures.save_png(page, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == old and list(tmp_path.iterdir()) == [tmp_path / "a.png"]
