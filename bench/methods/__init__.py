"""The methods that are compared, and the ablations of shared deltas: one table."""

from __future__ import annotations

from bench.methods import breakers, full, lora, nest, nullspace, probeloss, redundant
from bench.methods._scene import Attempt, Method, Scene

__all__ = ["METHODS", "PEERS", "Attempt", "Method", "Scene"]
PEERS = ("nest", "lora", "lora-gate-up", "lora-all", "full", "circuit-breakers")
"""What is compared unless the command says otherwise; the others are ablations."""
_FAMILIES = (lora, full, breakers, nest, nullspace, probeloss, redundant)
_ALL = {method.name: method for family in _FAMILIES for method in family.METHODS}
METHODS = {name: _ALL[name] for name in (*PEERS, *(name for name in _ALL if name not in PEERS))}
"""Name -> method."""
