"""Commands about who made a pack: keygen, sign, verify-signature, trust."""

from __future__ import annotations

import dataclasses
import glob
import os
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from nestpatch.commands._options import NewFile, OutputPath, PackType, PathType, json_option, print_json, say

if TYPE_CHECKING:
    from nestpatch.signing.keys import PrivateKey

PASSWORD = "NESTPATCH_KEY_PASSWORD"  # noqa: S105 - the name of a variable
MAX_PASSWORD = 1024
"""Bytes."""
password_option = click.option(
    "--password-file",
    type=click.File("rb"),
    help=f"First line: the password; - for stdin.  [default: ${PASSWORD}, or asked for]",
)


@click.command()
@click.argument("name", type=NewFile, default="nestpatch")
@click.option("--no-password", is_flag=True, help="Leave the private key unencrypted: for machines that sign on their own.")
@password_option
@json_option
def keygen(name: Path, no_password: bool, password_file: IO[bytes] | None, as_json: bool) -> None:
    """Make a key pair for signing packs: NAME.key, which stays with you, and NAME.pub, which everybody may have."""
    from nestpatch.signing import keys

    if no_password and password_file is not None:
        raise click.UsageError("--no-password and --password-file exclude each other")
    password = None if no_password else _password(password_file, f"Password for {name}.key", confirm=True)
    pair = keys.keygen(name, password)
    if as_json:
        print_json(dataclasses.asdict(pair))
        return
    from nestpatch.views.signing import show_pair

    show_pair(pair)


@click.command()
@click.argument("pack", type=PathType)
@click.option("--key", "key_file", type=PathType, required=True, help="The private key: a .key file that keygen made.")
@click.option("-o", "--output", type=OutputPath, help="Where to write.  [default: PACK.sig, or beside other signatures]")
@click.option("--overwrite", is_flag=True, help="Replace an older signature by the same key.")
@password_option
@json_option
def sign(
    pack: Path, key_file: Path, output: Path | None, overwrite: bool, password_file: IO[bytes] | None, as_json: bool
) -> None:
    """Sign PACK: writes an OpenSSF Model Signing bundle, which the model_signing tool verifies too."""
    from nestpatch.signing import verify

    done = verify.sign_pack(pack, unlocked(key_file, password_file), output, overwrite=overwrite)
    if as_json:
        print_json(dataclasses.asdict(done))
        return
    from nestpatch.views.signing import show_signature

    show_signature(done)


@click.command("verify-signature")
@click.argument("pack", type=PackType)
@click.option("--model", help="What the patch is for, a path or a Hub id: the rules and keys for this model count.")
@click.option("--key", "key_files", type=PathType, multiple=True, help="Trust this public key, instead of your own list.")
@click.option("--policy", "policy_file", type=PathType, help="Trust what this file says, instead of your own list.")
@json_option
def verify_signature(
    pack: str, model: str | None, key_files: tuple[Path, ...], policy_file: Path | None, as_json: bool
) -> None:
    """Tell who signed PACK, offline unless it is hub://owner/name. Exit code 0: as many trusted keys as needed, 1: not."""
    from nestpatch.gate import is_channel
    from nestpatch.signing import keys, trust, verify

    if key_files and policy_file is not None:
        raise click.UsageError("--key and --policy exclude each other")
    policy = trust.load_policy(policy_file) if not key_files else trust.Policy()
    for file in key_files:
        policy = policy.with_key(trust.TrustedKey(str(file), keys.read_public(file)))
    if is_channel(pack):
        from nestpatch.channels.follow import fetch_pack

        found = fetch_pack(pack, policy, model).outcome
    else:
        found = verify.verify_signature(pack, policy, model)
    if as_json:
        print_json(found.as_json())
    else:
        from nestpatch.views.signing import show_outcome

        show_outcome(pack, found)
    sys.exit(0 if isinstance(found, verify.Signed) else 1)


@click.group()
def trust() -> None:
    """Keep the list of keys whose packs this user trusts."""


@trust.command("add")
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
    """Trust the public KEY file from now on. Compare its id with what the publisher says elsewhere."""
    from nestpatch.signing import keys, trust
    from nestpatch.signing.store import changing, trust_file
    from nestpatch.signing.subject import EVERYTHING

    patterns = tuple(_pattern(model) for model in models) or (EVERYTHING,)
    trusted = trust.TrustedKey(trust.check_name(name or key.stem), keys.read_public(key), trust.check_patterns(patterns))
    with changing(trust_file(), create=True):
        file = trust.save_policy(trust.load_own(create=True).with_key(trusted))
    if as_json:
        print_json({"name": trusted.name, "id": trusted.key.key_id, "models": trusted.models, "file": file})
    else:
        say(f"trusting {trusted.name}, key {trusted.key.key_id}, for {', '.join(trusted.models)}")


@trust.command("list")
@json_option
def trust_list(as_json: bool) -> None:
    """Show the trusted keys and the rules: your own, and those of this machine's administrator."""
    from nestpatch.signing import store
    from nestpatch.signing.trust import load_own, load_system

    own, system, file = load_own(), load_system(), store.trust_file()
    if as_json:
        print_json({"file": file, **own.as_json(), "system": {"file": store.SYSTEM_FILE, **system.as_json()}})
        return
    from nestpatch.views.signing import show_policy, show_system_policy

    show_policy(own, str(file))
    show_system_policy(system, str(store.SYSTEM_FILE))


@trust.command("remove")
@click.argument("key")
@json_option
def trust_remove(key: str, as_json: bool) -> None:
    """Trust KEY no longer: its name, or at least 8 digits of its id."""
    from nestpatch.signing.store import changing, trust_file
    from nestpatch.signing.trust import load_own, load_system, refuse_system_key, save_policy

    with changing(trust_file()):
        before = load_own()
        refuse_system_key(key, before, load_system())
        after = before.without_key(key)
        file = save_policy(after)
    gone = next(trusted for trusted in before.keys if trusted not in after.keys)
    if as_json:
        print_json({"name": gone.name, "id": gone.key.key_id, "file": file})
    else:
        say(f"{gone.name}, key {gone.key.key_id[:12]}.., is no longer trusted")


def unlocked(key_file: Path, password_file: IO[bytes] | None) -> PrivateKey:
    """A private key; its password is asked for where it has one."""
    from nestpatch.signing import keys

    password = _password(password_file, f"Password of {key_file}") if keys.needs_password(key_file) else None
    return keys.read_private(key_file, password)


def _password(file: IO[bytes] | None, question: str, *, confirm: bool = False) -> bytes:
    """From the file, the environment or the terminal, in this order; never from the command line, which others can see."""
    from nestpatch.errors import KeyFileError

    if file is not None:
        found = file.readline(MAX_PASSWORD + 2).rstrip(b"\r\n")
        if len(found) > MAX_PASSWORD:
            raise KeyFileError(
                f"the first line of the password file has more than {MAX_PASSWORD} bytes", advice="Check the path."
            )
    elif PASSWORD in os.environ:
        found = os.environb[PASSWORD.encode()] if os.supports_bytes_environ else os.environ[PASSWORD].encode()
    elif sys.stdin.isatty():
        found = click.prompt(question, hide_input=True, confirmation_prompt=confirm, err=True).encode()
    else:
        raise KeyFileError(
            "a password is needed, and there is nobody to ask", advice=f"Use --password-file, or set {PASSWORD}."
        )
    if not found:
        raise KeyFileError(
            "the password is empty", advice="Give one, or make an unencrypted key: nestpatch keygen --no-password"
        )
    return found


def _pattern(model: str) -> str:
    """A path becomes absolute, and its own pattern; what is none stays as it is. Raises TrustError for what is no text."""
    if any("\ud800" <= character <= "\udfff" for character in model):
        from nestpatch.errors import TrustError

        raise TrustError(f"{model} is no text, and cannot be kept", advice="Name its folder with a pattern: models/*")
    return glob.escape(Path(os.path.abspath(model)).as_posix()) if os.path.exists(model) else model  # noqa: PTH110
