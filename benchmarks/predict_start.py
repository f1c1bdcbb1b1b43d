"""How long does `wardround-site predict` take to start?

Of a published version and an image: the whole command, and how long it is on its way until it has read the model and
begins with the image, beside the Python interpreter alone and the interpreter with numpy. Each is a process of its own,
in turns; medians over the repetitions.

How to read it: "start" is a run on a file that is no whole image, so that it ends where the image is read. "whole"
includes segmenting the image. Goal of the start: 1.5 s or less on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._report import median, report

_SHOWN = {
    "step": "step",
    "seconds": "seconds",
    "ratio": "x interpreter",
    "repetitions": "repetitions",
}


def main() -> None:
    """Times all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a published version, of a 2D study")
    parser.add_argument("--image", type=Path, required=True, help="a TIFF that the model can segment")
    parser.add_argument("--authority", type=Path, help="ca.crt of the study (default: as predict has it)")
    parser.add_argument("--repetitions", type=int, default=7, help="of each (default: 7)")
    options = parser.parse_args()
    if options.repetitions < 1:
        parser.error("--repetitions: expected a positive number")
    with tempfile.TemporaryDirectory(prefix="wardround-benchmark-") as name:
        folder = Path(name)
        broken = folder / "broken.tif"
        broken.write_bytes(options.image.read_bytes()[:64])
        trust = ["--authority", str(options.authority)] if options.authority is not None else []
        predict = [sys.executable, "-P", "-m", "client.cli", "predict", str(options.model), *trust]
        steps = {
            "interpreter": ([sys.executable, "-c", "pass"], 0),
            "interpreter, numpy": ([sys.executable, "-c", "import numpy"], 0),
            "predict: start": ([*predict, str(broken), "--out", str(folder / "a")], None),
            "predict: whole": ([*predict, str(options.image), "--out", str(folder / "b")], 0),
        }
        seconds: dict[str, list[float]] = {step: [] for step in steps}
        for _ in range(options.repetitions + 1):
            for step, (command, expected) in steps.items():
                started = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                seconds[step].append(time.perf_counter() - started)
                for out in (folder / "a", folder / "b"):
                    shutil.rmtree(out, ignore_errors=True)
                if expected is not None and done.returncode != expected:
                    raise SystemExit(f"{step}: ended with {done.returncode}: {done.stderr[-2000:]}")
                if expected is None and (done.returncode == 0 or "broken.tif" not in done.stderr):
                    raise SystemExit(f"{step}: did not come to the image: {done.stderr[-2000:]}")
    found = {step: median(values[1:]) for step, values in seconds.items()}  # the first fills the system's cache
    report(
        "predict_start",
        [
            {
                "step": step,
                "seconds": value,
                "ratio": round(value / found["interpreter"], 1),
                "repetitions": options.repetitions,
            }
            for step, value in found.items()
        ],
        _SHOWN,
    )


if __name__ == "__main__":
    main()
