"""Enrolment and renewal as those meet them who may and who may not: over gRPC and TLS, with real files."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from client.enrolment import Enrolled, enrol, rotate
from common.errors import IdentityError, NetworkError, UsageError
from common.security.audit import NO_AUDIT, AuditLog
from common.security.audit_check import check_log
from common.security.certificates import create_authority, issue, load_identity
from common.security.requests import Keys, Requests
from common.security.signing import load_signer
from common.security.tokens import Token
from common.wire import enrolment_pb2 as pb
from common.wire import enrolment_pb2_grpc as rpc
from common.wire.channel import channel_credentials
from server.enrolment import Attempts, host_of
from server.invitations import NOT_ACCEPTED, Register
from tests.server.enrolment import HOUR, Study


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    made = Study(tmp_path / "study")
    with made.serving():
        yield made


def enrolled(study: Study, folder: Path, name: str = "north", **options: object) -> Enrolled:
    return enrol(study.invite(name, **options), folder, NO_AUDIT)  # type: ignore[arg-type]


def ask(at: Study, token: Token, requests: Requests, /, **changes: object) -> pb.Certificates:
    """What a program of somebody's own would send."""
    fields = {
        "study": token.study,
        "invitation": token.invitation,
        "secret": token.secret,
        "tls_request": requests.tls,
        "signing_request": requests.signing,
    } | changes
    credentials = grpc.ssl_channel_credentials(at.authority_pem)
    with grpc.secure_channel(f"localhost:{at.port}", credentials) as channel:
        return rpc.EnrolmentStub(channel).Enrol(pb.EnrolRequest(**fields), timeout=20)  # type: ignore[no-untyped-call,no-any-return]


def refusal(at: Study, token: Token, requests: Requests, /, **changes: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as refused:
        ask(at, token, requests, **changes)
    return refused.value.code(), refused.value.details()


def requests_of(token: Token, **changes: str) -> Requests:
    owner = {"study": token.study, "role": token.role, "name": token.name} | changes
    return Keys.new().requests(**owner)  # type: ignore[arg-type]


# As it is meant to be. ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["site", "investigator", "observer"])
def test_who_was_invited_gets_an_identity_of_its_role(study: Study, tmp_path: Path, role: str) -> None:
    folder = tmp_path / "north"
    audit = AuditLog(tmp_path / "work", f"{role} north")
    found = enrol(study.invite("north", role), folder, audit)  # type: ignore[arg-type]
    identity, signer = load_identity(folder), load_signer(folder)
    assert (identity.role, identity.name, identity.not_after) == (role, "north", found.until)
    assert identity.authority == study.authority_pem
    assert (signer.role, signer.name) == (role, "north")
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {
        "ca.crt": 0o644,
        "enrolled.json": 0o644,
        "identity.crt": 0o644,
        "identity.key": 0o600,
        "signing.crt": 0o644,
        "signing.key": 0o600,
    }
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert study.events() == ["enrolled"]
    assert [entry.event for entry in check_log(tmp_path / "work").entries] == ["enrolment-asked", "enrolled"]


def test_nothing_secret_is_kept_by_the_coordinator(study: Study, tmp_path: Path) -> None:
    token = study.invite()
    enrol(token, tmp_path / "north", NO_AUDIT)
    keys = Keys.read(tmp_path / "north")
    secrets = [token.secret, keys.tls.private_numbers().private_value.to_bytes(32), keys.signing.private_bytes_raw()]
    kept = b"".join(path.read_bytes() for path in study.authority.iterdir())
    for secret in secrets:
        assert secret not in kept and secret.hex().encode() not in kept
    assert stat.S_IMODE((study.authority / "enrolment.sqlite").stat().st_mode) == 0o600


def test_who_lost_the_answer_gets_the_same_certificates_again(study: Study) -> None:
    token = study.invite()
    requests = requests_of(token)
    first = ask(study, token, requests)
    study.now += 2 * HOUR  # also when it would have expired meanwhile
    assert ask(study, token, requests) == first


# Attacks, and mistakes that look like them. -------------------------------------------------------------------------


def test_a_token_is_good_once(study: Study, tmp_path: Path) -> None:
    token = study.invite()
    enrol(token, tmp_path / "north", NO_AUDIT)
    with pytest.raises(IdentityError, match=r"this token was used on .* with other keys; if that was not you, tell"):
        enrol(token, tmp_path / "thief", NO_AUDIT)
    assert not (tmp_path / "thief" / "identity.crt").exists()
    assert study.events() == ["enrolled", "enrolment-refused"]


def test_an_expired_token_is_refused(study: Study, tmp_path: Path) -> None:
    token = study.invite()
    study.now += HOUR + 1
    with pytest.raises(IdentityError, match=r"this token expired on .*; ask whoever runs the study for a new one"):
        enrol(token, tmp_path / "north", NO_AUDIT)


def test_a_token_that_expired_days_ago_is_not_even_sent(study: Study, tmp_path: Path) -> None:
    token = dataclasses.replace(study.invite(), expires=1_700_000_000, address="localhost:1")
    with pytest.raises(IdentityError, match="token: it expired on 2023-11-14"):
        enrol(token, tmp_path / "north", NO_AUDIT)


def test_a_withdrawn_token_is_refused(study: Study, tmp_path: Path) -> None:
    token = study.invite()
    assert Register(study.authority).withdraw("site", "north", study.now) == 1
    with pytest.raises(IdentityError, match="this token was withdrawn on"):
        enrol(token, tmp_path / "north", NO_AUDIT)


def test_a_guess_learns_nothing(study: Study) -> None:
    """Neither whether there is such an invitation, nor what is wrong with it, nor that the request is."""
    good, used = study.invite("north"), study.invite("south")
    ask(study, used, requests_of(used))
    expired = study.invite("east", hours=-1.0)
    guess = os.urandom(32)
    answers = {
        refusal(study, good, requests_of(good), secret=guess),
        refusal(study, used, requests_of(used), secret=guess),
        refusal(study, expired, requests_of(expired), secret=guess),
        refusal(study, good, requests_of(good), invitation=os.urandom(8)),
        refusal(study, good, requests_of(good), secret=b""),
        refusal(study, good, requests_of(good), secret=good.digest()),  # who read the register has not the secret
        refusal(study, good, requests_of(good, name="other"), secret=guess, study="other"),
        refusal(study, good, Requests(b"", b""), secret=guess),
    }
    assert answers == {(grpc.StatusCode.PERMISSION_DENIED, NOT_ACCEPTED)}
    ask(study, good, requests_of(good))  # and the token is as good as before


def test_attempts_are_limited(tmp_path: Path) -> None:
    now = [0.0]
    study = Study(tmp_path / "study")
    with study.serving(Attempts(lambda: now[0])):
        token = study.invite()
        for _ in range(10):
            code, _ = refusal(study, token, requests_of(token), secret=os.urandom(32))
            assert code is grpc.StatusCode.PERMISSION_DENIED
        code, words = refusal(study, token, requests_of(token))  # now the right one would not help either
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "wait a minute" in words
        now[0] = 61.0
        ask(study, token, requests_of(token))
    assert study.events() == ["enrolment-refused"] * 10 + ["enrolled"]


def test_each_network_has_attempts_of_its_own() -> None:
    attempts = Attempts(lambda: 0.0)
    for _ in range(10):
        attempts.failed("ipv4:192.0.2.1:1000")
        attempts.failed("ipv6:%5B2001:db8::1%5D:1000")
    assert attempts.blocked("ipv4:192.0.2.1:2000") and not attempts.blocked("ipv4:192.0.2.2:1000")
    assert attempts.blocked("ipv6:%5B2001:db8::2%5D:1000") and not attempts.blocked("ipv6:%5B2001:db8:1::1%5D:1000")
    for number in range(5000):
        attempts.failed(f"ipv4:10.0.{number // 256}.{number % 256}:1")
    assert len(attempts._failures) == 4096
    assert host_of("ipv6:%5B::1%5D:40000") == "::1" and host_of("ipv4:192.0.2.1:40000") == "192.0.2.1"


@pytest.mark.parametrize(
    "changes", [{"name": "south"}, {"role": "investigator"}, {"role": "coordinator"}, {"study": "other"}]
)
def test_a_token_is_for_its_own_name_role_and_study_alone(study: Study, changes: dict[str, str]) -> None:
    token = study.invite()
    code, words = refusal(study, token, requests_of(token, **changes))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert words == "request: it is not for site 'north' of study 'nuclei', who was invited"
    ask(study, token, requests_of(token))  # it was not used up


def test_keys_of_somebody_else_are_not_certified(study: Study) -> None:
    token = study.invite()
    mine, theirs = requests_of(token), requests_of(token)
    forged = theirs.tls[:-1] + bytes([theirs.tls[-1] ^ 1])  # their key, not their signature
    code, words = refusal(study, token, Requests(forged, mine.signing))
    assert code is grpc.StatusCode.PERMISSION_DENIED and words.startswith("request: it")


def test_a_token_of_another_study_is_refused(study: Study, tmp_path: Path) -> None:
    other = Study(tmp_path / "other", "lungs")
    token = other.invite()
    changed = requests_of(token, study="nuclei")
    assert refusal(study, token, changed, study="nuclei") == (grpc.StatusCode.PERMISSION_DENIED, NOT_ACCEPTED)
    mine = study.invite()
    code, words = refusal(study, mine, requests_of(mine), study="lungs")
    assert code is grpc.StatusCode.PERMISSION_DENIED and "is of study 'lungs', and here is study 'nuclei'" in words


def test_a_server_of_another_authority_gets_nothing(study: Study, tmp_path: Path) -> None:
    """Somebody who holds the address, with a certificate for its name from an authority of the same name."""
    other = Study(tmp_path / "other")
    with other.serving():
        token = dataclasses.replace(study.invite(), address=f"localhost:{other.port}")
        with pytest.raises(IdentityError, match=r"not the coordinator that the token is from.*Nothing of the token"):
            enrol(token, tmp_path / "north", NO_AUDIT)
    assert other.events() == []


def test_a_server_that_shows_the_right_authority_but_is_not_of_it_gets_nothing(study: Study, tmp_path: Path) -> None:
    """The authority's certificate is public: a proxy in between can show it."""
    other = Study(tmp_path / "other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.enrolment.EnrolmentService.Authority", _showing(study.authority_pem))
        with other.serving():
            token = dataclasses.replace(study.invite(), address=f"localhost:{other.port}")
            with pytest.raises(IdentityError, match="not the coordinator that the token is from"):
                enrol(token, tmp_path / "north", NO_AUDIT)
    assert other.events() == []


def _showing(pem: bytes) -> object:
    async def authority(self: object, request: object, context: object) -> pb.AuthorityReply:
        return pb.AuthorityReply(authority=pem)

    return authority


def test_a_token_whose_study_was_changed_is_refused(study: Study, tmp_path: Path) -> None:
    token = Token.parse(dataclasses.replace(study.invite(), study="lungs").text())
    with pytest.raises(IdentityError, match="says study 'lungs', and its authority is that of 'nuclei'"):
        enrol(token, tmp_path / "north", NO_AUDIT)


def test_nothing_but_enrolment_is_served_to_who_has_no_certificate(study: Study) -> None:
    credentials = grpc.ssl_channel_credentials(study.authority_pem)
    with grpc.secure_channel(f"localhost:{study.port}", credentials) as channel:
        for method in (rpc.RenewalStub(channel).Renew, rpc.RenewalStub(channel).Confirm):  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.RpcError) as refused:
                method(pb.RenewRequest(), timeout=20)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    with grpc.secure_channel(f"localhost:{study.renewals}", credentials) as channel:  # the other port wants one
        with pytest.raises(grpc.RpcError) as refused:
            rpc.RenewalStub(channel).Renew(pb.RenewRequest(), timeout=20)  # type: ignore[no-untyped-call]
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_tls_1_2_is_refused(study: Study) -> None:
    for port in (study.port, study.renewals):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as line, pytest.raises(ssl.SSLError):
            context.wrap_socket(line)


def test_a_large_message_is_refused(study: Study) -> None:
    token = study.invite()
    code, _ = refusal(study, token, Requests(bytes(100_000), b""))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


# Mistakes of a hospital's IT. ---------------------------------------------------------------------------------------


def test_enrolling_twice_says_what_to_do(study: Study, tmp_path: Path) -> None:
    enrolled(study, tmp_path / "north")
    before = (tmp_path / "north" / "identity.key").read_bytes()
    with pytest.raises(IdentityError, match=r"holds the identity of site 'north' already, valid until 20.*rotate"):
        enrolled(study, tmp_path / "north", "south")
    assert (tmp_path / "north" / "identity.key").read_bytes() == before


def test_a_folder_with_other_files_is_left_alone(study: Study, tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir(mode=0o755)
    (folder / "thesis.txt").touch()
    with pytest.raises(IdentityError, match=r"holds other files \(thesis\.txt\)"):
        enrolled(study, folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755 and len(list(folder.iterdir())) == 1


def test_a_wrong_host_is_told(study: Study, tmp_path: Path) -> None:
    token = study.invite()
    port = token.address.partition(":")[2]
    for address, words in (
        (f"127.0.0.2:{port}", "certificate does not name '127.0.0.2'|nothing listens there"),
        ("localhost:1", "nothing listens there"),
        ("nowhere.invalid:8444", "its name is not known here"),
    ):
        with pytest.raises(NetworkError, match=words):
            enrol(dataclasses.replace(token, address=address), tmp_path / "north", NO_AUDIT)


def test_the_wrong_port_is_told(study: Study, tmp_path: Path) -> None:
    token = dataclasses.replace(study.invite(), address=f"localhost:{study.renewals}")
    with pytest.raises(NetworkError):
        enrol(token, tmp_path / "north", NO_AUDIT)


def test_something_that_speaks_no_tls_is_told(study: Study, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            line, _ = server.accept()
            with line:
                line.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        token = dataclasses.replace(study.invite(), address=f"localhost:{server.getsockname()[1]}")
        with pytest.raises(NetworkError, match="no enrolment of Wardround"):
            enrol(token, tmp_path / "north", NO_AUDIT)


# Killed between two steps. ------------------------------------------------------------------------------------------

_ENROL = """
import sys
from pathlib import Path
from client.enrolment import enrol, rotate
from common.security.audit import NO_AUDIT
from common.security.tokens import Token
if sys.argv[1] == "enrol":
    enrol(Token.parse(sys.argv[2]), Path(sys.argv[3]), NO_AUDIT)
else:
    rotate(Path(sys.argv[3]), sys.argv[2], NO_AUDIT)
"""


def killed(place: str, *arguments: str) -> None:
    """Runs a site's command that dies at a failpoint, as of a power cut."""
    environment = os.environ | {"WARDROUND_FAILPOINTS": f"{place}=kill"}
    done = subprocess.run([sys.executable, "-c", _ENROL, *arguments], env=environment, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("place", ["enrolled.keys", "enrolled.answer", "enrolled.half"])
def test_an_enrolment_that_was_cut_off_goes_on(study: Study, tmp_path: Path, place: str) -> None:
    token, folder = study.invite(), tmp_path / "north"
    killed(place, "enrol", token.text(), str(folder))
    with pytest.raises(IdentityError):
        load_identity(folder)  # it is none yet
    keys = (folder / "identity.key").read_bytes()
    enrol(token, folder, NO_AUDIT)
    assert load_identity(folder).key == keys
    assert load_signer(folder).name == "north"


def test_who_issues_may_be_killed_before_and_after_the_invitation_is_used(tmp_path: Path) -> None:
    """Before: it is as open as it was. After: the same keys get the certificates, and nobody else does."""
    script = (
        "import sys; from pathlib import Path; from server.invitations import Issuer;"
        "from common.security.requests import Requests; from common.security.revocation import RevocationFile;"
        "from common.security.signing import load_signer;"
        "folder = Path(sys.argv[1]); signer = load_signer(folder / 'coordinator');"
        "issuer = Issuer(folder / 'authority', RevocationFile(folder / 'coordinator', signer.authority), signer);"
        "issuer.enrol('nuclei', *map(bytes.fromhex, sys.argv[2:4]), Requests(*map(bytes.fromhex, sys.argv[4:6])))"
    )
    study = Study(tmp_path / "study")
    for place, state in (("enrolment.before", "open"), ("enrolment.used", "used")):
        token = study.invite(place.replace(".", "-"))
        requests = requests_of(token)
        values = [part.hex() for part in (token.invitation, token.secret, requests.tls, requests.signing)]
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "study"), *values],
            env=os.environ | {"WARDROUND_FAILPOINTS": f"{place}=kill"},
            timeout=60,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL
        found = Register(study.authority).find(token.invitation)
        assert found is not None and found.state(study.now) == state
        with study.serving():
            if state == "used":
                assert "with other keys" in refusal(study, token, requests_of(token))[1]
                assert ask(study, token, requests).tls == found.tls
            else:
                ask(study, token, requests)


# Revoked, and renewed. ----------------------------------------------------------------------------------------------


def renewals(study: Study) -> str:
    return f"localhost:{study.renewals}"


def test_rotation_gives_new_keys_for_the_same_owner(study: Study, tmp_path: Path) -> None:
    folder = tmp_path / "north"
    enrolled(study, folder)
    before, signer = load_identity(folder), load_signer(folder)
    rotate(folder, None, NO_AUDIT)
    after, signing = load_identity(folder), load_signer(folder)
    assert (after.role, after.name, after.authority) == (before.role, before.name, before.authority)
    assert after.key != before.key and after.certificate != before.certificate
    assert signing.certificate != signer.certificate
    assert not (folder / "next").exists() and not (folder / "switch").exists()
    assert stat.S_IMODE((folder / "identity.key").stat().st_mode) == 0o600
    assert study.events() == ["enrolled", "renewed", "rotated"]
    rotate(folder, None, NO_AUDIT)  # and by the new one the next


@pytest.mark.parametrize("place", ["rotation.answer", "rotation.confirmed"])
def test_a_rotation_that_was_cut_off_early_leaves_the_old_identity(study: Study, tmp_path: Path, place: str) -> None:
    folder = tmp_path / "north"
    enrolled(study, folder)
    before = load_identity(folder)
    killed(place, "rotate", renewals(study), str(folder))
    assert load_identity(folder) == before
    rotate(folder, None, NO_AUDIT)
    assert load_identity(folder).key != before.key


def test_a_rotation_that_was_cut_off_in_the_exchange_is_completed_by_who_comes_next(
    study: Study, tmp_path: Path
) -> None:
    folder = tmp_path / "north"
    enrolled(study, folder)
    before = load_identity(folder)
    killed("rotation.half", "rotate", renewals(study), str(folder))
    assert (folder / "switch").is_dir()
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert load_identity(folder).key != before.key
    assert not (folder / "switch").exists()
    assert load_signer(copy).certificate == load_signer(folder).certificate  # whoever it is


def test_a_revoked_site_gets_no_new_certificates(study: Study, tmp_path: Path) -> None:
    folder = tmp_path / "north"
    token = study.invite()
    enrol(token, folder, NO_AUDIT)
    before = load_identity(folder)
    study.now += 1
    study.revoke("north", reason="laptop stolen")
    with pytest.raises(IdentityError, match=r"certificate of site 'north' was revoked on .*\(laptop stolen\); ask"):
        rotate(folder, None, NO_AUDIT)
    assert load_identity(folder) == before
    keys = Keys.read(folder)
    _, words = refusal(study, token, keys.requests("nuclei", "site", "north"))  # nor the old ones once more
    assert "was revoked after this invitation was made" in words
    assert study.events()[-2:] == ["enrolment-refused"] * 2


def test_an_invitation_from_before_the_revocation_is_dead(study: Study, tmp_path: Path) -> None:
    token = study.invite()
    study.now += 1
    study.revoke("north")
    with pytest.raises(IdentityError, match="revoked after this invitation was made"):
        enrol(token, tmp_path / "north", NO_AUDIT)


def test_who_was_revoked_may_be_invited_again_and_the_old_certificate_stays_dead(study: Study, tmp_path: Path) -> None:
    enrolled(study, tmp_path / "old")
    study.now += 1
    study.revoke("north")
    study.now += 1
    enrolled(study, tmp_path / "new")
    rotate(tmp_path / "new", None, NO_AUDIT)
    rotate(tmp_path / "new", None, NO_AUDIT)
    with pytest.raises(IdentityError, match="was revoked"):
        rotate(tmp_path / "old", None, NO_AUDIT)


def test_nobody_renews_for_somebody_else(study: Study, tmp_path: Path) -> None:
    enrolled(study, tmp_path / "north")
    identity = load_identity(tmp_path / "north")
    for owner in (("nuclei", "site", "south"), ("nuclei", "investigator", "north"), ("lungs", "site", "north")):
        requests = Keys.new().requests(*owner)  # type: ignore[arg-type]
        with (
            grpc.secure_channel(renewals(study), channel_credentials(identity)) as channel,
            pytest.raises(grpc.RpcError) as refused,
        ):
            rpc.RenewalStub(channel).Renew(  # type: ignore[no-untyped-call]
                pb.RenewRequest(tls_request=requests.tls, signing_request=requests.signing), timeout=20
            )
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "it is not for site 'north' of study 'nuclei'" in refused.value.details()


def test_a_certificate_of_another_authority_renews_nothing(study: Study, tmp_path: Path) -> None:
    create_authority(tmp_path / "authority", "nuclei")
    issue(tmp_path / "north", tmp_path / "authority", "north", "site")
    identity = dataclasses.replace(load_identity(tmp_path / "north"), authority=study.authority_pem)
    requests = Keys.new().requests("nuclei", "site", "north")
    with (
        grpc.secure_channel(renewals(study), channel_credentials(identity)) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        rpc.RenewalStub(channel).Renew(  # type: ignore[no-untyped-call]
            pb.RenewRequest(tls_request=requests.tls, signing_request=requests.signing), timeout=20
        )
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert study.events() == []


def test_the_coordinators_identity_is_not_rotated_so(study: Study) -> None:
    with pytest.raises(IdentityError, match="wardround init --renew"):
        rotate(study.coordinator, renewals(study), NO_AUDIT)


def test_without_an_address_of_renewals_it_is_asked_for(study: Study, tmp_path: Path) -> None:
    issue(tmp_path / "north", study.authority, "north", "site")  # carried there by hand, as in a trial
    with pytest.raises(IdentityError, match="give it with --at"):
        rotate(tmp_path / "north", None, NO_AUDIT)
    rotate(tmp_path / "north", renewals(study), NO_AUDIT)


def test_a_malformed_token_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        Token.parse("wr1abc")
