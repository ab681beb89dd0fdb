"""Headless Chromium, and a report in it."""

import shutil
import time

import numpy as np
import pytest

pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")

from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars"
)


def installed():
    """Whether there is a Chromium, with its driver."""
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


def opened(profile):
    """A browser with a profile in a new folder; close it by ``with``."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


class Page:
    """A report in the browser."""

    def __init__(self, browser, path, width=1200, height=1000, again=True):
        self.browser = browser
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        if again:
            browser.get(path.as_uri())
        until = time.monotonic() + 60
        while not self.run("return 'ready' in document.documentElement.dataset"):
            assert time.monotonic() < until, self.errors()
            time.sleep(0.02)

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def texts(self, selector):
        return self.run("return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)", selector)

    def errors(self):
        """What the console says, but for a warning about how these tests read what is drawn."""
        messages = [entry["message"] for entry in self.browser.get_log("browser")]
        return [message for message in messages if "willReadFrequently" not in message]

    def centred(self, element):
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        return element

    def point(self, batch, patch):
        """Move to the middle of a patch of the explorer."""
        image, place = divmod(patch, batch.grid[0] * batch.grid[1])
        row, column = divmod(place, batch.grid[1])
        canvas = self.centred(self.all("#explorer .batch canvas")[image])
        size = canvas.size
        right, down = (column + 0.5) / batch.grid[1] - 0.5, (row + 0.5) / batch.grid[0] - 0.5
        moved = ActionChains(self.browser).move_to_element_with_offset(
            canvas, round(right * size["width"]), round(down * size["height"])
        )
        return moved

    def shown(self):
        """Which patches of the explorer are in full colour: (N,) bool."""
        return np.array(
            self.run("""
            const { batch, figures } = explorer;
            return figures.flatMap(({ canvas }) => Array.from({ length: batch.patches }, (_, patch) => {
              const [row, column] = batch.place(patch);
              const at = [(column + 0.5) / batch.columns * canvas.width, (row + 0.5) / batch.rows * canvas.height];
              return canvas.getContext("2d").getImageData(...at.map(Math.floor), 1, 1).data[3] === 255;
            }));""")
        )
