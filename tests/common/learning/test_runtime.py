"""How TensorFlow runs, whoever loads it by way of this project."""

from __future__ import annotations


def test_convolutions_are_those_of_onednn_whatever_the_processor(tensorflow: None) -> None:
    from tensorflow.python.util import _pywrap_util_port

    assert _pywrap_util_port.IsMklEnabled()
