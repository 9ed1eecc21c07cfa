"""The page of the user study: it tells nobody which sticker is of which run. The last test rates in a real
browser, from opening it to the table."""

import base64
import io
import json
import re
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from lab import rank, rank_table
from lab.rank_table import QUESTIONS
from support.encoders import Encoders, PretrainedVAE
from tests.browser import open_browser
from tests.checkpoints import CHANNELS, toy_model, write_model
from tests.runs import run_here
from tests.toys import FakeCodec, toy_unet

ALIGNMENT, INTEREST, MOTION = QUESTIONS
PROMPTS = ["a red heart bouncing", "a </script> star", 'a "blue" cat', "a fish", "a ghost", "an eye"]


def random_clips(runs, prompts=len(PROMPTS)):
    return list(np.random.default_rng(0).integers(0, 255, (runs, prompts, 3, 16, 16, 3), np.uint8))


def frames(uri):
    """A data URI -> uint8 (F, R, R, 3)"""
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)])


# The page


def test_the_study_is_the_same_whatever_the_order_of_the_runs():
    clips = random_clips(3)
    study, key = rank.make_study(["a", "b", "c"], PROMPTS, clips)
    other, other_key = rank.make_study(["c", "b", "a"], PROMPTS, clips[::-1])
    assert study == other and key != other_key
    first = [list(prompt["stickers"].values())[0] for prompt in key["prompts"]]
    assert set(first) == {0, 1, 2}  # no run has a place of its own


def test_the_key_tells_which_run_a_sticker_is_of():
    clips = random_clips(3)
    study, key = rank.make_study(["a", "b", "c"], PROMPTS, clips)
    for p, prompt in enumerate(study["prompts"]):
        for name, uri in prompt["stickers"]:
            assert np.array_equal(frames(uri), clips[key["prompts"][p]["stickers"][name]][p])


def test_stickers_that_are_equal_are_all_shown():
    (clips,) = random_clips(1)
    study, key = rank.make_study(["a", "b"], PROMPTS, [clips, clips])
    assert all(sorted(prompt["stickers"].values()) == [0, 1] for prompt in key["prompts"])
    assert all(len(prompt["stickers"]) == 2 for prompt in study["prompts"])


def test_a_prompt_cannot_end_the_script():
    study, _ = rank.make_study(["a", "b"], PROMPTS, random_clips(2))
    data = re.search('<script type="application/json" id="study">(.*?)</script>', rank.fill_page(study), re.S)
    assert json.loads(data[1])["prompts"][1]["text"] == PROMPTS[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two finished runs of random toy networks."""
    folder = tmp_path_factory.mktemp("runs")
    _, encoders = toy_model()
    for seed, name in enumerate(("quick-fox", "lazy-dog")):
        torch.manual_seed(seed)
        unet = toy_unet(latent_channels=CHANNELS, sti_heads=2, sti_head_width=8)
        write_model(folder / name, unet, Encoders(codec=encoders.codec))
    return folder / "quick-fox", folder / "lazy-dog"


@pytest.fixture
def quick(monkeypatch):
    """Decoding costs nothing."""
    monkeypatch.setattr(PretrainedVAE, "decode", FakeCodec(4, CHANNELS).decode)


def test_the_program_writes_a_page_that_names_no_run(models, quick, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red heart\n\n a green star \n")
    output = tmp_path / "new" / "page.html"
    run_here(rank.main, *models, "--output", output, "--prompts", tmp_path / "prompts.txt")
    assert str(output) in capsys.readouterr().out
    page, key = output.read_text(), json.loads((tmp_path / "new" / "page.key.json").read_text())
    assert [prompt["prompt"] for prompt in key["prompts"]] == ["a red heart", "a green star"]
    assert key["runs"] == [str(model) for model in models]
    assert not re.search("quick-fox|lazy-dog|quick|lazy", re.sub(r'base64,[^"]+', "", page))
    assert not re.search(r"(src|href)=.?http|url\(|fetch\(|XMLHttp|import\(", page)


def test_every_run_has_the_same_noise_and_every_prompt_its_own(models, quick, monkeypatch):
    seeds, generate = [], rank.sample.generate
    noting = lambda *args, **options: seeds.append(options["seed"]) or generate(*args, **options)
    monkeypatch.setattr(rank.sample, "generate", noting)
    clips = [rank.sample_run(model, ["a heart"] * (rank.BATCH + 1), 3) for model in models]
    assert seeds[:2] == seeds[2:] and len(set(seeds)) == 2
    assert all(len(np.unique(made, axis=0)) == rank.BATCH + 1 for made in clips)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["pretrained"], "different runs can be ranked, not pretrained"),
        (["pretrained", "pretrained"], "different runs"),
        (list("abcdefghij"), "two to 9"),
        (["pretrained", "no/such/run/at/all"], "RUN no/such/run/at/all"),
        (["pretrained", "b", "--output", "page.json"], "--output page.json"),
        (["pretrained", "b", "--output", "/proc/page.html"], "--output /proc/page.html"),
        (["pretrained", "pretrained/", "--prompts", "absent.txt"], "--prompts absent.txt"),
        (["pretrained", "pretrained/", "--prompts", "/dev/null"], "--prompts /dev/null holds no prompt"),
    ],
)
def test_bad_flags_of_the_page_get_one_sentence(refused, monkeypatch, tmp_path, arguments, words):
    monkeypatch.setattr("sample.load", lambda *args: pytest.fail("said too late"))
    output = [] if "--output" in arguments else ["--output", tmp_path / "page.html"]
    refused(words, run_here, rank.main, *arguments, *output)


# In a browser


@pytest.fixture
def browser(tmp_path):
    with open_browser(tmp_path / "profile", downloads=tmp_path / "downloads") as driver:
        yield driver


class Rater:
    """Someone before the page: sees what is on the screen, presses keys, clicks."""

    def __init__(self, browser, study, key):
        self.browser = browser
        # which run a picture is of, as nobody but the test can know
        self.runs = {
            uri: owners["stickers"][name]
            for prompt, owners in zip(study["prompts"], key["prompts"])
            for name, uri in prompt["stickers"]
        }

    def find(self, css):
        return self.browser.find_elements("css selector", css)

    def press(self, keys):
        self.browser.switch_to.active_element.send_keys(keys)

    def click(self, css):
        (button,) = self.find(css)
        button.click()

    def reads(self, name, words):
        """Waits until the element of this id shows the words."""
        for _ in range(100):
            if words in self.browser.find_element("id", name).text:
                return
            time.sleep(0.1)
        raise AssertionError(f"#{name} does not read {words!r}: {self.find('body')[0].text!r}")

    def places(self):
        """The place on the screen, from 0, of each run's sticker."""
        runs = [self.runs[picture.get_attribute("src")] for picture in self.find(".sticker img")]
        return [runs.index(run) for run in range(len(runs))]

    def badges(self):
        """What stands on each run's sticker."""
        badges = [badge.text for badge in self.find(".sticker b")]
        return [badges[place] for place in self.places()]


def downloaded(path):
    """A file that a browser is about to write, once it is there."""
    for _ in range(600):
        if path.is_file():
            return path
        time.sleep(0.1)
    raise AssertionError(f"{path} was not downloaded: {list(path.parent.glob('*'))}")


RUNS = ["first", "second", "third"]
LIKED = {ALIGNMENT: [2, 0, 1], INTEREST: [0, 1, 2], MOTION: [1, 2, 0]}  # runs, best first


def test_from_opening_the_page_to_the_table(browser, tmp_path, capsys):
    study, key = rank.make_study(RUNS, PROMPTS[:2], random_clips(3, 2))
    (tmp_path / "rank.html").write_text(rank.fill_page(study))
    (tmp_path / "rank.key.json").write_text(json.dumps(key))
    see, ENTER, BACKSPACE = Rater(browser, study, key), "\ue007", "\ue003"
    browser.get((tmp_path / "rank.html").as_uri())
    see.reads("about", "2 short texts")
    see.click("#start")

    # the first question by mouse, with a click taken back and nothing to go on with before it is ranked
    first, second, third = LIKED[ALIGNMENT]
    stickers, places = see.find(".sticker"), see.places()
    stickers[places[second]].click()
    assert see.badges()[second] == "1st" and not see.find("#next")[0].is_enabled()
    see.press(ENTER)  # which presses the sticker again
    assert see.badges() == [""] * 3
    for run in (first, second):
        stickers[places[run]].click()
    assert [see.badges()[run] for run in (first, second, third)] == ["1st", "2nd", "3rd"]
    see.click("#next")

    # the second one by keys, half of it before the page is loaded again
    shown, places = browser.find_element("id", "prompt").text, see.places()
    assert any(f"“{text}”" == shown for text in PROMPTS[:2])
    see.press(str(places[2] + 1))
    see.press(BACKSPACE)
    see.press(str(places[0] + 1))
    browser.refresh()
    assert see.places() == places and see.badges() == ["1st", "", ""]
    assert browser.find_element("id", "prompt").text == shown
    see.press(str(places[1] + 1) + ENTER)
    for question in (MOTION, *QUESTIONS):
        places = see.places()
        see.press("".join(str(places[run] + 1) for run in LIKED[question][:2]) + ENTER)
    see.reads("count", "All 6")
    assert see.find("#progress")[0].get_property("value") == 1
    browser.find_element("id", "name").send_keys("Ann B.")
    see.click("#download")
    ann = downloaded(tmp_path / "downloads" / "answers-ann-b.json")

    # another person, who agrees, and stops after a prompt
    see.click("#restart")
    browser.switch_to.alert.accept()
    see.press(ENTER)
    for question in QUESTIONS:
        places = see.places()
        see.press("".join(str(places[run] + 1) for run in LIKED[question][:2]) + ENTER)
    see.click("#stop")
    see.reads("count", "3 of 6")
    browser.find_element("id", "name").send_keys("bob")
    see.click("#download")
    bob = downloaded(tmp_path / "downloads" / "answers-bob.json")
    assert json.loads(ann.read_text())["rater"] != json.loads(bob.read_text())["rater"]
    assert not browser.get_log("browser")  # errors, and what the page is not allowed to fetch

    run_here(rank_table.main, tmp_path / "rank.key.json", ann, bob)
    out, said = capsys.readouterr()
    table = dict(line.strip("| ").split(" | ", 1) for line in out.splitlines() if line.startswith("| "))
    assert table["first"] == "2.00 [2.00, 2.00] | 3.00 [3.00, 3.00] | 1.00 [1.00, 1.00]"
    assert table["second"] == "1.00 [1.00, 1.00] | 2.00 [2.00, 2.00] | 3.00 [3.00, 3.00]"
    assert table["third"] == "3.00 [3.00, 3.00] | 1.00 [1.00, 1.00] | 2.00 [2.00, 2.00]"
    assert table["agreement, W (guessing)"] == " | ".join(["1.00 (0.50)"] * 3)
    assert table["answers"] == " | ".join(["3 of 4"] * 3) and "answers-bob.json has 3 of 6 answers" in said
