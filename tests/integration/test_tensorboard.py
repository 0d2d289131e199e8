"""The TensorBoard files of a run in a real browser."""

import math
import re
import shutil
import sys

import pytest
from playwright.sync_api import sync_playwright

from mtp_dist.metrics import HeadMetrics, RankStats, StepMetrics
from mtp_dist.monitoring.scalars import ThroughputWindow, head_scalars, step_scalars
from mtp_dist.monitoring.writers.tensorboard import TensorBoardWriter
from tests.integration import jobs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="neither Chromium nor Chrome is on the PATH")

HEADS = 4
STEPS = 40
DESCRIPTION = {
    "config": {"model": {"hidden_size": 32}, "heads": {"count": HEADS}, "log": {"wandb": None}},
    "layout": {"tensor": 2, "pipeline": 1, "data": 4},
    "device": "abacus",
    "versions": {"torch": "2.13.0"},
}


def losses(step):
    return tuple(2 + k / 2 + math.exp(-step / 10) for k in range(HEADS))


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Start TensorBoard on the files of a run that was killed after step 30 and resumed from step 20."""
    folder = tmp_path_factory.mktemp("tensorboard")
    for first, last in ((1, 30), (21, STEPS)):
        writer = TensorBoardWriter(folder / "files", [None], first - 1)
        writer.describe(DESCRIPTION)
        for step in range(first, last + 1):
            heads = HeadMetrics(losses(step), (0.5,) * HEADS, sum(losses(step)))
            metrics = StepMetrics(step, heads, 0.7, {}, 3e-4, 100, 0.5, {}, [RankStats(0, 0.0, 0.1, 0.2, 1)])
            writer.write(step, head_scalars(metrics.heads) | step_scalars(metrics, ThroughputWindow(100, 1, 0.5), None))
        writer.close(failed=False)
    port = jobs.free_port()
    options = ["--logdir", str(folder / "files"), "--host", "127.0.0.1", "--port", str(port)]
    with jobs.started([sys.executable, "-m", "tensorboard.main", *options], folder) as server:
        server.wait_until(lambda: f":{port}/" in server.output)
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM) as started:
        yield started


@pytest.fixture
def page(browser):
    # A new page per test: TensorBoard does not load another dashboard if only the fragment changes.
    with browser.new_page(viewport={"width": 1400, "height": 900}) as opened:
        opened.set_default_timeout(120_000)  # on a crowded machine
        yield opened


def test_all_heads_share_one_chart(page, address):
    page.goto(f"{address}/#custom_scalars")
    cards = page.locator("tf-custom-scalar-multi-line-chart-card")
    loss = cards.filter(has=page.get_by_text("loss of all heads", exact=True))
    curves = loss.locator(".line-plot:not(.ghost) path.line")
    curves.nth(HEADS - 1).wait_for(state="attached")
    shapes = [curve.get_attribute("d") or "" for curve in curves.all()]
    assert len(set(shapes)) == HEADS, shapes
    assert all(shape.count("L") > STEPS / 2 for shape in shapes), shapes
    matches = re.findall(r"\w+/\w+", " ".join(loss.locator(".match-list-entry").all_text_contents()))
    assert sorted(matches) == [f"loss/head_{k}" for k in range(1, HEADS + 1)]


def test_configuration_and_layout_can_be_read(page, address):
    page.goto(f"{address}/#text")
    code = page.locator("tf-text-loader code")
    for text in ("hidden_size", "abacus"):  # each is loaded by a request of its own
        code.filter(has_text=text).first.wait_for()
    texts = [text.strip() for text in code.all_inner_texts()]
    assert "model:\n  hidden_size: 32\nheads:\n  count: 4\nlog:\n  wandb: null" in texts
    assert "layout:\n  tensor: 2\n  pipeline: 1\n  data: 4\ndevice: abacus\nversions:\n  torch: 2.13.0" in texts
