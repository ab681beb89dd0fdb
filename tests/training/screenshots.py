"""Photograph sections of a report for the docs, at the width of a screen and of a phone.

python tests/training/screenshots.py runs/quickstart/report.html docs/images
"""

import io
import sys
import tempfile
from pathlib import Path

from chromium import Page, opened
from PIL import Image

SHOTS = {  # width of the window, section, and height that is kept
    "explorer-1200": (1200, "hidden-positives", 1090),
    "explorer-400": (400, "hidden-positives", 1380),
    "segmentations-1200": (1200, "segmentations", 1100),
    "classes-1200": (1200, "classes", 1000),
    "training-1200": (1200, "training", 1000),
}
MOST_BYTES = 300_000


def main(report: Path, folder: Path) -> None:
    """Write ``folder/report-NAME.png`` for each of `SHOTS`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, opened(profile) as browser:
        for name, (width, section, height) in SHOTS.items():
            page = Page(browser, report.absolute(), width)
            # The whole page in the window, so that nothing that sticks to its border covers anything.
            whole = page.run("return document.documentElement.scrollHeight")
            page = Page(browser, report.absolute(), width, whole, again=False)
            picture = Image.open(io.BytesIO(page.one(f"#{section}").screenshot_as_png)).convert("RGB")
            picture = picture.crop((0, 0, picture.width, min(picture.height, height)))
            file = folder / f"report-{name}.png"
            for most in (255, 63, 31, 23, 15):  # the greatest value of a channel, before it is spread again
                coarse = picture.point([round(value / 255 * most) * 255 // most for value in range(256)] * 3)
                coarse.save(file, optimize=True)
                if file.stat().st_size <= MOST_BYTES:
                    break
            print(f"{file}: {picture.width} x {picture.height}, {file.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
