"""
From the raters' files of a page of lab/rank.py to the table: average user ranking, its intervals, and how far
the raters agree.

    python -m lab.rank_table rank.key.json answers-*.json

An answer orders the N stickers of a prompt by one question. The best gets N points, the next N - 1, the worst
1, and the average user ranking of a run is the mean of its points over raters and prompts: higher is better,
(N + 1) / 2 is what guessing gives. The paper does not say the scale of its Table 5: its four models sum to 8,
where these points sum to 10, so the numbers cannot be compared with it.

Intervals are of a bootstrap, 95 %, that draws raters and prompts anew, both with replacement; with few raters
they are too narrow. Agreement is Kendall's W, for each prompt and question by itself, then the mean: 1 where
all rank alike, 0 where they contradict each other as far as they can, and 1 / raters on average where they
guess.
"""

import json
import sys
from pathlib import Path

import numpy as np

from support.common import UserError, one_sentence, printable, table
from support.flags import Parser

QUESTIONS = {  # columns of Table 5, of which the paper has only the names -> how the page asks
    "text alignment": "How well does the sticker show what the text says?",
    "interest": "How interesting is the sticker: would you like to send it?",
    "motion": "How well does it move: smoothly, and as such a thing would move?",
}
DRAWS = 4000  # of the bootstrap
MAX_BYTES = 64 * 2**20  # of a file

# ------------------------------------------------------------------------------------------------------------
# Files


def read_json(path, what):
    """The dict in a JSON file; `what` says which file is wanted. Raises UserError."""
    name, path = printable(path), Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES // 2**20} MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, or no UTF-8
        reason = printable(getattr(error, "strerror", None) or error, 200)
        raise UserError(f"{name} cannot be read ({reason}): give {what}.") from error
    return content


def read_key(path):
    """What lab/rank.py wrote beside the page: {"page": id, "runs": [name], "prompts": [{"prompt": text,
    "stickers": {id: number of the run}}]}. Raises UserError."""
    key = read_json(path, "the .key.json of the page")
    try:
        numbers = list(range(len(key["runs"])))
        sound = [sorted(prompt["stickers"].values()) == numbers for prompt in key["prompts"]]
        if not all(sound) or not sound or len(numbers) < 2 or not isinstance(key["page"], str):
            raise ValueError
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{printable(path)} is no key of a page: give the .key.json first, then answers."
        ) from error
    return key


def points_of(ids, owners):
    """The points of one answer, float (N,), a number for each run; NaN unless it orders all stickers.

    ids: what the file has, best first if all is well; owners: {id: number of the run}."""
    points, N = np.full(len(owners), np.nan), len(owners)
    if isinstance(ids, list) and all(isinstance(name, str) for name in ids) and sorted(ids) == sorted(owners):
        points[[owners[name] for name in ids]] = np.arange(N, 0, -1)
    return points


def read_answers(path, key):
    """One rater's file -> (rater, when it was saved, points): float (questions, prompts, N), NaN where there
    is no answer. Raises UserError."""
    content = read_json(path, "a file that the page gave out")
    page, rater, saved, answers = (content.get(name) for name in ("page", "rater", "saved", "answers"))
    if page != key["page"]:
        raise UserError(f"{printable(path)} holds no answers to this page: give the key of its own page.")
    if not (isinstance(rater, str) and isinstance(saved, str) and isinstance(answers, list)):
        raise UserError(f"{printable(path)} is damaged: ask its rater to download it again.")
    answers = [entry if isinstance(entry, dict) else {} for entry in answers]
    answers += [{}] * (len(key["prompts"]) - len(answers))
    rows = [
        [points_of(entry.get(question), prompt["stickers"]) for entry, prompt in zip(answers, key["prompts"])]
        for question in QUESTIONS
    ]
    return rater, saved, np.array(rows)


def read_raters(paths, key):
    """The files of all raters. Returns (points, remarks): float (raters, questions, prompts, N), and a
    sentence for each file that is not as it should be. Raises UserError where nothing is left."""
    found, remarks = [], []
    for path in paths:
        try:
            rater, saved, points = read_answers(path, key)
        except UserError as error:
            remarks.append(f"left out: {error}")
            continue
        answered = ~np.isnan(points[..., 0])
        if answered.any():
            found.append((saved, rater, printable(path), points))
        if not answered.all():
            counts = f"{answered.sum()} of {answered.size}"
            remarks.append(f"{printable(path)} has {counts} answers: these count.")
    latest = {}
    for saved, rater, name, points in sorted(found, key=lambda entry: entry[0]):
        if rater in latest:
            remarks.append(f"left out: {latest[rater][0]} is of the same rater as {name}, which is newer.")
        latest[rater] = name, points
    if not latest:
        raise UserError(f"no answers to count: {remarks[0]}")
    return np.stack([points for _, points in latest.values()]), remarks


# ------------------------------------------------------------------------------------------------------------
# Numbers


def bootstrap(points):
    """The 95 % interval of each run's mean: float (2, N), its lower and upper ends.

    points: float (raters, prompts, N), NaN where there is no answer. None for fewer than two answers."""
    raters, prompts, _ = points.shape
    answered = ~np.isnan(points[..., 0])
    if answered.sum() < 2:
        return None
    rng = np.random.default_rng(0)
    # how often each rater and each prompt is drawn: (DRAWS, raters) and (DRAWS, prompts)
    drawn = [rng.multinomial(n, np.full(n, 1 / n), DRAWS) for n in (raters, prompts)]
    totals = np.einsum("dr,dp,rpn->dn", *drawn, np.nan_to_num(points), optimize=True)
    counts = np.einsum("dr,dp,rp->d", *drawn, answered.astype(float), optimize=True)
    means = totals[counts > 0] / counts[counts > 0, None]
    return np.percentile(means, [2.5, 97.5], axis=0)


def kendall_w(points):
    """(Kendall's W, what guessing gives): means over the prompts that two or more raters answered, None if
    there are none.

    points: float (raters, prompts, N), NaN where there is no answer. For m raters of one prompt W is
    12 S / (m^2 (N^3 - N)), S the sum of squares of what the runs' sums of points are beside their mean."""
    found = []
    for answers in points.swapaxes(0, 1):  # (raters, N)
        answers = answers[~np.isnan(answers[:, 0])]
        m, N = answers.shape
        if m > 1:
            sums = answers.sum(0)
            S = ((sums - sums.mean()) ** 2).sum()
            found.append((12 * S / (m**2 * (N**3 - N)), 1 / m))
    return tuple(np.mean(found, axis=0)) if found else None


def column(points):
    """One question's column of the table, a text for each run and two more: agreement and number of answers.

    points: float (raters, prompts, N), NaN where there is no answer."""
    answered = ~np.isnan(points[..., 0])
    cells = (
        [f"{mean:.2f}" for mean in points[answered].mean(axis=0)] if answered.any() else ["-"] * len(points.T)
    )
    ends, agreement = bootstrap(points), kendall_w(points)
    if ends is not None:
        cells = [f"{cell} [{low:.2f}, {high:.2f}]" for cell, low, high in zip(cells, *ends)]
    cells.append("{:.2f} ({:.2f})".format(*agreement) if agreement else "-")
    return [*cells, f"{answered.sum()} of {answered.size}"]


def rank_table(key, points):
    """The table and what its numbers mean, a text in Markdown. points: as read_raters returns them."""
    raters, questions, prompts, N = points.shape
    columns = [column(points[:, q]) for q in range(questions)]
    names = [*map(printable, key["runs"]), "agreement, W (guessing)", "answers"]
    alone = "One rater: there is no agreement to measure, and the intervals say nothing about other people."
    return f"""\
{table(["average user ranking", *QUESTIONS], zip(names, *columns))}
{N} points for the best of {N} stickers, 1 for the worst: higher is better, guessing gives {(N + 1) / 2:g}.
In brackets: 95 % intervals of a bootstrap over {count(raters, "rater")} and {count(prompts, "prompt")}.
{"Agreement: Kendall's W, 1 = all rank alike." if raters > 1 else alone}"""


def count(n, what):
    return f"{n} {what}{'s' * (n != 1)}"


@one_sentence("lab.rank_table")
def main():
    parser = Parser(description="Merge the answers to a page of lab.rank into average user rankings.")
    add = parser.add_argument
    add("key", metavar="KEY.json", help="the .key.json that lab.rank wrote beside the page")
    add("answers", nargs="+", metavar="ANSWERS.json", help="the files that raters downloaded from the page")
    args = parser.parse_args()
    key = read_key(args.key)
    points, remarks = read_raters(args.answers, key)
    for remark in remarks:
        print(f"lab.rank_table: {remark}", file=sys.stderr)
    print(rank_table(key, points))


if __name__ == "__main__":
    main()
