"""Frozen dataclasses with shared methods behave like those of the standard library."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from dataclasses import asdict, field, fields, replace
from typing import Any, ClassVar

import pytest

from nestpatch.values import dataclass


def declared(decorator: Any) -> type:
    """The same class with one decorator or the other."""

    class Point:
        """A point."""

        unit: ClassVar[str] = "mm"
        x: int
        y: int = 2
        tags: list[str] = field(default_factory=list, compare=False)
        secret: str = field(default="s", repr=False)

        def __post_init__(self) -> None:
            if self.x < 0:
                raise ValueError("negative")

    return decorator(frozen=True)(Point)


OURS, THEIRS = declared(dataclass), declared(dataclasses.dataclass)


@dataclass(frozen=True)
class Named:
    """At the top of the module, where pickle finds it."""

    name: str
    size: int = 0


@pytest.mark.parametrize("kind", [OURS, THEIRS], ids=["ours", "theirs"])
def test_the_contract_of_both(kind: Any) -> None:
    one, same, other = kind(1), kind(x=1, y=2, tags=["t"]), kind(1, 3)
    assert (one, hash(one)) == (same, hash(same))
    assert one != other
    assert one != (1, 2, "s")
    assert repr(one).endswith("Point(x=1, y=2, tags=[])")
    assert one.tags is not kind(1).tags
    assert replace(one, y=3) == other
    assert asdict(one) == {"x": 1, "y": 2, "tags": [], "secret": "s"}
    assert [part.name for part in fields(kind)] == ["x", "y", "tags", "secret"]
    assert copy.deepcopy(one) == one
    for change in (lambda: setattr(one, "x", 5), lambda: delattr(one, "x"), lambda: setattr(one, "new", 5)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            change()
    for wrong in (dict, lambda: {"x": 1, "z": 2}, lambda: {"y": 1}):
        with pytest.raises(TypeError):
            kind(**wrong())
    for given, named in (((1, 2, [], "s", 5), {}), ((1,), {"x": 1})):
        with pytest.raises(TypeError):
            kind(*given, **named)
    with pytest.raises(ValueError, match="negative"):
        kind(-1)
    match one:
        case kind(x=1, y=second):
            assert second == 2


def test_signature_and_pickle() -> None:
    ours, theirs = (inspect.signature(kind) for kind in (OURS, THEIRS))
    assert list(ours.parameters) == list(theirs.parameters)
    assert ours.parameters["y"].default == 2
    assert ours.parameters["x"].annotation == theirs.parameters["x"].annotation
    assert pickle.loads(pickle.dumps(Named("a", 1))) == Named("a", 1)


def test_identity_and_own_methods_are_kept() -> None:
    @dataclass(frozen=True, eq=False)
    class Single:
        value: int

        def __repr__(self) -> str:
            return "one"

    assert Single(1) != Single(1)
    assert len({Single(1), Single(1)}) == 2
    assert repr(Single(1)) == "one"
