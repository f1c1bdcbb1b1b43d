"""A malicious coordinator: each attack on a site's update is refused, by name, and nothing leaves the site."""

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.secure_aggregation.keys import generate_key_pair
from common.secure_aggregation.ledger import FileLedger
from common.secure_aggregation.messages import (
    Advertisement,
    DeliveredShares,
    Roster,
    SurvivorSet,
    UnmaskRequest,
    sorted_by_site,
)
from common.secure_aggregation.refusals import (
    BadKeyError,
    BadSignatureError,
    BothSharesAskedError,
    CohortTooSmallError,
    DuplicateKeyError,
    InconsistentSetsError,
    NotASurvivorError,
    OutOfTurnError,
    OwnKeyReplacedError,
    SetChangedError,
    ThresholdTooLowError,
    TooFewConfirmationsError,
    UndecryptableShareError,
    UnknownSiteError,
    UnmaskingBegunError,
    WrongSessionError,
)
from common.secure_aggregation.session import SitePolicy, Stage
from common.secure_aggregation.shamir import reconstruct, share_from_bytes
from common.secure_aggregation.site import Site
from tests.common.secure_aggregation.cohort import Attempt, Cohort, plain_sums


def refused(site: Site, error: type[Exception], step: Callable[[], object]) -> None:
    """The step is refused so, and the site takes no further part."""
    with pytest.raises(error):
        step()
    assert site.stage is Stage.REFUSED


def replaced(roster: Roster, advertisement: Advertisement) -> Roster:
    """The roster with this advertisement for its site."""
    kept = {held.site: held for held in roster.advertisements} | {advertisement.site: advertisement}
    return Roster(roster.session, tuple(kept[site] for site in sorted(kept)))


def forged(attempt: Attempt, site: str) -> Advertisement:
    """Keys of the coordinator's in a site's name, with that site's certificate and a signature of the coordinator's."""
    encryption, mask = generate_key_pair().public, generate_key_pair().public
    statement = Advertisement.statement(attempt.session, site, encryption, mask)
    certificate = attempt.cohort.authority.certificate(site)
    return Advertisement(
        attempt.session.digest, site, encryption, mask, certificate, Ed25519PrivateKey.generate().sign(statement)
    )


# R0 and R1: keys


def test_keys_of_a_peer_that_were_replaced_are_refused() -> None:
    attempt = Cohort().attempt()
    roster = replaced(attempt.advertise(), forged(attempt, "b"))
    refused(attempt.sites["a"], BadSignatureError, lambda: attempt.sites["a"].share(roster))


def test_keys_under_a_certificate_of_the_coordinators_own_making_are_refused() -> None:
    attempt = Cohort().attempt()
    roster = attempt.advertise()
    elsewhere = Cohort().authority
    fake = forged(attempt, "b")
    statement = Advertisement.statement(attempt.session, "b", fake.encryption_key, fake.mask_key)
    fake = dataclasses.replace(
        fake, certificate=elsewhere.certificate("b"), signature=elsewhere.enrolled_key("b").sign(statement)
    )
    roster = replaced(roster, fake)
    refused(attempt.sites["a"], BadSignatureError, lambda: attempt.sites["a"].share(roster))


def test_a_certificate_of_another_site_is_refused() -> None:
    attempt = Cohort().attempt()
    roster = attempt.advertise()
    authority = attempt.cohort.authority
    fake = forged(attempt, "b")
    statement = Advertisement.statement(attempt.session, "b", fake.encryption_key, fake.mask_key)
    fake = dataclasses.replace(
        fake, certificate=authority.certificate("c"), signature=authority.enrolled_key("c").sign(statement)
    )
    refused(attempt.sites["a"], BadSignatureError, lambda: attempt.sites["a"].share(replaced(roster, fake)))


def test_a_site_whose_own_keys_were_replaced_notices() -> None:
    # Even keys that it signed itself: those of its run of the attempt before a restart.
    cohort = Cohort()
    attempt, before = cohort.attempt(), cohort.attempt()
    old = before.sites["a"].advertise()
    roster = replaced(attempt.advertise(), old)
    refused(attempt.sites["a"], OwnKeyReplacedError, lambda: attempt.sites["a"].share(roster))


def test_a_site_that_was_left_out_of_the_roster_notices() -> None:
    attempt = Cohort().attempt()
    roster = attempt.advertise()
    roster = Roster(roster.session, roster.advertisements[1:])
    refused(attempt.sites["a"], OwnKeyReplacedError, lambda: attempt.sites["a"].share(roster))


@pytest.mark.parametrize("role", ["mask_key", "encryption_key"])
def test_a_key_that_two_sites_have_is_refused(role: str) -> None:
    # A site in league with the coordinator signs another's key as its own.
    attempt = Cohort().attempt()
    roster = attempt.advertise()
    b, c = roster.advertisements[1:3]
    copied = dataclasses.replace(c, **{role: b.mask_key})
    statement = Advertisement.statement(attempt.session, "c", copied.encryption_key, copied.mask_key)
    copied = dataclasses.replace(copied, signature=attempt.cohort.authority.enrolled_key("c").sign(statement))
    refused(attempt.sites["a"], DuplicateKeyError, lambda: attempt.sites["a"].share(replaced(roster, copied)))


def test_a_key_that_fixes_the_secret_in_advance_is_refused() -> None:
    attempt = Cohort().attempt()
    roster = attempt.advertise()
    statement = Advertisement.statement(attempt.session, "c", bytes(32), roster.advertisements[2].mask_key)
    signature = attempt.cohort.authority.enrolled_key("c").sign(statement)
    low = dataclasses.replace(roster.advertisements[2], encryption_key=bytes(32), signature=signature)
    refused(attempt.sites["a"], BadKeyError, lambda: attempt.sites["a"].share(replaced(roster, low)))


def test_a_site_that_was_not_invited_is_refused() -> None:
    cohort = Cohort(6)
    attempt = cohort.attempt(cohort.session("abcde"))
    stranger = forged(attempt, "f")
    statement = Advertisement.statement(attempt.session, "f", stranger.encryption_key, stranger.mask_key)
    stranger = dataclasses.replace(stranger, signature=cohort.authority.enrolled_key("f").sign(statement))
    roster = replaced(attempt.advertise(), stranger)
    refused(attempt.sites["a"], UnknownSiteError, lambda: attempt.sites["a"].share(roster))


# Replays


def test_messages_of_another_round_attempt_plan_or_cohort_are_not_used() -> None:
    cohort = Cohort(6)
    attempt = cohort.attempt(cohort.session("abcde"))
    others = [
        cohort.session("abcde", round=1),
        cohort.session("abcde", attempt=1),
        cohort.session("abcdef"),
        cohort.session("abcde", threshold=5),
        dataclasses.replace(cohort.session("abcde"), plan_digest=bytes(32)),
        dataclasses.replace(cohort.session("abcde"), study="other"),
    ]
    site = attempt.sites["a"]
    roster = attempt.advertise()
    for session in others:
        with pytest.raises(WrongSessionError):
            site.share(cohort.attempt(session).advertise())
    assert site.stage is Stage.SHARE  # a message that strayed does no harm
    site.share(roster)


@pytest.mark.parametrize("relabelled", [False, True])
def test_keys_of_another_attempt_are_refused_under_this_ones_name(relabelled: bool) -> None:
    cohort = Cohort()
    attempt, other = cohort.attempt(), cohort.attempt(cohort.session(attempt=1))
    old = other.advertise().advertisements[1]
    if relabelled:
        old = dataclasses.replace(old, session=attempt.session.digest)
    roster = replaced(attempt.advertise(), old)
    error = BadSignatureError if relabelled else WrongSessionError
    refused(attempt.sites["a"], error, lambda: attempt.sites["a"].share(roster))


def test_shares_of_another_attempt_or_recipient_or_sender_do_not_decrypt() -> None:
    cohort = Cohort()
    attempt, other = cohort.attempt(), cohort.attempt(cohort.session(attempt=1))
    delivered, elsewhere = attempt.share(attempt.advertise()), other.share(other.advertise())
    held = dict(delivered["a"].by_sender)
    for name, ciphertext in (
        ("b", dict(elsewhere["a"].by_sender)["b"]),
        ("b", dict(delivered["c"].by_sender)["b"]),
        ("b", held["c"]),
        ("b", bytes([held["b"][0] ^ 1]) + held["b"][1:]),
        ("b", held["b"][:-1] + bytes([held["b"][-1] ^ 1])),
    ):
        again = cohort.attempt()  # a refusal ends a site's part
        good = again.share(again.advertise())["a"]
        bad = DeliveredShares(good.session, "a", sorted_by_site((dict(good.by_sender) | {name: ciphertext}).items()))
        site = again.sites["a"]
        refused(site, UndecryptableShareError, lambda site=site, bad=bad: site.mask(bad, cohort.inputs()["a"]))


def test_shares_that_were_meant_for_another_site_are_not_opened() -> None:
    attempt = Cohort().attempt()
    delivered = attempt.share(attempt.advertise())
    site = attempt.sites["a"]
    with pytest.raises(UnknownSiteError, match="for 'b': were brought to 'a'"):
        site.mask(delivered["b"], attempt.cohort.inputs()["a"])
    assert site.stage is Stage.REFUSED


def test_a_site_answers_every_stage_once() -> None:
    # Two masked inputs under the same masks would give away the difference of what was masked.
    attempt = Cohort().attempt()
    inputs = attempt.cohort.inputs()
    site = attempt.sites["a"]
    roster = attempt.advertise()
    with pytest.raises(OutOfTurnError):
        site.advertise()
    delivered = attempt.share(roster)
    with pytest.raises(OutOfTurnError):
        site.share(roster)
    survivors = attempt.mask(delivered, inputs)
    with pytest.raises(OutOfTurnError):
        site.mask(delivered["a"], inputs["a"])
    request = attempt.confirm(survivors)
    with pytest.raises(OutOfTurnError):
        site.confirm(SurvivorSet(survivors.session, tuple("abcd")))
    site.unmask(request)
    with pytest.raises(OutOfTurnError):
        site.unmask(request)


# The size of the cohort


def test_a_cohort_or_threshold_below_the_sites_policy_is_refused_at_once() -> None:
    cohort = Cohort(5, policy=SitePolicy(minimum_cohort=4, minimum_threshold=4))
    cohort.site(cohort.session(), "a")
    with pytest.raises(CohortTooSmallError):
        cohort.site(cohort.session("abc"), "a")
    with pytest.raises(ThresholdTooLowError):
        cohort.site(cohort.session(threshold=3), "a")
    with pytest.raises(ThresholdTooLowError, match="3 or more"):
        cohort.session(threshold=2)
    with pytest.raises(UnknownSiteError):
        cohort.site(cohort.session("bcde"), "a")


def test_a_cohort_that_shrinks_below_the_sites_policy_is_refused_at_every_stage() -> None:
    cohort = Cohort(5, policy=SitePolicy(minimum_cohort=5))
    inputs = cohort.inputs()

    attempt = cohort.attempt()
    roster = attempt.advertise(drop=["e"])
    refused(attempt.sites["a"], CohortTooSmallError, lambda: attempt.sites["a"].share(roster))

    attempt = cohort.attempt()
    delivered = attempt.share(attempt.advertise(), drop=["e"])
    refused(attempt.sites["a"], CohortTooSmallError, lambda: attempt.sites["a"].mask(delivered["a"], inputs["a"]))

    attempt = cohort.attempt()
    survivors = attempt.mask(attempt.share(attempt.advertise()), inputs, drop=["e"])
    refused(attempt.sites["a"], CohortTooSmallError, lambda: attempt.sites["a"].confirm(survivors))


def test_a_survivor_set_of_one_site_is_refused() -> None:
    attempt = Cohort().attempt()
    attempt.mask(attempt.share(attempt.advertise()), attempt.cohort.inputs())
    alone = SurvivorSet(attempt.session.digest, ("a",))
    refused(attempt.sites["a"], CohortTooSmallError, lambda: attempt.sites["a"].confirm(alone))


# R3 and R4: the sets


def test_a_survivor_set_without_the_site_itself_is_refused() -> None:
    # The others would give out its mask key; what it sent is then behind its own mask alone.
    attempt = Cohort().attempt()
    attempt.mask(attempt.share(attempt.advertise()), attempt.cohort.inputs())
    without = SurvivorSet(attempt.session.digest, tuple("bcde"))
    refused(attempt.sites["a"], NotASurvivorError, lambda: attempt.sites["a"].confirm(without))


def test_a_survivor_that_did_not_share_its_keys_is_refused() -> None:
    attempt = Cohort().attempt()
    attempt.mask(attempt.share(attempt.advertise(), drop=["e"]), attempt.cohort.inputs())
    more = SurvivorSet(attempt.session.digest, tuple("abcde"))
    refused(attempt.sites["a"], UnknownSiteError, lambda: attempt.sites["a"].confirm(more))


def test_different_survivors_shown_to_different_sites_are_noticed() -> None:
    # Of a, some are told that it survived and some that it dropped: both its secrets would be given out.
    cohort = Cohort(7)  # threshold 5
    attempt = cohort.attempt()
    attempt.mask(attempt.share(attempt.advertise()), cohort.inputs())
    all_of_them = SurvivorSet(attempt.session.digest, cohort.names)
    without = SurvivorSet(attempt.session.digest, cohort.names[1:])
    confirmations = {name: attempt.sites[name].confirm(all_of_them).signature for name in "abc"}
    confirmations |= {name: attempt.sites[name].confirm(without).signature for name in "defg"}
    everything = sorted_by_site(confirmations.items())
    for name, survivors, dropped in (("b", cohort.names, ()), ("d", cohort.names[1:], ("a",))):
        listed = tuple(pair for pair in everything if pair[0] in survivors)
        request = UnmaskRequest(attempt.session.digest, survivors, dropped, listed)
        site = attempt.sites[name]
        refused(site, InconsistentSetsError, lambda site=site, request=request: site.unmask(request))


def test_the_confirmations_of_a_part_of_the_sites_are_too_few() -> None:
    # The same attack, where each site is given only those confirmations that fit what it saw.
    attempt = Cohort(7).attempt()
    request = attempt.until_confirmed(attempt.cohort.inputs())
    few = dataclasses.replace(request, confirmations=request.confirmations[:4])
    refused(attempt.sites["a"], TooFewConfirmationsError, lambda: attempt.sites["a"].unmask(few))
    enough = dataclasses.replace(request, confirmations=request.confirmations[:5])
    attempt.sites["b"].unmask(enough)


@pytest.mark.parametrize("seen", ["roster", "sharers"])
def test_different_rosters_or_sharers_shown_to_different_sites_are_noticed(seen: str) -> None:
    # a alone is shown that f did not advertise, or that it did not share. All are told of the same survivors.
    attempt = Cohort(6).attempt()
    inputs = attempt.cohort.inputs()
    roster = attempt.advertise()
    smaller = Roster(roster.session, roster.advertisements[:5])
    shown = {name: smaller if name == "a" and seen == "roster" else roster for name in "abcdef"}
    shares = {name: dict(attempt.sites[name].share(shown[name]).by_recipient) for name in "abcdef"}
    for name in "abcde":
        senders = [s for s in "abcdef" if name in shares[s] and not (s == "f" and (name == "a" or seen == "roster"))]
        inbox = tuple((sender, shares[sender][name]) for sender in senders)
        attempt.sites[name].mask(DeliveredShares(roster.session, name, inbox), inputs[name])
    survivors = SurvivorSet(roster.session, tuple("abcde"))
    confirmations = sorted_by_site((name, attempt.sites[name].confirm(survivors).signature) for name in "abcde")
    for name in "abcde":
        dropped = () if name == "a" or seen == "roster" else ("f",)
        request = UnmaskRequest(roster.session, tuple("abcde"), dropped, confirmations)
        site = attempt.sites[name]
        refused(site, InconsistentSetsError, lambda site=site, request=request: site.unmask(request))


def test_a_confirmation_of_an_earlier_run_of_the_same_attempt_is_noticed() -> None:
    # Same session, same survivors, but the keys of another run.
    cohort = Cohort()
    before, attempt = cohort.attempt(), cohort.attempt()
    old = before.until_confirmed(cohort.inputs())
    request = attempt.until_confirmed(cohort.inputs())
    replayed = dataclasses.replace(request, confirmations=old.confirmations)
    refused(attempt.sites["a"], InconsistentSetsError, lambda: attempt.sites["a"].unmask(replayed))


def test_a_confirmation_of_a_site_that_dropped_does_not_count() -> None:
    attempt = Cohort().attempt()
    request = attempt.until_confirmed(attempt.cohort.inputs(), drop=["e"])
    padded = dataclasses.replace(request, confirmations=(*request.confirmations[:3], ("e", b"signature")))
    refused(attempt.sites["a"], UnknownSiteError, lambda: attempt.sites["a"].unmask(padded))


def test_both_secrets_of_one_site_are_not_given_out() -> None:
    attempt = Cohort().attempt()
    request = attempt.until_confirmed(attempt.cohort.inputs())
    both = dataclasses.replace(request, dropped=("a",))
    refused(attempt.sites["b"], BothSharesAskedError, lambda: attempt.sites["b"].unmask(both))
    assert attempt.cohort.ledgers["b"].begun("study", 0) is None


@pytest.mark.parametrize(
    ("survivors", "dropped"), [("abcd", "e"), ("abcd", ""), ("abcde", ""), ("abcdef", ""), ("bcde", "af")]
)
def test_sets_that_changed_after_they_were_confirmed_are_refused(survivors: str, dropped: str) -> None:
    cohort = Cohort(6)  # f dropped; the confirmed survivors are a to e
    attempt = cohort.attempt()
    request = attempt.until_confirmed(cohort.inputs(), drop=["f"])
    changed = dataclasses.replace(request, survivors=tuple(survivors), dropped=tuple(dropped))
    refused(attempt.sites["a"], SetChangedError, lambda: attempt.sites["a"].unmask(changed))


def test_a_dropped_sites_late_input_stays_masked() -> None:
    # What the coordinator holds of e: its masked input, which came late, and its mask key. Of its seed, no share.
    cohort = Cohort()
    attempt = cohort.attempt()
    delivered = attempt.share(attempt.advertise())
    survivors = attempt.mask(delivered, cohort.inputs(), drop=["e"])
    attempt.sites["e"].mask(delivered["e"], cohort.inputs()["e"])
    request = attempt.confirm(survivors)
    answers = [attempt.sites[name].unmask(request) for name in "abcd"]
    shares = [share_from_bytes(attempt.session.index(answer.site), dict(answer.key_shares)["e"]) for answer in answers]
    assert len(reconstruct(shares, 4)) == 32
    assert all("e" not in dict(answer.seed_shares) for answer in answers)
    assert all(not set(dict(answer.seed_shares)) & set(dict(answer.key_shares)) for answer in answers)


# One unmasking a round


def test_one_site_dropped_between_two_attempts_never_gives_both_sums() -> None:
    cohort = Cohort(6)
    inputs = cohort.inputs()
    first = cohort.attempt()
    aggregate = first.run(inputs)  # a to f
    second = cohort.session("abcde", attempt=1)
    for name in second.sites:
        with pytest.raises(UnmaskingBegunError):
            cohort.site(second, name)
    # The difference of these two sums, of which the second cannot be had, is the input of f:
    difference = aggregate.tensors[0] - plain_sums(inputs, "abcde")[0]
    np.testing.assert_array_equal(difference, inputs["f"][0])


def test_two_attempts_side_by_side_give_one_sum() -> None:
    # Both are ready to be unmasked before either is; of 6 sites with threshold 5, none has 5 left for the second.
    cohort = Cohort(6)
    inputs = cohort.inputs()
    first, second = cohort.attempt(), cohort.attempt(cohort.session("abcde", attempt=1))
    one, other = first.until_confirmed(inputs), second.until_confirmed(inputs)
    for name in "abcdf":  # no more than needed; e is kept for the second
        first.coordinator.receive_unmask_shares(first.sites[name].unmask(one))
    np.testing.assert_array_equal(first.coordinator.finish().tensors[0], plain_sums(inputs, "abcdef")[0])
    answers = [second.sites["e"].unmask(other)]
    for name in "abcd":
        site = second.sites[name]
        refused(site, UnmaskingBegunError, lambda site=site: site.unmask(other))
    assert len(answers) < second.session.threshold


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "confirm"])
def test_every_stage_of_another_attempt_is_refused_once_unmasking_has_begun(stage: str) -> None:
    cohort = Cohort()
    inputs = cohort.inputs()
    attempt = cohort.attempt(cohort.session(attempt=1))
    site = attempt.sites["a"]
    if stage == "advertise":
        cohort.ledgers["a"].begin("study", 0, 0, cohort.names)
        refused(site, UnmaskingBegunError, site.advertise)
        return
    roster = attempt.advertise()
    if stage == "share":
        cohort.ledgers["a"].begin("study", 0, 0, cohort.names)
        refused(site, UnmaskingBegunError, lambda: site.share(roster))
        return
    delivered = attempt.share(roster)
    if stage == "mask":
        cohort.ledgers["a"].begin("study", 0, 0, cohort.names)
        refused(site, UnmaskingBegunError, lambda: site.mask(delivered["a"], inputs["a"]))
        return
    survivors = attempt.mask(delivered, inputs)
    cohort.ledgers["a"].begin("study", 0, 0, cohort.names)
    refused(site, UnmaskingBegunError, lambda: site.confirm(survivors))


def test_unmasking_is_on_disk_before_a_share_leaves_and_counts_after_a_restart(tmp_path) -> None:
    cohort = Cohort()
    inputs = cohort.inputs()
    cohort.ledgers["a"] = FileLedger(tmp_path / "ledger.jsonl")
    attempt = cohort.attempt()
    request = attempt.until_confirmed(inputs)
    assert not (tmp_path / "ledger.jsonl").exists()
    attempt.sites["a"].unmask(request)
    cohort.ledgers["a"] = FileLedger(tmp_path / "ledger.jsonl")  # the process is another one
    with pytest.raises(UnmaskingBegunError):
        cohort.site(cohort.session(), "a")  # nor the same attempt
    with pytest.raises(UnmaskingBegunError):
        cohort.site(cohort.session(attempt=1), "a")
    cohort.site(cohort.session(round=1), "a")


def test_nothing_leaves_where_the_ledger_cannot_be_written(tmp_path) -> None:
    from common.errors import RunFolderError

    cohort = Cohort()
    cohort.ledgers["a"] = FileLedger(tmp_path / "missing" / "ledger.jsonl")
    attempt = cohort.attempt()
    request = attempt.until_confirmed(cohort.inputs())
    refused(attempt.sites["a"], RunFolderError, lambda: attempt.sites["a"].unmask(request))


def test_signatures_cover_protocol_study_plan_round_attempt_site_and_keys() -> None:
    attempt = Cohort().attempt()
    session = attempt.session
    message = attempt.sites["a"].advertise()
    statement = Advertisement.statement(session, "a", message.encryption_key, message.mask_key)
    assert hashlib.sha256(session.encode()).digest() in statement
    for part in (b"wardround secure aggregation, version 1", message.encryption_key, message.mask_key):
        assert part in statement
    for other in (
        dataclasses.replace(session, study="other"),
        dataclasses.replace(session, plan_digest=bytes(32)),
        dataclasses.replace(session, round=1),
        dataclasses.replace(session, attempt=1),
        dataclasses.replace(session, threshold=5),
        dataclasses.replace(session, minimum_cohort=4),
    ):
        assert Advertisement.statement(other, "a", message.encryption_key, message.mask_key) != statement
