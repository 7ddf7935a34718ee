"""Where a pack comes from, as far as that was proven: a value that goes with the pack into the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Origin:
    """Who answers for a pack. Nothing of it decides which bytes are written into a model."""

    signers: Mapping[str, str] = field(default_factory=dict)
    """Name -> key id of the trusted keys whose signatures were checked."""
    channel: str = ""
    """The channel that the model follows from now on: hub://owner/name, https://... or file://..."""
    roots: tuple[str, ...] = ()
    """Key ids of the channel's root keys, oldest first: each has signed that the next one follows it."""
    signatures: Mapping[str, bytes] = field(default_factory=dict)
    """What follows the pack's file name -> content of the signature file, to be kept beside the model."""

    @property
    def publishers(self) -> frozenset[str]:
        """The key ids in whose name the pack speaks; empty: nobody's."""
        return frozenset((*self.signers.values(), *self.roots))
