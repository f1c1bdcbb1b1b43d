"""Whole rounds: the sum is the plain sum, whoever drops out and when, and the coordinator sees nothing else."""

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import common.secure_aggregation
from common.secure_aggregation.masking import InputSpec
from common.secure_aggregation.messages import MaskedInput
from common.secure_aggregation.packing import unpack
from common.secure_aggregation.refusals import (
    BadShareError,
    DuplicateMessageError,
    ImpossibleSumError,
    InputError,
    OutOfTurnError,
    TooFewSitesError,
    UnknownSiteError,
    WrongSessionError,
)
from common.secure_aggregation.session import Stage
from tests.common.secure_aggregation.cohort import Cohort, plain_sums

STAGES = ("advertise", "share", "mask", "confirm", "unmask")


@st.composite
def rounds(draw: st.DrawFn) -> tuple[Cohort, dict[str, list[str]]]:
    """A cohort of any shapes and widths, and as many drop-outs as the threshold allows, each at any stage."""
    count = draw(st.integers(3, 9))
    widths = st.integers(1, 63 - (count - 1).bit_length())
    shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    specs = draw(st.lists(st.builds(InputSpec, shapes, widths), min_size=1, max_size=4))
    cohort = Cohort(count, specs)
    most = count - max(3, cohort.session().threshold)
    lost = draw(st.lists(st.sampled_from(cohort.names), unique=True, max_size=most))
    drop: dict[str, list[str]] = {}
    for name in lost:
        drop.setdefault(draw(st.sampled_from(STAGES)), []).append(name)
    return cohort, drop


@settings(max_examples=40)
@given(rounds(), st.integers(0, 2**32 - 1))
def test_the_sum_is_the_plain_sum_whoever_drops_out_and_when(
    drawn: tuple[Cohort, dict[str, list[str]]], seed: int
) -> None:
    cohort, drop = drawn
    inputs = cohort.inputs(seed)
    aggregate = cohort.attempt().run(inputs, drop)
    lost = [name for stage in ("advertise", "share", "mask") for name in drop.get(stage, ())]
    assert aggregate.survivors == tuple(name for name in cohort.names if name not in lost)
    assert aggregate.dropped == {stage: tuple(sorted(drop.get(stage, ()))) for stage in STAGES}
    for found, expected, spec in zip(
        aggregate.tensors, plain_sums(inputs, aggregate.survivors), cohort.specs, strict=True
    ):
        assert found.dtype == np.int64 and found.shape == spec.shape
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("sites", [3, 4, 8, 50])
def test_the_largest_values_of_all_sites_do_not_wrap(sites: int) -> None:
    width = 63 - (sites - 1).bit_length()
    cohort = Cohort(sites, [InputSpec((2,), width), InputSpec((2,), 1)])
    largest = [np.full(2, 2**width - 1, np.int64), np.ones(2, np.int32)]
    aggregate = cohort.attempt().run(dict.fromkeys(cohort.names, largest))
    assert [tensor.tolist() for tensor in aggregate.tensors] == [[sites * (2**width - 1)] * 2, [sites] * 2]


def test_tensors_longer_than_a_chunk_are_summed_exactly() -> None:
    cohort = Cohort(3, [InputSpec((70_001, 2), 32), InputSpec((1,), 20)])
    inputs = cohort.inputs()
    aggregate = cohort.attempt().run(inputs)
    for found, expected in zip(aggregate.tensors, plain_sums(inputs, cohort.names), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("stage", STAGES)
def test_an_attempt_with_too_few_sites_ends_and_names_who_dropped(stage: str) -> None:
    cohort = Cohort(5)  # threshold 4
    attempt = cohort.attempt()
    with pytest.raises(TooFewSitesError, match=f"{stage}: b, d") as raised:
        attempt.run(cohort.inputs(), {stage: ["b", "d"]})
    assert raised.value.dropped[stage] == ("b", "d")
    assert attempt.coordinator.stage is Stage.REFUSED


def test_a_restarted_attempt_has_other_keys_and_another_masked_input() -> None:
    cohort = Cohort(3)
    inputs = cohort.inputs()
    logs = []
    for _ in range(2):  # the same attempt again: neither site nor coordinator kept anything
        attempt = cohort.attempt()
        survivors = attempt.mask(attempt.share(attempt.advertise()), inputs)
        logs.append(set(attempt.log))
    assert logs[0] & logs[1] == {survivors.encode()}  # names only


def test_masked_inputs_look_uniform_and_unlike_each_other() -> None:
    # 200,000 equal values under 3 sites' masks, 18 bits each: a chi-squared statistic over 256 bins of the highest and
    # of the lowest 8 bits has mean 255 and standard deviation 22.6, so that 400 is passed once in 10^8 such tests.
    cohort = Cohort(3, [InputSpec((200_000,), 16)])
    attempt = cohort.attempt()
    delivered = attempt.share(attempt.advertise())
    streams = []
    for name in cohort.names:
        masked = attempt.sites[name].mask(delivered[name], [np.full(200_000, 7)])
        streams.append(unpack(masked.payload, 200_000, 18))
    for values in [*streams, (streams[0] - streams[1]) % 2**18, (streams[0] + streams[2]) % 2**18]:
        for part in (values >> np.uint64(10), values & np.uint64(255)):
            counts = np.bincount(part.astype(np.int64), minlength=256)
            assert ((counts - 200_000 / 256) ** 2 / (200_000 / 256)).sum() < 400


def test_no_message_holds_a_plain_value() -> None:
    # A value of 48 bits is 6 bytes that a random message of a few kilobytes holds once in 10^11. The packing aligns
    # values to bits; the message is searched at each of its 8 offsets.
    cohort = Cohort(5, [InputSpec((32,), 48), InputSpec((), 48)])  # the second: a weight or a metric
    inputs = cohort.inputs()
    attempt = cohort.attempt()
    attempt.run(inputs, {"mask": ["c"]})
    values = {int(value).to_bytes(6, "little") for tensors in inputs.values() for t in tensors for value in t.flat}
    values |= {value[::-1] for value in values}
    assert len(values) == 2 * 5 * 33
    for message in attempt.log:
        number = int.from_bytes(message, "little")
        for offset in range(8):
            shifted = (number >> offset).to_bytes(len(message), "little")
            assert not any(value in shifted for value in values)


def test_a_cohort_of_one_value_is_masked_too() -> None:
    cohort = Cohort(3, [InputSpec((), 1)])
    attempt = cohort.attempt()
    aggregate = attempt.run({name: [np.array(1)] for name in cohort.names})
    assert int(aggregate.tensors[0]) == 3


@pytest.mark.parametrize(
    "tensors",
    [
        [np.array([0, 1, 2**16]), np.array(1)],
        [np.array([0, 1, -1]), np.array(1)],
        [np.array([0.0, 1.0, 2.0]), np.array(1)],
        [np.array([0, 1]), np.array(1)],
        [np.array([0, 1, 2])],
        [np.array([0, 1, 2], np.uint64) + np.uint64(2**63), np.array(1)],
    ],
)
def test_a_tensor_that_is_not_the_plans_is_refused_before_masking(tensors: list[np.ndarray]) -> None:
    cohort = Cohort(3)
    attempt = cohort.attempt()
    delivered = attempt.share(attempt.advertise())
    with pytest.raises(InputError):
        attempt.sites["a"].mask(delivered["a"], tensors)
    assert attempt.sites["a"].stage is Stage.REFUSED


def test_the_coordinator_counts_a_message_once_and_in_its_stage_only() -> None:
    cohort = Cohort(4)
    inputs = cohort.inputs()
    attempt, other = cohort.attempt(), cohort.attempt(cohort.session(attempt=1))
    coordinator = attempt.coordinator
    advertisement = attempt.sites["a"].advertise()
    coordinator.receive_advertisement(advertisement)
    with pytest.raises(DuplicateMessageError):
        coordinator.receive_advertisement(advertisement)
    with pytest.raises(WrongSessionError):
        coordinator.receive_advertisement(other.sites["b"].advertise())
    assert coordinator.waiting_for == ("b", "c", "d")
    for name in "bcd":
        coordinator.receive_advertisement(attempt.sites[name].advertise())
    roster = coordinator.close_advertising()
    with pytest.raises(OutOfTurnError):
        coordinator.receive_advertisement(advertisement)
    with pytest.raises(OutOfTurnError):
        coordinator.close_advertising()
    delivered = attempt.share(roster, drop=["d"])
    masked = attempt.sites["a"].mask(delivered["a"], inputs["a"])
    coordinator.receive_masked_input(masked)
    with pytest.raises(DuplicateMessageError):
        coordinator.receive_masked_input(masked)
    with pytest.raises(UnknownSiteError):
        coordinator.receive_masked_input(MaskedInput(attempt.session.digest, "d", masked.payload))
    for name in "bc":
        coordinator.receive_masked_input(attempt.sites[name].mask(delivered[name], inputs[name]))
    aggregate = attempt.unmask(attempt.confirm(coordinator.close_masking()))
    np.testing.assert_array_equal(aggregate.tensors[0], plain_sums(inputs, "abc")[0])


def test_a_site_whose_input_was_masked_for_others_spoils_the_sum_and_is_noticed() -> None:
    cohort = Cohort(5, [InputSpec((500,), 16)])  # 5/8 of the modulus are sums that 5 sites can give
    attempt, other = cohort.attempt(), cohort.attempt()
    inputs = cohort.inputs()
    delivered, elsewhere = attempt.share(attempt.advertise()), other.share(other.advertise())
    for name in "abcd":
        attempt.coordinator.receive_masked_input(attempt.sites[name].mask(delivered[name], inputs[name]))
    attempt.sites["e"].mask(delivered["e"], inputs["e"])
    attempt.coordinator.receive_masked_input(other.sites["e"].mask(elsewhere["e"], inputs["e"]))
    with pytest.raises(ImpossibleSumError):
        attempt.unmask(attempt.confirm(attempt.coordinator.close_masking()))


@pytest.mark.parametrize("drop", [[], ["e"]])
def test_a_wrong_share_is_noticed(drop: list[str]) -> None:
    cohort = Cohort(6)  # threshold 5
    attempt = cohort.attempt()
    request = attempt.until_confirmed(cohort.inputs(), drop)
    for name, _ in request.confirmations:
        message = attempt.sites[name].unmask(request)
        if name == "b":
            if drop:
                (site, share), *others = message.key_shares
                keys = ((site, bytes([0, share[1] ^ 1]) + share[2:]), *others)
                message = type(message)(message.session, name, message.seed_shares, keys)
            else:
                (site, share), *others = message.seed_shares
                seeds = ((site, bytes([0, share[1] ^ 1]) + share[2:]), *others)
                message = type(message)(message.session, name, seeds, message.key_shares)
        attempt.coordinator.receive_unmask_shares(message)
    with pytest.raises(BadShareError):
        attempt.coordinator.finish()
    assert attempt.coordinator.stage is Stage.REFUSED


def test_the_example_of_the_package_runs() -> None:
    results = doctest.testmod(common.secure_aggregation)
    assert results.attempted > 10 and not results.failed
