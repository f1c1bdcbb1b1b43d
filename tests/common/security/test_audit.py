"""The audit log: whole after any crash, and every other change to it found."""

from __future__ import annotations

import base64
import errno
import json
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import IdentityError, RunFolderError
from common.security.audit import AuditDamagedError, AuditLog, Entry
from common.security.audit_check import check_log
from common.security.audit_files import HEAD, LOG
from common.security.authorities import trusted_authority
from common.security.certificates import ensure_simulation_identities
from common.security.signing import Signer, load_signer
from tests.signers import AUTHORITIES, coordinator_of, site_of


def logged(folder: Path, rounds: int = 3, *, signed: bool = True) -> Path:
    """A log of some rounds, each with its head signed, and one entry after the last."""
    log = AuditLog(folder, "site north", site_of("tiny") if signed else None)
    log.record("started", study="tiny", plan="ab" * 32)
    for number in range(1, rounds + 1):
        log.record("update-sent", round=number, bytes=1000 + number, sha256="cd" * 32)
        log.sign_head()
    log.record("stopped")
    log.close()
    return folder


def lines(folder: Path) -> list[bytes]:
    return (folder / LOG).read_bytes().splitlines(keepends=True)


def rewrite(folder: Path, content: list[bytes]) -> None:
    (folder / LOG).write_bytes(b"".join(content))


def test_a_log_says_who_did_what_when(tmp_path: Path) -> None:
    found = check_log(logged(tmp_path), trusted_authority(AUTHORITIES))
    assert [entry.sequence for entry in found.entries] == list(range(1, 9))
    assert {entry.actor for entry in found.entries} == {"site north"}
    assert found.entries[1].details == {"round": 1, "bytes": 1001, "sha256": "cd" * 32}
    assert found.entries[0].when.utcoffset() is not None
    assert (found.heads, found.signed_up_to, found.torn) == (3, 6, 0)
    assert found.signed_by is not None and found.signed_by.name == "north"
    assert (tmp_path / LOG).stat().st_mode & 0o777 == 0o600
    assert "whole, 8 entries, each as it was written" in found.text()
    assert "signed up to entry 6 by site 'north', 3 heads, under" in found.text()
    assert "1 later, not signed" in found.text()
    assert "not checked against an authority" in check_log(tmp_path).text()
    assert json.dumps(found.report())


def test_a_log_goes_on_where_it_ended(tmp_path: Path) -> None:
    logged(tmp_path)
    log = AuditLog(tmp_path, "site north", site_of("tiny"))
    log.record("started", study="tiny")
    log.sign_head()
    log.sign_head()  # there is nothing new to sign
    log.close()
    found = check_log(tmp_path)
    assert [entry.event for entry in found.entries][-3:] == ["stopped", "started", "head-signed"]


def test_without_a_key_no_head_is_signed(tmp_path: Path) -> None:
    found = check_log(logged(tmp_path, signed=False))
    assert (found.heads, found.signed_by) == (0, None)
    assert not (tmp_path / HEAD).exists()
    assert "no head is signed" in found.text()


# Crashes. ----------------------------------------------------------------------------------------------------------


def test_a_crash_in_the_middle_of_a_line_is_repaired_and_told(tmp_path: Path) -> None:
    logged(tmp_path)
    whole = (tmp_path / LOG).read_bytes()
    last = len(lines(tmp_path)[-1])
    for kept in (1, last // 2, last - 1):
        (tmp_path / LOG).write_bytes(whole[: len(whole) - last + kept])
        found = check_log(tmp_path)
        assert (len(found.entries), found.torn) == (7, kept)
        assert f"{kept} bytes of one more entry, torn by a crash" in found.text()
        log = AuditLog(tmp_path, "site north", site_of("tiny"))
        log.record("started")
        log.close()
        found = check_log(tmp_path)
        assert found.torn == 0
        repaired, started = found.entries[-2:]
        assert (repaired.event, repaired.details["bytes"], started.event) == ("repaired", kept, "started")


def test_a_crash_between_a_signed_head_and_its_copy_is_made_good(tmp_path: Path) -> None:
    logged(tmp_path)
    older = (tmp_path / HEAD).read_bytes()
    log = AuditLog(tmp_path, "site north", site_of("tiny"))
    log.record("update-sent")
    log.sign_head()
    log.close()
    newer = (tmp_path / HEAD).read_bytes()
    assert older != newer
    (tmp_path / HEAD).write_bytes(older)
    check_log(tmp_path)
    AuditLog(tmp_path, "site north", site_of("tiny")).close()
    assert (tmp_path / HEAD).read_bytes() == newer
    rewrite(tmp_path, lines(tmp_path)[:3])  # the first head has no older copy
    (tmp_path / HEAD).unlink()
    check_log(tmp_path)


def test_a_process_that_is_killed_at_any_time_leaves_a_log_that_goes_on(tmp_path: Path) -> None:
    def write() -> None:
        log = AuditLog(tmp_path, "site north", site_of("tiny"))
        while True:
            log.record("update-sent", bytes=1)
            log.sign_head()

    for attempt in range(5):
        child = multiprocessing.get_context("fork").Process(target=write)
        child.start()
        child.join(0.1 + attempt * 0.03)
        child.kill()
        child.join()
        check_log(tmp_path)
        AuditLog(tmp_path, "site north", site_of("tiny")).close()
    assert check_log(tmp_path, trusted_authority(AUTHORITIES)).torn == 0


def test_two_processes_and_many_threads_make_one_chain(tmp_path: Path) -> None:
    logs = [AuditLog(tmp_path, f"coordinator {number}") for number in range(2)]

    def write(log: AuditLog) -> None:
        for number in range(20):
            log.record("event", number=number)

    threads = [threading.Thread(target=write, args=(log,)) for log in logs for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(check_log(tmp_path).entries) == 80


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path, "site north")
    log.record("started")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(RunFolderError, match=r"audit\.log: cannot be written \(No space left on device\); free"):
            log.record("update-sent")
    assert [entry.event for entry in check_log(tmp_path).entries] == ["started"]
    log.record("update-sent")
    assert [entry.event for entry in check_log(tmp_path).entries] == ["started", "update-sent"]


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("rounds", [0, 2])
def test_nothing_follows_a_signed_head_before_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    logged(tmp_path, rounds)
    log = AuditLog(tmp_path, "site north", site_of("tiny"))
    log.record("update-sent")
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "mkstemp", full)  # a line still fits, another file does not
        for write in (log.sign_head, lambda: log.record("stopped"), log.sign_head):
            with pytest.raises(RunFolderError, match="No space left on device"):
                write()
        with pytest.raises(RunFolderError, match="No space left on device"):
            AuditLog(tmp_path, "site north", site_of("tiny"))
    log.close()
    assert check_log(tmp_path).entries[-1].event == "head-signed"
    log = AuditLog(tmp_path, "site north", site_of("tiny"))
    log.record("started")
    log.close()
    assert [entry.event for entry in check_log(tmp_path).entries][-2:] == ["head-signed", "started"]


def test_a_head_is_signed_once_room_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def make_room() -> int:
        monkeypatch.undo()
        made.append(1)
        return 1

    log = AuditLog(tmp_path, "site north", site_of("tiny"), make_room)
    log.record("started")
    monkeypatch.setattr(tempfile, "mkstemp", full)
    log.sign_head()
    log.close()
    assert made
    assert [entry.event for entry in check_log(tmp_path).entries] == ["started", "head-signed"]
    assert (tmp_path / HEAD).read_bytes() == lines(tmp_path)[-1][:-1]


# Attacks. ----------------------------------------------------------------------------------------------------------


def _resealed(folder: Path, number: int, **details: object) -> None:
    """An entry changed, with every hash from there on computed anew, as whoever knows the format can."""
    entries = [Entry.parse(line[:-1]) for line in lines(folder)]
    made: list[Entry] = []
    for index, entry in enumerate(entries):
        changed = dict(entry.details) | (details if index == number - 1 else {})
        before = made[-1] if made else None
        made.append(Entry.after(before, entry.actor, entry.event, changed, entry.time))
    rewrite(folder, [entry.line() + b"\n" for entry in made])


@pytest.mark.parametrize(
    ("attack", "match"),
    [
        (lambda folder, found: found.pop(2), "entry 3 does not follow the one before: entries were removed or moved"),
        (lambda folder, found: found.pop(0), "entry 1 does not follow the one before"),
        (lambda folder, found: found.insert(1, found.pop(3)), "entry 2 does not follow the one before"),
        (lambda folder, found: found.insert(3, found[2]), "entry 4 does not follow the one before"),
        (
            lambda folder, found: found.__setitem__(1, found[1].replace(b"1001", b"9001")),
            "entry 2 is not as it was written",
        ),
        (lambda folder, found: found.__setitem__(1, found[1].replace(b":", b": ", 1)), "entry 2 is not as it was"),
        (lambda folder, found: found.insert(2, b"\n"), "entry 3 is not as it was written"),
        (lambda folder, found: found.insert(2, b"x" * 70_000 + b"\n"), "line 3 is too long"),
        (
            lambda folder, found: found.__delitem__(slice(-3, None)),
            "it ends at entry 5, and its head was signed at entry 7: entries were removed",
        ),
        (lambda folder, found: found.clear(), "it ends at entry 0, and its head was signed at entry 7"),
    ],
)
def test_changed_lines_are_refused(tmp_path: Path, attack: Callable[[Path, list[bytes]], object], match: str) -> None:
    found = lines(logged(tmp_path))
    attack(tmp_path, found)
    rewrite(tmp_path, found)
    with pytest.raises(AuditDamagedError, match=match):
        check_log(tmp_path)
    before = (tmp_path / LOG).read_bytes()
    with pytest.raises(AuditDamagedError, match=match):
        AuditLog(tmp_path, "site north", site_of("tiny"))
    assert (tmp_path / LOG).read_bytes() == before  # evidence is not touched


def test_a_torn_line_behind_a_log_that_was_cut_off_is_not_repaired(tmp_path: Path) -> None:
    found = lines(logged(tmp_path))
    rewrite(tmp_path, [*found[:5], found[5][:20]])  # up to the second signed head
    before = (tmp_path / LOG).read_bytes(), (tmp_path / HEAD).read_bytes()
    with pytest.raises(AuditDamagedError, match="it ends at entry 5, and its head was signed at entry 7"):
        AuditLog(tmp_path, "site north", site_of("tiny"))
    assert ((tmp_path / LOG).read_bytes(), (tmp_path / HEAD).read_bytes()) == before


def test_a_log_with_new_hashes_does_not_fit_its_signatures(tmp_path: Path) -> None:
    _resealed(logged(tmp_path), 2, bytes=1)
    with pytest.raises(AuditDamagedError, match="the head that entry 3 signs is not that of the entry before"):
        check_log(tmp_path)
    with pytest.raises(AuditDamagedError, match=r"the head that was signed|is not its newest signed head"):
        AuditLog(tmp_path, "site north")


def test_a_log_that_somebody_else_signed_anew_is_refused(tmp_path: Path) -> None:
    ensure_simulation_identities(tmp_path / "other", "tiny", ["north"], ["localhost"])
    stranger = load_signer(tmp_path / "other" / "sites" / "north")
    log = AuditLog(tmp_path / "forged", "site north", stranger)
    log.record("started")
    log.sign_head()
    log.close()
    check_log(tmp_path / "forged")  # nobody vouches for anybody
    with pytest.raises(IdentityError, match=r"audit\.log: entry 2: .* was not issued by the authority"):
        check_log(tmp_path / "forged", trusted_authority(AUTHORITIES))


def test_a_log_without_a_signed_head_does_not_pass_by_an_authority(tmp_path: Path) -> None:
    logged(tmp_path, signed=False)  # as whoever can write the folder leaves it, with audit.head removed
    check_log(tmp_path)
    with pytest.raises(IdentityError, match=r"audit\.log: no head is signed, so that .* vouches for none of it"):
        check_log(tmp_path, trusted_authority(AUTHORITIES))


@pytest.mark.parametrize(
    ("actor", "signer"),
    [
        ("coordinator", site_of("tiny")),
        ("site alpha", site_of("tiny")),
        ("north", site_of("tiny")),
        ("site coordinator", coordinator_of("tiny")),
    ],
)
def test_nobody_signs_a_log_in_the_name_of_another(tmp_path: Path, actor: str, signer: Signer) -> None:
    log = AuditLog(tmp_path, actor, signer)
    log.record("started")
    log.sign_head()
    log.close()
    with pytest.raises(IdentityError, match=f"entry 1 is of '{actor}', and the heads are signed by {signer.role} "):
        check_log(tmp_path, trusted_authority(AUTHORITIES))


def test_a_forged_signature_is_refused(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, "site north", site_of("tiny"))
    log.record("started")
    log.sign_head()
    log.close()
    _resealed(tmp_path, 2, signature=base64.b64encode(b"\0" * 64).decode())
    (tmp_path / HEAD).write_bytes(lines(tmp_path)[-1][:-1])
    with pytest.raises(IdentityError, match="entry 2: the signature is not one that site 'north' gave"):
        check_log(tmp_path)


def test_a_missing_or_older_or_damaged_signed_head_is_missed(tmp_path: Path) -> None:
    logged(tmp_path)
    kept = (tmp_path / HEAD).read_bytes()
    (tmp_path / HEAD).write_bytes(lines(tmp_path)[2][:-1])
    with pytest.raises(AuditDamagedError, match=r"audit\.head is not its newest signed head, that of entry 7"):
        check_log(tmp_path)
    (tmp_path / HEAD).write_bytes(kept[:-1])
    with pytest.raises(AuditDamagedError, match=r"audit\.head: the audit log is not what was written"):
        check_log(tmp_path)
    (tmp_path / HEAD).unlink()
    with pytest.raises(AuditDamagedError, match=r"its head was signed at entry 7, and audit\.head is not there"):
        check_log(tmp_path)


def test_a_log_that_ends_at_a_signed_head_whose_file_is_gone_was_tampered_with(tmp_path: Path) -> None:
    logged(tmp_path)
    rewrite(tmp_path, lines(tmp_path)[:5])
    (tmp_path / HEAD).unlink()
    with pytest.raises(AuditDamagedError, match=r"2 heads were signed, and audit\.head is not there"):
        check_log(tmp_path)


def test_a_log_that_is_gone_while_its_signed_head_is_there_was_removed(tmp_path: Path) -> None:
    logged(tmp_path)
    (tmp_path / LOG).unlink()
    with pytest.raises(AuditDamagedError, match=r"it is not there, and audit\.head says that it was signed"):
        check_log(tmp_path)


def test_a_folder_without_a_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no audit log here; give the folder of a run, or the --work folder"):
        check_log(tmp_path)


@given(st.binary(max_size=200))
def test_no_bytes_pass_for_an_entry(noise: bytes) -> None:
    with pytest.raises((ValueError, TypeError)):
        Entry.parse(noise)
