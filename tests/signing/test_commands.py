"""The commands: what they print, what they write, and that no password appears anywhere."""

from __future__ import annotations

import json
import os
import select
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import nestpatch
from nestpatch.cli import main
from nestpatch.signing import keys
from tests.signing.conftest import spoil

pytestmark = pytest.mark.usefixtures("own_home")
PASSWORD = "hunter2 und Käse"


def run(*arguments: object, stdin: str | None = None, env: dict[str, str] | None = None) -> Result:
    """Runs a command; nothing that it prints or logs may hold the password."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin, env=env)
    assert "hunter2" not in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def answer(result: Result) -> Any:
    """The JSON object on stdout."""
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def acme(tmp_path: Path) -> Path:
    """The files acme.key and acme.pub, unencrypted; the path without the suffix."""
    assert run("keygen", tmp_path / "acme", "--no-password").exit_code == 0
    return tmp_path / "acme"


def test_the_whole_way(tmp_path: Path, pack: Path) -> None:
    (tmp_path / "password").write_text(f"{PASSWORD}\nsecond line\n", encoding="utf-8")
    secret = ["--password-file", tmp_path / "password"]
    pair = answer(run("keygen", tmp_path / "acme", *secret, "--json"))
    assert stat.S_IMODE(Path(pair["private"]).stat().st_mode) == 0o600
    assert keys.read_private(Path(pair["private"]), PASSWORD.encode()).public.key_id == pair["key_id"]
    done = answer(run("sign", pack, "--key", pair["private"], *secret, "--json"))
    assert done["key_id"] == pair["key_id"]
    before = run("verify-signature", pack)
    assert (before.exit_code, "unproven" in before.stdout) == (1, True)
    added = answer(run("trust", "add", pair["public"], "--name", "acme", "--json"))
    assert added["key_id"] == pair["key_id"]
    found = answer(run("verify-signature", pack, "--json"))
    assert found["verdict"] == "signed"
    assert found["signatures"] == [{"name": "acme", "key_id": pair["key_id"], "file": "no-harm.nest.sig"}]
    assert "by acme" in run("verify-signature", pack).stdout
    spoil(pack)
    bad = run("verify-signature", pack, "--json")
    assert (bad.exit_code, list(json.loads(bad.stdout))) == (1, ["error"])
    assert bad.stderr.startswith("BadSignatureError: no-harm.nest.sig was made for other bytes")


def test_passwords_from_stdin_and_from_the_environment(tmp_path: Path, pack: Path) -> None:
    made = run("keygen", tmp_path / "acme", "--password-file", "-", stdin=f"{PASSWORD}\n")
    assert made.exit_code == 0
    key = tmp_path / "acme.key"
    assert run("sign", pack, "--key", key, env={"NESTPATCH_KEY_PASSWORD": PASSWORD}).exit_code == 0
    wrong = run("sign", pack, "--key", key, "--overwrite", env={"NESTPATCH_KEY_PASSWORD": "hunter2 wrong"})
    assert (wrong.exit_code, wrong.stderr.splitlines()[0]) == (
        1, f"KeyFileError: {key} is not a private key, or the password is wrong",
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [("keygen", "NEW"), ("sign", "PATCH", "--key", "KEY")])
def test_without_a_terminal_nobody_is_asked(tmp_path: Path, pack: Path, arguments: tuple[str, ...]) -> None:
    keys.keygen(tmp_path / "acme", PASSWORD.encode())
    places = {"NEW": tmp_path / "new", "PATCH": pack, "KEY": tmp_path / "acme.key"}
    result = run(*(places.get(a, a) for a in arguments), stdin=f"{PASSWORD}\n")
    assert result.exit_code == 1
    assert "there is no terminal to ask for it" in result.stderr
    assert "--password-file" in result.stderr
    assert not (tmp_path / "new.key").exists()
    empty = run(*(places.get(a, a) for a in arguments), "--password-file", "-", stdin="\n")
    assert (empty.exit_code, "the password is empty" in empty.stderr) == (1, True)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_password_typed_at_a_terminal_is_not_echoed(tmp_path: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(Path(nestpatch.__file__).parent.parent), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "nestpatch", "keygen", str(tmp_path / "acme")]
    with subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment, close_fds=True
    ) as process:
        os.close(follower)
        screen = b""
        for question in (b"Password for", b"Repeat"):
            while question not in screen:
                screen += shown(leader)
            time.sleep(0.1)  # the terminal is switched to silence after the question
            os.write(leader, f"{PASSWORD}\n".encode())
        while more := shown(leader):
            screen += more
        assert process.wait(30) == 0
    os.close(leader)
    assert b"hunter2" not in screen
    assert keys.read_private(tmp_path / "acme.key", PASSWORD.encode())


def shown(leader: int) -> bytes:
    """What appears on the terminal next; nothing when it is closed."""
    ready, _, _ = select.select([leader], [], [], 30)
    assert ready, "nothing more came"
    try:
        return os.read(leader, 4096)
    except OSError:  # Linux says so when the other side is closed
        return b""


def test_trust_is_listed_and_taken_back(acme: Path, tmp_path: Path) -> None:
    assert "no key is trusted yet" in run("trust", "list").stdout
    (tmp_path / "models").mkdir()
    added = run("trust", "add", f"{acme}.pub", "--model", "acme/*", "--model", tmp_path / "models")
    assert added.exit_code == 0
    listed = answer(run("trust", "list", "--json"))
    assert [(key["name"], key["patterns"]) for key in listed["keys"]] == [("acme", ["acme/*", str(tmp_path / "models")])]
    assert "acme/*" in run("trust", "list").stdout
    assert answer(run("trust", "remove", "acme", "--json"))["key_id"] == listed["keys"][0]["key_id"]
    assert answer(run("trust", "list", "--json"))["keys"] == []
    gone = run("trust", "remove", "acme")
    assert (gone.exit_code, gone.stderr.splitlines()[0]) == (1, "TrustError: 0 trusted keys match 'acme', expected 1")


def test_who_trusts_a_key_learns_that_own_packs_need_a_signature(acme: Path, pack: Path) -> None:
    assert "Sign your own packs: nestpatch sign PACK" in run("trust", "add", f"{acme}.pub").stdout
    refused = run("verify-signature", pack)
    said = " ".join(refused.stderr.split())
    assert said.startswith("UnsignedError: no-harm.nest is not signed")
    assert f"nestpatch sign {pack.name} --key" in said
    assert "--allow-unsigned" in said


def test_a_path_with_wildcards_in_its_name_is_a_path(acme: Path, tmp_path: Path, pack: Path) -> None:
    for name in ("m[ab]", "ma"):
        (tmp_path / name).mkdir()
    run("trust", "add", f"{acme}.pub", "--model", tmp_path / "m[ab]")
    assert run("sign", pack, "--key", f"{acme}.key").exit_code == 0
    assert run("verify-signature", pack, "--model", tmp_path / "m[ab]").exit_code == 0
    other = run("verify-signature", pack, "--model", tmp_path / "ma")
    assert (other.exit_code, "who is not trusted for this model" in other.stderr) == (1, True)


def test_another_list_than_ones_own(acme: Path, tmp_path: Path, pack: Path) -> None:
    run("sign", pack, "--key", f"{acme}.key")
    assert run("verify-signature", pack, "--key", f"{acme}.pub").exit_code == 0
    other = keys.keygen(tmp_path / "other", None)
    assert run("verify-signature", pack, "--key", other.public).exit_code == 1
    run("trust", "add", f"{acme}.pub")
    policy = {"format": "nestpatch-trust/1", "keys": [{"name": "other", "pem": other.public.read_text(encoding="ascii")}]}
    (tmp_path / "policy.json").write_text(json.dumps(policy), encoding="utf-8")
    strict = run("verify-signature", pack, "--policy", tmp_path / "policy.json")
    assert (strict.exit_code, strict.stderr.startswith("UntrustedError")) == (1, True)
    both = run("verify-signature", pack, "--policy", tmp_path / "policy.json", "--key", other.public)
    assert both.exit_code == 2


def test_names_that_would_drive_the_terminal(acme: Path) -> None:
    result = run("trust", "add", f"{acme}.pub", "--name", "a\x1b[2J")
    assert (result.exit_code, result.stderr.startswith("TrustError")) == (1, True)
    assert "\x1b" not in result.stdout + result.stderr


def test_nothing_is_overwritten(acme: Path, pack: Path) -> None:
    again = run("keygen", acme, "--no-password")
    assert (again.exit_code, again.stderr.startswith("OutputError")) == (1, True)
    assert f"nestpatch sign PACK --key {acme}.key" in again.stderr
    assert "another name" in again.stderr
    assert run("sign", pack, "--key", f"{acme}.key").exit_code == 0
    assert run("sign", pack, "--key", f"{acme}.key").stderr.startswith("OutputError")
    assert run("sign", pack, "--key", f"{acme}.key", "--overwrite").exit_code == 0
    assert run("keygen", acme, "--no-password", "--password-file", "-").exit_code == 2
