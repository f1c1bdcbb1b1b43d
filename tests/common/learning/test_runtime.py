"""How TensorFlow runs, whoever loads it by way of this project."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")])
def test_onednn_is_asked_for_unless_the_user_says_otherwise(before: str | None, after: str) -> None:
    """Tests run in processes that have loaded the project already, and inherit what it sets."""
    environment = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
    if before is not None:
        environment["TF_ENABLE_ONEDNN_OPTS"] = before
    command = [sys.executable, "-c", "import os, common; print(os.environ['TF_ENABLE_ONEDNN_OPTS'])"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == after


def test_tensorflow_heard_it(tensorflow: None) -> None:
    from tensorflow.python.util import _pywrap_util_port

    assert _pywrap_util_port.IsMklEnabled() == (os.environ["TF_ENABLE_ONEDNN_OPTS"] == "1")
