"""The command that checks the health of a deployed model: doctor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nestpatch.commands.options import (
    ModelType,
    PackType,
    PathType,
    device_option,
    examples,
    json_option,
    print_json,
    progress,
    quiet_option,
    require_order,
    suite_options,
)

if TYPE_CHECKING:
    from nestpatch.evaluation.suites import Suite
    from nestpatch.events import OnEvent


@click.command(
    epilog=examples(
        "nestpatch doctor models/llama",
        "nestpatch doctor model.gguf --pack no-harm-1.0.0.nest",
        "nestpatch doctor models/llama --base models/llama-base --measure --limit 50",
    ),
)
@click.argument("model", type=PathType)
@click.option("--pack", "packs", type=PackType, multiple=True, help="A pack that MODEL should hold. Repeatable.")
@click.option("--strength", type=float, default=1.0, show_default=True, help="The strength at which --pack should be applied.")
@click.option("--base", type=ModelType, help="The unpatched model: shows how much of a delta is left, and its chat template.")
@click.option("--policy", "policy_file", type=PathType, help="Use the trusted keys and rules of this file instead of your own.")
@click.option("--online", is_flag=True, help="Ask the channels now, instead of what this user has last read of them.")
@click.option("--measure", is_flag=True, help="Also evaluate MODEL, which may take minutes. --suite and --limit imply it.")
@suite_options
@device_option("Of the evaluation")
@quiet_option
@json_option
def doctor(
    model: Path,
    packs: tuple[str, ...],
    strength: float,
    base: str | None,
    policy_file: Path | None,
    online: bool,
    measure: bool,
    suite: tuple[str, ...],
    limit: int | None,
    device: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check the health of a deployed, patched MODEL. Writes nothing beside it.

    Are the packs still in the rows, and which rows were changed since? Does the policy accept them, has their channel
    withdrawn them? Does the chat template or a setting take refusals away? Was a change interrupted, can it be undone? With
    --measure: are attack success and refusals worse than the packs state?

    Packs are those that the ledger and the files of MODEL name, and those of --pack. Exit code 1: a check failed. Warnings, and
    what could not be checked, do not count.
    """
    require_order(model, packs[0] if packs else None, "doctor")
    from nestpatch.health.diagnosis import doctor as run
    from nestpatch.signing.store import load_policy

    policy = load_policy(policy_file) if policy_file is not None else None
    with progress(quiet or as_json) as on_event:
        wanted = _measurement(model, _suites(suite, limit), device, on_event) if measure or suite or limit is not None else None
        found = run(model, packs, strength=strength, base=base, policy=policy, online=online, measure=wanted, on_event=on_event)
    if as_json:
        print_json(found.as_json())
    else:
        from nestpatch.views.health import show_diagnosis

        show_diagnosis(found)
    sys.exit(0 if found.healthy else 1)


def _suites(sources: tuple[str, ...], limit: int | None) -> list[Suite]:
    from nestpatch.evaluation.suites import choose_suites

    return choose_suites(sources, limit)


def _measurement(model: Path, suites: list[Suite], device: str, on_event: OnEvent) -> Callable[[], dict[str, Any]]:
    """What `doctor` calls to measure the model as it is."""
    from nestpatch.evaluation.evaluator import evaluate

    def measured() -> dict[str, Any]:
        return evaluate(model, suites, device=device, on_event=on_event).model.as_json()

    return measured
