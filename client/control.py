"""A site's control stream: says how far the site is, and brings what the coordinator asks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from client.site_log import of_this_site
from common.wire import federation_pb2 as pb


@dataclass(frozen=True)
class Said:
    """A message of the coordinator's; `count` is the how manieth thing it asks on its stream."""

    control: Control
    body: Any
    count: int


@dataclass(frozen=True)
class Ended:
    """A control stream is over, for this reason; None if the coordinator just ended it."""

    control: Control
    error: BaseException | None


class Control:
    """One control stream.

    Parameters
    ----------
    stub : of the coordinator's service.
    envelope : goes with each message.
    hello : the first.
    check : called with each message of the coordinator's; raises if it is not for this site.
    events : where `Said` and, at last, `Ended` are put.
    """

    def __init__(
        self,
        stub: Any,
        envelope: pb.Envelope,
        hello: pb.Hello,
        check: Callable[[pb.CoordinatorMessage], None],
        events: queue.SimpleQueue[Any],
    ) -> None:
        self._envelope = envelope
        self._check = check
        self._events = events
        self._outbox: queue.SimpleQueue[pb.SiteMessage | None] = queue.SimpleQueue()
        self.asked = 0
        self.ended = threading.Event()
        self.say(hello=hello)
        self._stream = stub.Attend(self._drain())
        threading.Thread(target=of_this_site(self._read), daemon=True, name="wardround-inbox").start()

    def say(self, **body: Any) -> None:
        """Sends a message of this body, in its turn; from any thread."""
        self._outbox.put(pb.SiteMessage(envelope=self._envelope, **body))

    def finish(self, seconds: float) -> None:
        """Nothing more comes from here: waits until the coordinator has read all and ends the stream."""
        self._outbox.put(None)
        self.ended.wait(seconds)

    def close(self) -> None:
        """Ends the stream now."""
        self._outbox.put(None)
        self._stream.cancel()

    def _drain(self) -> Iterator[pb.SiteMessage]:
        while (message := self._outbox.get()) is not None:
            yield message

    def _read(self) -> None:
        error: BaseException | None = None
        try:
            for message in self._stream:
                self._check(message)
                kind = message.WhichOneof("body")
                if kind is None:  # a word of a later version
                    continue
                if kind in ("task", "finished"):
                    self.asked += 1
                self._events.put(Said(self, getattr(message, kind), self.asked))
        except BaseException as raised:  # whatever it is, whoever waits for a message must hear of it
            error = raised
        self.asked += 1
        self.ended.set()
        self._events.put(Ended(self, error))
