"""Alerts to a webhook: signed, sent again until they are taken, each once; in a thread of its own.

A message is a POST of JSON:

    {"format": 1, "study": "nuclei", "event": "raised", "time": "2026-01-01T00:00:00+00:00",
     "alert": {"code": "site-silent", "severity": "warning", "what": "...", "where": "north", "todo": "...",
               "round": 3}}

with the headers ``Wardround-Delivery``, the same for every try of one message, and
``Wardround-Signature: t=<Unix time>,v1=<hex>``: HMAC-SHA256 by the shared secret over ``<Unix time>.<body>``. A
receiver compares it in constant time, refuses old times, and drops a delivery that it has. What is sent is an alert's
fixed words, names of sites and figures: nothing that an error, a site or a file said.
"""

from __future__ import annotations

import collections
import datetime
import hashlib
import hmac
import http.client
import json
import logging
import ssl
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from common.version import VERSION
from common.watching.alert import Alert

_log = logging.getLogger("wardround.coordinator")
_MOST_WAITING: Final = 200
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 300.0
_TIMEOUT: Final = 10.0
_WORTH_ANOTHER_TRY: Final = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class _Message:
    delivery: str
    body: bytes
    done: Callable[[], None]


class Webhook:
    """Sends messages in order, one at a time.

    Parameters
    ----------
    url, secret : where, and what signs.
    study : the study's name.
    first_pause : seconds after the first failure; each next one is twice as long, up to five minutes.
    """

    def __init__(self, url: str, secret: bytes, study: str, *, first_pause: float = _FIRST_PAUSE) -> None:
        self._url = url
        self._secret = secret
        self._study = study
        self._first_pause = first_pause
        self._waiting: collections.deque[_Message] = collections.deque()
        self._changed = threading.Condition()
        self._closing = False
        self._complained = False
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._thread = threading.Thread(target=self._run, daemon=True, name="wardround-webhook")
        self._thread.start()

    def tell(self, event: str, alert: Alert, done: Callable[[], None] = lambda: None) -> None:
        """Has an alert sent that was "raised" or "resolved"; returns at once.

        `done` is called, in another thread, when the message needs no further try.
        """
        about = {name: getattr(alert, name) for name in ("code", "severity", "what", "where", "todo", "round")}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        content = {"format": 1, "study": self._study, "event": event, "time": now, "alert": about}
        with self._changed:
            if len(self._waiting) >= _MOST_WAITING:
                self._waiting.popleft()
            self._waiting.append(_Message(str(uuid.uuid4()), json.dumps(content).encode(), done))
            self._changed.notify_all()

    def close(self, seconds: float = 3.0) -> None:
        """Sends what waits, for so long at most, and ends."""
        end = time.monotonic() + seconds
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while self._waiting and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._waiting:
                _log.warning("%d alerts could not be sent to the webhook", len(self._waiting))
                self._waiting.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        pause = self._first_pause
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closing:
                        return
                    self._changed.wait()
                message = self._waiting[0]
            if self._send(message):
                pause = self._first_pause
                message.done()
                with self._changed:
                    if self._waiting and self._waiting[0] is message:
                        self._waiting.popleft()
                    self._changed.notify_all()
            else:
                with self._changed:
                    self._changed.wait(min(pause, 0.2) if self._closing else pause)
                pause = min(pause * 2, _LONGEST_PAUSE)

    def _send(self, message: _Message) -> bool:
        """Whether the message needs no further try."""
        now = str(int(time.time()))
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"wardround/{VERSION}",
            "Wardround-Delivery": message.delivery,
            "Wardround-Signature": f"t={now},v1={signature(self._secret, now, message.body)}",
        }
        request = urllib.request.Request(self._url, message.body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=_TIMEOUT):
                self._complained = False
                return True
        except urllib.error.HTTPError as error:
            self._complain(f"it answers {error.code}")
            return error.code not in _WORTH_ANOTHER_TRY
        except (OSError, http.client.HTTPException, ssl.SSLError) as error:
            self._complain(str(getattr(error, "reason", "") or error or type(error).__name__))
            return False

    def _complain(self, why: str) -> None:
        """Says once that alerts do not get through, until one does."""
        if not self._complained:
            _log.warning("the webhook takes no alerts: %s; it is tried again", why)
        self._complained = True


def signature(secret: bytes, time_sent: str, body: bytes) -> str:
    """The hex HMAC-SHA256 of a message.

    >>> signature(b"key", "1", b"{}")[:16]
    '1ba6b8171186efc6'
    """
    return hmac.new(secret, time_sent.encode() + b"." + body, hashlib.sha256).hexdigest()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """What was meant for one address is not sent to another."""

    def redirect_request(self, *_: Any) -> None:
        """None: the answer counts as it is."""
