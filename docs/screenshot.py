"""The picture of a report in docs/first-run.md.

    python docs/screenshot.py RUN docs/report.png

Writes the page anew into a temporary directory and takes its upper part, light, 1,280 pixels wide.
Needs the extras `browser` and `plot` (for Pillow) and an installed Chromium.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from minilora.summarization.report.page import write_report

WIDTH, HEIGHT = 1280, 2120
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def main() -> None:
    run, picture = Path(sys.argv[1]), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as driver:
        page_file = Path(directory) / "report.html"
        write_report(run, page_file)
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(page_file.as_uri())
        page.get_by_role("button", name="biggest change").click()
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        page.screenshot(path=picture)
        with Image.open(picture) as image:  # flat colours: a palette takes a third
            image.convert("RGB").quantize(256, kmeans=2, dither=Image.Dither.NONE).save(
                picture, optimize=True
            )
        browser.close()
    print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
