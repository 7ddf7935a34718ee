"""Commands that carry packs between machines: push, pull, update, yank, renew."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from nestpatch.commands.options import (
    OutputPath,
    PathType,
    examples,
    json_option,
    opened_base,
    print_json,
    progress,
    quiet_option,
    require_only,
    say_unsigned,
    threads_option,
    trust_options,
)
from nestpatch.commands.patching import base_option, dither_option
from nestpatch.commands.signing import password_option, unlocked

if TYPE_CHECKING:
    from nestpatch.channels.publish import Published
    from nestpatch.signing.trust import Policy

AVAILABLE = 10
"""Exit code of `update --check` when there is something to do."""
_channel_argument = click.argument("address", metavar="CHANNEL")
_key_option = click.option("--key", "key_file", type=PathType, required=True, help="The channel's root key, a .key file.")
_days_option = click.option(
    "--days", type=click.IntRange(1, 3650), default=30, show_default=True, help="How long the channel is valid after this."
)


@click.command(
    epilog=examples(
        "nestpatch push no-harm-1.0.0.nest acme/no-harm --key acme.key",
        "nestpatch push no-harm-1.0.0.nest file:///mnt/channels/no-harm --key acme.key --days 90",
    )
)
@click.argument("pack", metavar="PACK", type=PathType)
@_channel_argument
@_key_option
@password_option
@_days_option
@click.option("--private", is_flag=True, help="Create a new repository or folder for its owner only.")
@json_option
def push(
    pack: Path, address: str, key_file: Path, password_file: IO[bytes] | None, days: int, private: bool, as_json: bool
) -> None:
    """Publish PACK as the next version of CHANNEL: owner/name on the Hub, or a folder (file:///folder).

    The pack is signed with the key unless it is signed already; signatures of others beside it are published too. A published
    version never changes; pushing the same pack again is no error. The channel has to be renewed before it expires.
    """
    from nestpatch.channels.publish import push as run

    _report(run(pack, address, unlocked(key_file, password_file), days=days, private=private), as_json)


@click.command(
    epilog=examples(
        'nestpatch yank acme/no-harm 1.1.0 --reason "refuses arithmetic" --key acme.key',
        "nestpatch yank file:///mnt/channels/no-harm 1.1.0 --reason drill --key acme.key --json",
    )
)
@_channel_argument
@click.argument("version")
@click.option("--reason", required=True, help="Why, in one line; it is shown to every user of the version.")
@_key_option
@password_option
@_days_option
@json_option
def yank(
    address: str, version: str, reason: str, key_file: Path, password_file: IO[bytes] | None, days: int, as_json: bool
) -> None:
    """Withdraw VERSION of CHANNEL: models that have it go back with their next update."""
    from nestpatch.channels.publish import yank as run

    _report(run(address, version, reason, unlocked(key_file, password_file), days=days), as_json)


@click.command(
    epilog=examples(
        "nestpatch renew acme/no-harm --key acme.key",
        "nestpatch renew acme/no-harm --key acme.key --new-key acme-2.key",
    )
)
@_channel_argument
@_key_option
@password_option
@click.option("--new-key", type=PathType, help="Hand the channel over to this private key, which signs from now on.")
@_days_option
@json_option
def renew(
    address: str, key_file: Path, password_file: IO[bytes] | None, new_key: Path | None, days: int, as_json: bool
) -> None:
    """Sign CHANNEL again before it expires, or hand it over to a new key."""
    from nestpatch.channels.publish import renew as run

    key = unlocked(key_file, password_file)
    _report(run(address, key, unlocked(new_key, password_file) if new_key else None, days=days), as_json)


def _report(done: Published, as_json: bool) -> None:
    if as_json:
        print_json(done.as_json())
        return
    from nestpatch.views.publishing import show_published

    show_published(done)


@click.command(
    epilog=examples(
        "nestpatch pull acme/no-harm",
        "nestpatch pull https://patches.example/no-harm@1.0.0 -o no-harm.nest",
    )
)
@click.argument("address", metavar="CHANNEL[@VERSION]")
@click.option("-o", "--output", type=OutputPath, help="A file, or a folder to write into.  [default: NAME-VERSION.nest here]")
@trust_options
@quiet_option
@json_option
def pull(address: str, output: Path | None, policy_file: Path | None, allow_unsigned: bool, quiet: bool, as_json: bool) -> None:
    """Download a version of CHANNEL, check it and write it, with its signatures. Without @VERSION: the latest."""
    from nestpatch.channels.follow import pull as run
    from nestpatch.signing.store import load_policy

    with progress(quiet or as_json) as on_event:
        policy = load_policy(policy_file)
        done = run(address, output, policy=policy, allow_unsigned=allow_unsigned, on_event=on_event)
    if not done.signers:
        say_unsigned(policy, done.pack)
    if as_json:
        print_json(done.as_json())
        return
    from nestpatch.views.publishing import show_pulled

    show_pulled(done)


@click.command(
    epilog=examples(
        "nestpatch update models/llama --check",
        "nestpatch update models/llama --channel acme/no-harm --quiet --json",
        "nestpatch update /srv/models/*/",
    )
)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=OutputPath, callback=require_only)
@click.option("--check", is_flag=True, help="Change nothing; exit code 10 when there is something to do.")
@click.option("--channel", "channels", multiple=True, metavar="CHANNEL", help="Follow this channel from now on. Repeatable.")
@click.option("--allow-overlap", is_flag=True, help="Add the changes of packs that change the same rows.")
@trust_options
@base_option
@dither_option
@threads_option
@quiet_option
@json_option
def update(
    models: tuple[Path, ...],
    channels: tuple[str, ...],
    policy_file: Path | None,
    base: str | None,
    quiet: bool,
    as_json: bool,
    **switches: bool,
) -> None:
    """Bring each MODEL to the latest version of the channels that it follows, in place; away from a version that was yanked.

    One small request per channel when nothing is new, however many models follow it. All models and channels are tried.
    Exit code 0: up to date now; 10: --check found something to do; 1: a model could not be updated, or a channel was
    refused or could not be reached, and nothing of it was applied.
    """
    from nestpatch.signing.store import load_policy

    policy = load_policy(policy_file)
    with progress(quiet or as_json) as on_event, opened_base(base, quiet=quiet or as_json) as float_model:
        options = {"policy": policy, "base": float_model, "on_event": on_event, **switches}
        states = (_update_one if len(models) == 1 else _update_all)(models, channels, as_json, options)
    sys.exit(1 if "failed" in states else AVAILABLE if "available" in states else 0)


def _say_unsigned(policy: Policy, states: set[str]) -> None:
    if not policy.keys and states != {"failed"}:
        say_unsigned(policy, "what these channels publish")


def _update_one(models: tuple[Path, ...], channels: tuple[str, ...], as_json: bool, options: dict[str, Any]) -> set[str]:
    """Updates one model and prints the result; returns the states of its channels."""
    from nestpatch.patcher.update import update as run

    model = models[0]
    results = run(model, channels, **options)
    states = {result.state for result in results}
    _say_unsigned(options["policy"], states)
    if as_json:
        print_json({"model": str(model), "channels": [result.as_json() for result in results]})
    if not as_json or "failed" in states:
        from nestpatch.views.publishing import show_updated

        show_updated(model, [result for result in results if not as_json or result.state == "failed"])
    return states


def _update_all(models: tuple[Path, ...], channels: tuple[str, ...], as_json: bool, options: dict[str, Any]) -> set[str]:
    """Updates several models and prints the results; returns the states of the models."""
    from nestpatch.patcher.fleet import update_all

    results = update_all(models, channels, **options)
    states = {result.state for result in results}
    _say_unsigned(options["policy"], states)
    if as_json:
        print_json({"models": [result.as_json() for result in results]})
    if not as_json or "failed" in states:
        from nestpatch.views.fleet import show_failures, show_fleet

        show_failures(results)
        if not as_json:
            show_fleet(results)
    return states
