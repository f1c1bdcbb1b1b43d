"""Program state and weights on disk."""

from __future__ import annotations

import asyncio
import collections
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from common import failpoints
from common.errors import RunFolderError
from common.wire.tensors import Stored, TensorSpec
from server.data_source import SiteDataSource
from server.kept import check_kept
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
    with pytest.raises(RunFolderError, match=r"000001\.tensors: the saved state cannot be used .*`wardround repair"):
        asyncio.run(manager.load(1, _state(0)))
    path.write_bytes(whole)
    with pytest.raises(RunFolderError):
        asyncio.run(manager.load(1, collections.OrderedDict(best=np.int32(0))))


def test_weights_of_kept_rounds_are_loaded_and_others_named_as_not_kept(tmp_path: Path) -> None:
    manager = ModelReleaseManager(tmp_path)
    for number in (1, 2, 3):
        asyncio.run(manager.release((tf.constant([float(number)]),), number))
    manager.keep_only([2, 3], up_to=3)
    specs = [TensorSpec("float32", (1,))]
    assert load_weights(tmp_path, 2, specs)[0].tolist() == [2.0]
    with pytest.raises(RunFolderError, match=r"round 1 were not kept; kept are: 2, 3"):
        load_weights(tmp_path, 1, specs)


def test_weights_of_a_round_whose_state_is_not_saved_yet_stay_and_so_do_the_best_and_the_last(tmp_path: Path) -> None:
    manager = ModelReleaseManager(tmp_path)
    for number in (1, 2, 3, 4):
        asyncio.run(manager.release((tf.constant([float(number)]),), number))
    manager.keep_only([1], up_to=3)
    assert [path.stem for path in sorted(tmp_path.iterdir())] == ["000001", "000003", "000004"]


class Recorded:
    """A journal of digests."""

    def __init__(self) -> None:
        self.digests: dict[int, str] = {}

    def __call__(self, number: int, stored: Stored) -> None:
        self.digests[number] = stored.digest.hex()


def saved(folder: Path, *versions: int) -> dict[int, str]:
    """Saves states, and returns what is recorded of them."""
    recorded = Recorded()
    manager = FileStateManager(folder, record=recorded)
    for version in versions:
        asyncio.run(manager.save(_state(version), version))
    return recorded.digests


def test_a_state_with_a_flipped_bit_is_refused_and_the_one_before_is_kept(tmp_path: Path) -> None:
    digests = saved(tmp_path, 1, 2)
    path = tmp_path / "000002.tensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # within a weight: nothing but the digest tells
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match=r"000002\.tensors: .*SHA-256.*`wardround repair"):
        asyncio.run(FileStateManager(tmp_path, recorded=digests).load_latest(_state(0)))
    assert asyncio.run(FileStateManager(tmp_path, recorded=digests).load(1, _state(0)))


def test_a_state_that_is_gone_is_no_reason_to_go_back_silently(tmp_path: Path) -> None:
    digests = saved(tmp_path, 1, 2)
    (tmp_path / "000002.tensors").unlink()
    with pytest.raises(RunFolderError, match=r"000002\.tensors: .*`wardround repair"):
        asyncio.run(FileStateManager(tmp_path, recorded=digests).load_latest(_state(0)))


def test_a_state_that_was_written_but_not_recorded_does_not_count_and_is_written_again(tmp_path: Path) -> None:
    digests = saved(tmp_path, 1, 2, 3)
    del digests[3]
    recorded = Recorded()
    manager = FileStateManager(tmp_path, recorded=digests, record=recorded)
    assert asyncio.run(manager.load_latest(_state(0)))[1] == 2
    asyncio.run(manager.save(_state(3), 3))
    assert list(recorded.digests) == [3]
    assert asyncio.run(manager.get_versions()) == [2, 3]


def test_states_of_a_version_without_digests_are_taken_and_recorded(tmp_path: Path) -> None:
    digests = saved(tmp_path, 1)
    recorded = Recorded()
    assert asyncio.run(FileStateManager(tmp_path, recorded={}, record=recorded).load_latest(_state(0)))[1] == 1
    assert recorded.digests == digests


def test_a_full_disk_keeps_the_states_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = saved(tmp_path, 1, 2)
    monkeypatch.setattr(failpoints, "_actions", failpoints.parse("state.before=error:ENOSPC"))
    manager = FileStateManager(tmp_path, recorded=digests)
    with pytest.raises(RunFolderError, match=r"000003\.tensors: cannot be written \(.*No space left.*free space"):
        asyncio.run(manager.save(_state(3), 3))
    assert asyncio.run(manager.get_versions()) == [1, 2]


def test_a_model_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    recorded = Recorded()
    asyncio.run(ModelReleaseManager(tmp_path, record=recorded).release((tf.constant([1.0]),), 1))
    path = tmp_path / "000001.tensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match="the weights cannot be used"):
        load_weights(tmp_path, 1, [TensorSpec("float32", (1,))], recorded.digests[1])
    with pytest.raises(RunFolderError, match=r"damaged .*`wardround repair"):
        check_kept(tmp_path, recorded.digests)
