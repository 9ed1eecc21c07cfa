"""The table of the user study: points, intervals and agreement that can be worked out by hand, and files that
are not as they should be."""

import json

import numpy as np
import pytest
from scipy.stats import friedmanchisquare

from lab import rank_table
from lab.rank_table import QUESTIONS
from tests.runs import run_here

_, INTEREST, MOTION = QUESTIONS
RUNS = ["first", "second", "third"]
KEY = dict(
    page="this page",
    runs=RUNS,
    prompts=[dict(prompt=text, stickers={f"{text}{r}": r for r in range(3)}) for text in "xyz"],
)


def write_answers(path, rater, *orders, saved="2025"):
    """A rater's file. orders: for each prompt the numbers of the runs, best first, the same for all
    questions; "" leaves them out. Returns path."""
    answers = [
        {"prompt": text} | {question: [f"{text}{r}" for r in order] for question in QUESTIONS if order}
        for text, order in zip("xyz", orders)
    ]
    path.write_text(json.dumps(dict(page=KEY["page"], rater=rater, saved=saved, answers=answers)))
    return path


@pytest.fixture
def merge(tmp_path, capsys):
    """merge(files) calls lab.rank_table. Returns ({first cell of a row: its other cells}, stdout, stderr)."""
    (tmp_path / "key.json").write_text(json.dumps(KEY))

    def merge(*files, key=tmp_path / "key.json"):
        run_here(rank_table.main, key, *files)
        out, said = capsys.readouterr()
        rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]
        return {name: cells for name, *cells in rows}, out, said

    return merge


def test_the_best_of_three_gets_three_points(merge, tmp_path):
    table, out, said = merge(write_answers(tmp_path / "a", "a", "201", "201", "210"))
    means = {run: [float(cell.split()[0]) for cell in table[run]] for run in RUNS}
    assert means == {"first": [1.67] * 3, "second": [1.33] * 3, "third": [3.0] * 3}
    assert table["third"] == ["3.00 [3.00, 3.00]"] * 3
    assert table["answers"] == ["3 of 3"] * 3 and not said
    assert table["agreement, W (guessing)"] == ["-"] * 3 and "One rater" in out
    assert "3 points for the best of 3" in out and "guessing gives 2." in out


def test_raters_who_agree_and_raters_who_do_not(merge, tmp_path):
    a = write_answers(tmp_path / "a", "a", "201", "012", "210")
    same = write_answers(tmp_path / "b", "b", "201", "012", "210")
    opposite = write_answers(tmp_path / "c", "c", "102", "210", "012")
    assert merge(a, same)[0]["agreement, W (guessing)"] == ["1.00 (0.50)"] * 3
    table, out, _ = merge(a, opposite)
    assert table["agreement, W (guessing)"] == ["0.00 (0.50)"] * 3
    assert all(table[run][0].startswith("2.00 [") for run in RUNS)
    assert "2 raters and 3 prompts" in out


def test_kendall_w_is_that_of_friedmans_test():
    rng = np.random.default_rng(0)
    points = rng.permuted(np.tile(np.arange(1.0, 6), (4, 7, 1)), axis=2)  # 4 raters, 7 prompts, 5 runs
    expected = [friedmanchisquare(*points[:, p].T).statistic / (4 * (5 - 1)) for p in range(7)]
    assert rank_table.kendall_w(points) == pytest.approx((np.mean(expected), 1 / 4))
    many = rng.permuted(np.tile(np.arange(1.0, 6), (4, 3000, 1)), axis=2)
    assert rank_table.kendall_w(many)[0] == pytest.approx(1 / 4, abs=0.01)  # who guesses
    points[1:, 0] = np.nan  # one rater is left
    points[0, 1] = np.nan
    three = friedmanchisquare(*points[1:, 1].T).statistic / (3 * (5 - 1))
    assert rank_table.kendall_w(points)[0] == pytest.approx(np.mean([three, *expected[2:]]))


def test_intervals_are_as_wide_as_raters_and_prompts_differ():
    rng = np.random.default_rng(1)
    first = 1.0 + (rng.random((1, 200)) < 0.3)  # two runs, 200 prompts, one rater
    low, high = rank_table.bootstrap(np.stack([first, 3 - first], axis=2))
    error = 1.96 * first.std() / 200**0.5
    assert low[0] == pytest.approx(first.mean() - error, abs=0.02)
    assert high[0] == pytest.approx(first.mean() + error, abs=0.02)
    assert low[1] == pytest.approx(3 - high[0]) and high[1] == pytest.approx(3 - low[0])

    taste = np.repeat([[1.0], [2.0]] * 5, 50, axis=1)  # ten raters, half of whom always prefer the second run
    low, high = rank_table.bootstrap(np.stack([taste, 3 - taste], axis=2))
    assert high[0] - low[0] == pytest.approx(2 * 1.96 * 0.5 / 10**0.5, abs=0.1)
    assert rank_table.bootstrap(np.array([[[1.0, 2.0], [np.nan, np.nan]]])) is None


def test_incomplete_answers_count_as_far_as_they_go(merge, tmp_path):
    a = write_answers(tmp_path / "a", "a", "012", "", "012")
    content = json.loads(a.read_text())
    content["answers"][2][MOTION] = ["z0", "z0", "z1"]  # no ranking
    content["answers"][2][INTEREST] = {"z0": 1}
    content["answers"][1] = "nothing"
    a.write_text(json.dumps(content))
    table, _, said = merge(a)
    assert table["answers"] == ["2 of 3", "1 of 3", "1 of 3"]
    assert table["first"] == ["3.00 [3.00, 3.00]", "3.00", "3.00"]  # one answer has no interval
    assert f"{a} has 4 of 9 answers" in said and said.count("\n") == 1


def test_a_question_that_nobody_answered_has_no_numbers(merge, tmp_path):
    a = write_answers(tmp_path / "a", "a", "012", "012", "012")
    content = json.loads(a.read_text())
    for entry in content["answers"]:
        del entry[INTEREST]
    a.write_text(json.dumps(content))
    table, _, _ = merge(a)
    assert [table[name][1] for name in RUNS] == ["-"] * 3 and table["answers"][1] == "0 of 3"


def test_of_one_rater_the_newest_answers_count(merge, tmp_path):
    old = write_answers(tmp_path / "old", "a", "012", "012", "012", saved="2025-01-02T03:04:05.678Z")
    new = write_answers(tmp_path / "new", "a", "210", "210", "210", saved="2025-01-02T03:04:06.000Z")
    for files in ((old, new), (new, old)):
        table, _, said = merge(*files)
        assert table["third"] == ["3.00 [3.00, 3.00]"] * 3 and table["answers"] == ["3 of 3"] * 3
        assert f"{old} is of the same rater as {new}" in said and said.count("\n") == 1


BAD = {
    "of another page": (dict(page="another", rater="b", saved="", answers=[]), "no answers to this page"),
    "without answers": (dict(page="this page", rater="b", saved="", answers=[]), "has 0 of 9 answers"),
    "damaged": (dict(page="this page", rater=["b"], saved="", answers=[]), "is damaged"),
    "a list": ([1], "it holds no object"),
    "broken": ('{"page": "this pa', "cannot be read"),
    "deep": ("[" * 100_000, "cannot be read"),
    "bytes": (b"\xff\xfe\x00", "cannot be read"),
    "absent": (None, "No such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_answers_are_left_out_with_a_sentence(name, merge, refused, tmp_path):
    content, words = BAD[name]
    bad = tmp_path / f"answers {name}.json"
    if isinstance(content, bytes):
        bad.write_bytes(content)
    elif content is not None:
        bad.write_text(content if isinstance(content, str) else json.dumps(content))
    sentence = refused(words, merge, bad)
    assert "no answers to count" in sentence and str(bad) in sentence
    table, _, said = merge(bad, write_answers(tmp_path / "good", "a", "012", "012", "012"))
    assert table["answers"] == ["3 of 3"] * 3
    assert str(bad) in said and words in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [dict(runs=["a", "b"]), dict(prompts=[]), dict(prompts=[{}]), dict(prompts=3), dict(page=None), None],
)
def test_a_bad_key_gets_one_sentence(change, merge, refused, tmp_path):
    good = write_answers(tmp_path / "good", "a", "012", "012", "012")
    bad = tmp_path / "bad.key.json"
    bad.write_text(json.dumps(KEY | change) if change else good.read_text())
    refused(f"{bad} is no key of a page", merge, good, key=bad)
    refused("absent.json cannot be read", merge, good, key=tmp_path / "absent.json")
