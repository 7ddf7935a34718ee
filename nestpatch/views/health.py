"""How the health of a model is shown: one line for each check, and below it what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nestpatch.views.console import escape, out

if TYPE_CHECKING:
    from nestpatch.health.diagnosis import Diagnosis

_SIGNS = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "failed": "[bold red]✗[/]", "not checked": "[dim]-[/]"}
_WIDTH = 12


def show_diagnosis(found: Diagnosis) -> None:
    """Shows what was found, and a line with the result.

    Args:
        found: The health of a model.
    """
    states = [check.state.value for check in found.checks]
    for check in found.checks:
        quiet = check.state.value == "not checked"
        text = f"[dim]not checked: {escape(check.detail)}[/]" if quiet else escape(check.detail)
        out.print(f"{_SIGNS[check.state.value]} {escape(f'{check.name:<{_WIDTH}}')} {text}")
        if check.advice and check.state.value in ("warning", "failed"):
            out.print(f"{'':<{_WIDTH + 3}}[bold]What to do[/]: {escape(check.advice)}")
    verdict = "[green]healthy[/]" if found.healthy else "[bold red]not healthy[/]"
    counts = ", ".join(f"{states.count(state)} {state}" for state in _SIGNS if state in states)
    out.print(f"{verdict}  {escape(found.model)}: {counts}")
