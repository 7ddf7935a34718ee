"""Signing a pack, and judging the signatures of one: `judge` decides on values, the other functions read and write files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

from nestpatch.errors import OutputError, PackError, SignatureFormatError, UnsignedError, UntrustedError
from nestpatch.files.atomic import write_bytes
from nestpatch.files.reading import read_bounded
from nestpatch.formats import nest
from nestpatch.pack import Pack
from nestpatch.signing import bundle
from nestpatch.signing.dsse import MAX_BYTES
from nestpatch.signing.keys import PrivateKey
from nestpatch.signing.subject import NO_MODEL, Subject, is_path, subject_of
from nestpatch.signing.trust import Policy, Rule

MAX_SIGNATURES = 64
SUFFIX = ".sig"


@dataclass(frozen=True)
class Signer:
    """A trusted key that signed a pack."""

    name: str
    key_id: str
    file: str
    """The signature's file name."""


@dataclass(frozen=True)
class Signed:
    """The pack was signed by as many trusted keys as the policy wants, and at least by one."""

    pack: Pack
    """What was signed. Use this value: the file may change after it was checked."""
    pack_id: str
    signers: tuple[Signer, ...]
    required: int

    def as_json(self) -> dict[str, Any]:
        """Facts for scripts."""
        signers = [{"name": s.name, "key": s.key_id, "file": s.file} for s in self.signers]
        return {"verdict": "signed", "pack": self.pack_id, "signers": signers, "required": self.required, "reason": ""}


@dataclass(frozen=True)
class Unproven:
    """Too few trusted keys have signed the pack, which the policy or the caller lets pass. What signatures there are fit it."""

    pack: Pack
    pack_id: str
    reason: str
    required: int

    def as_json(self) -> dict[str, Any]:
        """Facts for scripts."""
        return {"verdict": "unproven", "pack": self.pack_id, "signers": [], "required": self.required, "reason": self.reason}


Outcome: TypeAlias = Signed | Unproven


def signers_of(outcome: Outcome) -> dict[str, str]:
    """Name -> key id of those whose signatures counted."""
    return {signer.name: signer.key_id for signer in outcome.signers} if isinstance(outcome, Signed) else {}


def judge_signatures(
    data: bytes,
    signatures: Mapping[str, bytes],
    policy: Policy,
    subject: Subject = NO_MODEL,
    *,
    file: str = "the pack",
    allow_unsigned: bool = False,
) -> Outcome:
    """Whether the bytes of a pack are signed as the policy wants, for the model that the user and the pack name.

    `signatures`: file name -> content of each signature; `file` is for messages. `allow_unsigned` forgives missing and unknown
    signatures, never wrong ones, and not what the administrator of this machine asks for. Raises SignatureFormatError,
    BadSignatureError, UnsignedError, UntrustedError; PackError when the bytes are no pack.
    """
    digest = sha256(data).hexdigest()
    found = _sound(digest, signatures, policy, file)
    # Only now: a wrong signature is an error also where the bytes are no pack.
    return settle(nest.decode(data), digest, found, policy, subject, file=file, allow_unsigned=allow_unsigned)


@dataclass(frozen=True)
class Sound:
    """The signatures of a pack, each of which belongs to its bytes."""

    trusted: Mapping[str, Signer]
    """Key id -> who signed, of keys that are trusted for anything."""
    unknown: tuple[str, ...] = ()
    """Ids of keys that are not known here: whether they made these signatures is not known."""


def _sound(digest: str, signatures: Mapping[str, bytes], policy: Policy, file: str) -> Sound:
    """Raises SignatureFormatError or BadSignatureError for the first that is wrong."""
    trusted: dict[str, Signer] = {}
    unknown: list[str] = []
    for source, content in signatures.items():
        found = bundle.parse(content, source)
        found.check_file(digest, file)
        known = policy.find(found.key_id)
        if known is None:
            unknown.append(found.key_id)
            continue
        found.check_key(known.key)
        trusted[found.key_id] = Signer(known.name, found.key_id, source)
    return Sound(trusted, tuple(unknown))


def settle(
    pack: Pack, pack_id: str, found: Sound, policy: Policy, subject: Subject, *, file: str, allow_unsigned: bool = False
) -> Outcome:
    """Whether sound signatures are enough for a pack. Raises UnsignedError, UntrustedError."""
    subject = subject.of(pack.manifest.base.model_id)
    weighed = policy.weigh(subject, found.trusted)
    signers = tuple(signer for key_id, signer in found.trusted.items() if key_id in weighed.counting)
    if signers and not weighed.unmet:
        return Signed(pack, pack_id, signers, weighed.required)
    if weighed.unmet:
        wanted = {trusted.key.key_id for trusted in policy.counting(weighed.unmet[0], subject)}
        signers = tuple(signer for signer in signers if signer.key_id in wanted)
    lack = _lack(file, signers, found, weighed.unmet)
    lack = _with_rule(lack, weighed.unmet, subject, allow_unsigned=allow_unsigned)
    if weighed.unmet and (not allow_unsigned or any(rule.source for rule in weighed.unmet)):
        raise lack
    return Unproven(pack, pack_id, str(lack), weighed.required)


def _lack(file: str, signers: Sequence[Signer], found: Sound, unmet: Sequence[Rule]) -> UnsignedError | UntrustedError:
    """What is missing, as the error that says so."""
    others = [signer for signer in found.trusted.values() if signer not in signers]
    if not found.trusted and not found.unknown:
        return UnsignedError(f"{file} is not signed")
    keys = [f"{signer.name}, who is not trusted for this model" for signer in others]
    keys += [f"{key_id[:12]}.., which is not trusted here" for key_id in found.unknown]
    if not signers:
        return UntrustedError(f"{file} is signed by {'; '.join(keys)}")
    who = ", ".join(signer.name for signer in signers)
    more = f"; further by {'; '.join(keys)}" if keys else ""
    required = unmet[0].require if unmet else 0
    return UntrustedError(f"{file} is signed by {len(signers)} of the {required} keys that the policy wants: {who}{more}")


def _with_rule(
    lack: UnsignedError | UntrustedError, unmet: Sequence[Rule], subject: Subject, *, allow_unsigned: bool
) -> UnsignedError | UntrustedError:
    """The same with the rule that asks for more, where that is not plain."""
    above = next((rule for rule in unmet[:1] if rule.source), None)
    if above is not None:
        wants = f"{above.source} asks for {_signatures(above)} for {above.model!r}"
        lifted = ", which allowing unsigned packs does not lift" if allow_unsigned else ""
        advice = "Get the pack with its signatures. What the administrator of this machine asks for, only that file can change."
        return type(lack)(f"{lack}; {wants}{lifted}", advice=advice)
    foreign = next((rule for rule in unmet if not is_path(rule.model) and not subject.fits(rule.model)), None)
    if foreign is None:
        return lack
    wants = f"a rule asks for {_signatures(foreign)} for {foreign.model!r}"
    return type(lack)(
        f"{lack}; {wants}, and without a trusted signature the pack's own word that it is for {subject.base!r} does not count",
        advice=f"{lack.advice} A rule for paths that stands before that one needs no such word.",
    )


def _signatures(rule: Rule) -> str:
    return f"{rule.require} signature{'s' if rule.require > 1 else ''}"


def verify_signature(
    path: str | Path, policy: Policy, model: str | Path | None = None, *, allow_unsigned: bool = False
) -> Outcome:
    """Checks the signatures that lie beside a pack file: `<file>.sig`, and `<file>.<12 hex digits>.sig` of further signers.

    `model`: what the pack is for, a path or a Hub id, as the user names it. It decides which rules and keys count, together
    with what the pack says of its base. Raises as `judge` does, and PackError when the pack cannot be read.
    """
    return verify_file(path, policy, model, allow_unsigned=allow_unsigned)[0]


def verify_file(
    path: str | Path, policy: Policy, model: str | Path | None = None, *, allow_unsigned: bool = False
) -> tuple[Outcome, dict[str, bytes]]:
    """The same, with the signatures that were checked: file name -> content. The files may change afterwards."""
    file = Path(path)
    signatures, data = read_signatures(file), nest.read_bytes(file)
    try:
        outcome = judge_signatures(data, signatures, policy, subject_of(model), file=file.name, allow_unsigned=allow_unsigned)
    except PackError as error:
        raise type(error)(f"{path}: {error}", advice=error.advice) from error
    return outcome, signatures


def read_signatures(path: Path) -> dict[str, bytes]:
    """File name -> content of the signatures that lie beside a pack. Raises SignatureFormatError when one cannot be read."""
    return {found.name: _read_signature(found) for found in signature_files(path)}


def signature_files(path: Path) -> list[Path]:
    """The signature files of a pack, that of the first signer first."""
    pattern = re.compile(rf"{re.escape(path.name)}(?:\.[0-9a-f]{{12}})?{re.escape(SUFFIX)}")
    try:
        names = sorted(name for name in os.listdir(path.parent) if pattern.fullmatch(name))  # noqa: PTH208 - names alone
    except OSError:
        return []
    if len(names) > MAX_SIGNATURES:
        raise SignatureFormatError(f"{path.name} has {len(names)} signatures; at most {MAX_SIGNATURES} are read")
    return [path.with_name(name) for name in sorted(names, key=lambda name: (len(name), name))]


def _read_signature(path: Path) -> bytes:
    try:
        return read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise SignatureFormatError(
            f"cannot read {path}: {error.strerror or error}", advice="Check the file's permissions."
        ) from error


@dataclass(frozen=True)
class Signature:
    """A signature file that was written."""

    file: Path
    pack_id: str
    key_id: str


def sign_pack(path: str | Path, key: PrivateKey, output: Path | None = None, *, overwrite: bool = False) -> Signature:
    """Signs a pack file. Writes `<file>.sig`, or beside the signature of another key `<file>.<key id, 12 digits>.sig`.

    Raises PackError when the file is no pack, OutputError when the place is taken or cannot be written.
    """
    file = Path(path)
    pack_id = nest.pack_id(nest.read(file))
    key_id = key.public.key_id
    place = output or _free_place(file, key_id, overwrite=overwrite)
    write_bytes(place, bundle.sign(pack_id, file.name, key), overwrite=overwrite)
    return Signature(place, pack_id, key_id)


def _free_place(file: Path, key_id: str, *, overwrite: bool) -> Path:
    first = file.with_name(f"{file.name}{SUFFIX}")
    own = file.with_name(f"{file.name}.{key_id[:12]}{SUFFIX}")
    for taken in (place for place in (first, own) if os.path.lexists(place)):
        if bundle.parse(_read_signature(taken), taken.name).key_id == key_id:
            if overwrite:
                return taken
            raise OutputError(f"{taken} exists already, by the same key", advice="Pass --overwrite to sign again.")
    return own if os.path.lexists(first) else first
