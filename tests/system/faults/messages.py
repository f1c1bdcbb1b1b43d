"""Malformed messages on every call of the service: is any taken, does the coordinator live, does its memory grow?

A coordinator with a round open is sent, by a client with the certificates of its sites, messages that no site
sends: random bytes; valid messages cut off, with bits changed, doubled or with parts moved; wrong studies, plans,
names, rounds, digests and sizes; messages above the limit; messages in a wrong order or many times; updates that are
torn, of wrong types, not finite or absurdly large; and bytes that are no TLS at all. Then its real sites come, and the
study must end with the weights of an undisturbed run.

How to read it: a row a kind of message; "sent" counts messages, "answers" says how calls ended (a gRPC status,
`refused` for a receipt that says no, `ended` for a stream that ended without one, `open` for one that was still open
when the client hung up). "taken" must be 0 everywhere.
"""

from __future__ import annotations

import hashlib
import random
import re
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.security.certificates import load_identity
from common.wire import federation_pb2 as pb
from common.wire.channel import CHANNEL_OPTIONS, Address, channel_credentials
from common.wire.tensors import Array, encode_chunks, encoded_size
from tests.system.faults.arena import COORDINATOR, Arena, Bench, Scenario, bench
from tests.system.faults.light import LightPlan, light_update
from tests.system.faults.report import Row, parser, report
from tests.system.faults.studies import light

import grpc  # isort: skip  (after the channel, which restricts its TLS)

SCENARIO = light(sites=6, rounds=2, deadline="15s")
_SERVICE = "/wardround.v1.Federation/"
_ANSWER_SECONDS = 5.0
_PATIENCE = 0.2  # for an answer on a stream that may stay open
_HUGE = 5 * 1024 * 1024


@dataclass
class Sent:
    """What became of one kind of message."""

    messages: int = 0
    taken: int = 0
    answers: Counter[str] = field(default_factory=Counter)


@dataclass
class Result:
    """What was sent, and what the coordinator's memory did meanwhile (resident, in MB)."""

    sent: dict[str, Sent] = field(default_factory=lambda: defaultdict(Sent))
    reasons: Counter[str] = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)

    @property
    def messages(self) -> int:
        """How many messages were sent."""
        return sum(one.messages for one in self.sent.values())


class Attacker:
    """A client with the sites' certificates that sends, as one of them at a time, what no site sends."""

    def __init__(self, arena: Arena, seed: int) -> None:
        scenario = arena.scenario
        self._arena = arena
        self.chance = random.Random(seed)
        self.plan = LightPlan.read(arena.bench.plan(scenario))
        self.site = scenario.sites[0]
        self.result = Result()
        self._channels: dict[str, Any] = {}
        self.task = self._task()
        self.broadcast = self._download()

    # --- the line ---------------------------------------------------------------------------------------------------

    def _stub(self, method: str) -> Any:
        if self.site not in self._channels:
            folder = self._arena.bench.identities(self._arena.scenario) / "sites" / self.site
            options = [option for option in CHANNEL_OPTIONS if "message_length" not in option[0]]
            options += [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
            address = str(Address("127.0.0.1", self._arena.port))
            credentials = channel_credentials(load_identity(folder))
            self._channels[self.site] = grpc.secure_channel(address, credentials, options=options)
        return self._channels[self.site].stream_stream(_SERVICE + method)

    def close(self) -> None:
        """Ends the channels."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def _task(self) -> pb.Task:
        """The task of the round under way, as a site gets it."""
        hello = pb.SiteMessage(envelope=self.envelope(), hello=pb.Hello(version="0", training_cases=1))
        for reply in self._stub("Attend")(_held([hello.SerializeToString()], 30), timeout=60):
            message = pb.CoordinatorMessage.FromString(reply)
            if message.WhichOneof("body") == "task":
                return message.task
        raise AssertionError("the coordinator gave no task")

    def _download(self) -> list[Array]:
        from common.wire.tensors import decode

        request = pb.DownloadRequest(
            envelope=self.envelope(), task=self.task.name, sha256=self.task.broadcast.sha256
        ).SerializeToString()
        chunks = [pb.Chunk.FromString(reply).data for reply in self._stub("Download")(iter([request]), timeout=30)]
        return decode(b"".join(chunks))

    def send(self, kind: str, method: str, messages: Sequence[bytes], *, hold: bool = False) -> None:
        """One call with these messages; its answers are counted. `hold`: the client keeps the stream open a while."""
        count = self.result.sent[kind]
        count.messages += len(messages)
        taken = 0
        try:
            call = self._stub(method)(_held(messages, _PATIENCE) if hold else iter(messages), timeout=_ANSWER_SECONDS)
            answer = "ended"
            for reply in call:
                if method == "Upload":
                    receipt = pb.UploadReply.FromString(reply)
                    if receipt.WhichOneof("body") == "receipt":
                        answer = "refused"
                        taken += receipt.receipt.accepted
                        self.result.reasons[
                            re.sub(r"\d[\d.e+]*|[0-9a-f]{16,}|site-\S+", "N", receipt.receipt.reason)
                        ] += 1
                elif method == "Attend":
                    answer = "open"
        except grpc.RpcError as error:
            answer = error.code().name
        count.answers[answer] += 1
        count.taken += taken

    def envelope(self, **other: Any) -> pb.Envelope:
        """This site's, or one that differs."""
        right: dict[str, Any] = {"study": self.plan.study, "plan_digest": self.plan.digest, "site": self.site}
        return pb.Envelope(**(right | other))

    # --- kinds of messages ------------------------------------------------------------------------------------------

    def round_of(self) -> None:
        """Sends a few messages of every kind, as one of the sites."""
        self.site = self.chance.choice(self._arena.scenario.sites)
        for kind in KINDS:
            for _ in range(3 if kind == "broken updates" else 1):
                getattr(self, f"send_{kind.replace(' ', '_')}")(kind)

    def send_random_bytes(self, kind: str) -> None:
        """What need not even be a message."""
        for method in (*METHODS, "Nothing"):
            self.send(kind, method, [self.chance.randbytes(self.chance.choice([0, 1, 7, 100, 3000]))])

    def send_changed(self, kind: str) -> None:
        """Valid messages that were cut off, flipped, doubled or shuffled."""
        for method in METHODS:
            message = self._valid(method)
            self.send(kind, method, [self._changed(message) for _ in range(2)], hold=method == "Attend")
        # After a valid first message, so that more than the first check sees it.
        self.send(kind, "Attend", [self._hello(), self._changed(self._progress())], hold=True)
        header = self._header(hashlib.sha256(b"x").digest(), encoded_size(self.plan.sent))
        self.send(kind, "Upload", [header, self._changed(pb.UploadMessage(data=b"y" * 500).SerializeToString())])

    def send_wrong_fields(self, kind: str) -> None:
        """Well-formed messages that speak for another site, study, plan, round or update, or of impossible numbers."""
        for method in METHODS:
            self.send(kind, method, [self._wrong(method)], hold=False)
        self.send(kind, "Attend", [self._hello(), self._wrong_progress()], hold=True)

    def send_too_large(self, kind: str) -> None:
        """Above the largest message; rarely, as each costs the sender more than the coordinator."""
        if self.chance.random() < 0.2:
            method = self.chance.choice(METHODS)
            self.send(kind, method, [self.chance.randbytes(1000) * (_HUGE // 1000)])
            failure = pb.Failure(task=self.task.name, reason="x" * _HUGE)
            self.send(kind, "Attend", [pb.SiteMessage(envelope=self.envelope(), failure=failure).SerializeToString()])

    def send_out_of_order(self, kind: str) -> None:
        """Data before the header, headers twice, progress before hello, hello twice, and calls of no message."""
        blob = self.chance.randbytes(500)
        data = pb.UploadMessage(data=blob).SerializeToString()
        header = self._header(hashlib.sha256(blob).digest(), encoded_size(self.plan.sent))
        for messages in ([data, header], [header, header, data], [header, header], [data, data], [header], []):
            self.send(kind, "Upload", messages)
        self.send(kind, "Attend", [self._progress(), self._hello()])
        self.send(kind, "Attend", [self._hello(), self._hello(), self._hello()], hold=True)
        self.send(kind, "Attend", [])

    def send_many_times(self, kind: str) -> None:
        """The same message again and again, of a round that is over."""
        old = pb.TaskName(kind=pb.TRAIN, round=self.task.name.round + 7, attempt=1)
        failure = pb.SiteMessage(envelope=self.envelope(), failure=pb.Failure(task=old, reason="again"))
        self.send(kind, "Attend", [self._hello(), *[failure.SerializeToString()] * 8], hold=True)
        self.send(kind, "Upload", [self._header(b"\1" * 32, encoded_size(self.plan.sent), task=old)] * 4)

    def send_broken_updates(self, kind: str) -> None:
        """Updates of the right name: torn, longer, of another digest, not finite, absurdly large, of other types."""
        name, tensors = self.chance.choice(
            [
                ("torn", None),
                ("longer", None),
                ("other digest", None),
                ("not finite", self._filled(np.nan)),
                ("infinite", self._filled(np.inf)),
                ("absurd", self._filled(1e9)),
                ("fewer", self._update()[:-1]),
                ("other types", [tensor.astype(np.float64) for tensor in self._update()]),
                ("no tensors", None),
            ]
        )
        update = self._update() if tensors is None else tensors
        blob = b"".join(bytes(chunk) for chunk in encode_chunks(update))
        digest, size = hashlib.sha256(blob).digest(), len(blob)
        if name == "torn":
            blob = blob[: len(blob) // 2]
        elif name == "longer":
            blob += b"\0" * 64
        elif name == "other digest":
            digest = bytes(32)
        elif name == "no tensors":
            blob = self.chance.randbytes(size)
            digest = hashlib.sha256(blob).digest()
        pieces = [blob[start : start + 50_000] for start in range(0, len(blob), 50_000)]
        messages = [self._header(digest, size), *(pb.UploadMessage(data=one).SerializeToString() for one in pieces)]
        self.send(kind, "Upload", messages)

    def send_no_tls(self, kind: str) -> None:
        """Bytes at the port that are no TLS, or only begin as it does."""
        with socket.create_connection(("127.0.0.1", self._arena.port), timeout=5) as line:
            head = self.chance.choice([b"", b"\x16\x03\x01\x02\x00\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
            line.sendall(head + self.chance.randbytes(300))
        self.result.sent[kind].messages += 1
        self.result.sent[kind].answers["hung up"] += 1

    # --- their parts ------------------------------------------------------------------------------------------------

    def _update(self) -> list[Array]:
        """What this site would really send, but for one value: were it taken, the weights would show it."""
        large, small = iter(self.broadcast), iter([np.ones((), np.float32)] * 99)
        broadcast = [next(large) if spec.shape else next(small) for spec in self.plan.broadcast]
        update = light_update(self.plan, self.site, self.task.name.round, broadcast)
        return [tensor + 1 if tensor.ndim else tensor for tensor in update]

    def _filled(self, value: float) -> list[Array]:
        return [np.full_like(one, value) if one.ndim and one.dtype.kind == "f" else one for one in self._update()]

    def _hello(self) -> bytes:
        hello = pb.Hello(version="0", training_cases=1)
        return pb.SiteMessage(envelope=self.envelope(), hello=hello).SerializeToString()

    def _progress(self) -> bytes:
        progress = pb.Progress(task=self.task.name, stage="training", batch=1, batches=4)
        return pb.SiteMessage(envelope=self.envelope(), progress=progress).SerializeToString()

    def _header(self, digest: bytes, size: int, **other: Any) -> bytes:
        header = pb.UploadHeader(
            envelope=other.get("envelope", self.envelope()),
            task=other.get("task", self.task.name),
            blob=pb.Blob(sha256=digest, size=size),
            timing=pb.Timing(cases=1),
            broadcast_sha256=other.get("broadcast", self.task.broadcast.sha256),
        )
        return pb.UploadMessage(header=header).SerializeToString()

    def _valid(self, method: str) -> bytes:
        match method:
            case "Attend":
                return self.chance.choice([self._hello(), self._progress()])
            case "Download":
                request = pb.DownloadRequest(
                    envelope=self.envelope(), task=self.task.name, sha256=self.task.broadcast.sha256
                )
                return request.SerializeToString()
            case "Upload":
                return self._header(self.chance.randbytes(32), encoded_size(self.plan.sent))
            case _:
                return pb.FetchRequest(envelope=self.envelope(plan_digest=b""), version="v1").SerializeToString()

    def _changed(self, message: bytes) -> bytes:
        """The message with something done to its bytes."""
        chance = self.chance
        altered = bytearray(message)
        match chance.randrange(5):
            case 0:
                del altered[chance.randrange(len(altered)) :]
            case 1:
                for _ in range(chance.choice([1, 1, 2, 8])):
                    altered[chance.randrange(len(altered))] ^= 1 << chance.randrange(8)
            case 2:
                start = chance.randrange(len(altered))
                altered[start:start] = altered[start : start + chance.randrange(1, 40)]
            case 3:
                at = chance.randrange(len(altered))
                altered[at:at] = chance.randbytes(chance.randrange(1, 12))
            case _:
                altered += b"\xff" * chance.randrange(1, 12)
        return bytes(altered)

    def _wrong_envelope(self) -> pb.Envelope:
        wrong: list[dict[str, Any]] = [
            {"site": next(site for site in self._arena.scenario.sites if site != self.site)},
            {"site": "nobody"},
            {"site": ""},
            {"site": "../../etc/passwd"},
            {"study": "another"},
            {"study": "x" * 100_000},
            {"plan_digest": bytes(32)},
            {"plan_digest": b""},
            {"study": "", "site": "", "plan_digest": b""},
        ]
        return self.envelope(**self.chance.choice(wrong))

    def _wrong_task(self) -> pb.TaskName:
        name = self.task.name
        return self.chance.choice(
            [
                pb.TaskName(kind=pb.EVALUATE, round=name.round, attempt=name.attempt),
                pb.TaskName(kind=99, round=name.round, attempt=name.attempt),  # type: ignore[arg-type]
                pb.TaskName(kind=name.kind, round=0, attempt=name.attempt),
                pb.TaskName(kind=name.kind, round=2**32 - 1, attempt=2**32 - 1),
                pb.TaskName(),
            ]
        )

    def _wrong(self, method: str) -> bytes:
        chance = self.chance
        envelope, task = self._wrong_envelope(), self.task.name
        if chance.random() < 0.5:
            envelope, task = self.envelope(), self._wrong_task()
        sizes = (0, 1, 2**40, 2**64 - 1, encoded_size(self.plan.sent))
        match method:
            case "Attend":
                failure = pb.Failure(task=task, reason="\0\n" + "x" * chance.choice([0, 10, 10_000]))
                return pb.SiteMessage(envelope=envelope, failure=failure).SerializeToString()
            case "Download":
                digest = chance.choice([b"", bytes(31), bytes(32), bytes(1000)])
                return pb.DownloadRequest(
                    envelope=envelope, task=task, sha256=digest, offset=chance.choice(sizes)
                ).SerializeToString()
            case "Upload":
                digest = chance.choice([b"", bytes(31), bytes(33), chance.randbytes(32)])
                wrong: dict[str, Any] = {"envelope": envelope, "task": task}
                if chance.random() < 0.3:
                    wrong = {"broadcast": chance.choice([b"", bytes(32), bytes(99)])}
                return self._header(digest, chance.choice(sizes), **wrong)
            case _:
                version = chance.choice(["v1", "../state", "v99999999999", "\0", "x" * 10_000])
                return pb.FetchRequest(envelope=self._wrong_envelope(), version=version).SerializeToString()

    def _wrong_progress(self) -> bytes:
        chance = self.chance
        body: dict[str, Any] = chance.choice(
            [
                {"progress": pb.Progress(task=self.task.name, stage="done", batch=9, batches=2)},
                {"progress": pb.Progress(task=self.task.name, stage="x" * 50_000)},
                {"progress": pb.Progress(task=self._wrong_task(), stage="training", batch=2**32 - 1, batches=0)},
                {"failure": pb.Failure(task=self._wrong_task(), reason="no")},
                {},
            ]
        )
        envelope = self.chance.choice([self.envelope(), self._wrong_envelope()])
        return pb.SiteMessage(envelope=envelope, **body).SerializeToString()


METHODS = ("Attend", "Download", "Upload", "Fetch")
KINDS = (
    "random bytes",
    "changed",
    "wrong fields",
    "too large",
    "out of order",
    "many times",
    "broken updates",
    "no tls",
)


def attack(arena: Arena, count: int, seed: int, say: Callable[[str], None] = lambda line: None) -> Result:
    """Sends at least so many messages to the arena's coordinator, which runs alone; its sites come afterwards.

    Raises AssertionError where the coordinator dies or does anything that its journal shows.
    """
    coordinator = arena.start(COORDINATOR)
    arena.until(lambda: coordinator.poll() is not None or arena.status().get("state") == "waiting for sites")
    arena.until(lambda: coordinator.poll() is not None or bool(arena.events("opened")))
    before = _decisions(arena)
    attacker = Attacker(arena, seed)
    result = attacker.result
    steps = 0
    try:
        while result.messages < count:
            attacker.round_of()
            assert coordinator.poll() is None, f"the coordinator died:\n{coordinator.said()[-3000:]}"
            if steps % 5 == 0:
                result.memory.append(resident_mb(coordinator.pid))
                result.stored.append(sum(1 for _ in arena.run.updates.iterdir()))
            if steps % 50 == 0:
                say(f"{result.messages} messages, {result.memory[-1]:.0f} MB, {result.stored[-1]} files of updates")
            steps += 1
    finally:
        attacker.close()
    assert "Traceback" not in coordinator.said(), f"a defect:\n{coordinator.said()[-6000:]}"
    assert _decisions(arena) == before, f"decided because of malformed messages: {_decisions(arena)}"
    return result


def _decisions(arena: Arena) -> list[tuple[str, Any, Any, Any]]:
    """What the journal holds, but for refusals and deadlines that passed without sites."""
    return [
        (event["event"], event["kind"], event["round"], event["site"])
        for event in arena.events()
        if event["event"] not in ("refused", "late", "retried")
    ]


def _held(messages: Sequence[bytes], seconds: float) -> Iterator[bytes]:
    """The messages, and then a stream that stays open a while."""
    import time

    yield from messages
    time.sleep(seconds)


def resident_mb(pid: int) -> float:
    """Memory of a process, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise AssertionError(f"process {pid} has no memory")


def growth(memory: Sequence[float]) -> tuple[float, float]:
    """Resident memory after the first tenth of the messages and at the end, in MB; each the mean of a few samples."""
    tenth = max(1, len(memory) // 10)
    return float(np.mean(memory[tenth : 2 * tenth] or memory)), float(np.mean(memory[-tenth:]))


def run_messages(made: Bench, scenario: Scenario, count: int, seed: int) -> tuple[Result, list[str]]:
    """What was sent, and what is wrong with the study's end afterwards."""
    undisturbed = made.undisturbed(scenario)
    with made.arena(scenario) as arena:
        result = attack(arena, count, seed, lambda line: print(line, flush=True))
        arena.run_to_end()
        # A site whose update was refused is asked again in the next attempt.
        wrong = arena.left().without("attempt").differences(undisturbed.without("attempt"))
    if not wrong:
        arena.remove()
    return result, wrong


def main() -> None:
    """Runs it."""
    options = parser(__doc__)
    options.add_argument("--count", type=int, default=10_000, help="messages (default: 10000)")
    options.add_argument("--seed", type=int, default=1, help="of what is sent (default: 1)")
    chosen = options.parse_args()
    with bench(chosen.folder) as made:
        result, wrong = run_messages(made, SCENARIO, chosen.count, chosen.seed)
    rows: list[Row] = [
        {
            "kind": kind,
            "sent": sent.messages,
            "taken": sent.taken,
            "answers": ", ".join(f"{number} {answer}" for answer, number in sent.answers.most_common()),
        }
        for kind, sent in result.sent.items()
    ]
    taken = sum(sent.taken for sent in result.sent.values())
    first, last = growth(result.memory)
    summary = (
        f"{result.messages} messages: {taken} taken. The coordinator lived and held {first:.0f} MB after a tenth of "
        f"them and {last:.0f} MB at the end ({(last / first - 1):+.1%}), with at most {max(result.stored)} files of "
        "updates on disk; its sites then came, and the study ended with "
        + ("the weights of the undisturbed run." if not wrong else f"DIFFERENCES: {wrong}")
    )
    print(
        "\nReasons on receipts:", *(f"{count:5} {reason}" for reason, count in result.reasons.most_common()), sep="\n"
    )
    report("messages", rows, summary, write_docs=chosen.write_docs)
    raise SystemExit(0 if taken == 0 and not wrong else 1)


if __name__ == "__main__":
    main()
