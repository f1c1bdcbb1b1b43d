"""Program state and weights on disk."""

from __future__ import annotations

import asyncio
import collections
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from common.errors import RunFolderError
from common.wire.tensors import TensorSpec
from server.data_source import SiteDataSource
from server.state import FileStateManager, ModelReleaseManager, load_weights

DATA = tff.FederatedType(tff.SequenceType(np.float32), tff.CLIENTS)


def _state(value: float) -> collections.OrderedDict:
    state = tff.learning.templates.LearningAlgorithmState(
        global_model_weights=(tf.constant([value, 2.0]),),
        distributor=(),
        client_work=np.int32(3),
        aggregator=(),
        finalizer=(),
    )
    return collections.OrderedDict(state=state, data=SiteDataSource(["a", "b"], DATA).iterator(), best=np.int32(1))


def test_a_saved_state_comes_back_in_its_containers_with_the_data_at_its_place(tmp_path: Path) -> None:
    manager = FileStateManager(tmp_path)
    state = _state(5.0)
    state["data"].select()
    asyncio.run(manager.save(state, 4))
    loaded, version = asyncio.run(FileStateManager(tmp_path).load_latest(_state(0.0)))
    assert version == 4
    np.testing.assert_array_equal(loaded["state"].global_model_weights[0], [5.0, 2.0])
    assert [(handle.site, handle.round) for handle in loaded["data"].select()] == [("a", 2), ("b", 2)]
    assert loaded["data"].federated_type == DATA


def test_old_versions_go_and_the_newest_stay(tmp_path: Path) -> None:
    manager = FileStateManager(tmp_path, keep=2)
    for version in (1, 2, 3):
        asyncio.run(manager.save(_state(version), version))
    assert asyncio.run(manager.get_versions()) == [2, 3]
    with pytest.raises(tff.program.ProgramStateExistsError):
        asyncio.run(manager.save(_state(0), 3))
    with pytest.raises(tff.program.ProgramStateNotFoundError):
        asyncio.run(manager.load(1, _state(0)))


def test_nothing_saved_is_version_0(tmp_path: Path) -> None:
    assert asyncio.run(FileStateManager(tmp_path).load_latest(_state(0))) == (None, 0)


def test_a_damaged_or_foreign_state_is_refused_with_the_file_and_the_way_out(tmp_path: Path) -> None:
    manager = FileStateManager(tmp_path)
    asyncio.run(manager.save(_state(1), 1))
    path = tmp_path / "000001.tensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunFolderError, match=r"000001\.tensors: the saved state cannot be used .* remove this file"):
        asyncio.run(manager.load(1, _state(0)))
    path.write_bytes(whole)
    with pytest.raises(RunFolderError):
        asyncio.run(manager.load(1, collections.OrderedDict(best=np.int32(0))))


def test_weights_of_kept_rounds_are_loaded_and_others_named_as_not_kept(tmp_path: Path) -> None:
    manager = ModelReleaseManager(tmp_path)
    for number in (1, 2, 3):
        asyncio.run(manager.release((tf.constant([float(number)]),), number))
    manager.keep_only([2, 3])
    specs = [TensorSpec("float32", (1,))]
    assert load_weights(tmp_path, 2, specs)[0].tolist() == [2.0]
    with pytest.raises(RunFolderError, match=r"round 1 were not kept; kept are: 2, 3"):
        load_weights(tmp_path, 1, specs)
