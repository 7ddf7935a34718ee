"""Commands about who made a pack: keygen, sign, verify-signature, trust."""

from __future__ import annotations

import glob
import os
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from nestpatch.commands.options import (
    NewFile,
    OutputPath,
    PackType,
    PathType,
    examples,
    json_option,
    print_json,
    say,
)

if TYPE_CHECKING:
    from nestpatch.signing.keys import PrivateKey

_PASSWORD = "NESTPATCH_KEY_PASSWORD"  # noqa: S105 - the name of a variable
_MAX_PASSWORD = 1024
"""Bytes."""
password_option = click.option(
    "--password-file",
    type=click.File("rb"),
    help=f"File whose first line is the password; - for stdin.  [default: ${_PASSWORD}, or a prompt]",
)


@click.command(epilog=examples("nestpatch keygen acme", "nestpatch keygen ci --no-password --json"))
@click.argument("name", type=NewFile, default="nestpatch")
@click.option("--no-password", is_flag=True, help="Leave the private key unencrypted: for machines that sign unattended.")
@password_option
@json_option
def keygen(name: Path, no_password: bool, password_file: IO[bytes] | None, as_json: bool) -> None:
    """Make a key pair for signing packs: NAME.key, which you keep secret, and NAME.pub, which you give away."""
    from nestpatch.signing import keys

    if no_password and password_file is not None:
        raise click.UsageError("--no-password and --password-file exclude each other")
    password = None if no_password else _password(password_file, f"Password for {name}.key", confirm=True)
    pair = keys.keygen(name, password)
    if as_json:
        print_json(pair.as_json())
        return
    from nestpatch.views.publishing import show_pair

    show_pair(pair)


@click.command(
    epilog=examples(
        "nestpatch sign no-harm-1.0.0.nest --key acme.key",
        "nestpatch sign no-harm-1.0.0.nest --key ci.key --overwrite --json",
    )
)
@click.argument("pack", metavar="PACK", type=PathType)
@click.option("--key", "key_file", type=PathType, required=True, help="The private key: a .key file that keygen made.")
@click.option("-o", "--output", type=OutputPath, help="Where to write.  [default: PACK.sig, or beside other signatures]")
@click.option("--overwrite", is_flag=True, help="Replace an older signature by the same key.")
@password_option
@json_option
def sign(
    pack: Path, key_file: Path, output: Path | None, overwrite: bool, password_file: IO[bytes] | None, as_json: bool
) -> None:
    """Sign PACK: write an OpenSSF Model Signing bundle, which the model_signing tool verifies too."""
    from nestpatch.signing import verify

    done = verify.sign_pack(pack, unlocked(key_file, password_file), output, overwrite=overwrite)
    if as_json:
        print_json(done.as_json())
        return
    from nestpatch.views.publishing import show_signature

    show_signature(done)


@click.command(
    "verify-signature",
    epilog=examples(
        "nestpatch verify-signature no-harm-1.0.0.nest --model models/llama",
        "nestpatch verify-signature hub://acme/no-harm --key acme.pub",
    ),
)
@click.argument("pack", metavar="PACK", type=PackType)
@click.option("--model", help="Path or Hub id of the model: the rules and keys for this model count.")
@click.option("--key", "key_files", type=PathType, multiple=True, help="Trust this public key, instead of your own list.")
@click.option("--policy", "policy_file", type=PathType, help="Use the trusted keys and rules of this file instead of your own.")
@json_option
def verify_signature(
    pack: str, model: str | None, key_files: tuple[Path, ...], policy_file: Path | None, as_json: bool
) -> None:
    """Show who signed PACK, a file or a channel; a file is checked offline.

    Exit code 0: enough trusted keys have signed, 1: too few.
    """
    from nestpatch.gate import is_channel
    from nestpatch.signing import keys, store, trust, verify

    if key_files and policy_file is not None:
        raise click.UsageError("--key and --policy exclude each other")
    policy = store.load_policy(policy_file) if not key_files else trust.Policy()
    for file in key_files:
        policy = policy.with_key(trust.TrustedKey(str(file), keys.PublicKey.read(file)))
    if is_channel(pack):
        from nestpatch.channels.follow import fetch_pack

        found = fetch_pack(pack, policy, model).result
    else:
        found = verify.verify_signature(pack, policy, model)
    if as_json:
        print_json({"model": model, **found.as_json()})
    else:
        from nestpatch.views.publishing import show_result

        show_result(pack, found)
    sys.exit(0 if isinstance(found, verify.VerifiedPack) else 1)


@click.group()
def trust() -> None:
    """Keep the list of keys whose packs this user trusts."""


@trust.command(
    "add",
    epilog=examples(
        "nestpatch trust add acme.pub --name acme",
        "nestpatch trust add team.pub --model 'team/*' --model /srv/models/team",
    ),
)
@click.argument("key", type=PathType)
@click.option("--name", help="Whose key it is.  [default: the file's name]")
@click.option(
    "--model",
    "models",
    multiple=True,
    help="Only for these models: paths, ids of the packs' bases, patterns such as acme/*.",
)
@json_option
def trust_add(key: Path, name: str | None, models: tuple[str, ...], as_json: bool) -> None:
    """Trust the public KEY file from now on. Compare its id with what the publisher says elsewhere.

    Once any key is trusted, every pack needs a trusted signature, also your own: nestpatch sign.
    """
    from nestpatch.signing import keys
    from nestpatch.signing.store import trust_key
    from nestpatch.signing.subject import EVERYTHING
    from nestpatch.signing.trust import TrustedKey

    patterns = tuple(_pattern(model) for model in models) or (EVERYTHING,)
    trusted = TrustedKey.of(name or key.stem, keys.PublicKey.read(key), patterns)
    file = trust_key(trusted)
    if as_json:
        print_json({**trusted.as_json(), "file": str(file)})
        return
    say(f"trusting {trusted.name}, key {trusted.key.key_id}, for {', '.join(trusted.models)}")
    say("From now on a pack must be signed by a trusted key. Sign your own packs: nestpatch sign PACK --key NAME.key")


@trust.command("list", epilog=examples("nestpatch trust list", "nestpatch trust list --json"))
@json_option
def trust_list(as_json: bool) -> None:
    """Show the trusted keys and the rules: your own, and those of this machine's administrator."""
    from nestpatch.signing.store import SYSTEM_FILE, load_own, load_system, trust_file

    own, system, file = load_own(), load_system(), trust_file()
    if as_json:
        print_json({"file": str(file), **own.as_json(), "system": {"file": str(SYSTEM_FILE), **system.as_json()}})
        return
    from nestpatch.views.publishing import show_policies

    show_policies(own, str(file), system, str(SYSTEM_FILE))


@trust.command("remove", epilog=examples("nestpatch trust remove acme", "nestpatch trust remove 3f9a1c07 --json"))
@click.argument("key")
@json_option
def trust_remove(key: str, as_json: bool) -> None:
    """Stop trusting KEY: its name, or at least 8 digits of its id."""
    from nestpatch.signing.store import distrust_key

    gone, file = distrust_key(key)
    if as_json:
        print_json({**gone.as_json(), "file": str(file)})
    else:
        say(f"{gone.name}, key {gone.key.key_id[:12]}.., is no longer trusted")


def unlocked(key_file: Path, password_file: IO[bytes] | None) -> PrivateKey:
    """Reads a private key; asks for its password if it has one."""
    from nestpatch.signing import keys

    password = _password(password_file, f"Password of {key_file}") if keys.needs_password(key_file) else None
    return keys.read_private(key_file, password)


def _password(file: IO[bytes] | None, question: str, *, confirm: bool = False) -> bytes:
    """From the file, the environment or the terminal, in this order; never from the command line, which others can see."""
    from nestpatch.errors import KeyFileError

    if file is not None:
        found = file.readline(_MAX_PASSWORD + 2).rstrip(b"\r\n")
        if len(found) > _MAX_PASSWORD:
            raise KeyFileError(
                f"the first line of the password file has more than {_MAX_PASSWORD} bytes", advice="Check the path."
            )
    elif _PASSWORD in os.environ:
        found = os.environb[_PASSWORD.encode()] if os.supports_bytes_environ else os.environ[_PASSWORD].encode()
    elif sys.stdin.isatty():
        found = click.prompt(question, hide_input=True, confirmation_prompt=confirm, err=True).encode()
    else:
        raise KeyFileError(
            "a password is needed, and there is no terminal to ask for it", advice=f"Use --password-file, or set {_PASSWORD}."
        )
    if not found:
        raise KeyFileError(
            "the password is empty", advice="Give one, or make an unencrypted key: nestpatch keygen --no-password"
        )
    return found


def _pattern(model: str) -> str:
    """An existing path becomes absolute and literal; anything else stays as it is. Raises TrustError for undecodable text."""
    if any("\ud800" <= character <= "\udfff" for character in model):
        from nestpatch.errors import TrustError

        raise TrustError(f"{model} is not text, and cannot be stored", advice="Name its folder with a pattern: models/*")
    return glob.escape(Path(os.path.abspath(model)).as_posix()) if os.path.exists(model) else model  # noqa: PTH110
