"""Whom this machine trusts, and how many of them must have signed: a value, its rules, and the file that holds it.

The file is one JSON object, by default `trust.json` in the user's configuration folder. It never lies beside a model: whoever
hands over a model could then hand over the trust as well. A policy file given to a command has the same format and replaces it.

Rules go by what the user calls the model, never by what a pack says of its base: else a pack could choose its rule.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

from nestpatch.errors import KeyFileError, SignatureFormatError, TrustError
from nestpatch.files import read_bounded
from nestpatch.formats.atomic import write_bytes
from nestpatch.signing.dsse import MAX_BYTES, members, parse_json
from nestpatch.signing.keys import PublicKey, parse_public
from nestpatch.signing.places import config_folder

FORMAT = "nestpatch-trust/1"
EVERYTHING = "*"
Names: TypeAlias = tuple[str, ...]
"""What one model is called; empty: no particular model."""
MAX_NAME = 96


@dataclass(frozen=True)
class TrustedKey:
    """A public key, whose it is, and for which models it counts."""

    name: str
    key: PublicKey
    models: tuple[str, ...] = (EVERYTHING,)
    """Patterns of model names (`names_of`): "acme/*", "/srv/models/*"."""

    def covers(self, names: Names) -> bool:
        """Whether the key counts for a model of these names; without a model it does."""
        return not names or any(_matches(pattern, names) for pattern in self.models)


@dataclass(frozen=True)
class Rule:
    """How many signatures packs for some models need."""

    model: str
    """A pattern of model names."""
    require: int
    """Distinct trusted keys that must have signed; 0: a signature is optional, but must be sound."""
    keys: tuple[str, ...] = ()
    """Names or ids of the keys that count; none: all that are trusted for the model."""


@dataclass(frozen=True)
class Policy:
    """The trusted keys and the rules. Rules are tried in order."""

    keys: tuple[TrustedKey, ...] = ()
    rules: tuple[Rule, ...] = ()

    def find(self, key_id: str) -> TrustedKey | None:
        """The trusted key with this id."""
        return next((trusted for trusted in self.keys if trusted.key.key_id == key_id), None)

    def rule_for(self, names: Names) -> Rule:
        """The first rule for a model of these names; without a model, the first for all models.

        Where no rule fits: who trusts any key wants one signature, who trusts none wants none.
        """
        fitting = (rule for rule in self.rules if rule.model == EVERYTHING or _matches(rule.model, names))
        return next(fitting, Rule(EVERYTHING, int(bool(self.keys))))

    def counting(self, rule: Rule, names: Names) -> tuple[TrustedKey, ...]:
        """The keys whose signatures count for a model under a rule."""
        named = {key_id for text in rule.keys for key_id in self._ids(text)}
        return tuple(t for t in self.keys if t.covers(names) and (not rule.keys or t.key.key_id in named))

    def _ids(self, text: str) -> list[str]:
        return [trusted.key.key_id for trusted in self.keys if text in {trusted.name, trusted.key.key_id}]

    def with_key(self, trusted: TrustedKey) -> Policy:
        """One more key, or the same key with another name or other models. Raises TrustError when the name is taken."""
        others = tuple(other for other in self.keys if other.key != trusted.key)
        return replace(self, keys=(*others, trusted)).checked()

    def without_key(self, text: str) -> Policy:
        """Without the key of this name, or of an id that begins so. Raises TrustError when none or several fit."""
        fitting = [t for t in self.keys if t.name == text or (len(text) >= 8 and t.key.key_id.startswith(text))]
        if len(fitting) != 1:
            raise TrustError(f"{len(fitting)} trusted keys are called {text!r}")
        return replace(self, keys=tuple(t for t in self.keys if t != fitting[0])).checked()

    def checked(self) -> Policy:
        """Itself. Raises TrustError when names or ids occur twice, or a rule cannot be met."""
        for what, found in (("name", [t.name for t in self.keys]), ("key", [t.key.key_id for t in self.keys])):
            for again in sorted({one for one in found if found.count(one) > 1}):
                raise TrustError(f"the {what} {again!r} is there twice")
        for rule in self.rules:
            for text in rule.keys:
                if not self._ids(text):
                    raise TrustError(f"a rule for {rule.model!r} names the key {text!r}, which is not there")
            keys = len(self.counting(rule, ()))
            if rule.require > keys:
                raise TrustError(f"a rule for {rule.model!r} wants {rule.require} signatures of {keys} keys")
        return self

    def as_json(self) -> dict[str, Any]:
        """As the file holds it."""
        keys = [{"name": t.name, "id": t.key.key_id, "pem": t.key.pem, "models": list(t.models)} for t in self.keys]
        rules = [{"model": rule.model, "require": rule.require, "keys": list(rule.keys)} for rule in self.rules]
        return {"format": FORMAT, "keys": keys, "rules": rules}


def parse_policy(data: bytes, source: str) -> Policy:
    """Reads the content of a trust or policy file. Raises TrustError."""
    try:
        value = parse_json(data, source)
        facts = members(value, {"format": str, "keys": list, "rules": list}, source, keys=[], rules=[])
        if facts["format"] != FORMAT:
            raise TrustError(f"{source} has the format {facts['format']!r}; this nestpatch reads {FORMAT}")
        keys = tuple(_key(entry, source) for entry in facts["keys"])
        return Policy(keys, tuple(_rule(entry, source) for entry in facts["rules"])).checked()
    except (SignatureFormatError, KeyFileError) as error:
        raise TrustError(f"{source} is broken: {error}") from error


def _key(entry: Any, source: str) -> TrustedKey:
    kinds: dict[str, type] = {"name": str, "id": str, "pem": str, "models": list}
    facts = members(entry, kinds, source, id="", models=[EVERYTHING])
    key = parse_public(facts["pem"].encode("utf-8"), source)
    if facts["id"] not in {"", key.key_id}:
        raise TrustError(f"{source}: the key {facts['name']!r} has another id than it says")
    return TrustedKey(check_name(facts["name"]), key, check_patterns(facts["models"]))


def _rule(entry: Any, source: str) -> Rule:
    facts = members(entry, {"model": str, "require": int, "keys": list}, source, model=EVERYTHING, keys=[])
    if facts["require"] < 0 or not all(isinstance(text, str) for text in facts["keys"]):
        raise TrustError(f"{source}: a rule for {facts['model']!r} makes no sense")
    return Rule(facts["model"], facts["require"], tuple(dict.fromkeys(facts["keys"])))


def names_of(model: str | Path) -> Names:
    """What patterns may call a model: its path, with and without links, that of its folder, its Hub id if that can be told."""
    text = os.fspath(model)
    if not os.path.exists(text):  # noqa: PTH110 - answers no where Path.exists raises
        return (text.removeprefix("hub://").partition("@")[0],)
    paths = [Path(os.path.abspath(text)), Path(os.path.realpath(text))]
    paths += [path.parent for path in paths if path.is_file()]
    cached = [
        part.removeprefix("models--").replace("--", "/") for path in paths for part in path.parts if part.startswith("models--")
    ]
    return tuple(dict.fromkeys([*(path.as_posix() for path in paths), *cached]))


def _matches(pattern: str, names: Names) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def check_name(name: str) -> str:
    """A name for a key: one printable line. Raises TrustError."""
    if not name.isprintable() or name != name.strip() or not 0 < len(name) <= MAX_NAME:
        raise TrustError(f"{name!r} is no name for a key", advice=f"Names are one line of at most {MAX_NAME} characters.")
    return name


def check_patterns(patterns: Iterable[Any]) -> tuple[str, ...]:
    """Patterns of model names; none would trust a key for nothing. Raises TrustError."""
    found = tuple(patterns)
    if not found or not all(isinstance(pattern, str) and pattern for pattern in found):
        raise TrustError(f"{list(found)!r} names no models")
    return found


def trust_file() -> Path:
    """The user's own file: $NESTPATCH_HOME/trust.json, or where this system keeps configuration. Raises TrustError."""
    return config_folder() / "trust.json"


def load_policy(path: Path | None = None) -> Policy:
    """The policy of a file, or the user's own, which may be missing and is then empty. Raises TrustError."""
    file = trust_file() if path is None else path
    try:
        data = read_bounded(file, MAX_BYTES)
    except FileNotFoundError as error:
        if path is None:
            return Policy()
        raise TrustError(f"there is no policy file {file}", advice="Check the path.") from error
    except OSError as error:
        raise TrustError(f"cannot read {file}: {error.strerror or error}", advice="Check the file's permissions.") from error
    return parse_policy(data, str(file))


def save_policy(policy: Policy) -> Path:
    """Writes the user's own file, returns its path. Raises OutputError."""
    file = trust_file()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = json.dumps(policy.checked().as_json(), indent=1, ensure_ascii=False) + "\n"
    write_bytes(file, text.encode("utf-8"), overwrite=True, mode=0o600)
    return file
