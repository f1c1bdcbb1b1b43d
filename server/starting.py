"""What a study's first round starts from: the weights of a published version, an encoder's, or the study's seed alone.

What was chosen is copied into the run folder at the first start, so that a run that is continued, and the comparison at
its end, know the same weights whatever became of the folder they came from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import PublishError, RunFolderError, StudyError, UsageError, WireError
from common.inference.trust import Trust
from common.inference.version_files import PublishedWeights, open_weights, origin_of
from common.security.authorities import authority_for
from common.study import Study, parse_study
from common.wire.tensors import Array, TensorSpec, read_tensors, write_tensors
from server.run_folder import RunFolder, write_atomically
from server.versions import authority_of, is_version, newest_version

if TYPE_CHECKING:
    from common.models.network import Network

_KEY = "training.start_from"
_SHOWN = 3

TrustOf = Callable[[Path | None], Trust]
"""Says whom to believe; takes the authority's certificate of the run that a version lies in, None where it has none."""


@dataclass(frozen=True)
class Start:
    """The weights before the first round.

    Attributes
    ----------
    weights : in the order of the network's `specs`.
    origin : what of report and manifest they become: "started_from" (study, version, sha256) or "encoder_weights"
        (sha256).
    study : by which the model they are of prepares images; None where they are no model yet.
    """

    weights: Sequence[Array]
    origin: Mapping[str, Any]
    study: Study | None


def signed(own: Path | None) -> Trust:
    """What is signed under the authority that the environment names, else under the run's own."""
    return Trust(authority_for(None, own))


def starting_weights(study: Study, run: RunFolder, network: Network, trust: TrustOf = signed) -> Start | None:
    """What the run starts, or started, from; None: from the study's seed.

    Relative paths are relative to where the coordinator is started.

    Parameters
    ----------
    trust : whose signature the published version that the study names must have.

    Raises
    ------
    StudyError : the file or folder that the study names is none, or of another network or task.
    IdentityError : the published version is not signed by whom it must be.
    PublishError : it is damaged.
    RunFolderError : what the run keeps of its start cannot be read or written.
    """
    if study.training.start_from is None and study.model.encoder_weights is None:
        return None
    if study.training.start_from is not None and study.model.encoder_weights is not None:
        raise StudyError(
            f"model.encoder_weights: expected null with {_KEY}, whose version has weights of its encoder too; remove "
            "one of the two"
        )
    kept = kept_start(run, network)
    if kept is not None:
        return kept
    start = _published(study, network, trust) if study.training.start_from is not None else _encoder(study, network)
    _keep(run, start)
    return start


def kept_start(run: RunFolder, network: Network) -> Start | None:
    """What the run started from, as it keeps it; None where it keeps nothing.

    Raises
    ------
    RunFolderError : it cannot be read.
    """
    papers = run.start / "start.json"
    if not papers.exists():
        return None
    try:
        content = json.loads(papers.read_text(encoding="utf-8"))
        specs = [TensorSpec("float32", spec.shape) for spec in network.specs]
        weights = read_tensors(run.start / "weights.tensors", specs, bytes.fromhex(content["kept_sha256"]))
        study = parse_study(content["study"], str(papers)) if content["study"] else None
        return Start(weights, content["origin"], study)
    except (OSError, ValueError, KeyError, TypeError, WireError, StudyError) as error:
        raise RunFolderError(
            f"{run.start}: what this run started from cannot be read ({error}); restore the folder from a backup, or "
            "begin the study in another --run"
        ) from error


def _keep(run: RunFolder, start: Start) -> None:
    try:
        run.start.mkdir(exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{run.start}: cannot be made ({error.strerror}); check the run folder") from error
    stored = write_tensors(run.start / "weights.tensors", list(start.weights))
    content = {
        "origin": dict(start.origin),
        "kept_sha256": stored.digest.hex(),
        "study": start.study.to_yaml() if start.study is not None else None,
    }
    write_atomically(run.start / "start.json", json.dumps(content, indent=1))  # last: without it nothing is kept


def _published(study: Study, network: Network, trust: TrustOf) -> Start:
    folder = Path(study.training.start_from or "")
    try:
        version = folder if is_version(folder) else newest_version(RunFolder(folder))
        if version is None or not version.is_dir():
            raise UsageError(
                f"{folder.absolute()}: neither the folder of a published version nor of a run that has one"
            )
        whom = trust(authority_of(version))
        found = open_weights(version, whom)
        whom.warn()
    except (UsageError, RunFolderError) as error:
        raise StudyError(f"{_KEY}: {error}; correct the path, which only the coordinator reads") from error
    check_fits(study, network, found)
    return Start(found.weights, {"started_from": origin_of(found)}, found.study)


def check_fits(study: Study, network: Network, found: PublishedWeights) -> None:
    """Weights can be those of the study's network, and mean the same there.

    Raises
    ------
    StudyError : they are of another network or task; the first weights that differ, or the key, are named.
    PublishError : they are not even those of their own study's network.
    """
    from common.models import build_network

    theirs = {spec.name: spec.shape for spec in build_network(found.study).specs}
    whose = f"{found.study.name} {found.version}"
    if [weight.shape for weight in found.weights] != list(theirs.values()):
        raise PublishError(f"{whose}: its weights are not those of its study's network; publish the round again")
    ours = {spec.name: spec.shape for spec in network.specs}
    names = [*ours, *(name for name in theirs if name not in ours)]
    different = [
        f"{name}: expected {_shape(ours.get(name))}, found {_shape(theirs.get(name))}"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]
    if different:
        more = f" (and {len(different) - _SHOWN} more)" if len(different) > _SHOWN else ""
        raise StudyError(
            f"{_KEY}: the weights of {whose} are of another network or task: {'; '.join(different[:_SHOWN])}{more}. "
            "Take its model and task keys, or start from another version"
        )
    if list(ours) != list(theirs):
        raise StudyError(f"{_KEY}: the weights of {whose} are in another order; start from another version")
    # What weights of equal shapes may still mean otherwise.
    for key, mine, other in (
        ("task.classes", study.task.classes, found.study.task.classes),
        ("task.labels", study.task.labels, found.study.task.labels),
        ("task.modalities", study.task.modalities, found.study.task.modalities),
        ("model.name", study.model.name, found.study.model.name),
        ("model.head", study.model.head, found.study.model.head),
        ("model.normalization", study.model.normalization, found.study.model.normalization),
        ("preprocessing.patch (its dilations)", _dilations(study), _dilations(found.study)),
    ):
        if mine != other:
            raise StudyError(
                f"{_KEY}: {key} is {_words(mine)} here and {_words(other)} in {whose}, whose weights (the last is "
                f"{list(ours)[-1]}) would mean something else here; take the same {key}, or start from another version"
            )


def _dilations(study: Study) -> tuple[str, ...]:
    """What DeepLabv3+ takes from the patch, and the shapes of its weights do not show."""
    from common.models.deeplabv3plus import aspp_rates

    return tuple(map(str, aspp_rates(study.preprocessing.patch))) if study.model.name == "deeplabv3plus" else ()


def _encoder(study: Study, network: Network) -> Start:
    from common.models.encoder_weights import load_encoder_weights, with_encoder_weights

    path = Path(study.model.encoder_weights or "")
    values = load_encoder_weights(network, path)
    weights = with_encoder_weights(network, [weight.numpy() for weight in network.initial_weights(study.seed)], values)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Start(weights, {"encoder_weights": {"weights": len(values), "sha256": digest}}, None)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else f"shape {shape}"


def _words(value: Any) -> str:
    return ", ".join(value) or "none" if isinstance(value, tuple) else str(value)
