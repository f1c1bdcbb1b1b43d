"""What do open pages cost a round, and how long does a large study's page take to draw?

Two questions, two rows.

**round**: a simulated study on generated images, all sites in one process, with its live page beside it (`wardround
simulate --page`). In blocks of rounds that alternate, twenty pages are open, or none. An open page is what a browser
does of it: it holds the stream of events, and fetches the figures whenever it is told of new ones; drawing is left out,
as it is done on the viewers' own machines, and so what the viewers do here comes after all else (nice 19). The page's
process runs in both, as niced as it always is. A round's time is that of all of its parts in `rounds.csv`; the first
round of each block is left out. "ratio" is the median with pages divided by that without.

**draw**: the page of a written run of 50 sites and 500 rounds in a real Chromium on this machine, from asking for it
until it shows text, and until all charts are drawn.

How to read it: goal of the ratio is 1.02 or less; of the drawing, that nobody has to wait for it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._report import RESULTS, median, report
from common.study import parse_study
from server.run_folder import RunFolder
from server.simulation.hospitals import example_study, generate_hospitals
from server.tables import read_table
from server.timings import ROUND_PARTS
from tests.server.dashboard.runs import WrittenRun
from tests.system.browsing import CHROMIUM, command_page

ROOT = Path(__file__).resolve().parents[1]
_PATIENCE = 3600.0
_SHOWN = {
    "question": "question",
    "pages": "pages",
    "with_seconds": "with s",
    "without_seconds": "without s",
    "ratio": "ratio",
    "lowest_ratio": "lowest",
    "highest_ratio": "highest",
    "events": "events",
    "rounds": "rounds",
}


def main() -> None:
    """Measures both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=20, help="how many are open (default: 20)")
    parser.add_argument("--blocks", type=int, default=6, help="pairs of blocks (default: 6)")
    parser.add_argument(
        "--block", type=int, default=6, help="rounds of a block, of which one is not timed (default: 6)"
    )
    parser.add_argument("--draws", type=int, default=5, help="how often the large page is drawn (default: 5; 0: not)")
    parser.add_argument("--name", default="page_cost", help=f"of the CSV file in {RESULTS.name}/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wardround-benchmark-") as folder:
        rows = [of_rounds(Path(folder), options.pages, options.blocks, options.block)]
        if options.draws:
            rows += of_drawing(Path(folder), options.draws)
    report(options.name, rows, _SHOWN)


# Rounds. -----------------------------------------------------------------------------------------------------------


def of_rounds(folder: Path, pages: int, pairs: int, block: int) -> dict[str, Any]:
    """The row of a round's time."""
    rounds = 2 * pairs * block
    text = re.sub(r"rounds: \d+", f"rounds: {rounds}", example_study())
    study, run = folder / "study.yaml", RunFolder(folder / "run")
    study.write_text(text, encoding="utf-8")
    generate_hospitals(folder / "hospitals", seed=parse_study(text).seed, images_per_site=16, holdout_per_site=4)
    command = [sys.executable, "-P", "-m", "server.cli", "simulate", str(study), "--data", str(folder / "hospitals")]
    command += ["--run", str(run.path), "--in-process", "--page", "127.0.0.1:0"]
    log = (folder / "simulation.log").open("wb")
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log, stdin=subprocess.DEVNULL
    )
    events = 0
    try:
        url = _url(run.path / "page.log", process)
        with_pages: list[int] = []
        for number in range(0, rounds, block):
            on = (number // block) % 2 == 0
            with viewers(url, pages if on else 0) as seen:
                _until_round(run, number + block, process)
            events += sum(seen)
            with_pages += range(number + 2, number + block + 1) if on else ()
        if process.wait(_PATIENCE) != 0:
            raise SystemExit(f"the simulation failed: {(folder / 'simulation.log').read_text()[-2000:]}")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait()
        log.close()
    seconds = {int(row["round"]): _seconds(row) for row in read_table(run.rounds).rows}
    blocks = [[seconds[first + place] for place in range(2, block + 1)] for first in range(0, rounds, block)]
    on_blocks, off_blocks = blocks[0::2], blocks[1::2]
    ratios = [
        statistics.median(one) / statistics.median(other) for one, other in zip(on_blocks, off_blocks, strict=True)
    ]
    with_seconds = median(list(itertools.chain.from_iterable(on_blocks)))
    without = median(list(itertools.chain.from_iterable(off_blocks)))
    return {
        "question": "round",
        "pages": pages,
        "with_seconds": with_seconds,
        "without_seconds": without,
        "ratio": round(with_seconds / without, 3),
        "lowest_ratio": round(min(ratios), 3),
        "highest_ratio": round(max(ratios), 3),
        "events": events,
        "rounds": rounds,
    }


@contextlib.contextmanager
def viewers(url: str, count: int) -> Iterator[list[int]]:
    """So many open pages; how many events each was told of is in the list once they are closed."""
    seen = [0] * count
    over = threading.Event()

    def look(place: int) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        urllib.request.urlopen(url, timeout=60).read()
        with urllib.request.urlopen(f"{url}events", timeout=60) as stream:
            while not over.is_set():
                line = stream.readline()
                if line.startswith(b"event: "):
                    seen[place] += 1
                if line == b"event: figures\n":
                    urllib.request.urlopen(f"{url}figures.json", timeout=60).read()

    threads = [threading.Thread(target=look, args=(place,), daemon=True) for place in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        over.set()
        for thread in threads:
            thread.join(30)


def _seconds(row: Any) -> float:
    return sum(float(row[f"seconds_{part}"]) for part in ROUND_PARTS)


def _url(log: Path, process: subprocess.Popen[bytes]) -> str:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end and process.poll() is None:
        if log.exists() and (found := re.search(r"http://\S+", log.read_text())):
            return found[0]
        time.sleep(0.1)
    raise SystemExit("the page did not start")


def _until_round(run: RunFolder, number: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end and process.poll() is None:
        rows = read_table(run.rounds).rows
        if rows and int(rows[-1]["round"]) >= number:
            return
        time.sleep(0.2)


# Drawing. ----------------------------------------------------------------------------------------------------------

_DRAWN = "() => [...document.querySelectorAll('[data-chart]')].every(e => e.dataset.drawn) && performance.now()"


def of_drawing(folder: Path, times: int) -> list[dict[str, Any]]:
    """The rows of a large page, until text and until all charts; none where there is no Chromium."""
    if CHROMIUM is None:
        print("no Chromium here: the drawing is not measured", file=sys.stderr)
        return []
    from playwright.sync_api import sync_playwright

    run = WrittenRun(folder / "large", sites=50, rounds=500, done=499)
    text, charts = [], []
    with (
        run.folder.locked(),
        command_page("server.cli", "--run", str(run.folder.path)) as url,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for _ in range(times + 1):
            # As tall as the page: every chart is in view at once, the most that there is to draw.
            page = browser.new_context(viewport={"width": 1280, "height": 4000}).new_page()
            page.goto(url, wait_until="commit")
            charts.append(page.wait_for_function(_DRAWN, timeout=120_000).json_value() / 1e3)
            text.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1e3)
            page.context.close()
        browser.close()
    nothing = dict.fromkeys(_SHOWN, "")
    return [
        nothing | {"question": f"draw: {what}", "pages": 1, "with_seconds": median(seconds[1:]), "rounds": 500}
        for what, seconds in (("text", text), ("all charts", charts))
    ]


if __name__ == "__main__":
    main()
