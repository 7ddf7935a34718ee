"""The command that writes a page for people: report."""

from __future__ import annotations

from pathlib import Path

import click

from nestpatch.commands.options import NewFile, PackType, PathType, SourceType, examples, progress, quiet_option, say


@click.command(
    epilog=examples(
        "nestpatch report no-harm-1.0.0.nest -o report.html",
        "nestpatch report models/llama -o report.html",
        "nestpatch report eval.json --pack no-harm-1.0.0.nest --answers answers.jsonl -o report.html",
    )
)
@click.argument("source", type=SourceType)
@click.option("-o", "--output", type=NewFile, required=True, help="The HTML file to write.")
@click.option("--pack", type=PackType, help="Describe this pack too, where SOURCE is a model or an evaluation.")
@click.option("--answers", type=PathType, help="Show examples from this file of eval --answers.")
@click.option("--show-harmful", is_flag=True, help="Show the words of harmful prompts and of their answers.")
@click.option("--policy", "policy_file", type=PathType, help="Use the trusted keys and rules of this file instead of your own.")
@quiet_option
def report(
    source: str,
    output: Path,
    pack: str | None,
    answers: Path | None,
    show_harmful: bool,
    policy_file: Path | None,
    quiet: bool,
) -> None:
    """Write one HTML page about SOURCE: a pack, a patched model, or what eval --json printed.

    The page needs no other file, no network and no script, on a screen or on paper. It says who signed the pack by your trusted
    keys, what was measured, what the pack changes, how it was made, and how to verify and undo it. Nothing is measured for it.
    """
    from nestpatch.report.page import write_report

    with progress(quiet) as on_event:
        write_report(
            source,
            output,
            pack=pack,
            answers=answers,
            show_harmful=show_harmful,
            policy_file=policy_file,
            on_event=on_event,
        )
    say(f"wrote {output}")
