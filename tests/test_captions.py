"""What metadata and text files say of stickers, as it should be and as it comes."""

import codecs
import io
import json
import os
import time
import tracemalloc
import unicodedata

import pytest

from data import load_clips
from support import captions, pictures
from support.captions import MAX_CAPTION, MAX_EXAMPLES, DataError
from support.folder import scan_folder
from tests.clips import fill, good_folder, scan, square_folder


@pytest.fixture
def place(tmp_path):
    return good_folder(tmp_path / "stickers")


@pytest.fixture
def pair(tmp_path):
    return fill(tmp_path / "pair", "a.gif", "b.gif")


def captions_of(folder):
    return {name: sticker.caption for name, sticker in scan(folder)[0].items()}


def write_lines(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


A, B = dict(file_name="a.gif", text="a cat"), dict(file_name="b.gif", text="a dog")
BOTH = {"a.gif": "a cat", "b.gif": "a dog"}

# ------------------------------------------------------------------------------------------------------------
# Where captions come from


def test_captions_of_jsonl_csv_and_sidecars(tmp_path):
    squares = square_folder(tmp_path / "squares")
    stickers, notes = scan(squares)
    assert len(stickers) == 12 and not notes and stickers["deeper/07.gif"].caption == "square number 7"

    (squares / "metadata.jsonl").unlink()
    (squares / "02.txt").write_text("  a  sidecar\ncaption ")
    found = captions_of(squares)
    assert found["02.gif"] == "a sidecar caption" and found["04.gif"] == ""

    (squares / "metadata.csv").write_text("file_name,caption\n04.gif,from a table\n")
    found = captions_of(squares)
    assert found["04.gif"] == "from a table" and found["02.gif"] == "a sidecar caption"


def test_metadata_of_subfolders_names_files_relative_to_itself(tmp_path):
    fill(tmp_path, "train/a.gif", "train/c.gif", "validation/a.gif", "packs/deep/b.gif")
    write_lines(tmp_path / "metadata.jsonl", dict(file_name="train/a.gif", text="from above"))
    write_lines(
        tmp_path / "train" / "metadata.jsonl", A, dict(file_name="../packs/deep/b.gif", text="across")
    )
    (tmp_path / "validation" / "metadata.csv").write_text("file_name,text\na.gif,held out\n")
    stickers, notes = scan(tmp_path)
    assert {name: sticker.caption for name, sticker in stickers.items()} == {
        "packs/deep/b.gif": "across",
        "train/a.gif": "a cat",
        "train/c.gif": "",
        "validation/a.gif": "held out",
    }
    assert [note for note in notes if "train/metadata.jsonl names stickers for the second time" in note]
    assert {name for name, sticker in stickers.items() if sticker.split != "train"} == {"validation/a.gif"}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_find_their_file_in_any_spelling(tmp_path, form):
    """As other systems write them: composed or not, with backslashes, in other case, with spaces around."""
    other = "NFD" if form == "NFC" else "NFC"
    disk, written = (unicodedata.normalize(f, "dé/Café \u1e69.GIF") for f in (form, other))
    fill(tmp_path, disk)
    for name in (disk, written, written.replace("/", "\\"), ".\\" + written.lower(), f" {written} "):
        write_lines(tmp_path / "metadata.jsonl", dict(file_name=name, text="a cat"))
        assert captions_of(tmp_path) == {disk: "a cat"} and not scan(tmp_path)[1]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / disk).with_name(written.split("/")[1][:-4] + ".TXT").write_text("a dog")
    assert captions_of(tmp_path) == {disk: "a dog"} and not scan(tmp_path)[1]


def test_a_name_that_two_files_could_mean_is_taken_as_it_is_written(tmp_path):
    fill(tmp_path, "a.gif", "A.gif", "b\\c.gif", "b/c.gif")
    entries = [dict(file_name=name, text=name) for name in ("a.gif", "A.gif", "A.GIF", "b\\c.gif", "b/c.gif")]
    write_lines(tmp_path / "metadata.jsonl", *entries)
    assert all(name == caption for name, caption in captions_of(tmp_path).items())
    assert scan(tmp_path)[1] == ["metadata.jsonl names files that are not among the stickers: line 3 (A.GIF)"]


def test_text_files_without_a_sticker_are_noted(pair):
    fill(pair, "README.txt", "a.gif.txt", "b.txt")
    assert scan(pair)[1] == ["text files without a sticker of the same name: README.txt, a.gif.txt"]


# ------------------------------------------------------------------------------------------------------------
# Forms of metadata


@pytest.mark.parametrize(
    "text", ["[\n %s,\n %s\n]", "%s,\n%s,\n", "%s\n\n%s", " [%s, %s] ", "\ufeff%s\r\n%s"]
)
def test_arrays_commas_and_empty_lines_of_json_are_read(pair, text):
    (pair / "metadata.jsonl").write_text(
        text % (json.dumps(A, indent=2 * (text[0] == "[") or None), json.dumps(B))
    )
    assert captions_of(pair) == BOTH and not scan(pair)[1]


def test_an_array_that_is_damaged_or_large_is_read_line_by_line(pair, monkeypatch):
    array = "[\n" + json.dumps(A) + ",\n" + json.dumps(B) + "%s\n]"
    for text, size in ((array % ",", 2**26), (array % "", 10)):
        monkeypatch.setattr(captions, "MAX_ARRAY_BYTES", size)
        (pair / "metadata.jsonl").write_text(text)
        assert captions_of(pair) == BOTH
        assert "one JSON object per line" in scan(pair)[1][0] and scan(pair)[1][0].endswith(
            ": line 1, line 4"
        )


def test_json_over_several_lines_is_one_note(pair):
    (pair / "metadata.jsonl").write_text("\n".join(json.dumps(entry, indent=1) for entry in (A, B, A)))
    (note,) = scan(pair)[1]
    assert "it needs one JSON object per line" in note and note.endswith(" and 6 more")


@pytest.mark.parametrize("divider", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_tables_of_any_divider_and_byte_order_mark(pair, divider, encoding):
    rows = [("file_name", "text"), ("a.gif", '"a cat, a ""cat"";\ta dog"'), ("b.gif", "a dog")]
    table = "\r\n".join(divider.join(row) for row in rows)
    (pair / "metadata.csv").write_bytes(table.encode(encoding))
    assert captions_of(pair) == {"a.gif": 'a cat, a "cat"; a dog', "b.gif": "a dog"} and not scan(pair)[1]


def test_a_table_with_spaces_and_one_without_a_header(pair):
    (pair / "metadata.csv").write_text('file_name, text\na.gif, "a cat"\nb.gif, a dog\n')
    assert captions_of(pair) == BOTH
    (pair / "metadata.csv").write_text("a.gif,a cat\nb.gif,a dog\nb.gif,a dog\n")
    (note,) = scan(pair)[1]
    assert note == (
        'metadata.csv has entries without a "file_name", which are not used: line 2 (it has a.gif, a cat), '
        "line 3 (it has a.gif, a cat)"
    )


def test_commas_that_nobody_quoted_belong_to_the_caption_if_it_stands_last(pair):
    (pair / "metadata.csv").write_text("file_name,text\na.gif,a cat, with, a hat\nb.gif,a dog\n")
    assert captions_of(pair) == BOTH | {"a.gif": "a cat, with, a hat"} and not scan(pair)[1]
    (pair / "metadata.csv").write_text("text,file_name\na cat, with a hat,a.gif\na dog,b.gif\n")
    assert captions_of(pair) == BOTH | {"a.gif": ""}
    assert "put texts with commas into quotes: line 2" in scan(pair)[1][0]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("text", ["", "\n\n", "\ufeff"])
def test_empty_metadata_is_noted(pair, name, text):
    (pair / name).write_text(text)
    assert scan(pair)[1] == [f"{name} has no entries: it is empty"]


# ------------------------------------------------------------------------------------------------------------
# Entries


def test_what_repeats_is_noted_once_with_a_count(pair):
    rows = [dict(video=f"{i}.mp4", text="x") for i in range(500)]
    absent = [dict(file_name=f"{i}" + "x\n" * 10**3, text="x") for i in range(1000)]
    write_lines(pair / "metadata.jsonl", *rows, *absent, A)
    first, second = scan(pair)[1]
    assert first.startswith('metadata.jsonl has entries without a "file_name", which are not used: line 1 (')
    assert "line 1 (it has video, text)" in first and first.endswith(f" and {500 - MAX_EXAMPLES} more")
    assert "names files that are not among the stickers: line 501 (0x" in second and second.endswith(
        " and 994 more"
    )
    assert captions_of(pair) == {"a.gif": "a cat", "b.gif": ""}


def test_a_sticker_that_is_named_twice_is_noted_unless_both_entries_agree(pair):
    write_lines(pair / "metadata.jsonl", A, A, B, dict(B, text="a bird"))
    assert captions_of(pair) == {"a.gif": "a cat", "b.gif": "a bird"}
    (note,) = scan(pair)[1]
    assert note == "metadata.jsonl names stickers for the second time: the last entry counts: line 4 (b.gif)"


def test_captions_under_another_key_are_noted(pair):
    write_lines(pair / "metadata.jsonl", dict(file_name="a.gif", prompt="a cat"), dict(file_name="b.gif"))
    (note,) = scan(pair)[1]
    assert note == 'metadata.jsonl has entries without "text" or "caption": line 1 (it has file_name, prompt)'


@pytest.mark.parametrize(
    "value, caption, words",
    [
        (["a cat", "a kitten"], "a cat", "lists of texts, of which the first counts"),
        ([None, "a cat"], "a cat", "lists of texts, of which the first counts"),
        (["a cat"], "a cat", None),
        ([], "", None),
        (None, "", None),
        ("", "", None),
        ("\ud800", "?", None),
        ("a" * 10**6, "a" * MAX_CAPTION, None),
        (7, "", "no text, and is not used: line 1 (int)"),
        (1.5, "", "(float)"),
        (True, "", "(bool)"),
        ([7], "", "(list)"),
        ({"a": 1}, "", "(dict)"),
    ],
)
@pytest.mark.parametrize("key", ["text", "caption"])
def test_texts_of_any_kind(pair, key, value, caption, words):
    write_lines(pair / "metadata.jsonl", {"file_name": "a.gif", key: value})
    stickers, notes = scan(pair)
    assert stickers["a.gif"].caption == caption and len(notes) == (words is not None)
    assert words is None or words in notes[0]


@pytest.mark.parametrize("value", [7, 1.5, [], ["a"], {"a": 1}, True, "\ud800", "x" * 10**5])
def test_splits_of_any_kind(pair, value):
    write_lines(pair / "metadata.jsonl", dict(A, split=value))
    stickers, notes = scan(pair)
    assert stickers["a.gif"].split == "train" and len(notes) == 1 and "neither train nor" in notes[0]


def test_names_that_metadata_may_not_use(place):
    outside = place.parent / "outside.gif"
    outside.write_bytes((place / "good.gif").read_bytes())
    (place / "way_out").symlink_to(place.parent)
    absolute = str(place / "good.gif")  # even one inside: names are relative
    out = ["../outside.gif", str(outside), absolute, "a/../../outside.gif"]
    absent = [
        "way_out/outside.gif",
        "nul\0.gif",
        "x" * 5000 + ".gif",
        "x/" * 5000 + "a.gif",
        ".",
        "..\\o.gif",
    ]
    unusable = [None, "", 7, [], {}, True]
    lines = [dict(file_name=name, text="x") for name in out + absent + unusable]
    broken = ["[" * 100_000, '{"a":' * 100_000, "{", "1" * 10_000, "\0", '{"file_name": "good.gif"']
    good = dict(file_name="./good.gif", text="a good one", split="validation")
    text = "\n".join(map(json.dumps, [*lines, [], 7, "good.gif", None])) + "\n"
    (place / "metadata.jsonl").write_text(text + "\n".join([*broken, json.dumps(good)]))
    (sticker,), notes = scan_folder(place)
    assert sticker[1:] == ("good.gif", "a good one", "validation")
    for words, count in (
        ("names files outside of the folder, or not relative to it", len(out)),
        ("names files that are not among the stickers", len(absent)),
        ('entries without a "file_name"', len(unusable)),
        ("entries that cannot be read", 4 + len(broken)),
    ):
        (note,) = (note for note in notes if words in note)
        more = int(note.split()[-2]) if note.endswith(" more") else 0
        assert note.count("line ") - note.count("per line ") + more == count


# ------------------------------------------------------------------------------------------------------------
# Bytes


def test_encodings_of_metadata(place):
    entry = dict(file_name="good.gif", text="caf\u00e9 \u2028 \u0085 one line")
    line = json.dumps(entry, ensure_ascii=False) + "\n"
    for text in (line.encode("utf-8-sig"), line.replace("\n", "\r\n").encode(), line.encode("utf-16")):
        (place / "metadata.jsonl").write_bytes(text)
        assert captions_of(place) == {"good.gif": "caf\u00e9 one line"} and not scan(place)[1]
    (place / "metadata.jsonl").write_bytes(line.encode("latin-1", "replace"))
    assert captions_of(place) == {"good.gif": "caf? ? ? one line"}
    assert "not UTF-8 and became question marks" in scan(place)[1][0]
    for text in (line.encode("utf-16-le"), line.encode("utf-16") + b"\0", b"\xff\xfe\0", os.urandom(999)):
        (place / "metadata.jsonl").write_bytes(text)  # no mark, half a letter, no text at all
        assert captions_of(place)["good.gif"] in ("", "caf\u00e9 one line") and scan(place)[1]
    (place / "metadata.jsonl").unlink()
    (place / "metadata.csv").write_text("file_name,text\ngood.gif,a caption\n")
    (place / "metadata.jsonl").mkdir()  # no file: the table counts
    assert captions_of(place) == {"good.gif": "a caption"}


def test_metadata_names_files_whose_names_are_no_utf8(place):
    (place / "good.gif").rename(place / os.fsdecode(b"\xff.gif"))
    (place / "metadata.jsonl").write_bytes(b'{"file_name": "\xff.gif", "text": "a caption"}')
    (sticker,), notes = scan_folder(place)
    assert sticker.caption == "a caption" and not notes


def test_sidecars_are_read_by_their_byte_order_mark(place):
    text = "\u0645 caf\u00e9\r\na caption"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        (place / "good.txt").write_bytes(text.encode(encoding))
        assert captions_of(place) == {"good.gif": "\u0645 caf\u00e9 a caption"} and not scan(place)[1]
    (place / "good.txt").write_bytes(codecs.BOM_UTF16_BE + text.encode("utf-16-be"))
    assert captions_of(place) == {"good.gif": "\u0645 caf\u00e9 a caption"}


def test_a_sidecar_belongs_to_the_sticker_of_exactly_its_name(tmp_path):
    folder = fill(tmp_path / "cases", "A.gif", "a.gif")
    (folder / "a.txt").write_text("small")
    assert captions_of(folder) == {"A.gif": "", "a.gif": "small"}
    (folder / "a.gif").unlink()
    assert captions_of(folder) == {"A.gif": "small"}


@pytest.mark.parametrize(
    "content", [b"caf\xe9", "a red square".encode("utf-16-le"), b"\x89PNG\r\n\x1a\n\0", b"\xff\xfea", b"a \0"]
)
def test_a_sidecar_that_is_no_text_is_noted_and_not_used(place, content):
    (place / "good.txt").write_bytes(content)
    stickers, notes = scan(place)
    assert stickers["good.gif"].caption == "" and len(notes) == 1
    assert notes[0].startswith("captions that are not used, since they are no UTF-8") and notes[0].endswith(
        ": good.txt"
    )


def test_a_sidecar_that_is_a_folder_is_none(place):
    (place / "good.txt").mkdir()
    assert captions_of(place) == {"good.gif": ""}


# ------------------------------------------------------------------------------------------------------------
# Limits


def test_metadata_that_cannot_be_read_is_one_sentence(place, monkeypatch):
    (place / "metadata.jsonl").write_text("{}")
    monkeypatch.setattr(captions, "open_text", lambda path, **_: open(place / "nothing"))
    with pytest.raises(DataError, match="nothing cannot be read .No such file"):
        scan_folder(place)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_beyond_its_limit_is_refused_unread(place, name):
    with open(place / name, "wb") as file:
        file.truncate(captions.MAX_METADATA_BYTES + 1)  # sparse
    start = time.perf_counter()
    with pytest.raises(DataError, match=f"{name} has more than 1024 MiB: shorten it.$"):
        scan_folder(place)
    assert time.perf_counter() - start < 1


def test_an_entry_beyond_its_limit_is_not_held(place, monkeypatch):
    """Neither a line without an end, nor a table's row of very many quoted lines."""
    monkeypatch.setattr(captions, "MAX_ENTRY", 200)
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
            (sticker,), notes = scan_folder(place)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert sticker.caption == "a caption" and peak < 2**19
            assert notes[0].startswith(name) and "of at most 200 characters" in notes[0]
        (place / name).unlink()


@pytest.mark.parametrize(
    "row",
    [b"nul\0.gif,x", b"good.gif", b'"' + b"a" * 200_000 + b'",x', b"a" * 200_000, b",,,,", b"../a.gif,x"],
)
def test_tables_with_broken_rows(place, row):
    (place / "metadata.csv").write_bytes(b"file_name,text\n" + row + b"\ngood.gif,a caption,and,more\n")
    stickers, notes = scan(place)
    assert stickers["good.gif"].caption == "a caption, and, more" and (len(notes) >= 1 or row == b"good.gif")


@pytest.mark.parametrize(
    "table", [b"", b"\n\n", b"\0", b"a,b\n1,2\n", b'"' * 9, b"x" * 200_000 + b"\n", b'"open\ngood.gif,x']
)
def test_tables_without_a_header(place, table):
    (place / "metadata.csv").write_bytes(table)
    stickers, notes = scan(place)
    assert stickers["good.gif"].caption == "" and notes


CAPTIONS = {
    "": "",
    " \n\t\x01 ": "",
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
    (sticker,), notes = scan_folder(place)
    assert sticker.caption == CAPTIONS[caption] and not notes
    loaded = next(load_clips([sticker], 16, 0))
    pictures.preview([loaded.pixels], [sticker.caption], [loaded.count]).save(io.BytesIO(), "PNG")
    assert time.perf_counter() - start < 3
