"""The page to make stickers: what it makes, and the page itself in a browser."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lab import page
from support import media
from support.common import UserError
from tests.browser import open_browser
from tests.checkpoints import toy_model, write_model

ROOT = Path(__file__).parents[1]
SETTINGS = dict(guidance_scale=2.0, image_guidance_scale=2.0, num_inference_steps=1, seed=0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work") / "runs"
    return write_model(folder / "toy", *toy_model()).parent


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (20, 16), (250, 40, 40)).save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


def test_pictures_and_a_prompt_become_stickers_and_their_files(runs, picture, tmp_path):
    clips, trained = page.make(runs / "toy", {0: picture, 3: picture}, "a heart", SETTINGS, 2)
    assert clips.shape == (2, 8, 16, 16, 3) and not trained
    assert page.make(runs / "toy", {0: picture}, "", SETTINGS, 1)[1]  # row G4
    clips[:, :, :4] = 255
    for transparent in (False, True):
        files = page.save(clips, 8, transparent, tmp_path)
        assert [path.suffix for path in files] == 2 * [".gif", ".webp", ".png"]
        assert str(files[1]) in page.show(files) and str(files[0]) not in page.show(files)
        assert media.read_clip(files[1], 16)[1].sum() == 1000  # milliseconds
        with Image.open(files[1]) as sticker:
            assert (sticker.convert("RGBA").getchannel("A").getextrema()[0] == 0) == transparent


def test_nothing_to_start_from_and_bad_pictures_are_said(runs, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    with pytest.raises(UserError, match="nothing to start from"):
        page.make(runs / "toy", {}, " ", SETTINGS, 1)
    with pytest.raises(UserError, match="All frames are given"):
        page.make(runs / "toy", dict.fromkeys(range(8), "a.png"), "", SETTINGS, 1)
    with pytest.raises(UserError, match="bad.png"):
        page.make(runs / "toy", {2: str(tmp_path / "bad.png")}, "a heart", SETTINGS, 1)


def test_models_are_those_at_hand_and_the_one_that_ships(runs, tmp_path):
    assert list(page.models(runs)) == ["toy", "pretrained"]
    assert list(page.models(tmp_path / "none")) == ["pretrained"]


# ------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def address(runs):
    """Where the page is served, with the toy model."""
    pytest.importorskip("gradio", reason="pip install gradio")
    command = [sys.executable, "-m", "lab.page", "--port", "7871"]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    with subprocess.Popen(command, cwd=runs.parent, env=env, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = next((line for line in server.stdout if "http://" in line), "")
            yield re.search(r"http://[\d.]+:\d+", line)[0]
        finally:
            server.terminate()


@pytest.fixture
def browser(tmp_path):
    with open_browser(tmp_path) as driver:
        yield driver


def find(driver, selector, seconds=30):
    """The element, as soon as it is there."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := driver.find_elements("css selector", selector):
            return found
        time.sleep(0.2)
    raise AssertionError(f"no {selector} on the page")


def press(driver):
    (button,) = [b for b in find(driver, "button") if b.text.strip() == "Make"]
    driver.execute_script("arguments[0].click()", button)


def shown(driver):
    return find(driver, "img[alt^=sticker]", 60)


def test_a_storyboard_becomes_an_animation(address, browser, picture):
    browser.get(address)
    uploads = find(browser, "input[type=file]")
    for slot in (0, 3):
        uploads[slot].send_keys(picture)
    while len(find(browser, "img[src*='red.png']")) < 2:  # both pictures are there
        time.sleep(0.1)
    find(browser, "textarea")[0].send_keys("a red heart")
    press(browser)
    (sticker,) = shown(browser)
    name = sticker.get_attribute("src")
    assert name.endswith(".webp")
    data = browser.execute_async_script(
        "const done = arguments[1]; fetch(arguments[0]).then(r => r.arrayBuffer())"
        ".then(b => done(Array.from(new Uint8Array(b))))",
        name,
    )
    path = Path(picture).with_name("again.webp")
    path.write_bytes(bytes(data))
    frames, durations = media.read_clip(path, 256)
    assert len(frames) > 1 and durations.sum() == 1000
    assert np.ptp(frames.astype(int), axis=0).max() > 0  # it moves
    links = {link.get_attribute("href").rsplit(".")[-1] for link in find(browser, "a[download]")}
    assert {"gif", "webp", "png"} <= links


def test_an_empty_form_and_a_bad_picture_are_said_on_the_page(address, browser, tmp_path):
    browser.get(address)
    find(browser, "textarea")
    press(browser)
    assert "nothing to start from" in find(browser, ".toast-body")[0].get_attribute("textContent")

    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    browser.get(address)
    find(browser, "input[type=file]")[5].send_keys(str(tmp_path / "bad.png"))
    find(browser, "img[src*='bad.png']")
    press(browser)
    assert "bad.png" in find(browser, ".toast-body")[0].get_attribute("textContent")


def test_two_users_at_once_get_their_own(address, tmp_path):
    with open_browser(tmp_path / "a") as one, open_browser(tmp_path / "b") as two:
        for driver, prompt in ((one, "a red heart"), (two, "a blue cat")):
            driver.get(address)
            find(driver, "textarea")[0].send_keys(prompt)
        for driver in (one, two):
            press(driver)
        assert len({shown(driver)[0].get_attribute("src") for driver in (one, two)}) == 2
