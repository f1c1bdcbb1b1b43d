"""A real browser that may reach loopback alone, and pages served by the real command."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60_000.0
"""Milliseconds until a test gives up; what is waited for takes a second or two."""
FOLLOWING = """() => document.getElementById("line").textContent === "live\""""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for a module's tests: its driver holds this thread's event loop, which others need afterwards."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed here, and the pages are tested in a real browser")
    api = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


class Tab:
    """A page in a browser of its own; nothing but loopback can be reached, and whatever it tries is kept.

    Attributes
    ----------
    page : the driver's.
    tried : requests to elsewhere, which were stopped.
    said : errors and warnings in the console.
    """

    def __init__(self, browser: Any, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(PATIENCE)
        self.tried: list[str] = []
        self.said: list[str] = []
        self.context.route("**/*", self._route)
        self.page = self.context.new_page()
        self.page.on("console", lambda line: self.said.append(line.text) if line.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))

    def _route(self, route: Any) -> None:
        if urlsplit(route.request.url).hostname in ("127.0.0.1", "localhost", None):
            route.continue_()
        else:
            self.tried.append(route.request.url)
            route.abort()

    def open(self, url: str) -> Any:
        """Goes there, and waits until the page follows."""
        self.page.goto(url)
        self.page.wait_for_function(FOLLOWING)
        return self.page

    def see_all(self) -> None:
        """Scrolls through the page, so that every chart comes into view, and waits until they are drawn."""
        for chart in self.page.locator("[data-chart]").all():
            chart.scroll_into_view_if_needed()
        self.page.wait_for_function("() => [...document.querySelectorAll('[data-chart]')].every(e => e.dataset.drawn)")


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """Opens tabs: `tab(color_scheme="dark")`; each is held to have tried nothing, and to have said nothing."""
    opened: list[Tab] = []

    def make(**options: Any) -> Tab:
        opened.append(Tab(browser, **options))
        return opened[-1]

    yield make
    for one in opened:
        tried, said = one.tried, one.said
        one.context.close()
        assert tried == []
        assert said == []


@pytest.fixture
def serve() -> Iterator[Any]:
    """Serves pages until the test is over: `serve("server.cli", "--run", folder)` gives a URL.

    To be asked for before `tab`: whose console would tell of a server that went first.
    """
    with contextlib.ExitStack() as stack:
        yield lambda module, *arguments: stack.enter_context(command_page(module, *map(str, arguments)))


@contextlib.contextmanager
def command_page(module: str, *arguments: str) -> Iterator[str]:
    """A page by its own command, in a process; gives its URL."""
    command = [sys.executable, "-P", "-m", module, "page", *arguments, "--listen", "127.0.0.1:0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found is not None, line
        yield found[0]
    finally:
        process.terminate()
        end = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.kill()
        process.wait()
