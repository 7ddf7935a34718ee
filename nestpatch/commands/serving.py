"""Commands that load packs into running servers: adapter load, unload, scale and list."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nestpatch.commands.options import (
    F,
    OutputPath,
    PackType,
    PathType,
    examples,
    json_option,
    print_json,
    progress,
    proven,
    quiet_option,
    say,
    say_unchecked,
    trust_options,
)

if TYPE_CHECKING:
    from nestpatch.export.serving import ServedAdapter, Server
    from nestpatch.runtimes.endpoint import Endpoint


def _server_options(command: F) -> F:
    """URL, --server and --api-key-env."""
    text = "The environment variable that holds the API key of the server.  [default: NESTPATCH_API_KEY]"
    command = click.option("--api-key-env", "key_variable", metavar="NAME", help=text)(command)
    kinds = click.Choice(["llama-server", "vllm"])
    command = click.option("--server", type=kinds, help="Which server it is.  [default: by the models that it lists]")(command)
    return click.argument("url")(command)


@contextmanager
def _connected(url: str, server: Server | None, key_variable: str | None) -> Iterator[tuple[Endpoint, Server]]:
    from nestpatch.export.serving import server_of
    from nestpatch.runtimes.connection import KEY_VARIABLE, EndpointSettings
    from nestpatch.runtimes.endpoint import Endpoint

    with Endpoint(url, EndpointSettings(key_variable=key_variable or KEY_VARIABLE)) as endpoint:
        for note in endpoint.notes:
            say(note, err=True)
        yield endpoint, server or server_of(endpoint)


_STALE = (
    "llama-server goes on from what it has cached at the old scale where a prompt begins like an earlier one: start it with "
    "--no-cache-prompt --cache-ram 0, or again after this change"
)
"""Measured with llama.cpp 0.5.0: most answers after a change were neither those of the old scale nor those of the new one."""


@click.group()
def adapter() -> None:
    """Load packs as adapters into running servers: llama-server and vLLM."""


@adapter.command(
    "load",
    epilog=examples(
        "nestpatch adapter load http://localhost:8000/v1 no-harm-1.0.0.nest --base models/llama",
        "nestpatch adapter load http://localhost:8080 hub://acme/no-harm -o no-harm.gguf",
    ),
)
@_server_options
@click.argument("pack", type=PackType)
@click.option("-o", "--output", type=OutputPath, help="Where the adapter is written.  [default: beside the pack]")
@click.option("--base", type=PathType, help="The files of the server's model, to check that the pack is for it.")
@click.option("--strength", type=float, default=1.0, show_default=True, help="Multiplies the pack, over 0 and up to 1.5.")
@click.option("--name", help="vLLM: the adapter's name, by which requests choose it.  [default: NAME-VERSION of the pack]")
@click.option("--server-path", help="Where the server finds the adapter, if not at the same path as here.")
@trust_options
@quiet_option
@json_option
def load(
    url: str,
    server: Server | None,
    key_variable: str | None,
    pack: str,
    output: Path | None,
    base: Path | None,
    strength: float,
    name: str | None,
    server_path: str | None,
    policy_file: Path | None,
    allow_unsigned: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write PACK as an adapter, and load it into the server at URL.

    vLLM loads it while it runs; requests choose it as a model of its own name. llama-server reads adapters when it starts: the
    first call writes the file and shows the option to start the server with, and ends with 1; the same call afterwards sets its
    scale. Signatures are checked first.
    """
    from nestpatch.export import serving
    from nestpatch.export.adapters import adapter_output

    # The pack first: a server is waited for.
    with progress(quiet or as_json) as on_event:
        passed = proven(pack, base, policy_file, on_event, allow_unsigned=allow_unsigned)
    with _connected(url, server, key_variable) as (endpoint, kind):
        target = output or adapter_output(pack, passed.pack, "lora" if kind == "vllm" else "gguf-lora")
        done = serving.load(endpoint, kind, passed, target, base=base, strength=strength, name=name, server_path=server_path)
    say_unchecked(passed)
    if as_json:
        print_json({"url": endpoint.url, **done.as_json()})
    elif done.adapter is None:
        say(f"wrote {done.output}; {endpoint.url} has not loaded it. Start the server with it, then run this command again:")
        say(f"  {done.start}")
    else:
        say(f"{done.pack} is loaded: {_described(done.adapter)}")
    if kind == "llama-server" and done.adapter is not None:
        say(f"WARNING: {_STALE}", err=True)
    sys.exit(0 if done.adapter is not None else 1)


@adapter.command(
    "unload",
    epilog=examples(
        "nestpatch adapter unload http://localhost:8000/v1 no-harm-1.0.0",
        "nestpatch adapter unload http://localhost:8080 0 --json",
    ),
)
@_server_options
@click.argument("name")
@json_option
def unload(url: str, server: Server | None, key_variable: str | None, name: str, as_json: bool) -> None:
    """Drop the adapter NAME from vLLM, or disable it in llama-server."""
    from nestpatch.export import serving

    with _connected(url, server, key_variable) as (endpoint, kind):
        found = serving.unload(endpoint, kind, name)
    if as_json:
        print_json({"url": endpoint.url, "server": kind, "adapter": found.as_json()})
    else:
        say(f"disabled: {_described(found)}" if kind == "llama-server" else f"dropped: {_described(found)}")
    if kind == "llama-server":
        say(f"WARNING: {_STALE}", err=True)


@adapter.command(
    "scale",
    epilog=examples(
        "nestpatch adapter scale http://localhost:8080 0 0.5",
        "nestpatch adapter scale http://localhost:8080 no-harm-1.0.0-lora.gguf 1 --json",
    ),
)
@_server_options
@click.argument("name")
@click.argument("scale", type=click.FloatRange(0, 1.5))
@json_option
def scale_adapter(url: str, server: Server | None, key_variable: str | None, name: str, scale: float, as_json: bool) -> None:
    """Set the scale of the adapter NAME of llama-server: its number, its path, or the name of its file. 0 disables it."""
    from nestpatch.export import serving

    with _connected(url, server, key_variable) as (endpoint, kind):
        found = serving.set_scale(endpoint, kind, name, scale)
    if as_json:
        print_json({"url": endpoint.url, "server": kind, "adapter": found.as_json()})
    else:
        say(_described(found))
    say(f"WARNING: {_STALE}", err=True)


@adapter.command(
    "list",
    epilog=examples("nestpatch adapter list http://localhost:8000/v1", "nestpatch adapter list http://localhost:8080 --json"),
)
@_server_options
@json_option
def list_loaded(url: str, server: Server | None, key_variable: str | None, as_json: bool) -> None:
    """List the adapters of the server at URL."""
    from nestpatch.export import serving

    with _connected(url, server, key_variable) as (endpoint, kind):
        found = serving.list_adapters(endpoint, kind)
    if as_json:
        print_json({"url": endpoint.url, "server": kind, "adapters": [one.as_json() for one in found]})
        return
    for one in found:
        say(_described(one))
    if not found:
        say(f"{endpoint.url} has no adapters")


def _described(found: ServedAdapter) -> str:
    scale = "" if found.scale is None else f", scale {found.scale:g}"
    return f"{found.name}  {found.path}{scale}"
