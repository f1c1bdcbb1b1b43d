"""TensorBoard's files: scalars and pictures as TensorBoard itself reads and serves them."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow_federated as tff
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from server.releases import InThread, SamplePictures
from server.run_folder import RunFolder
from server.watching.samples import Sampler, read_samples, sampled_rounds

PATIENCE = 240.0


def row(number: int) -> Any:
    """A round's figures as the program releases them."""
    return OrderedDict(
        sites=3,
        seconds=60.0,
        seconds_training=40.0 + number,
        seconds_evaluation=2.0,
        slowest_site="north",
        train=OrderedDict(loss=np.float32(1.0 / number), patches=64),
        validation=OrderedDict({"dice": 0.5, "class": OrderedDict(cell=0.25 * number)}),
        holdout=OrderedDict(dice=0.6, site=OrderedDict(north=OrderedDict(dice=0.1 * number, iou=0.1))),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run folder in which two rounds were released."""
    run = RunFolder(tmp_path_factory.mktemp("run"))
    sampler = Sampler(["0001-east", "0002-north"], ["east", "north"], planar=False)
    evaluated: Any = SimpleNamespace(latest=SimpleNamespace(dice_of_cases=np.array([0.5, np.nan])))
    scalars = InThread(lambda: tff.program.TensorBoardReleaseManager(run.tensorboard), run.tensorboard)
    pictures = SamplePictures(run, ["background", "cell"], sampler, evaluated)

    async def release() -> None:
        for number in (1, 2):
            for index in (0, 1):
                label = np.zeros((6, 20, 30), np.uint8)
                label[2:5, 4:9, 4:9] = 1
                sampler.take(index, lambda: np.random.default_rng(0).random((6, 20, 30, 1), np.float32), label, label)
            await scalars.release(row(number), number)
            await pictures.release(row(number), number)
        await pictures.release(OrderedDict(sites=0), 3)  # a round that was skipped has no holdout
        await pictures.close()

    asyncio.run(release())
    return run


def test_scalars_are_loss_dice_by_class_and_origin_and_durations(run: RunFolder) -> None:
    events = EventAccumulator(str(run.tensorboard), size_guidance={"tensors": 0})
    events.Reload()
    found = {
        tag: [(each.step, round(float(np.frombuffer(each.tensor_proto.tensor_content or b"", np.float32)[0]), 3))
              if each.tensor_proto.tensor_content else (each.step, round(each.tensor_proto.float_val[0], 3))
              for each in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }  # fmt: skip
    assert found["train/loss"] == [(1, 1.0), (2, 0.5)]
    assert found["validation/class/cell"] == [(1, 0.25), (2, 0.5)]
    assert found["holdout/site/north/dice"] == [(1, 0.1), (2, 0.2)]
    assert found["seconds_training"] == [(1, 41.0), (2, 42.0)]
    assert "slowest_site" not in found


def test_pictures_show_image_truth_prediction_and_difference_by_slice(run: RunFolder) -> None:
    events = EventAccumulator(str(run.tensorboard / "samples"), size_guidance={"tensors": 0})
    events.Reload()
    assert sorted(events.Tags()["tensors"]) == ["samples/0001-east", "samples/0002-north"]
    shown = events.Tensors("samples/0001-east")
    assert [each.step for each in shown] == [1, 2]
    width, height, *pngs = shown[0].tensor_proto.string_val
    assert (int(width), int(height)) == (4 * 30, 20)
    assert len(pngs) == 2 and all(png.startswith(b"\x89PNG") for png in pngs)
    assert [sample.dice for sample in read_samples(run.path, 2)] == [0.5, None]
    assert sampled_rounds(run.path) == [1, 2]


def test_tensorboard_serves_the_folder(run: RunFolder, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run.tensorboard), "--host", "127.0.0.1"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--port", str(port), "--load_fast=false"], stdout=log, stderr=log)
    try:
        end, found = time.monotonic() + PATIENCE, {}
        while set(found) != {".", "samples"} and time.monotonic() < end and process.poll() is None:
            time.sleep(0.5)
            found = served(port, "scalars/tags") | served(port, "images/tags")
        assert set(found) == {".", "samples"}, (tmp_path / "log").read_text()
        assert "holdout/dice" in found["."]
        assert "samples/0001-east" in found["samples"]
    finally:
        process.terminate()
        process.wait()


def served(port: int, what: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/{what}", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
            return {run: tags for run, tags in found.items() if tags}
    except OSError:
        return {}
