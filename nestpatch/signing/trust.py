"""Whom this machine trusts, and how many trusted keys must have signed: values only; store.py reads and writes the files.

Keys and rules name models by patterns of paths and of model ids (subject.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from nestpatch.errors import KeyFileError, SignatureFormatError, TrustError
from nestpatch.signing.envelopes import members, parse_json
from nestpatch.signing.keys import PublicKey
from nestpatch.signing.subject import EVERYTHING, NO_MODEL, Subject, is_path
from nestpatch.values import dataclass

FORMAT = "nestpatch-trust/1"
_MAX_NAME = 96


@dataclass(frozen=True)
class TrustedKey:
    """A public key, whose it is, and for which models it counts."""

    name: str
    key: PublicKey
    models: tuple[str, ...] = (EVERYTHING,)
    """Patterns of paths and model ids: "/srv/models/*", "acme/*"."""
    source: str = ""
    """The administrator's file that contains it; empty: it is the user's own."""

    def as_json(self) -> dict[str, Any]:
        """The key for `--json`. A policy file has other names."""
        return {"name": self.name, "key_id": self.key.key_id, "pem": self.key.pem, "patterns": list(self.models)}

    @classmethod
    def of(cls, name: str, key: PublicKey, models: Iterable[Any] = (EVERYTHING,)) -> TrustedKey:
        """A key whose name and patterns were checked.

        Args:
            name: One printable line of at most 96 characters.
            key: The public key.
            models: Patterns of paths and model ids.

        Returns:
            The trusted key.

        Raises:
            TrustError: The name is not printable, or a pattern is empty or a relative path.
        """
        if not name.isprintable() or name != name.strip() or not 0 < len(name) <= _MAX_NAME:
            raise TrustError(
                f"{name!r} is not a name for a key", advice=f"Names are one line of at most {_MAX_NAME} characters."
            )
        return cls(name, key, _checked_patterns(models))


@dataclass(frozen=True)
class Rule:
    """How many signatures packs for some models need."""

    model: str
    """A pattern of paths or model ids."""
    require: int
    """Number of distinct trusted keys that must have signed; 0: a signature is optional, but must be valid."""
    keys: tuple[str, ...] = ()
    """Names or ids of the keys that count; empty: all keys that are trusted for the model."""
    source: str = ""
    """The administrator's file that contains it, which no user and no option overrules; empty: it is the user's own."""

    def as_json(self) -> dict[str, Any]:
        """The rule for `--json`. A policy file has other names."""
        return {"pattern": self.model, "require": self.require, "keys": list(self.keys)}


@dataclass(frozen=True)
class PolicyResult:
    """How the signatures of a pack count under a policy."""

    counting: frozenset[str]
    """Ids of the keys that signed and count."""
    required: int
    """The highest number of signatures that a rule requires."""
    unmet: tuple[Rule, ...]
    """The rules that require more; empty: the policy is met."""


@dataclass(frozen=True)
class Policy:
    """Trusted keys and rules. Rules are tried in order, the administrator's and the user's separately."""

    keys: tuple[TrustedKey, ...] = ()
    rules: tuple[Rule, ...] = ()

    @classmethod
    def parse(cls, data: bytes, source: str) -> Policy:
        """Reads the content of a policy file.

        Args:
            data: The content.
            source: The file, for messages.

        Returns:
            The policy, checked.

        Raises:
            TrustError: The file is broken, of another format, or contradicts itself.
        """
        try:
            value = parse_json(data, source)
            facts = members(value, {"format": str, "keys": list, "rules": list}, source, keys=[], rules=[])
            if facts["format"] != FORMAT:
                raise TrustError(f"{source} has the format {facts['format']!r}; this nestpatch reads {FORMAT}")
            keys = tuple(_parse_key(entry, source) for entry in facts["keys"])
            return cls(keys, tuple(_parse_rule(entry, source) for entry in facts["rules"])).checked()
        except (SignatureFormatError, KeyFileError) as error:
            raise TrustError(f"{source} is broken: {error}") from error
        except TrustError as error:
            reason = str(error)
            raise TrustError(reason if source in reason else f"{source}: {reason}", advice=error.advice) from error

    def find(self, key_id: str) -> TrustedKey | None:
        """Finds a key by its id.

        Args:
            key_id: SHA-256 of the key's PEM text, hex.

        Returns:
            The trusted key, or None.
        """
        return next((trusted for trusted in self.keys if trusted.key.key_id == key_id), None)

    def rules_for(self, subject: Subject) -> tuple[Rule, ...]:
        """The rules that a pack signed by a trusted key must meet: the administrator's first that applies, and the user's.

        Where no rule of the user's applies, one signature is needed if any key is trusted, and none otherwise.

        Args:
            subject: The model that the pack is for.

        Returns:
            The rules, all of which must be met.
        """
        return tuple(rule for part in self._parts() for rule in _deciding(part, subject, vouched=True))

    def weigh(self, subject: Subject, signed: Collection[str]) -> PolicyResult:
        """Applies the rules to the signatures of a pack. The caller applies `allow_unsigned`.

        Args:
            subject: The model that the pack is for, with the base that the pack names.
            signed: Ids of the trusted keys whose signatures are valid.

        Returns:
            Which keys count, and which rules are not met.
        """
        counted: list[tuple[Rule, frozenset[str]]] = []
        for part in self._parts():
            for vouched in (True, False):
                rules = _deciding(part, subject, vouched=vouched)
                ids = [{key.key.key_id for key in self.counting(rule, subject)}.intersection(signed) for rule in rules]
                if any(ids):
                    break
            counted += [(rule, frozenset(found)) for rule, found in zip(rules, ids, strict=True)]
        unmet = tuple(rule for rule, found in counted if len(found) < rule.require)
        required = max((rule.require for rule, _ in counted), default=0)
        return PolicyResult(frozenset().union(*(found for _, found in counted)), required, unmet)

    def counting(self, rule: Rule, subject: Subject) -> tuple[TrustedKey, ...]:
        """The keys whose signatures count for a model under a rule.

        Args:
            rule: The rule.
            subject: The model.

        Returns:
            The keys that are trusted for the model and, where the rule names keys, named by it.
        """
        named = self._named_in(rule)
        return tuple(t for t in self.keys if subject.is_covered(t.models) and (not rule.keys or t.key.key_id in named))

    def _parts(self) -> tuple[tuple[Rule, ...], tuple[Rule, ...]]:
        """The administrator's rules; the user's, with the default rule after them."""
        system = tuple(rule for rule in self.rules if rule.source)
        own = tuple(rule for rule in self.rules if not rule.source)
        return system, (*own, _default_rule(self.keys))

    def _named_in(self, rule: Rule) -> tuple[str, ...]:
        """The ids of the keys that a rule names."""
        return tuple(dict.fromkeys(key_id for text in rule.keys for key_id in self._ids(text)))

    def _ids(self, text: str) -> list[str]:
        """By id, else by name: a key whose name is the id of another key does not replace that one."""
        exact = [trusted.key.key_id for trusted in self.keys if text == trusted.key.key_id]
        return exact or [trusted.key.key_id for trusted in self.keys if text == trusted.name]

    def with_key(self, trusted: TrustedKey) -> Policy:
        """The policy with one more key, or with another name or other models for a key that it has.

        Args:
            trusted: The key.

        Returns:
            The new policy.

        Raises:
            TrustError: Another key has this name.
        """
        others = tuple(other for other in self.keys if other.key != trusted.key)
        return replace(self, keys=(*others, trusted)).checked()

    def matching(self, text: str) -> tuple[TrustedKey, ...]:
        """Finds keys by what a user types.

        Args:
            text: A name, or at least the first 8 digits of an id.

        Returns:
            All keys that match.
        """
        return tuple(t for t in self.keys if t.name == text or (len(text) >= 8 and t.key.key_id.startswith(text)))

    def without_key(self, text: str) -> Policy:
        """The policy without a key.

        Args:
            text: The key's name, or at least 8 digits of its id.

        Returns:
            The new policy.

        Raises:
            TrustError: Not exactly one key matches, or a rule needs the key.
        """
        fitting = self.matching(text)
        if len(fitting) != 1:
            raise TrustError(f"{len(fitting)} trusted keys match {text!r}, expected 1")
        return replace(self, keys=tuple(t for t in self.keys if t != fitting[0])).checked()

    def under(self, system: Policy, source: str) -> Policy:
        """Combines this policy with the administrator's, so that both must be met.

        What the administrator requires, only the administrator's keys can give: those that a rule names, else all of them.
        They also count under the user's rules. A key in both counts for the administrator's models only. A user's key with the
        name of one of the administrator's gets digits of its id behind the name.

        Args:
            system: The administrator's policy.
            source: The administrator's file, for messages.

        Returns:
            The combined policy.
        """
        if not system.keys and not system.rules:
            return self
        every = tuple(trusted.key.key_id for trusted in system.keys)
        with_defaults = [(*policy.rules, _default_rule(policy.keys)) for policy in (system, self)]
        above = [replace(rule, keys=system._named_in(rule) or every, source=source) for rule in with_defaults[0]]
        own = [replace(rule, keys=self._named_in(rule)) for rule in with_defaults[1]]
        taken = {trusted.name for trusted in system.keys}
        more = [t for t in self.keys if t.key.key_id not in every]
        renamed = [replace(t, name=f"{t.name} ({t.key.key_id[:12]})") if t.name in taken else t for t in more]
        keys = (*(replace(trusted, source=source) for trusted in system.keys), *renamed)
        return Policy(keys, (*above, *own))

    def checked(self) -> Policy:
        """Checks that names and keys are unique and that every rule can be met.

        Returns:
            The policy itself.

        Raises:
            TrustError: A name or key is duplicate, or a rule names an unknown key or requires more keys than there are.
        """
        for what, found in (("name", [t.name for t in self.keys]), ("key", [t.key.key_id for t in self.keys])):
            for again in sorted({one for one in found if found.count(one) > 1}):
                raise TrustError(f"duplicate {what} {again!r}")
        for rule in self.rules:
            for text in rule.keys:
                if not self._ids(text):
                    raise TrustError(f"a rule for {rule.model!r} names the unknown key {text!r}")
            keys = len(self.counting(rule, NO_MODEL))
            if rule.require > keys:
                raise TrustError(f"a rule for {rule.model!r} requires {rule.require} signatures, but only {keys} keys count")
        return self

    def content(self) -> dict[str, Any]:
        """The policy as the JSON object of a policy file."""
        keys = [{"name": t.name, "id": t.key.key_id, "pem": t.key.pem, "models": list(t.models)} for t in self.keys]
        rules = [{"model": rule.model, "require": rule.require, "keys": list(rule.keys)} for rule in self.rules]
        return {"format": FORMAT, "keys": keys, "rules": rules}

    def as_json(self) -> dict[str, Any]:
        """The policy for `--json`. A policy file has other names."""
        return {"keys": [trusted.as_json() for trusted in self.keys], "rules": [rule.as_json() for rule in self.rules]}


def _default_rule(keys: Sequence[TrustedKey]) -> Rule:
    """The rule where no other applies: one signature if any key is trusted, none otherwise."""
    return Rule(EVERYTHING, int(bool(keys)))


def _deciding(rules: Sequence[Rule], subject: Subject, *, vouched: bool) -> tuple[Rule, ...]:
    """The rules of one file that decide.

    `vouched`: a trusted key has signed the pack, and so what it states as its base. Otherwise anyone can write any base into
    the pack, so that statement selects no rule: all rules for model ids apply that stand before the first rule which applies by
    the user's words alone, and that one.
    """
    found: list[Rule] = []
    by_user = replace(subject, base=None)
    for rule in rules:
        if by_user.fits(rule.model) or (vouched and subject.fits(rule.model)):
            return (*found, rule)
        if not vouched and not is_path(rule.model):
            found.append(rule)
    return tuple(found)


def _parse_key(entry: Any, source: str) -> TrustedKey:
    kinds: dict[str, type] = {"name": str, "id": str, "pem": str, "models": list}
    facts = members(entry, kinds, source, id="", models=[EVERYTHING])
    key = PublicKey.parse(facts["pem"].encode("utf-8"), source)
    if facts["id"] not in {"", key.key_id}:
        raise TrustError(f"{source}: the id of the key {facts['name']!r} is not that of its PEM text")
    return TrustedKey.of(facts["name"], key, facts["models"])


def _parse_rule(entry: Any, source: str) -> Rule:
    facts = members(entry, {"model": str, "require": int, "keys": list}, source, model=EVERYTHING, keys=[])
    if facts["require"] < 0 or not all(isinstance(text, str) for text in facts["keys"]):
        raise TrustError(f"{source}: a rule for {facts['model']!r} has a negative `require`, or keys that are not text")
    (model,) = _checked_patterns([facts["model"]])
    return Rule(model, facts["require"], tuple(dict.fromkeys(facts["keys"])))


def _checked_patterns(patterns: Iterable[Any]) -> tuple[str, ...]:
    """At least one pattern, since a key for no models would count for nothing, and no relative path."""
    found = tuple(patterns)
    if not found or not all(isinstance(pattern, str) and pattern for pattern in found):
        raise TrustError(f"{list(found)!r} does not name any models")
    for pattern in found:
        if pattern.startswith("."):
            raise TrustError(f"{pattern!r} is a relative path, which would match no model", advice="Write the absolute path.")
    return found
