"""Alerts to a webhook, against a real HTTP server that fails first and answers then."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from common.errors import UsageError
from common.watching.alert import Alert
from server.watching.options import parse_options, read_secret
from server.watching.watch import Bell
from server.watching.webhook import Webhook

SECRET = b"0123456789abcdef0123456789abcdef"
ALERT = Alert("site-silent", "warning", "Round 3 waits for north.", "north", "See to north.", 3, "/data/patient-7.tif")


class Receiver:
    """A server that answers with these codes in turn, and then with 204."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.arrived = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with receiver.arrived:
                    receiver.requests.append((dict(self.headers), body))
                    code = receiver.codes.pop(0) if receiver.codes else 204
                    receiver.arrived.notify_all()
                if code == 0:  # hangs up without an answer
                    return
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", "http://127.0.0.1:9/")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook"

    def wait(self, count: int) -> None:
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.requests) >= count, 60)


@contextlib.contextmanager
def receiving(*codes: int) -> Iterator[Receiver]:
    receiver = Receiver(*codes)
    thread = threading.Thread(target=receiver.server.serve_forever, daemon=True)
    thread.start()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


def test_an_alert_is_sent_again_until_it_is_taken_and_signed_each_time() -> None:
    with receiving(500, 0, 429) as receiver:
        webhook = Webhook(receiver.url, SECRET, "cells", first_pause=0.02)
        webhook.tell("raised", ALERT)
        webhook.tell("resolved", ALERT)
        receiver.wait(5)
        webhook.close()
    assert len(receiver.requests) == 5
    for headers, body in receiver.requests:
        sent, signed = (part.split("=")[1] for part in headers["Wardround-Signature"].split(","))
        expected = hmac.new(SECRET, f"{sent}.".encode() + body, hashlib.sha256).hexdigest()
        assert hmac.compare_digest(signed, expected)
        assert abs(int(sent) - time.time()) < 300
        assert b"patient" not in body
    deliveries = [headers["Wardround-Delivery"] for headers, _ in receiver.requests]
    assert len(set(deliveries[:4])) == 1 and deliveries[4] != deliveries[0]
    events = [json.loads(body)["event"] for _, body in receiver.requests]
    assert events == ["raised"] * 4 + ["resolved"]
    assert json.loads(receiver.requests[0][1])["alert"] == {
        "code": "site-silent", "severity": "warning", "what": "Round 3 waits for north.", "where": "north",
        "todo": "See to north.", "round": 3,
    }  # fmt: skip


@pytest.mark.parametrize("code", [404, 302])
def test_what_another_try_would_not_change_is_given_up(code: int) -> None:
    with receiving(code) as receiver:
        webhook = Webhook(receiver.url, SECRET, "cells", first_pause=0.02)
        webhook.tell("raised", ALERT)
        webhook.tell("resolved", ALERT)
        receiver.wait(2)
        webhook.close()
    assert [json.loads(body)["event"] for _, body in receiver.requests] == ["raised", "resolved"]


def test_nobody_waits_for_a_webhook_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    webhook = Webhook("http://127.0.0.1:9/", SECRET, "cells", first_pause=0.01)
    for _ in range(500):
        webhook.tell("raised", ALERT)
    webhook.close(seconds=0.3)
    complaints = [record.message for record in caplog.records if "takes no alerts" in record.message]
    assert len(complaints) == 1
    assert "alerts could not be sent" in caplog.text


class Told:
    """Takes the place of a webhook."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def tell(self, event: str, alert: Alert, done: Callable[[], None]) -> None:
        self.events.append((event, alert.key))
        done()


def test_an_alert_is_told_once_also_by_the_next_process_and_once_more_when_it_is_over(tmp_path: Path) -> None:
    told: Any = Told()
    bell = Bell(tmp_path / "alerts.json", told)
    for _ in range(3):
        bell.ring((ALERT,))
    bell.ring(())
    bell.ring((ALERT,))  # it was gone for a moment
    assert told.events == [("raised", "site-silent:north")]
    again = Bell(tmp_path / "alerts.json", told)
    again.ring((ALERT,))
    assert len(told.events) == 1
    for _ in range(3):
        again.ring(())
    assert told.events[1:] == [("resolved", "site-silent:north")]
    again.ring((ALERT,))
    assert told.events[2:] == [("raised", "site-silent:north")]


def test_what_the_webhook_did_not_take_is_sent_by_the_next_process(tmp_path: Path) -> None:
    gone = Webhook("http://127.0.0.1:9/", SECRET, "cells", first_pause=0.01)
    bell = Bell(tmp_path / "alerts.json", gone)
    bell.ring((ALERT,))
    for _ in range(3):
        bell.ring(())
    gone.close(seconds=0.1)
    with receiving() as receiver:
        webhook = Webhook(receiver.url, SECRET, "cells")
        Bell(tmp_path / "alerts.json", webhook)
        webhook.close()
    assert [json.loads(body)["event"] for _, body in receiver.requests] == ["raised", "resolved"]
    assert json.loads((tmp_path / "alerts.json").read_text()) == {"raised": [], "waiting": []}


def test_options_are_checked_line_by_line(tmp_path: Path) -> None:
    text = "alerts:\n  webhook: https://x.example/hook\n  dice_drop: 2\ntracking: {mlflow: nowhere}\nmore: 1\n"
    with pytest.raises(UsageError) as caught:
        parse_options(text, "w.yaml")
    said = str(caught.value).splitlines()
    assert len(said) == 4
    assert all("w.yaml:" in line for line in said)
    assert any("webhook and secret_file together" in line for line in said)
    options = parse_options("alerts: {dice_drop: 0.1, silent: 2m}\n", "w.yaml")
    assert (options.alerts.rules.dice_drop, options.alerts.rules.silent_seconds) == (0.1, 120.0)


def test_a_secret_is_for_its_owner_alone_and_long_enough(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(UsageError, match="cannot be read"):
        read_secret(path)
    path.write_bytes(SECRET + b"\n")
    path.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        read_secret(path)
    path.chmod(0o600)
    assert read_secret(path) == SECRET
    path.write_bytes(b"short")
    with pytest.raises(UsageError, match="at least 16"):
        read_secret(path)
