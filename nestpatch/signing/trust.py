"""Whom this machine trusts, and how many of them must have signed: a value, its rules, and the files that hold it.

A file is one JSON object, `trust.json`: the user's own, by default in the user's configuration folder, and under it the
administrator's (signing/store.py). None lies beside a model: whoever hands over a model could then hand over the trust as well.
A policy file given to a command has the same format and replaces the user's own; the administrator's stays in force.

Keys and rules name models by patterns of paths and of model ids (signing/subject.py).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nestpatch.errors import KeyFileError, SignatureFormatError, TrustError
from nestpatch.files.atomic import write_bytes
from nestpatch.signing import store
from nestpatch.signing.dsse import members, parse_json
from nestpatch.signing.keys import PublicKey, parse_public
from nestpatch.signing.store import trust_file
from nestpatch.signing.subject import EVERYTHING, NO_MODEL, Subject, is_path

FORMAT = "nestpatch-trust/1"
MAX_NAME = 96


@dataclass(frozen=True)
class TrustedKey:
    """A public key, whose it is, and for which models it counts."""

    name: str
    key: PublicKey
    models: tuple[str, ...] = (EVERYTHING,)
    """Patterns of paths and model ids: "/srv/models/*", "acme/*"."""
    source: str = ""
    """The administrator's file that it stands in; empty: it is the user's own."""

    def covers(self, subject: Subject) -> bool:
        """Whether the key counts for a model."""
        return subject.is_covered(self.models)


@dataclass(frozen=True)
class Rule:
    """How many signatures packs for some models need."""

    model: str
    """A pattern of paths or model ids."""
    require: int
    """Distinct trusted keys that must have signed; 0: a signature is optional, but must be sound."""
    keys: tuple[str, ...] = ()
    """Names or ids of the keys that count; none: all that are trusted for the model."""
    source: str = ""
    """The administrator's file that it stands in, which no user and no option overrules; empty: it is the user's own."""


@dataclass(frozen=True)
class Weighed:
    """What the signatures of a pack are worth under a policy."""

    counting: frozenset[str]
    """Ids of the keys that signed and count."""
    required: int
    """The most signatures that a rule asks for."""
    unmet: tuple[Rule, ...]
    """The rules that ask for more; empty: the policy is met."""


@dataclass(frozen=True)
class Policy:
    """The trusted keys and the rules. Rules are tried in order, the administrator's and the user's each for themselves."""

    keys: tuple[TrustedKey, ...] = ()
    rules: tuple[Rule, ...] = ()

    def find(self, key_id: str) -> TrustedKey | None:
        """The trusted key with this id."""
        return next((trusted for trusted in self.keys if trusted.key.key_id == key_id), None)

    def rules_for(self, subject: Subject, *, vouched: bool = True) -> tuple[Rule, ...]:
        """What a pack has to meet, all of it: the administrator's first rule for this model, and the user's.

        Where no rule of the user's fits: who trusts any key wants one signature, who trusts none wants none.

        `vouched`: whether a trusted key has signed the pack, and so what it says of its base. Anybody can write any base into
        a pack that nobody signed, so that chooses no rule there: all rules for model ids hold that stand before the first
        rule which fits by the user's words alone, and that one.
        """
        return tuple(rule for part in self._parts() for rule in _chosen(part, subject, vouched=vouched))

    def weigh(self, subject: Subject, signed: Collection[str]) -> Weighed:
        """Judges the ids of trusted keys whose signatures are sound. Pure, and without any forgiveness."""
        rules: list[Rule] = []
        for part in self._parts():
            chosen = _chosen(part, subject, vouched=True)
            if not any(self._counted(rule, subject, signed) for rule in chosen):
                chosen = _chosen(part, subject, vouched=False)
            rules += chosen
        counted = [self._counted(rule, subject, signed) for rule in rules]
        unmet = tuple(rule for rule, ids in zip(rules, counted, strict=True) if len(ids) < rule.require)
        return Weighed(frozenset().union(*counted), max((rule.require for rule in rules), default=0), unmet)

    def counting(self, rule: Rule, subject: Subject) -> tuple[TrustedKey, ...]:
        """The keys whose signatures count for a model under a rule."""
        named = self.ids_in(rule)
        return tuple(t for t in self.keys if t.covers(subject) and (not rule.keys or t.key.key_id in named))

    def _counted(self, rule: Rule, subject: Subject, signed: Collection[str]) -> frozenset[str]:
        return frozenset(t.key.key_id for t in self.counting(rule, subject) if t.key.key_id in signed)

    def _parts(self) -> tuple[tuple[Rule, ...], tuple[Rule, ...]]:
        """The administrator's rules; the user's, with the one for all models that stands after them."""
        system = tuple(rule for rule in self.rules if rule.source)
        own = tuple(rule for rule in self.rules if not rule.source)
        return system, (*own, Rule(EVERYTHING, int(bool(self.keys))))

    def ids_in(self, rule: Rule) -> tuple[str, ...]:
        """The keys that a rule names, by their ids."""
        return tuple(dict.fromkeys(key_id for text in rule.keys for key_id in self._ids(text)))

    def _ids(self, text: str) -> list[str]:
        """By id, else by name: a key that is called like the id of another one does not stand in for it."""
        exact = [trusted.key.key_id for trusted in self.keys if text == trusted.key.key_id]
        return exact or [trusted.key.key_id for trusted in self.keys if text == trusted.name]

    def with_key(self, trusted: TrustedKey) -> Policy:
        """One more key, or the same key with another name or other models. Raises TrustError when the name is taken."""
        others = tuple(other for other in self.keys if other.key != trusted.key)
        return replace(self, keys=(*others, trusted)).checked()

    def matching(self, text: str) -> tuple[TrustedKey, ...]:
        """The keys of this name, or of an id that begins so."""
        return tuple(t for t in self.keys if t.name == text or (len(text) >= 8 and t.key.key_id.startswith(text)))

    def without_key(self, text: str) -> Policy:
        """Without the key of this name, or of an id that begins so. Raises TrustError when none or several fit."""
        fitting = self.matching(text)
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
            keys = len(self.counting(rule, NO_MODEL))
            if rule.require > keys:
                raise TrustError(f"a rule for {rule.model!r} wants {rule.require} signatures of {keys} keys")
        return self

    def as_json(self) -> dict[str, Any]:
        """As the file holds it."""
        keys = [{"name": t.name, "id": t.key.key_id, "pem": t.key.pem, "models": list(t.models)} for t in self.keys]
        rules = [{"model": rule.model, "require": rule.require, "keys": list(rule.keys)} for rule in self.rules]
        return {"format": FORMAT, "keys": keys, "rules": rules}


def _chosen(rules: Sequence[Rule], subject: Subject, *, vouched: bool) -> tuple[Rule, ...]:
    """The rules of one file that decide; without a voucher several may (`Policy.rules_for`)."""
    found: list[Rule] = []
    for rule in rules:
        if subject.fits_by_user(rule.model) or (vouched and subject.fits(rule.model)):
            return (*found, rule)
        if not vouched and not is_path(rule.model):
            found.append(rule)
    return tuple(found)


def combined(system: Policy, user: Policy, source: str) -> Policy:
    """The administrator's policy, from the file `source`, and a user's, as one in which both are met.

    What the administrator asks for, only the administrator's keys can give; where a rule names none, all of them. The
    administrator's keys count under the user's rules too. A key that both trust counts for the administrator's models alone.
    A user's key that has the name of another key of the administrator's gets digits of its id behind the name.
    """
    if not system.keys and not system.rules:
        return user
    every = tuple(trusted.key.key_id for trusted in system.keys)
    above = [replace(rule, keys=system.ids_in(rule) or every, source=source) for rule in _with_default(system)]
    own = [replace(rule, keys=user.ids_in(rule)) for rule in _with_default(user)]
    taken = {trusted.name for trusted in system.keys}
    more = [t for t in user.keys if t.key.key_id not in every]
    renamed = [replace(t, name=f"{t.name} ({t.key.key_id[:12]})") if t.name in taken else t for t in more]
    keys = (*(replace(trusted, source=source) for trusted in system.keys), *renamed)
    return Policy(keys, (*above, *own))


def _with_default(policy: Policy) -> tuple[Rule, ...]:
    """The rules of a file with what holds where none fits."""
    return (*policy.rules, Rule(EVERYTHING, int(bool(policy.keys))))


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
    except TrustError as error:
        reason = str(error)
        raise TrustError(reason if source in reason else f"{source}: {reason}", advice=error.advice) from error


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
    (model,) = check_patterns([facts["model"]])
    return Rule(model, facts["require"], tuple(dict.fromkeys(facts["keys"])))


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
    for pattern in found:
        if pattern.startswith("."):
            raise TrustError(f"{pattern!r} is a relative path, which would match no model", advice="Write the absolute path.")
    return found


def load_policy(path: Path | None = None) -> Policy:
    """The administrator's policy together with the one of a file, or with the user's own. Raises TrustError.

    A named file must exist. The user's own may be missing and is then empty; the same holds for the administrator's.
    """
    own = load_own() if path is None else _load_named(path)
    return combined(load_system(), own, str(store.SYSTEM_FILE))


def load_for_looking() -> Policy:
    """The policy for commands that use no pack: of a user without a home, who can have no list, the administrator's alone."""
    return load_policy() if store.has_home() else combined(load_system(), Policy(), str(store.SYSTEM_FILE))


def load_own(*, create: bool = False) -> Policy:
    """The user's own policy alone: what `trust add` changes. `create`: its folder may be missing. Raises TrustError."""
    data = store.read_user(create=create)
    return Policy() if data is None else parse_policy(data, str(trust_file()))


def load_system() -> Policy:
    """The administrator's policy alone; empty where there is none. Raises TrustError."""
    data, source = store.read_system(), str(store.SYSTEM_FILE)
    if data is None:
        return Policy()
    policy = parse_policy(data, source)
    patterns = [*(rule.model for rule in policy.rules), *(model for key in policy.keys for model in key.models)]
    for pattern in patterns:
        if pattern.startswith("~"):
            raise TrustError(f"{source} names {pattern!r}: where a home folder lies, its user decides")
    return policy


def refuse_system_key(text: str, own: Policy, system: Policy) -> None:
    """Raises TrustError when what is to be removed is a key of the administrator's alone."""
    if own.matching(text) or not system.matching(text):
        return
    source = store.SYSTEM_FILE
    raise TrustError(
        f"{text!r} is a key of this machine's administrator, in {source}",
        advice=f"Ask who may write {source} to remove it there. No list of your own takes its trust away.",
    )


def _load_named(file: Path) -> Policy:
    data = store.read_file(file)
    if data is None:
        raise TrustError(f"there is no policy file {file}", advice="Check the path.")
    return parse_policy(data, str(file))


def save_policy(policy: Policy) -> Path:
    """Writes the user's own file, returns its path. Raises OutputError."""
    file = trust_file()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = json.dumps(policy.checked().as_json(), indent=1, ensure_ascii=False) + "\n"
    write_bytes(file, text.encode("utf-8"), overwrite=True, mode=0o600)
    return file
