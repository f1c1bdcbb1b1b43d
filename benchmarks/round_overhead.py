"""What does a round cost beside the training?

Real processes on this machine: the coordinator, and a process a site, over mutual TLS on loopback. Training is replaced
by the identity plus a constant of the site's own (1e-6 times its number), so that what remains is the platform: sending
the weights down and the updates up, checking and storing them, summing them, updating and saving the weights. The
coordinator is the product's, up to where it would publish. A site is the product's agent; it gets the plan's digest and
types from a file that the coordinator writes once it has compiled the study, and never loads TensorFlow.

Compared in the same run: the same bytes between as many processes through bare gRPC streams with the same TLS ("bare"),
and the same with SHA-256 on both sides and every upload written and synced at the server ("durable", the least that a
round must do to survive a crash). Half of these copies are timed before the rounds, half after them.

How to read it: "round s" is the median time from the beginning of one round to that of the next, the first round left
out; everything between rounds, such as saving the state, is in it. "x bare" and "x durable" are its ratios to the
copies. "bytes" is what the tensors' blobs of a round add up to, divided by 2 x sites x the weights' own bytes. "peak
MB" is the most memory that the coordinator ever held, TensorFlow included ("ready MB": what it holds once the study is
compiled). "launch s" is from the start of its process to the first round. "exact" says whether the last weights are, to
the bit, the first ones plus the mean of the sites' constants in every round. The CSV also has the median seconds of a
round's call of the cohort, and of a site's download and upload within it.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._bare_stream import BareStream
from benchmarks._processes import processes
from benchmarks._report import median, report
from benchmarks._study import benchmark_study
from common.security.certificates import ensure_simulation_identities, load_identity
from common.study import Study, load_study
from common.wire.tensors import Array, TensorSpec
from server.journal import Journal
from server.run_folder import RunFolder, write_atomically

STEP = 1e-6
PLAN = "plan.json"
OUTCOME = "outcome.json"
_SHOWN = {
    "filters": "filters",
    "parameters": "weights",
    "sites": "sites",
    "round_seconds": "round s",
    "bare_seconds": "bare s",
    "durable_seconds": "durable s",
    "to_bare": "x bare",
    "to_durable": "x durable",
    "bytes_ratio": "bytes",
    "peak_mb": "peak MB",
    "ready_mb": "ready MB",
    "launch_seconds": "launch s",
    "exact": "exact",
}


def main() -> None:
    """Measures every combination of sizes asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[5], help="numbers of sites, up to 50 (default: 5)")
    parser.add_argument("--filters", type=int, nargs="+", default=[16, 64], help="sizes of the U-Net (default: 16 64)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds, at least 3 (default: 10)")
    parser.add_argument(
        "--copies", type=int, default=6, help="how often the bytes are copied in each mode (default: 6)"
    )
    parser.add_argument("--threads", type=int, default=1, help="TensorFlow's threads at the coordinator (default: 1)")
    parser.add_argument(
        "--folder", type=Path, help="where updates and states are written (default: a temporary folder)"
    )
    roles = parser.add_subparsers(metavar="")  # the processes that it starts; not for people
    coordinator = roles.add_parser("coordinator")
    coordinator.add_argument("run", type=Path)
    coordinator.set_defaults(role=_coordinator)
    site = roles.add_parser("site")
    site.add_argument("run", type=Path)
    site.add_argument("name")
    site.set_defaults(role=_site)
    options = parser.parse_args()
    if "role" in options:
        options.role(options)
        return
    if options.rounds < 3:
        parser.error("--rounds: expected at least 3, of which the first and the last are not timed")
    rows = []
    for filters in options.filters:
        for count in options.sites:
            with tempfile.TemporaryDirectory(prefix="wardround-benchmark-", dir=options.folder) as folder:
                print(f"U-Net of {filters} filters, {count} sites ...", file=sys.stderr, flush=True)
                rows.append(measure(Path(folder), filters, count, options.rounds, options.copies, options.threads))
    report("round_overhead", rows, _SHOWN)


def measure(folder: Path, filters: int, count: int, rounds: int, copies: int, threads: int) -> dict[str, Any]:
    """One row: the study's rounds, between two halves of the copies."""
    sites = [f"site-{number:02d}" for number in range(count)]
    study = benchmark_study(filters=filters, patch=(32, 32), rounds=rounds, sites=sites, threads=threads)
    run = RunFolder(folder / "run")
    run.prepare(study)
    ensure_simulation_identities(run.identity, study.name, sites, ["127.0.0.1"])
    with processes(folder) as started:
        launched = time.time()
        coordinator = started.start("coordinator", "round_overhead", "coordinator", run.path)
        started.wait_until((run.path / PLAN).exists)
        plan = json.loads((run.path / PLAN).read_text())
        model_bytes = 4 * plan["parameters"]
        journal = Journal(run.journal)
        started.wait_until(
            lambda: bool(journal.events("opened"))
        )  # it waits for its sites, and takes no time from the copies
        floor = BareStream(started, run.identity, sites, model_bytes, folder / "copies")
        seconds = {
            "bare": [floor.seconds("bare")][1:],
            "durable": [floor.seconds("durable")][1:],
        }  # the first is not timed
        _copy(floor, seconds, copies - copies // 2)
        running = [started.start(site, "round_overhead", "site", run.path, site) for site in sites]
        started.wait_until(lambda: all(process.poll() is not None for process in [coordinator, *running]))
        _copy(floor, seconds, copies // 2)
    opened = [event["at"] for event in journal.events("opened")]
    journal.close()
    with run.sites.open(newline="") as file:
        ledger = [row for row in csv.DictReader(file) if int(row["round"]) > 1]
    round_seconds = median(np.diff(opened[1:]).tolist())
    bare, durable = median(seconds["bare"]), median(seconds["durable"])
    moved = sum(int(row["bytes_down"]) + int(row["bytes_up"]) for row in ledger) / (rounds - 1)
    return {
        "filters": filters,
        "parameters": plan["parameters"],
        "sites": count,
        "round_seconds": round_seconds,
        "bare_seconds": bare,
        "durable_seconds": durable,
        "to_bare": round(round_seconds / bare, 3),
        "to_durable": round(round_seconds / durable, 3),
        "bytes_ratio": round(moved / (2 * count * model_bytes), 5),
        **json.loads((run.path / OUTCOME).read_text()),
        "launch_seconds": round(opened[0] - launched, 2),
        "call_seconds": median([float(row["seconds_round"]) for row in ledger]),
        "download_seconds": median([float(row["seconds_download"]) for row in ledger]),
        "upload_seconds": median([float(row["seconds_upload"]) for row in ledger]),
    }


def _copy(floor: BareStream, seconds: dict[str, list[float]], times: int) -> None:
    for _ in range(times):
        seconds["bare"].append(floor.seconds("bare"))
        seconds["durable"].append(floor.seconds("durable"))


# The coordinator's process. ----------------------------------------------------------------------------------------


def _coordinator(options: argparse.Namespace) -> None:
    """The product's coordinator, which also hands out the plan, and ends where it would publish."""
    study = load_study(options.run / "study.yaml")
    run = RunFolder(options.run)
    memory = {}

    import common.learning.plan
    from common.models import build_network
    from server import coordinator

    build_plan = common.learning.plan.build_plan

    def build_and_hand_out(study: Study) -> Any:
        plan = build_plan(study)
        memory["ready_mb"] = _memory_mb("VmRSS")
        handout = {
            "digest": plan.digest.hex(),
            "parameters": build_network(study).parameters,
            "broadcast": [[spec.dtype, spec.shape] for spec in plan.train.broadcast],
            "sent": [[spec.dtype, spec.shape] for spec in plan.train.sent],
            "secure": [[spec.shape, spec.bits] for spec in plan.train.secure],
        }
        write_atomically(run.path / PLAN, json.dumps(handout))
        return plan

    def instead_of_publishing(*arguments: object, **options: object) -> dict[str, Any]:
        memory["peak_mb"] = _memory_mb("VmHWM")
        return {"publication": {"version": "none", "folder": "none"}}

    common.learning.plan.build_plan = build_and_hand_out
    coordinator.publish_study = instead_of_publishing
    coordinator.run(study, run, coordinator.Setup("127.0.0.1:0", run.identity / "coordinator"))

    from server.state import load_weights

    network = build_network(study)
    first = [np.asarray(weight) for weight in network.initial_weights(study.seed)]
    last = load_weights(
        run.models, study.training.rounds, [TensorSpec("float32", spec.shape) for spec in network.specs]
    )
    outcome = {**memory, "exact": "yes" if _is_exact(study, first, last) else "NO"}
    write_atomically(run.path / OUTCOME, json.dumps(outcome))


def _is_exact(study: Study, first: Sequence[Array], last: Sequence[Array]) -> bool:
    """Whether every round added the mean of the sites' constants, summed in the order of their names."""
    total = np.float32(0)
    for number in range(len(study.cohort.sites)):
        total += _update_value(number)
    mean = total / np.float32(len(study.cohort.sites))
    for weights, found in zip(first, last, strict=True):
        expected = weights.copy()
        for _ in range(study.training.rounds):
            expected -= mean
        if not np.array_equal(expected, found):
            return False
    return True


def _memory_mb(name: str) -> int:
    """A figure of this process's memory, as the kernel counts it (VmRSS: now, VmHWM: the most so far), in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 // 10**6
    raise RuntimeError(f"/proc/self/status: no {name}; this benchmark needs Linux")


# A site's process. -------------------------------------------------------------------------------------------------


def _update_value(number: int) -> np.float32:
    """What site `number` sends for every weight: the weights before its training minus those after it."""
    return np.float32(-STEP * (number + 1))


class ConstantWorker:
    """Does a site's part without training: sends a constant for every weight, one patch and a loss of 1."""

    training_cases = 1
    validation_cases = 0

    def __init__(self, plan: dict[str, Any], number: int) -> None:
        self.digest = bytes.fromhex(plan["digest"])
        self._broadcast = _specs(plan["broadcast"])
        self._update: list[Array] = [
            np.full(spec.shape, _sent_value(spec, number), spec.dtype) for spec in _specs(plan["sent"])
        ]

    def expected(self, kind: str) -> Sequence[TensorSpec]:
        """See `client.work.Worker`."""
        return self._broadcast

    def work(self, kind: str, round_number: int, broadcast: Sequence[Array], on_batch: Any) -> Sequence[Array]:
        """See `client.work.Worker`."""
        on_batch(1, 1)
        return self._update

    def cases(self, kind: str) -> int:
        """See `client.work.Worker`."""
        return 1


def _specs(entries: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(dtype, tuple(shape)) for dtype, shape in entries)


def _sent_value(spec: TensorSpec, number: int) -> Any:
    """Of a weight the site's constant; of a secure sum, whose numbers are not floats, any that fits."""
    if not spec.shape or spec.dtype == "uint8":
        return 1
    return 2**25 + number if spec.dtype == "uint32" else _update_value(number)  # 26 bits with 50 sites


def _secure_task(study: Study, name: str, run: RunFolder, plan: dict[str, Any]) -> Any:
    """The site's side of secure sums, where the study has them."""
    if not study.secure_aggregation.required:
        return None
    from client.policy import NO_POLICY, secure_policy
    from client.secure_task import SecureTask
    from common.secure_aggregation.masking import InputSpec
    from common.security.signing import load_signer

    folder = run.identity / "sites" / name
    work = run.path / "sites" / name
    work.mkdir(parents=True, exist_ok=True)
    return SecureTask(
        study,
        name,
        bytes.fromhex(plan["digest"]),
        load_identity(folder).run,
        {"train": [InputSpec(tuple(shape), bits) for shape, bits in plan["secure"]]},
        signer=load_signer(folder),
        folder=work,
        policy=lambda: secure_policy(NO_POLICY, study),
    )


def _site(options: argparse.Namespace) -> None:
    run_site(options.run, options.name)
    assert "tensorflow" not in sys.modules


def run_site(folder: Path, name: str) -> None:
    """One site of the study in the run folder, to its end."""
    from common.wire.channel import parse_address

    # `client.work` names the plan's types, whose module loads TensorFlow Federated; nothing here is of these types.
    stand_in: Any = types.ModuleType("common.learning.plan")
    stand_in.__getattr__ = lambda name: None
    sys.modules.setdefault("common.learning.plan", stand_in)
    from client.agent import Agent

    study = load_study(folder / "study.yaml")
    run = RunFolder(folder)
    plan = json.loads((run.path / PLAN).read_text())
    address = parse_address(run.read_status()["address"])
    worker = ConstantWorker(plan, study.cohort.sites.index(name))
    identity = load_identity(run.identity / "sites" / name)
    secure = _secure_task(study, name, run, plan)
    Agent(study.name, name, worker, address, identity, run.path / "sites" / name, secure=secure).run()


if __name__ == "__main__":
    main()
