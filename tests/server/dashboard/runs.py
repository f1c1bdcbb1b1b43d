"""Run folders as a coordinator leaves them, of any size, written in a second: what pages and reports are tested on."""

from __future__ import annotations

import csv
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.security.audit import AuditLog
from common.security.certificates import ensure_simulation_identities
from common.security.signing import load_signer
from common.study import Study, parse_study
from server.run_folder import RunFolder
from server.watching.samples import Taken, View, write_samples

STUDY = """
study: {name}
seed: 7
task: {{dimensions: {dimensions}, channels: {channels}, classes: [background, tumour, edema]}}
model: {{filters: 8, depth: 3, head: softmax}}
preprocessing: {{patch: {patch}}}
training: {{rounds: {rounds}{patches}}}
cohort: {{sites: [{sites}], quorum: {quorum}, deadline: 10m}}
{sections}
"""
PRIVACY = (
    "privacy: {unit: patient, epsilon: 8, delta: 1e-5, noise_multiplier: 1.1, clip_norm: 1.0, patients_per_step: 4}"
)
SECURE = "secure_aggregation: {protocol: bonawitz, minimum_cohort: 4}"


def site_names(number: int) -> list[str]:
    """That many names, in order."""
    known = ["central", "east", "north", "south", "west"]
    return known if number == 5 else [f"hospital-{place:02d}" for place in range(1, number + 1)]


class WrittenRun:
    """A run folder under way, to be changed as a coordinator would.

    Parameters
    ----------
    folder : where; made.
    sites, rounds : how many; of the rounds `done` are over.
    sections : further sections of the study file.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sites: int = 5,
        rounds: int = 24,
        done: int = 6,
        dimensions: int = 2,
        name: str = "cells",
        sections: str = "",
    ) -> None:
        self.folder = RunFolder(folder)
        self.names = site_names(sites)
        text = STUDY.format(
            name=name,
            dimensions=dimensions,
            channels=3 if dimensions == 2 else 1,
            patch=[32] * dimensions,
            rounds=rounds,
            sites=", ".join(self.names),
            quorum=max(2, sites - 1),
            patches="" if "unit: patient" in sections else ", patches_per_epoch: 64, batch_size: 8",
            sections=sections,
        )
        self.study: Study = parse_study(text)
        self.folder.prepare(self.study)
        self.rounds = rounds
        self._random = random.Random(3)
        self._columns: dict[Path, list[str]] = {}
        self.done = 0
        self._rows: dict[Path, list[Mapping[str, Any]]] = {}
        for _ in range(done):
            self.end_round(write=False)
        for path, rows in self._rows.items():
            self._write(path, rows, header=True)
        self.status()

    # Rounds. --------------------------------------------------------------------------------------------------------

    def end_round(self, *, write: bool = True) -> None:
        """A round ends: its rows are added to the tables."""
        self.done += 1
        number, noise = self.done, self._random.gauss
        quality = 0.93 - 0.6 * math.exp(-number / max(self.rounds / 5, 3))

        def dice(offset: float = 0.0) -> float:
            return round(min(max(quality + offset + noise(0, 0.008), 0.0), 1.0), 5)

        seconds = {site: (1.2 + noise(0, 0.1), 21 + 4 * noise(0, 1), 1.5 + noise(0, 0.1)) for site in self.names}
        slowest = max(seconds, key=lambda site: sum(seconds[site]))
        download, work, upload = (round(abs(value), 3) for value in seconds[slowest])
        row: dict[str, Any] = {
            "round": number, "attempt": 1, "sites": len(self.names), "seconds": round(download + work + upload + 1, 3),
            "seconds_download": download, "seconds_training": work, "seconds_upload": upload, "seconds_waiting": 0.4,
            "seconds_aggregation": 0.8, "seconds_evaluation": round(5 + abs(noise(0, 0.3)), 3), "slowest_site": slowest,
            "holdout/cases": 4 * len(self.names), "holdout/dice": dice(), "holdout/iou": dice(-0.1),
        }  # fmt: skip
        for place, each in enumerate(("tumour", "edema")):
            row |= {f"holdout/class/{each}/dice": dice(-0.06 * place), f"holdout/class/{each}/iou": dice(-0.15)}
        for place, site in enumerate(self.names):
            offset = -0.01 * (place % 7)
            row |= {
                f"holdout/site/{site}/dice": dice(offset),
                f"holdout/site/{site}/iou": dice(offset - 0.1),
                f"holdout/site/{site}/cases": 4,
            }
        row |= {"train/loss": round(1.2 * math.exp(-number / (self.rounds / 4)) + 0.2 + noise(0, 0.01), 5)}
        row |= {"train/patches": 64 * len(self.names), "validation/dice": dice(-0.02)}
        per_site = [
            {
                "round": number, "kind": kind, "site": site, "attempt": 1, "outcome": "included", "reason": "",
                "cases": 24 + place, "bytes_down": 1_940_000, "bytes_up": 1_940_000 if kind == "train" else 400,
                "seconds_download": round(seconds[site][0], 3), "seconds_work": round(seconds[site][1], 3),
                "seconds_upload": round(seconds[site][2], 3), "seconds_round": 27.0,
            }
            for kind in ("train", "evaluate")
            for place, site in enumerate(self.names)
        ]  # fmt: skip
        for path, rows in ((self.folder.rounds, [row]), (self.folder.sites, per_site)):
            self._rows.setdefault(path, []).extend(rows)
            if write:
                self._write(path, rows, header=not path.exists())

    def _write(self, path: Path, rows: Sequence[Mapping[str, Any]], *, header: bool) -> None:
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            if header:
                writer.writeheader()
            writer.writerows(rows)

    # How it stands. -------------------------------------------------------------------------------------------------

    def status(
        self, state: str = "training", sites: Mapping[str, Mapping[str, Any]] | None = None, **more: Any
    ) -> None:
        """Writes `status.json`: each site trains, unless `sites` says otherwise of some."""
        now = time.time()
        parts: dict[str, dict[str, Any]] = {}
        for place, name in enumerate(self.names):
            parts[name] = {
                "connected": True, "stage": "training", "batch": 3 + place % 5, "batches": 8 + place % 3, "reason": "",
                "refused_reason": "", "asked": True, "no_progress_seconds": 0, "training_cases": 19 + place,
                "validation_cases": 5 + place % 4, "revoked": False, "last_seen_at": now,
                "certificate_expires": now + 400 * 86_400,
            } | dict((sites or {}).get(name, {}))  # fmt: skip
        self.folder.write_status(
            {
                "study": self.study.name, "plan": "ab" * 32, "pid": 4321, "round": min(self.done + 1, self.rounds),
                "rounds": self.rounds, "quorum": self.study.cohort.quorum, "needed": self.study.cohort.quorum,
                "closed_with": None, "attempt": 1, "kind": "train" if state == "training" else None,
                "deadline_at": now + 500, "started_at": now - 3600, "updated_at": now, "privacy": None, "state": state,
                "address": "127.0.0.1:8443", "notice": "", "error": "", "published": None,
                "last": {"round": self.done, "holdout_dice": 0.9, "train_loss": 0.3} if self.done else None,
                "best": None, "sites": parts, **more,
            }
        )  # fmt: skip

    def finish(self) -> None:
        """The study ends: a version is published, the log signed, the report written."""
        variants = [
            {"name": "float32", "file": "model_float32.tflite", "bytes": 7_800_000, "ratio_to_float32": 1.0,
             "dice": 0.9312, "dice_lost": 0.0, "latency_ms": 99.0, "latency_ratio": 1.0, "recommended": True,
             "note": ""},
            {"name": "int8", "file": "model_int8.tflite", "bytes": 1_990_000, "ratio_to_float32": 0.2551,
             "dice": 0.9301, "dice_lost": 0.0011, "latency_ms": 41.5, "latency_ratio": 0.42, "recommended": True,
             "note": ""},
            {"name": "float16", "file": "model_float16.tflite", "bytes": 3_900_000, "ratio_to_float32": 0.5,
             "dice": 0.8012, "dice_lost": 0.13, "latency_ms": 99.8, "latency_ratio": 1.01, "recommended": False,
             "note": "loses more Dice than the study allows"},
        ]  # fmt: skip
        version = self.folder.published / "v1"
        version.mkdir(parents=True)
        (version / "manifest.json").write_text(
            json.dumps({"version": "v1", "wardround": "0.1.0", "variants": variants})
        )
        self.folder.report.write_text(json.dumps({"best_round": self.done}))
        self.status("finished", published=str(version))

    def identities(self, hosts: Sequence[str] = ("127.0.0.1", "localhost")) -> Path:
        """The study's certificates, in the run; returns the coordinator's folder."""
        ensure_simulation_identities(self.folder.identity, self.study.name, self.names, list(hosts))
        return self.folder.identity / "coordinator"

    def audit(self) -> None:
        """A log with a signed head."""
        log = AuditLog(self.folder.path, "coordinator", load_signer(self.identities()))
        log.record("coordinator-started", version="0.1.0")
        log.sign_head()
        log.close()

    def samples(self, round_number: int | None = None) -> None:
        """Pictures of two cases, of a round."""
        planar = self.study.task.dimensions == 2
        depth, rng = (1 if planar else 9), np.random.default_rng(5)
        grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in (depth, 96, 96)), indexing="ij"))
        taken = []
        for place, site in enumerate(self.names[:2]):
            radius = np.sqrt(grid[0] ** 2 * (not planar) + (grid[1] - 0.2 * place) ** 2 + grid[2] ** 2)
            truth = (radius < 0.6).astype(np.uint8) + (radius < 0.3).astype(np.uint8)
            prediction = (radius < 0.55).astype(np.uint8) + (radius < 0.33).astype(np.uint8)
            image = (1 - radius[..., None] + rng.normal(0, 0.08, (*radius.shape, 1))).astype(np.float32)
            slices = [0] if planar else [2, 4, 6]
            views = tuple(View(None if planar else z, image[z], truth[z], prediction[z]) for z in slices)
            taken.append(Taken(f"0{place + 1}-{site}", site, 0.9, views))
        write_samples(self.folder.path, round_number or self.done, ["background", "tumour", "edema"], taken)
