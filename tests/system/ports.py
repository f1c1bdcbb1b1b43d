"""Ports for servers of tests that are started more than once."""

from __future__ import annotations

import contextlib
import random
import socket


def free_port() -> int:
    """A port that nobody listens on now, and that no connection is given of itself: those begin at 32768.

    A coordinator listens there again after each kill, and what runs beside it opens connections all the time.
    """
    for port in random.sample(range(20_000, 32_768), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("127.0.0.1: none of 100 ports between 20000 and 32767 is free")
