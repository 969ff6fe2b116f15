"""A real browser on the playground: Debian's Chromium, driven by Playwright."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 400, "height": 800}


@contextmanager
def chromium():
    """A browser, for many pages.

    Raises:
        Skipped: Playwright or Chromium is not there.
    """
    api = pytest.importorskip("playwright.sync_api")
    if not Path(CHROMIUM).is_file():
        pytest.skip("there is no Chromium")
    with api.sync_playwright() as playwright:
        # No sandbox of its own: tests run as root in containers.
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        try:
            yield browser
        finally:
            browser.close()


class Seen:
    """What a page asked for and complained of.

    Attributes:
        requests: Addresses, in order.
        bodies: Of requests with JSON, by path, in order.
        errors: Errors on the console and exceptions that nobody caught.
    """

    def __init__(self, page):
        self.requests, self.bodies, self.errors = [], [], []
        page.on("request", self._asked)
        page.on("console", lambda said: self._said(said.type, said.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _asked(self, request):
        self.requests.append(request.url)
        if request.method == "POST":
            self.bodies.append((request.url, request.post_data_json))

    def _said(self, kind, text):
        if kind in ("error", "warning"):
            self.errors.append(text)

    def of(self, path):
        """Bodies that were sent there."""
        return [body for url, body in self.bodies if url.endswith(path)]


@contextmanager
def opened(browser, address, view="chat", *, size=WIDE, dark=False, ready=True, errors=()):
    """The playground in a fresh context; at the end nothing left the machine, nothing complained.

    Args:
        browser: Of `chromium`.
        address: Of the server.
        view: Name of the view.
        size: Of the window.
        dark: Which colours the system asks for.
        ready: Wait until the page knows what is served.
        errors: Parts of messages on the console that are expected.
    """
    scheme = "dark" if dark else "light"
    context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
    context.set_default_timeout(60_000)
    try:
        page = context.new_page()
        seen = Seen(page)
        page.goto(f"{address}/#{view}")
        if ready:
            page.locator("#frame[data-ready]").wait_for()
        yield page, seen
        allowed = (f"{address}/", f"blob:{address}/")
        assert [url for url in seen.requests if not url.startswith(allowed)] == []
        odd = [one for one in seen.errors if not any(part in one for part in errors)]
        assert odd == [], odd
    finally:
        context.close()


def shot(page, folder, name):
    """Keep a picture of the page, in $DEMUR_SHOTS if that is set."""
    folder = Path(os.environ.get("DEMUR_SHOTS") or folder)
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png")


def is_too_wide(page):
    """Whether the page scrolls sideways."""
    return page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
