"""Frozen dataclasses that cost little at import.

`dataclasses` compiles six methods for every frozen class, a third of a millisecond each time a command starts, and a command
that patches has sixty such classes. Here all classes share their methods, and building an instance takes a microsecond longer.
Type checkers see the decorator of the standard library, and `replace`, `asdict` and `fields` work as with that.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

__all__ = ["dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(*, frozen: bool, eq: bool = True) -> Any:
        """The decorator `dataclasses.dataclass`, for frozen classes.

        Args:
            frozen: Has to be True.
            eq: Whether instances with equal fields are equal, and have equal hashes.

        Returns:
            The decorator.
        """
        assert frozen  # noqa: S101 - the decorator of the standard library is as good for others

        def decorated(kind: type) -> type:
            shared = _METHODS | (_COMPARED if eq else {})
            own = vars(kind)
            for name in [name for name in shared if name not in own or (name == "__hash__" and "__eq__" in own)]:
                setattr(kind, name, shared[name])
            made: Any = dataclasses.dataclass(init=False, repr=False, eq=False)(kind)
            made.__compared__ = tuple(one.name for one in dataclasses.fields(made) if one.compare)
            return made

        return decorated


class _Factory:
    """Stands in signatures for a default that is made anew for each instance."""

    def __repr__(self) -> str:
        return "<factory>"


class _Signature:
    """What `inspect.signature` finds, made when it is wanted."""

    def __get__(self, instance: object, kind: type) -> Any:
        from inspect import Parameter, Signature

        def parameter(one: dataclasses.Field[Any]) -> Parameter:
            factory = one.default_factory is not dataclasses.MISSING
            absent = Parameter.empty if one.default is dataclasses.MISSING else one.default
            kind = Parameter.POSITIONAL_OR_KEYWORD
            return Parameter(one.name, kind, default=_Factory() if factory else absent, annotation=one.type)

        return Signature([parameter(one) for one in dataclasses.fields(kind)], return_annotation=None)


def _init(self: Any, /, *given: Any, **named: Any) -> None:
    names, values = type(self).__match_args__, vars(self)
    if len(given) > len(names):
        raise TypeError(f"{type(self).__name__} takes {len(names)} values, {len(given)} were given")
    values.update(zip(names, given, strict=False))
    for name in named:
        if name in values or name not in names:
            raise TypeError(f"{type(self).__name__} got {'two values for' if name in values else 'an unknown value'} {name!r}")
    values.update(named)
    if len(values) < len(names):
        _complete(self, values)
    check = getattr(self, "__post_init__", None)
    if check is not None:
        check()


def _complete(self: Any, values: dict[str, Any]) -> None:
    """Adds the defaults of the fields that were not given."""
    for name, one in self.__dataclass_fields__.items():
        if name in values or name not in type(self).__match_args__:
            continue
        if one.default is not dataclasses.MISSING:
            values[name] = one.default
        elif one.default_factory is not dataclasses.MISSING:
            values[name] = one.default_factory()
        else:
            raise TypeError(f"{type(self).__name__} needs a value for {name!r}")


def _refuse(self: Any, name: str, *_: Any) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot change {name!r} of a frozen {type(self).__name__}")


def _repr(self: Any) -> str:
    shown = [one.name for one in dataclasses.fields(self) if one.repr]
    return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


def _compared(self: Any) -> tuple[Any, ...]:
    return tuple(getattr(self, name) for name in self.__compared__)


def _eq(self: Any, other: object) -> Any:
    return _compared(self) == _compared(other) if other.__class__ is self.__class__ else NotImplemented


def _hash(self: Any) -> int:
    return hash(_compared(self))


_METHODS: dict[str, Any] = {
    "__init__": _init,
    "__setattr__": _refuse,
    "__delattr__": _refuse,
    "__repr__": _repr,
    "__signature__": _Signature(),
}
_COMPARED: dict[str, Any] = {"__eq__": _eq, "__hash__": _hash}
