"""Folders, metadata and captions, as they should be and as they come."""

import io
import json
import os
import re
import sys
import time
import tracemalloc

import pytest

import data
from data import Clip, load_clips
from support import folder, media, pictures
from support.common import printable
from support.folder import MAX_CAPTION, DataError, scan_folder
from tests.clips import clip, good_folder, square_folder


@pytest.fixture
def place(tmp_path):
    return good_folder(tmp_path / "stickers")


@pytest.fixture
def squares(tmp_path):
    return square_folder(tmp_path / "squares")


def named(problems):
    """{name: reason}, after a check that each can be printed in any terminal."""
    for name, reason in problems:
        line = f"{printable(name)}: {reason}"
        assert line.isprintable() and line.encode() and len(line) < 1000
    return dict(problems)


# ------------------------------------------------------------------------------------------------------------
# As they should be


def test_captions_of_jsonl_csv_and_sidecars(squares):
    stickers, problems = scan_folder(squares)
    assert len(stickers) == 12 and not problems
    assert {s.name: s.caption for s in stickers}["deeper/07.gif"] == "square number 7"

    (squares / "metadata.jsonl").unlink()
    (squares / "02.txt").write_text("  a  sidecar\ncaption ")
    captions = {s.name: s.caption for s in scan_folder(squares)[0]}
    assert captions["02.gif"] == "a sidecar caption" and captions["04.gif"] == ""

    (squares / "metadata.csv").write_text("file_name,caption\n04.gif,from a table\n")
    captions = {s.name: s.caption for s in scan_folder(squares)[0]}
    assert captions["04.gif"] == "from a table" and captions["02.gif"] == "a sidecar caption"


def test_a_broken_entry_is_named_and_the_rest_used(squares):
    lines = [
        "not json",
        '{"text": "no name"}',
        '{"file_name": "absent.gif"}',
        '{"file_name": "../out.gif"}',
        "[]",
    ]
    with open(squares / "metadata.jsonl", "a") as file:
        file.write("\n".join(lines))
    stickers, problems = scan_folder(squares)
    assert len(stickers) == 12
    reasons = dict(problems)
    assert "no such file" in reasons["absent.gif"]
    assert "outside" in reasons["../out.gif"]
    assert sum("usable file_name" in reason for _, reason in problems) == 3


def test_held_out_tenth_does_not_depend_on_the_other_files(squares):
    held_out = {s.name for s in scan_folder(squares)[0] if s.split == "validation"}
    assert len(held_out) == 1  # a tenth of twelve
    again = {s.name for s in scan_folder(squares)[0] if s.split == "validation"}
    assert again == held_out
    lines = [json.loads(line) for line in (squares / "metadata.jsonl").read_text().splitlines()]
    lines[0]["split"], lines[1]["split"] = "validation", "train"
    (squares / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    split = {s.name: s.split for s in scan_folder(squares)[0]}
    assert split["00.gif"] == "validation" and split["deeper/01.gif"] == "train"


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(DataError, match="not a folder"):
        scan_folder(tmp_path / "absent")
    with pytest.raises(DataError, match=r"no sticker.*\.gif"):
        scan_folder(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Links, names, what may not be read


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
    assert "Permission denied" in data.load_clip(stickers[0], 16)
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
    with pytest.raises(DataError, match="holds no sticker.* a.gif is not a file .*, or a link to nothing"):
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
    (sticker,), problems = scan_folder(place)
    assert not problems and isinstance(next(load_clips([sticker], 16, 1)), Clip)
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
    (sticker,), problems = scan_folder(place)
    assert sticker[1:] == ("good.gif", "a good one", "validation")
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
    line = json.dumps(dict(file_name="good.gif", text="a caption"))
    table = "file_name,text\ngood.gif,a caption"
    endless, quoted = line[:-1] + " " * 10**6 + "}", "good.gif," + '"\n",' * 10**4 + "end"
    for name, good, long in (
        ("metadata.jsonl", line, endless),
        ("metadata.csv", table, endless),
        ("metadata.csv", table, quoted),
    ):
        before = [f"{long}\n{good}"] * (long is endless)  # what follows a broken quote is anybody's guess
        for text in (*before, f"{good}\n{long}", f"{good}\r\n{long}\r\n{long}"):
            (place / name).write_text(text, newline="")
            tracemalloc.start()
            (sticker,), problems = scan_folder(place)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert sticker.caption == "a caption" and 1 <= len(named(problems)) and peak < 2**19
            assert "in at most 200 characters" in problems[0][1] and problems[0][0].startswith(name)
        (place / name).unlink()


def test_problems_of_metadata_are_named_up_to_a_number(place):
    count = folder.MAX_PROBLEMS + 50
    lines = [json.dumps(dict(file_name=f"{i}" + "x\n" * 10**3, text="x")) for i in range(count)]
    good = json.dumps(dict(file_name="good.gif", text="a caption", split="x" * 10**5))
    (place / "metadata.jsonl").write_text("\n".join([*lines, good]))
    (sticker,), problems = scan_folder(place)
    assert sticker.caption == "a caption" and sticker.split == "train"
    assert len(problems) == folder.MAX_PROBLEMS + 1 and named(problems)
    assert all(name.isprintable() and len(name) < 1100 for name, _ in problems)
    assert problems[-1] == ("metadata.jsonl", "and 50 more of its entries, which cannot be used either")


@pytest.mark.parametrize("key", ["text", "caption", "split"])
@pytest.mark.parametrize("value", [None, 7, 1.5, [], ["a"], {"a": 1}, True, "\ud800", "a" * 10**6])
def test_values_of_any_kind(place, key, value):
    (place / "metadata.jsonl").write_text(json.dumps({"file_name": "good.gif", key: value}))
    (sticker,), problems = scan_folder(place)
    assert not problems and sticker.split in ("train", "validation")
    captions = {"\ud800": "?", "a" * 10**6: "a" * MAX_CAPTION}
    expected = captions[value] if isinstance(value, str) and key != "split" else ""
    assert sticker.caption == expected


def test_encodings_of_metadata(place):
    entry = dict(file_name="good.gif", text="caf\u00e9 \u2028 \u0085 one line")
    line = json.dumps(entry, ensure_ascii=False) + "\n"
    for text, caption in (
        (b"\xef\xbb\xbf" + line.encode(), "caf\u00e9 one line"),  # a byte order mark
        (line.encode("latin-1", "replace"), "caf? ? ? one line"),
        (line.replace("\n", "\r\n").encode(), "caf\u00e9 one line"),
    ):
        (place / "metadata.jsonl").write_bytes(text)
        (sticker,), problems = scan_folder(place)
        assert sticker.caption == caption and not problems
    (place / "metadata.jsonl").write_bytes(line.encode("utf-16"))
    (sticker,), problems = scan_folder(place)
    assert sticker.caption == "" and named(problems)
    (place / "metadata.jsonl").unlink()
    (place / "metadata.csv").write_bytes(b"\xef\xbb\xbffile_name,text\ngood.gif,a caption\n")
    assert scan_folder(place)[0][0].caption == "a caption"
    (place / "metadata.jsonl").mkdir()  # no file: the table counts
    assert scan_folder(place)[0][0].caption == "a caption"


def test_metadata_names_files_whose_names_are_no_utf8(place):
    (place / "good.gif").rename(place / os.fsdecode(b"\xff.gif"))
    (place / "metadata.jsonl").write_bytes(b'{"file_name": "\xff.gif", "text": "a caption \xff"}')
    (sticker,), problems = scan_folder(place)
    assert sticker.caption == "a caption ?" and not problems


@pytest.mark.parametrize(
    "row",
    [b"nul\0.gif,x", b"good.gif", b'"' + b"a" * 200_000 + b'",x', b"a" * 200_000, b",,,,", b"../a.gif,x"],
)
def test_tables_with_broken_rows(place, row):
    (place / "metadata.csv").write_bytes(b"file_name,text\n" + row + b"\ngood.gif,a caption,and,more\n")
    (sticker,), problems = scan_folder(place)
    assert sticker.caption == "a caption" and len(named(problems)) == (row != b"good.gif")


@pytest.mark.parametrize(
    "table", [b"", b"\n\n", b"\0", b"a,b\n1,2\n", b'"' * 9, b"x" * 200_000 + b"\n", b'"open\ngood.gif,x']
)
def test_tables_without_a_header(place, table):
    (place / "metadata.csv").write_bytes(table)
    (sticker,), problems = scan_folder(place)
    assert sticker.caption == "" and named(problems) is not None


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
    (sticker,), problems = scan_folder(place)
    assert sticker.caption == CAPTIONS[caption] and not problems
    loaded = next(load_clips([sticker], 16, 0))
    pictures.preview([loaded.pixels], [sticker.caption], [loaded.count]).save(io.BytesIO(), "PNG")
    assert time.perf_counter() - start < 3


def test_a_sidecar_that_is_no_text(place):
    (place / "good.txt").write_bytes(b"\xef\xbb\xbfa \xff\xfe caption\xed\xa0\x80" + b"\xff" * 10**6)
    (sticker,), problems = scan_folder(place)
    assert re.fullmatch(r"a \?\? caption\?+", sticker.caption) and len(sticker.caption) == MAX_CAPTION
    (place / "good.txt").unlink()
    (place / "good.txt").mkdir()
    assert scan_folder(place)[0][0].caption == ""


def test_printable_keeps_what_can_be_read_and_escapes_the_rest():
    readable = "caf\u00e9 \u732b \u0645 \U0001f431 a\\b.gif"
    assert printable(readable) == readable
    assert printable("a\n\x1b[0m\udcff\u202e\u2028") == r"a\n\x1b[0m\udcff\u202e\u2028"
    assert len(printable("\0" * 10**6)) < 4 * 600
