"""Signing packs and checking their signatures.

`check_signatures` and `apply_policy` decide on values; the other functions read and write files. The result is a type: a
`VerifiedPack` when enough trusted keys have signed, an `UnverifiedPack` when too few have and the policy or the caller allows
that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from nestpatch.errors import OutputError, PackError, SignatureFormatError, UnsignedError, UntrustedError
from nestpatch.files.atomic import write_bytes
from nestpatch.files.reading import read_bounded
from nestpatch.formats import nest
from nestpatch.pack import Pack
from nestpatch.signing.envelopes import MAX_BYTES, Bundle
from nestpatch.signing.keys import PrivateKey
from nestpatch.signing.subject import NO_MODEL, Subject, is_path
from nestpatch.signing.trust import Policy, Rule
from nestpatch.values import dataclass

MAX_SIGNATURES = 64
SUFFIX = ".sig"


@dataclass(frozen=True)
class Signer:
    """A trusted key that signed a pack."""

    name: str
    key_id: str
    file: str
    """Name of the signature file."""

    def as_json(self) -> dict[str, Any]:
        """The signature for `--json`."""
        return {"name": self.name, "key_id": self.key_id, "file": self.file}


@dataclass(frozen=True)
class _CheckedPack:
    """A pack whose signatures were checked; none of them is wrong."""

    verdict: ClassVar[str]
    pack: Pack
    """What was checked. Use this value: the file may change afterwards."""
    pack_id: str
    required: int
    """Signatures that the policy requires."""
    signers: tuple[Signer, ...] = ()
    """The trusted keys whose signatures count."""
    reason: str = ""
    """What is missing."""
    signatures: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """File name -> content of each signature that was checked."""

    @property
    def key_ids(self) -> dict[str, str]:
        """Name -> key id of the signers."""
        return {signer.name: signer.key_id for signer in self.signers}

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`."""
        return {
            "verdict": self.verdict,
            "pack": self.pack.label,
            "pack_id": self.pack_id,
            "signatures": [signer.as_json() for signer in self.signers],
            "required": self.required,
            "reason": self.reason,
        }


class VerifiedPack(_CheckedPack):
    """A pack that is signed by as many trusted keys as the policy requires, and by at least one."""

    verdict = "signed"


class UnverifiedPack(_CheckedPack):
    """A pack that too few trusted keys have signed, which the policy or the caller allows. It has no signers that count."""

    verdict = "unproven"


SignatureResult: TypeAlias = VerifiedPack | UnverifiedPack


def check_signatures(
    data: bytes,
    signatures: Mapping[str, bytes],
    policy: Policy,
    subject: Subject = NO_MODEL,
    *,
    file: str = "the pack",
    allow_unsigned: bool = False,
) -> SignatureResult:
    """Checks the signatures of a pack, and whether they are enough for the model that the user and the pack name.

    Args:
        data: The bytes of the pack.
        signatures: File name -> content of each signature.
        policy: The trusted keys and rules.
        subject: The model that the pack is for.
        file: Name of the pack, for messages.
        allow_unsigned: Allows missing and unknown signatures; never wrong ones, nor less than the administrator requires.

    Returns:
        Who signed, or what is missing and was allowed.

    Raises:
        SignatureFormatError: A signature cannot be parsed.
        BadSignatureError: A signature is for other bytes, or was made with another key than it names.
        UnsignedError: There is no signature, and the policy requires one.
        UntrustedError: Too few trusted keys have signed.
        PackError: The bytes are not a pack.
    """
    digest = sha256(data).hexdigest()
    trusted: dict[str, Signer] = {}
    unknown: list[str] = []
    for source, content in signatures.items():
        bundle = Bundle.parse(content, source)
        known = policy.find(bundle.key_id)
        bundle.check(digest, file, known.key if known else None)
        if known is None:
            unknown.append(bundle.key_id)
        else:
            trusted[bundle.key_id] = Signer(known.name, bundle.key_id, source)
    # Decoded last: a wrong signature is an error also where the bytes are not a pack.
    pack = nest.decode(data)
    signers = tuple(trusted.values())
    result = apply_policy(pack, digest, policy, subject, signers, unknown, file=file, allow_unsigned=allow_unsigned)
    return replace(result, signatures=signatures)


def apply_policy(
    pack: Pack,
    pack_id: str,
    policy: Policy,
    subject: Subject,
    trusted: Sequence[Signer] = (),
    unknown: Sequence[str] = (),
    *,
    file: str,
    allow_unsigned: bool = False,
) -> SignatureResult:
    """Decides whether valid signatures are enough for a pack.

    Args:
        pack: The pack.
        pack_id: SHA-256 of its bytes, hex.
        policy: The trusted keys and rules.
        subject: The model that the pack is for; its base is taken from the pack.
        trusted: The keys with a valid signature that are trusted for any model, each once.
        unknown: Ids of keys that are not known here; whether they really made their signatures is not known either.
        file: Name of the pack, for messages.
        allow_unsigned: Allows too few signatures, except where the administrator requires them.

    Returns:
        Who signed, or what is missing and was allowed.

    Raises:
        UnsignedError: There is no signature, and the policy requires one.
        UntrustedError: Too few trusted keys have signed.
    """
    subject = replace(subject, base=pack.manifest.base.model_id)
    weighed = policy.weigh(subject, [signer.key_id for signer in trusted])
    signers = tuple(signer for signer in trusted if signer.key_id in weighed.counting)
    if signers and not weighed.unmet:
        return VerifiedPack(pack, pack_id, weighed.required, signers)
    if weighed.unmet:
        wanted = {trusted.key.key_id for trusted in policy.counting(weighed.unmet[0], subject)}
        signers = tuple(signer for signer in signers if signer.key_id in wanted)
    others = [f"{signer.name}, who is not trusted for this model" for signer in trusted if signer not in signers]
    others += [f"{key_id[:12]}.., which is not trusted here" for key_id in unknown]
    lack = _lack(file, signers, others, weighed.unmet)
    lack = _with_rule(lack, weighed.unmet, subject, allow_unsigned=allow_unsigned)
    if weighed.unmet and (not allow_unsigned or any(rule.source for rule in weighed.unmet)):
        raise lack
    return UnverifiedPack(pack, pack_id, weighed.required, reason=str(lack))


def _lack(file: str, signers: Sequence[Signer], others: Sequence[str], unmet: Sequence[Rule]) -> UnsignedError | UntrustedError:
    """The error that reports what is missing. `others`: the signers that do not count, with the reason."""
    if not signers and not others:
        return UnsignedError(
            f"{file} is not signed",
            advice=f"If the pack is your own: nestpatch sign {file} --key NAME.key. If not, get its .sig file from the "
            "publisher and put it beside the pack. To use it unsigned all the same: --allow-unsigned.",
        )
    if not signers:
        return UntrustedError(f"{file} is signed by {'; '.join(others)}")
    who = ", ".join(signer.name for signer in signers)
    more = f"; further by {'; '.join(others)}" if others else ""
    required = unmet[0].require if unmet else 0
    return UntrustedError(f"{file} is signed by {len(signers)} of the {required} keys that the policy requires: {who}{more}")


def _with_rule(
    lack: UnsignedError | UntrustedError, unmet: Sequence[Rule], subject: Subject, *, allow_unsigned: bool
) -> UnsignedError | UntrustedError:
    """The same error with the rule that requires more, where that is not obvious."""
    above = next((rule for rule in unmet[:1] if rule.source), None)
    foreign = next((rule for rule in unmet if not is_path(rule.model) and not subject.fits(rule.model)), None)
    rule = above or foreign
    if rule is None:
        return lack
    count = f"{rule.require} signature{'s' if rule.require > 1 else ''} for {rule.model!r}"
    if above is not None:
        lifted = ", which allowing unsigned packs does not lift" if allow_unsigned else ""
        advice = "Get the pack with its signatures. What the administrator requires can only be changed in that file."
        return type(lack)(f"{lack}; {above.source} requires {count}{lifted}", advice=advice)
    return type(lack)(
        f"{lack}; a rule requires {count}, and without a trusted signature the pack's statement that it is for "
        f"{subject.base!r} does not count",
        advice=f"{lack.advice} A rule for paths that stands before that one needs no such statement.",
    )


def verify_signature(
    path: str | Path, policy: Policy, model: str | Path | None = None, *, allow_unsigned: bool = False
) -> SignatureResult:
    """Checks the signatures beside a pack file: `<file>.sig`, and `<file>.<12 hex digits>.sig` of further signers.

    Args:
        path: The pack file.
        policy: The trusted keys and rules.
        model: What the pack is for, a path or a Hub id. It decides which rules and keys count, together with the base that the
            pack names.
        allow_unsigned: Allows missing and unknown signatures; never wrong ones, nor less than the administrator requires.

    Returns:
        A VerifiedPack or an UnverifiedPack, with the signatures that were checked; the files may change afterwards.

    Raises:
        SignatureError: A signature is wrong, or too few trusted keys have signed.
        PackError: The file cannot be read, or is not a pack.
    """
    file = Path(path)
    signatures, data = read_signatures(file), nest.read_bytes(file)
    try:
        return check_signatures(data, signatures, policy, Subject.of(model), file=file.name, allow_unsigned=allow_unsigned)
    except PackError as error:
        raise type(error)(f"{path}: {error}", advice=error.advice) from error


def read_signatures(path: Path) -> dict[str, bytes]:
    """Reads the signatures beside a pack.

    Args:
        path: The pack file.

    Returns:
        File name -> content of each signature.

    Raises:
        SignatureFormatError: There are too many, or one cannot be read.
    """
    return {found.name: _read_signature(found) for found in signature_files(path)}


def signature_files(path: Path) -> list[Path]:
    """Finds the signatures beside a pack, without reading them.

    Args:
        path: The pack file.

    Returns:
        The signature files, the first signer's first.

    Raises:
        SignatureFormatError: There are more than MAX_SIGNATURES.
    """
    pattern = re.compile(rf"{re.escape(path.name)}(?:\.[0-9a-f]{{12}})?{re.escape(SUFFIX)}")
    try:
        names = sorted(name for name in os.listdir(path.parent) if pattern.fullmatch(name))  # noqa: PTH208 - names alone
    except OSError:
        return []
    if len(names) > MAX_SIGNATURES:
        raise SignatureFormatError(f"{path.name} has {len(names)} signatures, limit {MAX_SIGNATURES}")
    return [path.with_name(name) for name in sorted(names, key=lambda name: (len(name), name))]


def _read_signature(path: Path) -> bytes:
    try:
        return read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise SignatureFormatError(
            f"cannot read {path}: {error.strerror or error}", advice="Check the file's permissions."
        ) from error


@dataclass(frozen=True)
class SignatureFile:
    """A signature file that `sign_pack` wrote."""

    file: Path
    pack_id: str
    """SHA-256 of the pack, hex."""
    key_id: str

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`."""
        return {"output": str(self.file), "pack_id": self.pack_id, "key_id": self.key_id}


def sign_pack(path: str | Path, key: PrivateKey, output: Path | None = None, *, overwrite: bool = False) -> SignatureFile:
    """Signs a pack file. Writes `<file>.sig`, or beside another key's signature `<file>.<key id, 12 digits>.sig`.

    Args:
        path: The pack file.
        key: The signer.
        output: Where to write instead.
        overwrite: Replaces an older signature by the same key.

    Returns:
        The file that was written.

    Raises:
        PackError: The file is not a pack.
        SignatureFormatError: A signature beside the pack cannot be read.
        OutputError: The signature exists already, or cannot be written.
    """
    file = Path(path)
    pack_id, key_id = nest.pack_id(nest.read(file)), key.public.key_id
    target = output
    if target is None:
        first, own = file.with_name(f"{file.name}{SUFFIX}"), file.with_name(f"{file.name}.{key_id[:12]}{SUFFIX}")
        taken = [path for path in (first, own) if os.path.lexists(path)]
        older = next((path for path in taken if Bundle.parse(_read_signature(path), path.name).key_id == key_id), None)
        if older is not None and not overwrite:
            raise OutputError(f"{older} exists already, by the same key", advice="Pass --overwrite to sign again.")
        target = older or (own if first in taken else first)
    write_bytes(target, Bundle.write(pack_id, file.name, key), overwrite=overwrite)
    return SignatureFile(target, pack_id, key_id)
