"""What servers and folders may do to whoever reads them: take for ever, collect credentials, lead elsewhere."""

from __future__ import annotations

import base64
import os
import socket
from pathlib import Path

import pytest

from nestpatch.channels.follow import follow, pull
from nestpatch.channels.listing import CHANNEL_FILE
from nestpatch.channels.readers import FolderReader, HubReader, open_reader
from nestpatch.errors import DataError, HubAccessError, HubAnswerError, HubError, HubNotFoundError, HubUnavailableError
from nestpatch.hub import deadline
from nestpatch.hub.client import look_up, scrubbed, shown
from nestpatch.hub.deadline import Deadline
from nestpatch.signing.store import save_policy, trust_file
from tests.calls import answer, run
from tests.hub.calls import ledger_of
from tests.hub.scene import PATCH, REPO, Scene, refused, updated
from tests.hub.web import Web
from tests.hubserver import faults
from tests.hubserver.messages import Answer

SLOW = 0.1
"""Seconds between two bytes: each read is served well in time."""


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for a file of any size."""
    monkeypatch.setattr(deadline, "SETUP", 1.0)
    monkeypatch.setattr(deadline, "RATE", 1 << 40)


# Servers that take for ever


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("head", [False, True])
def test_a_channel_that_comes_byte_by_byte(scene: Scene, head: bool) -> None:
    scene.publish("1.1.0", 1)
    scene.hub.fault(CHANNEL_FILE, faults.trickled(SLOW, head=head))
    refused(scene, HubUnavailableError, r"cannot read http.*: it took longer than the allowed 1\.0 s")


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("head", [False, True])
def test_a_pack_that_comes_byte_by_byte(scene: Scene, head: bool) -> None:
    scene.publish("1.1.0", 1)
    scene.hub.fault(f"GET /{scene.entry(PATCH.format('1.1.0')).lfs}", faults.trickled(SLOW, head=head))
    refused(scene, HubUnavailableError, r"it took longer than the allowed 1\.0 s", remembered=False)


@pytest.mark.usefixtures("hurried")
def test_a_signature_that_comes_byte_by_byte(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    scene.hub.fault(r"packs/1\.1\.0/no-harm\.nest\.sig", faults.trickled(SLOW))
    refused(scene, HubUnavailableError, "it took longer than", remembered=False)


@pytest.mark.usefixtures("hurried")
def test_redirects_share_the_time_of_the_file(scene: Scene) -> None:
    """Each of four answers comes in time."""
    scene.hub.fault(CHANNEL_FILE, faults.redirected("/again"))
    scene.hub.fault("again", faults.redirected("/again"))
    scene.hub.fault("GET", faults.slow(0.6))
    refused(scene, HubUnavailableError, "it took longer than")


@pytest.mark.usefixtures("hurried")
def test_broken_answers_share_the_time_of_the_file(scene: Scene) -> None:
    scene.hub.fault(CHANNEL_FILE, faults.dropped())
    scene.hub.fault(CHANNEL_FILE, faults.slow(0.6))
    refused(scene, HubUnavailableError, "it took longer than")


def test_a_server_that_asks_to_be_waited_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day, or again and again a little."""
    scene.publish("1.1.0", 1)
    pack = f"GET /{scene.entry(PATCH.format('1.1.0')).lfs}"
    scene.hub.fault(pack, faults.status(503, Retry_After="86400"))
    refused(scene, HubUnavailableError, "asks for a pause of 86400 s; 60 s are left for pauses", remembered=False)
    scene.hub.faults.clear()
    monkeypatch.setattr(deadline, "MOST_WAITS", 1.5)
    scene.hub.fault(pack, faults.status(429, Retry_After="1"))
    refused(scene, HubUnavailableError, r"asks for a pause of 1 s; 0\.5 s are left for pauses")


@pytest.mark.usefixtures("hurried")
def test_a_hub_that_answers_byte_by_byte_which_commit_it_has(scene: Scene) -> None:
    scene.hub.fault("GET /api/models/", faults.trickled(SLOW))
    with pytest.raises(HubUnavailableError, match="it took longer than"):
        look_up(REPO, endpoint=scene.hub.url)


@pytest.mark.usefixtures("hurried")
def test_a_web_server_that_sends_byte_by_byte(scene: Scene, web: Web) -> None:
    updated(scene.model, scene.policy, [web.url])
    web.replaced[f"/{CHANNEL_FILE}"] = Answer(200, {}, b"{" * 1000, pace=SLOW)
    with pytest.raises(HubUnavailableError, match="it took longer than"):
        updated(scene.model, scene.policy)


def test_larger_files_have_more_time() -> None:
    assert Deadline(0).seconds == deadline.SETUP == 30
    assert Deadline(64_000_000).seconds == 1030
    assert Deadline(64_000_000, share=8).seconds == 8030


# Credentials


@pytest.fixture
def secret_web(scene: Scene, web: Web, monkeypatch: pytest.MonkeyPatch) -> Web:
    """A server that lets in nobody but me."""
    monkeypatch.setenv("NETRC", str(scene.folder / "netrc"))
    web.wants = "Basic " + base64.b64encode(b"me:hush hush").decode()
    return web


def everything_kept(scene: Scene) -> str:
    """All that lies beside the model and in the user's folder."""
    files = [*scene.model.rglob("*"), *trust_file().parent.rglob("*")]
    return "\n".join(file.read_bytes().decode("latin-1") for file in files if file.is_file() and file.suffix != ".safetensors")


def test_credentials_of_an_address_are_used_once_and_kept_nowhere(scene: Scene, secret_web: Web) -> None:
    save_policy(scene.policy)
    typed = secret_web.url.replace("//", "//me:hush%20hush@") + "/?token=t0psecret"
    done = answer("update", scene.model, "--channel", typed)
    assert (done["channels"][0]["state"], done["channels"][0]["address"]) == ("updated", secret_web.url)
    assert all(target.endswith("?token=t0psecret") for target in secret_web.targets)
    assert ledger_of(scene.model).follows == (secret_web.url,)
    kept = everything_kept(scene)
    assert secret_web.url in kept
    assert not any(word in kept for word in ("hush", "t0psecret", "me:"))

    # What follows it has none, and says where they come from.
    told = run("update", scene.model)
    assert (told.exit_code, told.stderr.startswith("HubAccessError: ")) == (1, True)
    assert "~/.netrc" in told.stderr
    for words in (
        ("update", scene.model, "--channel", typed.replace("hush%20hush", "wr0ng")),
        ("pull", typed.replace("hush", "x")),
    ):
        told = run(*words)
        assert told.exit_code == 1
        assert not any(word in told.stderr + told.stdout for word in ("wr0ng", "t0psecret", "me:", "hush"))


def test_a_login_comes_from_netrc(scene: Scene, secret_web: Web) -> None:
    (scene.folder / "netrc").write_text('default login you password all\nmachine 127.0.0.1 login me password "hush hush"\n')
    assert updated(scene.model, scene.policy, [secret_web.url])[0].state == "updated"
    (scene.folder / "netrc").write_text('default login me password "hush hush"\n')
    with pytest.raises(HubAccessError):
        updated(scene.model, scene.policy)
    assert secret_web.logins[-1] is None, "a default login is not for whatever host a ledger names"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pw@host/x?token=abc#d", "https://host/x"),
        ("https://me:p?w#@host:8443/x", "https://host:8443/x"),
        ("https://me:p@w@host/a@b", "https://host/a@b"),
        ("https://hf_abc@host", "https://host"),
        ("hub://acme/no-harm", "hub://acme/no-harm"),
        ("file:///srv/a%20b", "file:///srv/a%20b"),
    ],
)
def test_an_address_is_shown_without_what_may_be_secret(text: str, expected: str) -> None:
    assert shown(text) == expected
    assert scrubbed(f"it said '{text}' twice") == f"it said '{expected}' twice"


def test_signed_addresses_are_in_no_message(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    path = scene.entry(PATCH.format("1.1.0")).lfs
    said = "see https://me:pw@cdn.example/x?X-Amz-Signature=abc for why"
    for bend in (faults.status(403, X_Error_Message=said), faults.truncated(9), faults.dropped(), faults.status(404)):
        scene.hub.faults.clear()
        scene.hub.fault(f"GET /{path}", bend)
        with pytest.raises(HubError) as caught:
            scene.update()
        assert not any(word in f"{caught.value} {caught.value.advice}" for word in ("epoch=", "abc", "pw", "Signature"))


def test_an_endpoint_with_a_password_is_in_no_message(scene: Scene) -> None:
    endpoint = scene.hub.url.replace("//", "//me:pw123@")
    for bend in (faults.dropped(), faults.status(403), faults.status(400), faults.replayed(Answer(200, {}, b"x"))):
        scene.hub.faults.clear()
        scene.hub.fault("GET", bend)
        for act in (lambda: HubReader(REPO, endpoint).channel(), lambda: look_up(REPO, endpoint=endpoint)):
            with pytest.raises(HubError) as caught:
                act()
            assert "pw123" not in f"{caught.value} {caught.value.advice}"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("https://host/a\nb", "contains a control character"),
        ("https://host/a\x00b", "contains a control character"),
        ("https://host/a\u202eb", "contains a control character"),
        ("https://host/a\u2028b", "contains a control character"),
        ("file:///srv/a\x1b[2Jb", "contains a control character"),
        ("acme/no-harm\r", "contains a control character"),
        ("https://host/a b", "contains a space or a backslash"),
        ("https://host\\@other/x", "contains a space or a backslash"),
        ("https://host:0/x", "an invalid port"),
        ("https://host:99999/x", "an invalid port"),
        ("https://host:ssh/x", "an invalid port"),
        ("https://host:-1/x", "an invalid port"),
        ("https://[::1/x", "has no host"),
        ("https:///x", "has no host"),
        ("https://me:pw@/x", "has no host"),
        ("https://me:pw/pw@host/x", "an invalid port"),
        ("http://me:pw@patches.example/x?pw", "http://patches.example/x is not encrypted"),
        ("http://127.0.0.1@patches.example/x", "http://patches.example/x is not encrypted"),
        ("htps://me:pw@host/x?pw", "is not the address of a channel"),
        ("file://server/share", "names a folder of another machine"),
        ("file:////server/share", "names a folder of another machine"),
        ("//server/share", "names a folder of another machine"),
        ("file:///\\\\server\\share", "names a folder of another machine"),
    ],
)
def test_odd_addresses_are_refused_by_name(text: str, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        open_reader(text)
    assert "pw" not in f"{caught.value} {caught.value.advice}"
    assert str(caught.value).isprintable()


# Folders that somebody else has filled


@pytest.fixture
def pack_file(scene: Scene, shared: Path) -> Path:
    """A version that the model would go to next."""
    updated(scene.model, scene.policy, [shared.as_uri()])
    scene.publish("1.1.0", 1, shared.as_uri())
    return shared / PATCH.format("1.1.0")


def test_a_pipe_in_place_of_a_channel_is_refused_and_not_waited_for(shared: Path) -> None:
    (shared / CHANNEL_FILE).unlink()
    os.mkfifo(shared / CHANNEL_FILE)
    with pytest.raises(HubAnswerError, match=r"channel\.json: it is a pipe, not a file"):
        FolderReader(shared).channel()


def test_a_pipe_in_place_of_a_channel_does_not_hold_its_publisher(scene: Scene, shared: Path) -> None:
    (shared / CHANNEL_FILE).unlink()
    os.mkfifo(shared / CHANNEL_FILE)
    with pytest.raises(HubAnswerError, match=r"channel\.json: it is a pipe, not a file"):
        scene.publish("1.1.0", 1, shared.as_uri())


def test_a_pipe_in_place_of_a_pack_is_refused_and_not_waited_for(scene: Scene, pack_file: Path) -> None:
    pack_file.unlink()
    os.mkfifo(pack_file)
    before = scene.state()
    with pytest.raises(HubAnswerError, match=r"no-harm\.nest: it is a pipe, not a file"):
        updated(scene.model, scene.policy)
    assert scene.state() == before


def test_a_directory_and_a_socket_in_place_of_a_channel(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shared / CHANNEL_FILE).unlink()
    (shared / CHANNEL_FILE).mkdir()
    with pytest.raises(HubAnswerError, match="it is a directory, not a file"):
        FolderReader(shared).channel()
    (shared / CHANNEL_FILE).rmdir()
    monkeypatch.chdir(shared)  # the names of sockets are short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(CHANNEL_FILE)
        with pytest.raises(HubAnswerError, match="it is a socket, not a file"):
            FolderReader(shared).channel()


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", "/etc/passwd", "../elsewhere.json"])
def test_links_out_of_the_folder_are_refused(scene: Scene, shared: Path, target: str) -> None:
    (shared.parent / "elsewhere.json").write_bytes((shared / CHANNEL_FILE).read_bytes())
    (shared / CHANNEL_FILE).unlink()
    (shared / CHANNEL_FILE).symlink_to(target)
    with pytest.raises(HubAnswerError, match=r"channel\.json is a link to .*, which is outside of the channel's folder"):
        follow(FolderReader(shared), scene.policy)


def test_a_folder_of_packs_that_is_a_link_elsewhere(scene: Scene, pack_file: Path, tmp_path: Path) -> None:
    """Also where the file at the end is the right one."""
    pack_file.parent.rename(tmp_path / "elsewhere")
    pack_file.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HubAnswerError, match=r"is a link to .*elsewhere"):
        updated(scene.model, scene.policy)


def test_links_within_the_folder_and_to_it_are_followed(scene: Scene, shared: Path, tmp_path: Path) -> None:
    (shared / CHANNEL_FILE).rename(shared / "current.json")
    (shared / CHANNEL_FILE).symlink_to("current.json")
    (tmp_path / "link").symlink_to(shared)
    assert follow(FolderReader(tmp_path / "link"), scene.policy).accepted.channel.serial == 1


@pytest.mark.parametrize("place", ["file:///dev/zero", "file:///dev/stdin", "file:///dev", "file:///proc/self/fd"])
def test_devices_are_no_folders(place: str, scene: Scene) -> None:
    with pytest.raises((HubNotFoundError, HubUnavailableError, HubAnswerError)):
        pull(place, policy=scene.policy)
