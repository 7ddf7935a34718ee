"""The same bundles as the model_signing tool: ours pass there, theirs pass here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as s

from nestpatch.errors import BadSignatureError
from nestpatch.signing import envelopes, keys
from nestpatch.signing.keys import PrivateKey
from nestpatch.signing.verify import VerifiedPack, sign_pack, verify_signature
from tests.signing.conftest import People, spoil

GOLDEN = Path(__file__).parent / "golden"
CONTENT = bytes(range(256)) * 4
TOOL = shutil.which("model_signing", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
needs_tool = pytest.mark.skipif(TOOL is None, reason="the model_signing tool is not installed: pip install 'nestpatch[sign]'")


def tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs the real tool. Signing and verifying with keys, it asks nobody."""
    return subprocess.run([str(TOOL), *map(str, arguments)], capture_output=True, text=True, check=False)


def on_disk(key: PrivateKey, folder: Path) -> tuple[Path, Path]:
    """(private, public) key files."""
    (folder / "k.key").write_bytes(key.pem(None))
    (folder / "k.pub").write_text(key.public.pem, encoding="ascii")
    return folder / "k.key", folder / "k.pub"


def test_a_bundle_that_the_tool_made() -> None:
    """Made once by model_signing 1.1.1; its private key is gone."""
    found = envelopes.Bundle.parse((GOLDEN / "content.sig").read_bytes(), "content.sig")
    digest, key = sha256(CONTENT).hexdigest(), keys.PublicKey.read(GOLDEN / "tool.pub")
    found.check(digest, "content", key)
    with pytest.raises(BadSignatureError):
        found.check(sha256(CONTENT + b"x").hexdigest(), "content", None)
    with pytest.raises(BadSignatureError):
        found.check(digest, "content", keys.PrivateKey.generate().public)


@needs_tool
def test_the_tool_accepts_ours(pack: Path, people: People, tmp_path: Path) -> None:
    _, public = on_disk(people.acme, tmp_path)
    signature = sign_pack(pack, people.acme).file
    check = ["verify", "key", pack, "--signature", signature, "--public_key", public]
    done = tool(*check)
    assert done.returncode == 0, done.stderr
    assert "Verification succeeded" in done.stdout + done.stderr
    spoil(pack)
    assert tool(*check).returncode != 0
    _, other = on_disk(people.evil, tmp_path)
    assert tool(*check[:-1], other).returncode != 0


@needs_tool
@pytest.mark.parametrize("form", [s.PrivateFormat.PKCS8, s.PrivateFormat.TraditionalOpenSSL])
def test_we_accept_the_tools(pack: Path, people: People, tmp_path: Path, form: s.PrivateFormat) -> None:
    private, _ = on_disk(people.acme, tmp_path)
    private.write_bytes(people.acme._key.private_bytes(s.Encoding.PEM, form, s.NoEncryption()))
    done = tool("sign", "key", pack, "--private_key", private, "--signature", f"{pack}.sig")
    assert done.returncode == 0, done.stderr
    found = verify_signature(pack, people.policy("acme"))
    assert isinstance(found, VerifiedPack)
    assert [signer.name for signer in found.signers] == ["acme"]
    spoil(pack)
    with pytest.raises(BadSignatureError):
        verify_signature(pack, people.policy("acme"))
