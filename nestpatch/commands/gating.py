"""Where commands take a patch: one gate for all of them, and what it says on stderr of what passed without a check."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nestpatch.commands.options import say

if TYPE_CHECKING:
    from nestpatch.events import OnEvent
    from nestpatch.gate import Proven
    from nestpatch.signing.trust import Policy


def proven(
    patch: str, model: str | Path | None, policy_file: Path | None, on_event: OnEvent, *, allow_unsigned: bool
) -> Proven:
    """The patch after it passed the gate. Says what passed against the policy; `say_unchecked` says the rest in the end."""
    from nestpatch.gate import prove
    from nestpatch.signing.trust import load_policy

    done = prove(patch, model, policy=load_policy(policy_file), allow_unsigned=allow_unsigned, on_event=on_event)
    if done.warning:
        say(f"WARNING: --allow-unsigned: {done.warning}", err=True)
    return done


def say_unchecked(done: Proven | None) -> None:
    """One line, with the result of a command and also where it is quiet, for what no signature was asked of."""
    if done is not None and done.unchecked:
        say(done.unchecked, err=True)


def say_unsigned(policy: Policy, what: str) -> None:
    """The same for what came from a channel and bears no trusted signature."""
    if policy.keys:
        say(f"WARNING: no trusted key has signed {what}", err=True)
    else:
        where = "on this machine: the signature"
        say(f"no key is trusted {where} of {what} was not checked (nestpatch trust add)", err=True)
