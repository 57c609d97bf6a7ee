"""Chromium for the tests of pages: where it is, and pages that tell what goes wrong on them.

Skipped where there is no Chromium, or no Playwright: ``pip install -e '.[browser]'``, and Debian's ``chromium``.
Pictures of pages are left in the folder that SCREENSHOTS names.
"""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MARKS = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")]


@contextmanager
def opening(browser):
    """Context: a function that makes an empty page, which only asks ``own`` addresses, and what goes wrong on it."""
    contexts = []

    def new_page(width, dark, own, kinds=None):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        page, wrong = context.new_page(), []
        page.on("console", lambda told: wrong.append(told.text) if kinds is None or told.type in kinds else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda sent: None if sent.url.startswith(own) else wrong.append(sent.url))
        return page, wrong

    yield new_page
    for context in contexts:
        context.close()


def violations(page):
    """What axe-core finds on a page: rule, impact and the first place of each."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="there is no axe-core here")
    found = axe.Axe().run(page).response["violations"]
    return [(each["id"], each["impact"], each["nodes"][0]["html"]) for each in found]


def keep_picture(page, name):
    """A picture of a whole page, where pictures are kept."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
