"""Takes images/tensorboard.png: `python docs/screenshot.py TENSORBOARD_FOLDER`, with Chromium or Chrome on the PATH."""

import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PORT = 7870
IMAGE = Path(__file__).parent / "images/tensorboard.png"
PAGE = f"http://127.0.0.1:{PORT}/#custom_scalars"


def take(chromium: str) -> None:
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=chromium) as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.set_default_timeout(120_000)
        page.goto(PAGE)
        loss = page.locator("tf-custom-scalar-multi-line-chart-card").first
        loss.locator(".line-plot:not(.ghost) path.line").first.wait_for(state="attached")
        loss.locator("paper-icon-button").first.click()  # the whole width
        loss.locator(".matches-text").locator("xpath=..").locator("paper-icon-button").click()
        page.wait_for_timeout(5_000)  # it redraws the chart
        page.screenshot(path=IMAGE)


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if len(sys.argv) != 2 or not chromium:
        sys.exit(__doc__)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", sys.argv[1], "--port", str(PORT)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr
            next(line for line in server.stderr if f":{PORT}/" in line)  # it is ready
            take(chromium)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
