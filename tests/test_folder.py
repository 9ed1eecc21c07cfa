"""Which files of a folder are stickers, and which are held out, as folders should be and as they come."""

import io
import json
import os
import sys

import pytest

import data
from data import Clip, load_clips
from support import folder, media
from support.common import printable
from support.folder import DataError, scan_folder
from tests.clips import clip, fill, good_folder, scan, square_folder


@pytest.fixture
def place(tmp_path):
    return good_folder(tmp_path / "stickers")


@pytest.fixture
def squares(tmp_path):
    return square_folder(tmp_path / "squares")


# ------------------------------------------------------------------------------------------------------------
# What is a sticker


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(DataError, match="not a folder"):
        scan_folder(tmp_path / "absent")
    with pytest.raises(DataError, match=r"no sticker.*\.gif"):
        scan_folder(tmp_path)
    fill(tmp_path, "a.tgs", "__MACOSX/._a.gif")
    with pytest.raises(DataError, match=r"no sticker.*passed over: __MACOSX. .*not read: \.tgs.$"):
        scan_folder(tmp_path)


def test_suffixes_of_any_case(tmp_path):
    assert set(scan(fill(tmp_path, "video(1).MP4", "A.GIF", "b.WebP"))[0]) == {
        "video(1).MP4",
        "A.GIF",
        "b.WebP",
    }


# ------------------------------------------------------------------------------------------------------------
# What is held out


def held_out(folder):
    return {name for name, sticker in scan(folder)[0].items() if sticker.split == "validation"}


def test_a_tenth_is_held_out_by_name_unless_the_metadata_says(squares):
    (tenth,) = held_out(squares)  # of twelve
    assert held_out(squares) == {tenth}
    lines = [json.loads(line) for line in (squares / "metadata.jsonl").read_text().splitlines()]
    for line in lines:
        line["split"] = "train" if line["file_name"] == tenth else None
    (squares / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert not held_out(squares)
    other = next(line for line in lines if line["file_name"] != tenth)
    other["split"] = "validation"  # then it is that, and no tenth of the others besides
    (squares / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert held_out(squares) == {other["file_name"]}


@pytest.mark.parametrize("word", ["test", "val", "Validation", "dev", " eval "])
def test_other_words_for_held_out(tmp_path, word):
    fill(tmp_path, "a.gif", "b.gif")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(dict(file_name="b.gif", split=word)))
    assert held_out(tmp_path) == {"b.gif"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(dict(file_name="b.gif", split="fold 1")))
    assert held_out(tmp_path) == set() and "neither train nor validation" in scan(tmp_path)[1][0]


def test_the_folders_of_a_split_are_held_out_with_a_note(tmp_path):
    """The layout of ImageFolder and VideoFolder."""
    fill(
        tmp_path, *(f"train/{i}.gif" for i in range(20)), "validation/a.gif", "Test/b.gif", "test/cats/c.gif"
    )
    assert held_out(tmp_path) == {"validation/a.gif", "Test/b.gif", "test/cats/c.gif"}
    (note,) = scan(tmp_path)[1]
    assert note == "stickers are held out, as the name of their folder says: Test, test, validation"
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "test/cats/c.gif", "split": "train"}')
    assert held_out(tmp_path) == {"validation/a.gif", "Test/b.gif"}


def test_a_folder_alone_is_no_split(tmp_path):
    fill(tmp_path, *(f"test/{i}.gif" for i in range(20)))
    assert len(held_out(tmp_path)) == 2 and not scan(tmp_path)[1]


def test_metadata_that_leaves_nothing_to_train_on_is_noted(tmp_path):
    fill(tmp_path, "a.gif")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.gif", "split": "test"}')
    assert "nothing is left to train on" in scan(tmp_path)[1][0]


# ------------------------------------------------------------------------------------------------------------
# What is passed over


def test_hidden_files_and_leftovers_of_programs_are_passed_over(tmp_path):
    hidden = ["__MACOSX/._a.gif", ".ipynb_checkpoints/a-checkpoint.gif", ".Trash-1000/files/b.gif", "._a.gif"]
    stickers, notes = scan(fill(tmp_path, "a.gif", ".DS_Store", "@eaDir/a.gif/thumb.png", *hidden))
    assert set(stickers) == {"a.gif"}
    (note,) = notes
    assert note.startswith("what is hidden") and ".Trash-1000, .ipynb_checkpoints, @eaDir, __MACOSX" in note
    assert note.endswith("._a.gif")
    (home := tmp_path / ".stickers").mkdir()
    assert set(scan(fill(home, "a.gif"))[0]) == {"a.gif"}  # what is asked for is looked at


def test_files_that_are_not_read_are_counted_by_suffix(tmp_path):
    names = ["a.tgs", "b.TGS", "c.mov", "d.avif", "GIF without a suffix", "pack.zip", "e.caption"]
    stickers, notes = scan(fill(tmp_path, "a.gif", "stickers.json", "a.txt", "deeper/f.tgs", *names))
    assert set(stickers) == {"a.gif"}
    (note,) = notes
    assert note.startswith("files with a suffix that is not read: ")
    assert set(note.split(": ")[1].split(", ")) == {".tgs (3)", ".mov", ".avif", ".zip", ".caption", "none"}


def test_names_that_end_in_a_space_are_noted(tmp_path):
    assert scan(fill(tmp_path, "a.gif", "b.gif "))[1] == ["files with a suffix that is not read: .gif "]


def test_what_runs_wrote_is_passed_over(tmp_path):
    fill(tmp_path, "a.gif", "mine/log.jsonl")  # a log of the user's own
    fill(tmp_path, "mine/b.gif", "run/.lock", "run/log.jsonl", "run/sample.gif", "run/validation-3.png")
    fill(tmp_path, "copied/model_index.json", "copied/sample.gif", "old/checkpoint-3/model_index.json")
    stickers, notes = scan(tmp_path)
    assert set(stickers) == {"a.gif", "mine/b.gif"}
    assert "folders that train.py wrote are passed over: copied, run, old/checkpoint-3" in notes
    with pytest.raises(DataError, match="run is a folder that train.py wrote"):
        scan_folder(tmp_path / "run")


def test_metadata_of_other_kinds_is_noted(tmp_path):
    others = ["metadata.json", "b/metadata.parquet", "metadata.csv"]
    notes = scan(fill(tmp_path, "a.gif", "metadata.jsonl", *others))[1]
    assert any("not from: metadata.csv, metadata.json, b/metadata.parquet" in note for note in notes)


# ------------------------------------------------------------------------------------------------------------
# Links, names, what may not be read


def test_links_to_folders_are_followed_once_and_not_in_circles(tmp_path):
    place, store = tmp_path / "stickers", tmp_path / "store"
    fill(store, "cats/a.gif", "cats/metadata.jsonl", "dogs/b.gif")
    (store / "cats" / "metadata.jsonl").write_text('{"file_name": "a.gif", "text": "a cat"}')
    (store / "cats" / "round").symlink_to(store)
    fill(place, "pack/c.gif")
    for name, target in dict(
        cats=store / "cats", again=store / "cats", own="pack", up="..", root="/"
    ).items():
        (place / name).symlink_to(target)
    stickers, notes = scan(place)
    assert {name: sticker.caption for name, sticker in stickers.items()} == {
        "again/a.gif": "a cat",
        "again/round/dogs/b.gif": "",
        "pack/c.gif": "",
    }
    (note,) = notes
    assert note.startswith("links to what is read anyway") and note.endswith(
        ": cats, own, root, up, again/round/cats"
    )


def test_a_folder_of_links_alone(tmp_path):
    fill(tmp_path / "store", "a.gif")
    (tmp_path / "stickers").mkdir()
    (tmp_path / "stickers" / "pack").symlink_to(tmp_path / "store")
    assert set(scan(tmp_path / "stickers")[0]) == {"pack/a.gif"}
    (tmp_path / "link").symlink_to(tmp_path / "stickers")
    assert set(scan(tmp_path / "link")[0]) == {"pack/a.gif"}


def test_links_folders_and_unreadable_files(place, tmp_path):
    media.write_clip(tmp_path / "store.gif", clip(4, 32), 10)
    (place / "loop.gif").symlink_to(place / "loop.gif")  # a file that is itself
    (place / "dangling.webp").symlink_to(tmp_path / "nothing")
    (place / "pack").symlink_to(tmp_path / "nothing")  # a folder that is not mounted
    (place / "link.gif").symlink_to(tmp_path / "store.gif")
    (place / "folder.gif").mkdir()
    media.write_clip(place / "folder.gif" / "inside.gif", clip(4, 32), 10)
    os.mkfifo(place / "pipe.png")
    deep = place
    for _ in range(folder.MAX_DEPTH + 1):
        deep = deep / "d"
        deep.mkdir()
    (deep / "deep.gif").write_bytes(b"")
    stickers, notes = scan(place)
    assert set(stickers) == {"folder.gif/inside.gif", "good.gif", "link.gif"} and len(notes) == 2
    assert "what is no file, or a link to nothing: dangling.webp, loop.gif, pack, pipe.png" in notes
    assert any(note.startswith("what lies more than 100 folders deep") for note in notes)
    assert all(isinstance(loaded, Clip) for loaded in load_clips(stickers.values(), 16, 0))


def test_what_may_not_be_read_is_noted(place):
    for name in ("closed.gif", "good.txt"):
        (place / name).write_text("a")
        (place / name).chmod(0)
    if os.access(place / "closed.gif", os.R_OK):
        pytest.skip("root may read everything")
    (place / "closed").mkdir(mode=0)
    stickers, notes = scan(place)
    assert "folders that cannot be read: closed (Permission denied)" in notes and len(stickers) == 2
    assert "captions that cannot be read: good.txt (Permission denied)" in notes
    assert "Permission denied" in data.load_clip(stickers["closed.gif"], 16)
    (place / "metadata.jsonl").write_text("{}")
    (place / "metadata.jsonl").chmod(0)
    with pytest.raises(DataError, match="metadata.jsonl cannot be read .Permission denied."):
        scan_folder(place)


def test_a_folder_of_broken_links_says_so(tmp_path):
    (tmp_path / "a.gif").symlink_to("nowhere")
    with pytest.raises(DataError, match="holds no sticker.* a link to nothing: a.gif.$"):
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
    (sticker,), notes = scan_folder(place)
    assert not notes and isinstance(next(load_clips([sticker], 16, 1)), Clip)
    monkeypatch.setattr(
        sys, "argv", ["data.py", str(place), "--num_workers", "0", "--preview", f"{tmp_path}/a.png"]
    )
    data.main()  # the preview shows its name
    path.write_text("no sticker")
    reason = data.load_clip(sticker, 16)
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
    readable = "caf\u00e9 \u732b \u0645 \U0001f431 a\\b.gif"
    assert printable(readable) == readable
    assert printable("a\n\x1b[0m\udcff\u202e\u2028") == r"a\n\x1b[0m\udcff\u202e\u2028"
    assert len(printable("\0" * 10**6)) < 4 * 600
