"""A task and its update as a site's audit log and the wire name them."""

from __future__ import annotations

from typing import Any

from client.outbox import PendingUpdate
from common.wire import federation_pb2 as pb
from common.wire.tensors import read_tensors

KINDS = {pb.TRAIN: "train", pb.EVALUATE: "evaluate"}
KIND_NUMBERS = {name: number for number, name in KINDS.items()}
CONTENTS = {
    "train": "change of the model's weights, number of batches; without differential privacy also sum of the training "
    "loss and number of patches",
    "evaluate": "Dice of each class over all validation cases, and which classes occurred",
}
CONTENTS_PRIVATE = {
    **CONTENTS,
    "train": "change of the model's weights with this site's noise, the study's number of steps; beside it the epsilon "
    "spent so far",
}
CONTENTS_SECURE = {
    "train": "under masks: change of the model's weights, its weight, loss and counts; the sum alone can be read",
    "evaluate": "under masks: Dice of each class, and which classes occurred; the sum alone can be read",
}
"""What an update consists of, in words (docs/what-leaves.md has every tensor): the second of a `Spender`, the last
of secure sums."""


def named(name: pb.TaskName) -> dict[str, Any]:
    """A task as it is recorded."""
    return {"kind": KINDS[name.kind], "round": name.round, "attempt": name.attempt}


def offered(header: pb.UploadHeader) -> dict[str, Any]:
    """What an upload's header says, as it is recorded."""
    offered = {**named(header.task), "sha256": header.blob.sha256.hex(), "cases": header.timing.cases}
    if header.HasField("privacy"):
        offered |= {"epsilon": header.privacy.epsilon, "delta": header.privacy.delta}
    return offered


def sent(pending: PendingUpdate, name: pb.TaskName, position: int, contents: str) -> dict[str, Any]:
    """What is about to leave, as it is recorded."""
    return {
        **named(name),
        "bytes": pending.size - position,
        "of_bytes": pending.size,
        "sha256": pending.sha256.hex(),
        "broadcast": pending.key.broadcast,
        "contents": contents,
        "tensors": len(read_tensors(pending.path)),
        "cases": pending.cases,
    }
