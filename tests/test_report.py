"""From samples and losses to report.json, report.md and its pictures."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from lab import metrics
from lab.heldout import NO_TEXT
from lab.items import CONDITIONED, Item
from lab.report import write_report
from lab.summary import Clips, summarize, summarize_loss
from masks import LENGTHS, TASKS

RNG = np.random.default_rng(0)


def test_order_of_difficulty_is_counted_draw_by_draw():
    timestep = np.array([100, 300, 500, 700])
    cells = {("text", 8): 1.0}
    cells |= {(task, k): 1.0 + TASKS.index(task) + 0.1 * k for task in TASKS for k in LENGTHS}
    cells["prediction", 5] = 0.5  # one that is out of order
    arrays = {
        cell: dict(loss=v + timestep / 100, unknown=v + timestep / 100, timestep=timestep)
        for cell, v in cells.items()
    }
    entry = summarize_loss(arrays, 1.0)["Eq. 1"]
    wrong = [(c["easier"], c["harder"]) for c in entry["order of tasks"] if not c["holds"]]
    assert wrong == [(["interpolation", 5], ["prediction", 5])]  # timesteps differ by far more, and drop out
    wrong = [(c["easier"], c["harder"]) for c in entry["order of lengths"] if c["refuted"]]
    assert wrong == [(["prediction", 4], ["prediction", 5])]


def random_clip():
    return RNG.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)


class StandInJudge:
    """Reads the same words off every clip."""

    def read(self, clips):
        return [("red", "heart", "bouncing")] * len(clips)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, report, text of report.md) of a report with every section."""
    words = ("red", "heart", "bouncing"), ("blue", "cat", "spinning")
    items = [Item("text", "G0", "a red heart bouncing", "a", words[0], False)]
    items.append(Item("text", "G0", "a blue cat spinning", "", words[1], True))
    for task, rows in CONDITIONED.items():
        items += [Item(task, rows[-1], "a red heart bouncing", name, words[0], True) for name in "ab"]
    made = {"network": {i: random_clip() for i in range(len(items))}}
    clips = Clips(items, made, {name: random_clip() for name in "abcd"}, ["a", "b"], ["c", "d"])
    draws = dict(loss=np.arange(1.0, 5), unknown=np.arange(4.0), timestep=np.array([50, 300, 500, 900]))
    draws |= dict(frames=np.ones((4, 8)), given=np.arange(8) < np.ones((4, 1)))
    alone = [task + text for task in ("text", "image", *TASKS[:2]) for text in ("", NO_TEXT)]
    losses = {(name, 8): draws for name in alone} | {(task, k): draws for task in TASKS for k in LENGTHS}
    sampler = dict(num_inference_steps=2, eta=1.0, guidance_scale=3.0, image_guidance_scale=1.5)
    samplers = dict.fromkeys(("text", *CONDITIONED), sampler)
    about = dict(checkpoint="runs/a|b", sampler=samplers, latent_std=1.0, loss_draws=4, step=None)
    shares = dict(colour=1.0, subject=0.9, motion=0.8)
    exam = {"clips": 12, "raw": shares, "round trip": shares}
    report = summarize(about, clips, losses, StandInJudge(), exam)
    score = dict(model=dict(mean=0.25, se=0.1), real=None)
    report |= dict(fvd={"text": dict(fvd=12.34, clips=2, real_clips=2)}, vqa={"text": score})
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, report, clips)
    return folder, report, (folder / "report.md").read_text()


def test_every_picture_of_a_report_lies_beside_it(written):
    folder, _, page = written
    shown = re.findall(r"!\[.*?\]\((.*?)\)", page)
    sheets = {f"samples-{task}.png" for task in ("text", *CONDITIONED)}
    assert set(shown) == sheets | {"heat_map.png", "timesteps.png"}
    assert all(Image.open(folder / name).format == "PNG" for name in shown)
    assert {path.name for path in folder.iterdir()} == {*shown, "report.md", "report.json"}


def test_report_json_is_the_report(written):
    folder, report, _ = written
    assert json.loads((folder / "report.json").read_text()) == report


def test_a_report_has_a_table_for_every_measure(written):
    _, _, page = written
    tables = [part.splitlines() for part in page.split("\n\n") if part.startswith("|")]
    for lines in tables:  # as many cells in every row as in the header
        assert len({line.count(" | ") for line in lines if not line.startswith("| checkpoint")}) == 1
    headings = re.findall("^## (.*)", page, re.MULTILINE)
    measures = [
        "Text adherence",
        "Frames against the ground truth",
        "Motion",
        "FVD",
        "Held-out loss",
        "Use of given frames",
    ]
    measures += ["Beside trivial rivals", "Video quality (external program)"]
    assert set(headings) == {*measures, *(f"Samples: {task}" for task in ("text", *CONDITIONED))}
    assert "| chance | 16.7% |" in page and "| text | 12.3 | 2 | 2 |" in page
    assert "| text | 0.2500 ± 0.1000 | - |" in page
    assert "| of 12 | 12 hold, 0 refuted |" in page  # equal losses: no order is broken
    for name in metrics.BASELINES:
        assert f"| unknown frames: {name} |" in page


def test_every_figure_says_how_it_was_sampled(written):
    _, _, page = written
    sampler = "2 DDIM steps, eta 1, text guidance 3, image guidance 1.5"
    for part in re.split("^##+ ", page, flags=re.MULTILINE):
        if not part.startswith(("FVD", "Video quality", "Held-out loss", "Frames against", "Beside trivial")):
            assert sampler in part
    assert "<" not in page.replace("<=", "")  # no HTML
