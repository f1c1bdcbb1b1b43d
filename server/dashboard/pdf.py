"""A report as PDF, printed by the Chromium that is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from common.errors import RunFolderError, UsageError

VARIABLE: Final = "WARDROUND_CHROMIUM"
NAMES: Final = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
_SECONDS: Final = 180.0


def chromium() -> str | None:
    """The browser that prints: that which the environment names, or the first that is on the path."""
    if named := os.environ.get(VARIABLE):
        return shutil.which(named)
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def print_to_pdf(page: Path) -> Path:
    """Prints an HTML file beside itself; returns the PDF.

    Raises
    ------
    UsageError : there is no Chromium.
    RunFolderError : it did not print.
    """
    browser = chromium()
    if browser is None:
        raise UsageError(
            f"--pdf: no Chromium here (looked for {', '.join(NAMES)}); install one, name it in ${VARIABLE}, or print "
            f"{page} from any browser"
        )
    target = page.with_suffix(".pdf").absolute()
    with tempfile.TemporaryDirectory(prefix="wardround-print-") as folder:
        printed = Path(folder, "report.pdf")
        command = [
            browser, "--headless", "--disable-gpu", "--disable-extensions", "--no-first-run", "--window-size=800,1100",
            f"--user-data-dir={folder}/profile", "--no-pdf-header-footer", "--virtual-time-budget=20000",
            f"--print-to-pdf={printed}", page.absolute().as_uri(),
        ]  # fmt: skip
        if os.geteuid() == 0:  # Chromium's sandbox does not run as root; the page is our own, and fetches nothing
            command.insert(1, "--no-sandbox")
        try:
            done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RunFolderError(
                f"{browser}: could not print {page} ({type(error).__name__}); print it from any browser"
            ) from error
        if done.returncode or not printed.is_file() or not printed.stat().st_size:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise RunFolderError(
                f"{browser}: could not print {page} (exit code {done.returncode}{f': {said[-1]}' if said else ''}); "
                "print it from any browser"
            )
        shutil.move(printed, target)
    return target
