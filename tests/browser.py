"""A headless Chromium for the tests of pages. Where there is none, those tests are skipped and say why."""

from contextlib import contextmanager
from shutil import which

import pytest

QUIET = "disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"


@contextmanager
def open_browser(profile, downloads=None):
    """A selenium driver of Chromium whose state lies in the folder `profile`; downloads go to a folder."""
    selenium = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    chromium, driver = which("chromium"), which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium and chromedriver (Debian: apt install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless",
        "no-sandbox",
        *QUIET.split(),
        f"user-data-dir={profile}",
        "window-size=1280,1000",
    ):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = selenium.Chrome(options, selenium.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()
