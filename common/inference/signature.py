"""`manifest.sig`: the signature over a version's manifest, which has the digest of every other file of the version.

It is JSON: "format", "algorithm", "certificate" (PEM, of who signed) and "signature" (base64). Nothing in it says whom
to trust: a folder that is passed on could bring its own authority along. The authority's certificate comes from the
user.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common.errors import IdentityError
from common.inference.published import MANIFEST, SIGNATURE, parse_manifest
from common.security.authorities import Authority
from common.security.signing import ALGORITHM, SignedBy, Signer, verify

PERSONAL: Final = "personal"
"""The key of a manifest whose version a site fine-tuned for itself; the site signs it, no other version."""

_PURPOSE: Final = "published version"
_SIGNER: Final = "signer"
_FORMAT: Final = 1
_MOST_BYTES: Final = 2**16
_AGAIN: Final = "get the version again from where it was published"


@dataclass(frozen=True)
class Checked:
    """What was found of a version's signature.

    Attributes
    ----------
    signed_by : None where the version is not signed, and that was allowed.
    personal : whether a site made the version for itself.
    authority : what vouches for the signer; None where none was given, so that anybody may have made the signature.
    """

    signed_by: SignedBy | None
    personal: bool
    authority: Authority | None

    @property
    def warnings(self) -> list[str]:
        """What a user has to know before relying on the version; nothing where the study's authority vouches for it."""
        if self.signed_by is None:
            return ["this version is not signed: nobody can tell who made it, or whether it was changed since"]
        whose = f"{self.signed_by.role} {self.signed_by.name!r}"
        said = []
        if self.authority is None:
            said.append(
                f"signed by a certificate that says it is of {whose} (SHA-256 {self.signed_by.fingerprint}): not "
                "checked against an authority, and anyone can make such a certificate; give the study's with "
                "--authority ca.crt"
            )
        if self.personal:
            said.append(f"a personal model, made and signed by {whose} for its own images, not by the study")
        return said

    def report(self) -> dict[str, Any]:
        """Plain values: "signed_by" (None, or role, name and certificate_sha256), "authority" (None: not checked)."""
        by = self.signed_by
        return {
            "signed_by": by and {"role": by.role, "name": by.name, "certificate_sha256": by.fingerprint},
            "authority": self.authority.source if self.authority is not None and by is not None else None,
        }


def signer_entry(signer: Signer) -> dict[str, str]:
    """What a manifest says of who will sign it, so that a signature cannot be taken away unseen."""
    return {"role": signer.role, "name": signer.name, "certificate_sha256": signer.fingerprint}


def sign_manifest(folder: Path, signer: Signer) -> None:
    """Write the signature of the manifest that lies in the folder, which must name this signer (`signer_entry`)."""
    signature = signer.sign(_PURPOSE, (folder / MANIFEST).read_bytes())
    content = {
        "format": _FORMAT,
        "algorithm": ALGORITHM,
        "certificate": signer.certificate.decode("ascii"),
        "signature": base64.b64encode(signature).decode("ascii"),
    }
    (folder / SIGNATURE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def was_signed(manifest: bytes, folder: Path) -> bool:
    """Whether a manifest names who signed it. Raises PublishError where it is none."""
    return _SIGNER in parse_manifest(manifest, folder / MANIFEST)


def check_signature(
    manifest: bytes, folder: Path, authority: Authority | None, *, allow_unsigned: bool = False
) -> Checked:
    """Whose a version's manifest is. The files that it lists are for `version_files.check_files`.

    A version must be signed by the coordinator of the study that it says it is of; a personal one, by a site.

    Parameters
    ----------
    manifest : the bytes of the manifest.
    folder : where its signature lies beside it.
    authority : of the study. None: the signature is only held against the certificate that it brings along.
    allow_unsigned : whether a version of before versions were signed will do.

    Raises
    ------
    IdentityError : it is not signed; the signature is damaged, not of this manifest, or of somebody who may not sign.
    PublishError : the manifest is none.
    """
    path = folder / SIGNATURE
    signature = _read(path)
    if signature is None:
        content = parse_manifest(manifest, folder / MANIFEST)
        if was_signed(manifest, folder):
            raise IdentityError(f"{path}: is not there, and the manifest says that it was signed; {_AGAIN}")
        if not allow_unsigned:
            raise IdentityError(
                f"{folder}: not signed ({SIGNATURE} is not in it); {_AGAIN}. A version that was published before "
                "versions were signed is used only with --allow-unsigned"
            )
        return Checked(None, PERSONAL in content, authority)
    pem, value = signature
    found = verify(
        authority.issuer_of(pem) if authority is not None else None,
        pem,
        purpose=_PURPOSE,
        message=manifest,
        signature=value,
        where=str(path),
    )
    content = parse_manifest(manifest, folder / MANIFEST)
    personal = PERSONAL in content
    if found.role != ("site" if personal else "coordinator"):
        raise IdentityError(
            f"{path}: signed by {found.role} {found.name!r}, and only "
            + (
                "the site that made a personal model signs it"
                if personal
                else "a study's coordinator signs its versions"
            )
            + "; do not use it, and tell whoever runs the study"
        )
    if authority is not None and found.study != content.get("study"):
        raise IdentityError(
            f"{path}: the signer is of study {found.study!r}, the version of {content.get('study')!r}; do not use it"
        )
    named = content.get(_SIGNER)
    if not isinstance(named, dict) or named.get("certificate_sha256") != found.fingerprint:
        raise IdentityError(f"{path}: not by the signer that the manifest names; {_AGAIN}")
    return Checked(found, personal, authority)


def _read(path: Path) -> tuple[bytes, bytes] | None:
    """Certificate and signature; None where there is no file."""
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise IdentityError(f"{path}: cannot be read ({error.strerror or error}); check its rights") from error
    try:
        if len(text) > _MOST_BYTES:
            raise ValueError("too large")
        content: Any = json.loads(text)
        if content["algorithm"] != ALGORITHM or content["format"] != _FORMAT:
            raise IdentityError(
                f"{path}: a signature of format {content['format']!r} by {content['algorithm']!r}, expected {_FORMAT} "
                f"by {ALGORITHM}; update Wardround, or {_AGAIN}"
            )
        return str(content["certificate"]).encode(), base64.b64decode(content["signature"], validate=True)
    except (ValueError, KeyError, TypeError) as error:
        raise IdentityError(f"{path}: damaged, no signature can be read from it ({error}); {_AGAIN}") from error
