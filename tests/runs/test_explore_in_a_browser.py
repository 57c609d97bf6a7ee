"""The page of a run in Chromium: draw, erase, slide, walk and sample; it asks no other host, and anybody can use it.

Skipped where there is no Chromium, Playwright or Gradio: ``pip install -e '.[browser,explore]'``, and Debian's
``chromium``. Pictures of it are left in the folder that SCREENSHOTS names.
"""

import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pyro_vae import cli, runs
from tests.chromium import MARKS, keep_picture, opening, violations

ROOT = Path(__file__).parents[2]
OLD = Path(__file__).parent / "data" / "0.1.0" / "vae"
PATIENCE = 240_000
"""Milliseconds: an answer takes a fraction of a second, on machines that others use far more."""

pytestmark = MARKS


@pytest.fixture(scope="module")
def served():
    """A function that serves the page of a run, and returns its address; at the end Ctrl-C ends all quietly."""
    pytest.importorskip("gradio", reason="there is no Gradio here")
    started = []

    def serve(run):
        command = [sys.executable, "-m", "pyro_vae", "explore", str(run), "--port=0", "--browser=false"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        lines = []
        for line in process.stdout:  # the first ones may be on the data
            if found := re.match(r"http://127\.0\.0\.1:\d+/", line):
                return found[0]
            lines.append(line)
        raise AssertionError("".join(lines))

    yield serve
    for process in started:
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=120)
        assert (process.returncode, told) == (0, "")


@pytest.fixture(scope="module")
def images(served):
    return served(OLD)


@pytest.fixture
def opened(browser):
    """A function that opens an address: the page once it has answered, and what went wrong on it."""
    with opening(browser) as new_page:

        def open_address(address, width=1200, dark=False):
            page, wrong = new_page(width, dark, (address, "data:", "blob:"), ("error",))
            page.set_default_timeout(PATIENCE)
            page.goto(address)
            page.locator("#scores tbody tr").nth(1).wait_for()  # the annealed estimate
            return page, wrong

        yield open_address


SHOWN = "place => place.innerText + [...place.querySelectorAll('img')].map(image => image.src).join()"


def changed(page, selector, act):
    """Do something, and wait until what the selector names shows something else."""
    place = page.locator(selector)
    before = place.evaluate(SHOWN)
    act()
    wait = f"([selector, before]) => ({SHOWN})(document.querySelector(selector)) !== before"
    page.wait_for_function(wait, arg=[selector, before])


def numbers(page):
    """Estimates that are shown, by row: log p(x)."""
    cells = page.locator("#scores tbody tr td:nth-child(2)").all_inner_texts()
    return [float(text) for text in cells]


def test_a_datum_is_shown_drawn_and_erased(opened, images):
    page, wrong = opened(images)
    run = runs.load(OLD)
    first, annealed = numbers(page)
    assert abs(first - run.importance["log_px"].values[0]) < 1
    assert abs(annealed - first) < 2
    board = page.locator("#canvas canvas")
    box = board.bounding_box()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.8 * box["height"], steps=4)
    changed(page, "#scores table", page.mouse.up)
    assert numbers(page)[0] != first
    page.locator("#scores tbody tr").nth(1).wait_for()
    page.locator("#canvas input[value=erase]").check()
    board.focus()
    page.keyboard.press("ArrowUp")
    changed(page, "#filled", lambda: page.keyboard.press("Space"))
    page.locator("#filled img").nth(8).wait_for()
    assert "What was not seen" in page.locator("#filled").inner_text()
    assert "some of it was not seen" in page.locator("#scores").inner_text()
    changed(page, "#scores table", lambda: page.get_by_role("button", name="clear").click())
    assert not wrong


def test_the_annealed_estimate_of_a_stroke_is_not_lost_to_the_one_before(opened, images):
    page, wrong = opened(images)
    box = page.locator("#canvas canvas").bounding_box()
    for x in (0.2, 0.4, 0.6, 0.8):  # while that of another stroke is on its way
        page.mouse.move(box["x"] + x * box["width"], box["y"] + 0.2 * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + x * box["width"], box["y"] + 0.8 * box["height"], steps=4)
        changed(page, "#scores table", page.mouse.up)
    page.locator("#scores tbody tr").nth(1).wait_for()
    page.get_by_label("test image, 0 to").fill("3.5")
    page.get_by_role("button", name="Show the test image").click()
    page.get_by_text("there is no 3.5").wait_for()
    page.locator("#scores table").wait_for(state="detached")  # of another datum
    assert not wrong


def test_latents_are_moved_walked_and_drawn(opened, images):
    page, wrong = opened(images)
    slider = page.locator(".sliders input[type=range]").first
    slider.focus()
    changed(page, "#moved", lambda: [page.keyboard.press("PageUp") for _ in range(3)])
    changed(page, "#moved", lambda: page.get_by_role("button", name="Back to the datum").click())
    page.get_by_role("tab", name="Walk").click()
    changed(page, "#walked", lambda: page.get_by_role("button", name="Start at this image").click())
    page.get_by_label("test image, 0 to").fill("1")
    changed(page, "#seen", lambda: page.get_by_role("button", name="Show the test image").click())
    page.get_by_role("button", name="End at this image").click()
    page.locator("#walked img").nth(8).wait_for()
    page.get_by_role("tab", name="Samples").click()
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#samples img").nth(11).wait_for()
    page.get_by_role("tab", name="Posterior").click()
    assert page.locator("#posterior tbody tr").count() == 3
    assert not wrong


@pytest.mark.parametrize(("width", "dark"), [(400, True), (1200, False)])
def test_it_fits_and_axe_finds_nothing_serious(opened, images, width, dark):
    page, wrong = opened(images, width, dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    keep_picture(page, f"explore_{width}")
    assert not [each for each in violations(page) if each[1] in ("serious", "critical")]
    assert not wrong


NAME = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def table(served, tmp_path_factory):
    """A run of a table whose columns and classes are code, told one of them."""
    folder = tmp_path_factory.mktemp("table")
    draws = np.random.default_rng(0)
    columns = {NAME: draws.normal(size=60).round(2), "<b>": draws.choice(["<img src=x onerror=alert(2)>", "b"], 60)}
    columns["${kind}"] = draws.choice(["<i>", "{{1}}"], 60)
    pd.DataFrame(columns).to_csv(folder / "rows.csv", index=False)
    small = ["--encoder.hidden=[8]", "--decoder.hidden=[8]", "--latent_dim=2", "--epochs=2", "--device=cpu"]
    small += ["--evidence.num_samples=30", "--evidence.annealed_images=0", "--condition=${kind}"]
    cli.train(["--dataset=Table", f"--dataset.path={folder / 'rows.csv'}", f"--run_dir={folder / 'run'}", *small])
    return served(folder / "run")


def test_a_row_is_typed_in_and_nothing_of_names_is_executed(opened, table):
    page, wrong = opened(table)
    assert page.locator("#seen tbody th").all_inner_texts() == [NAME, "<b>"]
    first = numbers(page)[0]
    number = page.get_by_label(NAME)
    changed(page, "#scores table", lambda: number.fill("7.5"))
    page.locator("#seen").get_by_text("7.5").wait_for()
    assert numbers(page)[0] < first
    page.get_by_role("tab", name="Samples").click()
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#samples table").nth(1).wait_for()
    assert page.locator("#samples h3").all_inner_texts() == ["${kind} <i>", "${kind} {{1}}"]
    assert page.locator("#samples script, #samples img, #seen img, #seen b b, #samples i").count() == 0
    assert not wrong
