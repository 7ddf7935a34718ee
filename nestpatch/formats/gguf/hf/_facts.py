"""Typed access to the metadata of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from nestpatch.errors import CheckpointFormatError

REQUIRED: Any = object()
"""The default of facts that a file must state."""


class FileFacts:
    """The scalars of a header, checked when they are asked for."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        """Wraps a header.

        Args:
            metadata: Its numbers, strings and booleans.
            where: The file, for messages.
        """
        self._metadata, self.where = metadata, where
        self.architecture = str(metadata.get("general.architecture", ""))

    def whole(self, key: str, default: Any = REQUIRED) -> int:
        """A whole number that is not negative.

        Args:
            key: Below the architecture's prefix, or a full key with a colon before it.
            default: What to return where the file has none; without it the key is required.

        Returns:
            The number.

        Raises:
            CheckpointFormatError: It is missing, or is no such number.
        """
        found = self._get(key, default)
        if found is default:
            return found  # type: ignore[no-any-return]
        if type(found) is not int or found < 0:
            raise self._odd(key, found, "a whole number")
        return found

    def real(self, key: str, default: Any = REQUIRED) -> float:
        """A finite number, as the decimal number with the fewest digits that is stored like it: 1e-05, not 9.99999974e-06.

        Args:
            key: As for `whole`.
            default: As for `whole`.

        Returns:
            The number.

        Raises:
            CheckpointFormatError: It is missing, or is no such number.
        """
        found = self._get(key, default)
        if found is default:
            return found  # type: ignore[no-any-return]
        if type(found) not in (int, float) or not math.isfinite(found):
            raise self._odd(key, found, "a finite number")
        return float(str(np.float32(found)))

    def text(self, key: str, default: Any = REQUIRED) -> str:
        """A text.

        Args:
            key: As for `whole`.
            default: As for `whole`.

        Returns:
            The text.

        Raises:
            CheckpointFormatError: It is missing, or is no text.
        """
        found = self._get(key, default)
        if found is not default and not isinstance(found, str):
            raise self._odd(key, found, "a text")
        return found  # type: ignore[no-any-return]

    def flag(self, key: str, default: bool) -> bool:
        """A boolean.

        Args:
            key: As for `whole`.
            default: What to return where the file has none.

        Returns:
            The boolean.

        Raises:
            CheckpointFormatError: It is something else.
        """
        found = self._get(key, default)
        if not isinstance(found, bool):
            raise self._odd(key, found, "true or false")
        return found

    def below(self) -> list[str]:
        """The keys below the architecture's prefix, without it."""
        prefix = f"{self.architecture}."
        return [key.removeprefix(prefix) for key in self._metadata if key.startswith(prefix)]

    def starting(self, prefix: str) -> dict[str, str]:
        """The texts whose keys start with a prefix.

        Args:
            prefix: The beginning of the full keys.

        Returns:
            Rest of the key -> text.
        """
        found = {key.removeprefix(prefix): value for key, value in self._metadata.items() if key.startswith(prefix)}
        return {key: value for key, value in found.items() if isinstance(value, str)}

    def _get(self, key: str, default: Any) -> Any:
        full = self._full(key)
        if full not in self._metadata and default is REQUIRED:
            raise CheckpointFormatError(f"{self.where} does not say {full} as one value")
        return self._metadata.get(full, default)

    def _full(self, key: str) -> str:
        return key[1:] if key.startswith(":") else f"{self.architecture}.{key}"

    def _odd(self, key: str, value: Any, expected: str) -> CheckpointFormatError:
        return CheckpointFormatError(f"{self.where} has {str(value)[:40]!r} for {self._full(key)}; expected {expected}")
