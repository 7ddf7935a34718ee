"""Small files are asked for with the standard library or with huggingface_hub: both ways give the same answers and errors."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from threading import Thread

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from huggingface_hub import constants, get_token

from nestpatch.channels.follow import fetch_pack
from nestpatch.channels.listing import CHANNEL_FILE
from nestpatch.channels.readers import HubReader
from nestpatch.errors import HubError, HubUnavailableError
from nestpatch.hub import _plain, _requests, fetch
from nestpatch.hub.client import token
from nestpatch.hub.fetch import Request
from nestpatch.signing.store import save_policy
from tests.hub.scene import REPO, Scene
from tests.hubserver import faults
from tests.hubserver.machine import Machine
from tests.hubserver.messages import Answer

COMMIT = {"X-Repo-Commit": "5" * 40}
BENDS = {
    # What is wrong -> how the Hub's answer is bent, the error
    "nothing": (None, ""),
    "another commit": (lambda: faults.replayed(Answer(200, COMMIT, b"{}")), ""),
    "no file": (lambda: faults.status(404, X_Error_Code="EntryNotFound"), "HubNotFoundError"),
    "no repository": (lambda: faults.status(401, X_Error_Code="RepoNotFound"), "HubNotFoundError"),
    "gated": (lambda: faults.status(403, X_Error_Code="GatedRepo"), "HubAccessError"),
    "bad token": (lambda: faults.status(401, X_Error_Message="Invalid credentials in Authorization header"), "HubAccessError"),
    "bad request": (lambda: faults.status(400), "HubAnswerError"),
    "a teapot": (lambda: faults.status(418), "HubAnswerError"),
    "no content": (lambda: faults.replayed(Answer(204, COMMIT, b"")), "HubAnswerError"),
    "in trouble": (lambda: faults.status(503), "HubUnavailableError"),
    "too many": (lambda: faults.status(429, Retry_After="0"), "HubUnavailableError"),
    "cut": (lambda: faults.truncated(9), "HubUnavailableError"),
    "dropped": (faults.dropped, "HubUnavailableError"),
    "too long": (lambda: faults.replayed(Answer(200, COMMIT, b" " * ((1 << 20) + 1))), "HubAnswerError"),
    "elsewhere": (lambda: faults.redirected("http://example.org/x"), "HubAnswerError"),
    "a circle": (lambda: faults.redirected(f"/{REPO}/resolve/main/{CHANNEL_FILE}"), "HubAnswerError"),
    "no commit": (lambda: faults.replayed(Answer(200, {}, b"{}")), "HubAnswerError"),
    "compressed": (lambda: faults.status(404, Content_Encoding="gzip"), "HubAnswerError"),
}


@pytest.fixture(params=["standard library", "huggingface_hub"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A proxy is set for other hosts, so that the library is needed."""
    if request.param == "huggingface_hub":
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    return str(request.param)


def outcome(scene: Scene) -> tuple[str, str, bytes | None]:
    """The error and its words, or the commit and the file."""
    try:
        found = HubReader(REPO, scene.hub.url).channel()
    except HubError as error:
        return type(error).__name__, f"{error} {error.advice}", None
    return "", found.revision, found.data


def test_both_ways_see_the_same(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (bend, error) in BENDS.items():
        seen = []
        for proxy in ("", "http://127.0.0.1:9"):
            monkeypatch.setenv("HTTPS_PROXY", proxy)
            scene.hub.faults.clear()
            scene.hub.log.clear()
            if bend is not None:
                scene.hub.fault(CHANNEL_FILE, bend())
            seen.append((*outcome(scene), len(scene.hub.log)))
        assert seen[0][0] == seen[1][0] == error, name
        assert seen[0][2:] == seen[1][2:], name
        if name not in ("cut", "dropped", "compressed"):  # each library has its own words for these
            assert seen[0][1] == seen[1][1], name
        assert "\x1b" not in seen[0][1]


def test_which_way_is_taken(scene: Scene, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("get", "_by_library"):
        monkeypatch.setattr(_requests, name, noting(taken, name, getattr(_requests, name)))
    assert outcome(scene)[0] == ""
    assert taken == (["get"] if way == "standard library" else ["_by_library"])


def test_a_pack_comes_whole_from_the_cdn_without_the_token(scene: Scene, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.publish("3.0.0", seed=3)
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    taken: list[str] = []
    monkeypatch.setattr(_requests, "_by_library", noting(taken, "library", _requests._by_library))
    asked = len(scene.hub.seen())
    done = fetch_pack(f"{REPO}@3.0.0", scene.policy)
    assert done.data == scene.pack("3.0.0", seed=3).read_bytes()
    assert bool(taken) == (way == "huggingface_hub")
    new = scene.hub.seen()[asked:]
    assert {one.token for one in new if one.place == "hub"} == {"hf_reader"}
    assert [one.token for one in new if one.place == "cdn"] == [None]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bend", ["cut", "dropped", "in trouble"])
def test_a_pack_is_asked_for_again(scene: Scene, bend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer of the CDN is bad."""
    monkeypatch.setattr("nestpatch.hub.retry.WAITS", (0.01,))
    scene.publish("3.0.0", seed=3)
    bent, _ = BENDS[bend]
    assert bent is not None
    scene.hub.fault(r"GET /[0-9a-f]{64}\?", bent(), times=1)
    assert fetch_pack(f"{REPO}@3.0.0", scene.policy).data == scene.pack("3.0.0", seed=3).read_bytes()


def noting(taken: list[str], name: str, function: Callable[..., object]) -> Callable[..., object]:
    def noted(*arguments: object, **options: object) -> object:
        taken.append(name)
        return function(*arguments, **options)

    return noted


@pytest.mark.parametrize(
    ("url", "headers", "expected"),
    [
        ("https://host/x?y=1", {"A": "b c"}, True),
        ("https://me:pw@host/x", {}, False),
        ("https://h\u00f6st/x", {}, False),
        ("https://host/a b", {}, False),
        ("https://host/x", {"A": "b\r\nC: d"}, False),
        ("https://host/x", {"A": "\u20ac"}, False),
    ],
)
@pytest.mark.usefixtures("online")
def test_what_the_standard_library_is_used_for(url: str, headers: dict[str, str], expected: bool) -> None:
    assert _plain.suits(url, headers) is expected


@pytest.mark.usefixtures("online")
def test_a_proxy_and_being_offline_need_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTPS_PROXY", "all_proxy"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "http://proxy:3128")
            assert not _plain.suits("https://host/x", {})
    assert _plain.suits("https://host/x", {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not _plain.suits("https://host/x", {})
    with pytest.raises(HubUnavailableError, match="HF_HUB_OFFLINE is set"):
        HubReader(REPO, "http://127.0.0.1:9").channel()


def test_a_header_that_is_there_twice_passes_for_neither(scene: Scene) -> None:
    class Twice(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            for commit in ("5" * 40, "6" * 40):
                self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Twice)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(HubError, match="names no commit"):
            HubReader(REPO, f"http://127.0.0.1:{server.server_port}").channel()
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.usefixtures("online")
def test_the_token_is_that_of_huggingface_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = Path(constants.HF_TOKEN_PATH)
    file.parent.mkdir(parents=True)
    for environment in (
        {},
        {"HF_TOKEN": " hf_a\n"},
        {"HUGGING_FACE_HUB_TOKEN": "hf_b"},
        {"HF_TOKEN": "", "HUGGING_FACE_HUB_TOKEN": ""},
    ):
        for stored in (None, "hf_c\n"):
            with monkeypatch.context() as patch:
                for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
                    patch.delenv(name, raising=False)
                for name, value in environment.items():
                    patch.setenv(name, value)
                file.unlink(missing_ok=True)
                if stored:
                    file.write_text(stored)
                assert token() == get_token(), (environment, stored)
    monkeypatch.setenv("HF_TOKEN", "hf_a")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert token() is None


# TLS


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server on loopback, and its certificate, which no authority has signed."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "here")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path / "here.pem"
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "both.pem").write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    class Hello(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hello)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://127.0.0.1:{server.server_port}/x", file
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("online")
def test_certificates_are_checked(secure: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    url, certificate = secure
    monkeypatch.setattr("nestpatch.hub.retry.WAITS", ())
    assert _plain.get(url, {}, 9, 5, lambda: None) is None, "left to the library, which may know the authority"
    with pytest.raises(HubUnavailableError, match="certificate"):
        fetch.fetch(Request(url, url, 9, {}))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    reply = _plain.get(url, {}, 9, 5, lambda: None)
    assert reply is not None
    assert reply.data == fetch.fetch(Request(url, url, 9, {})).data == b"hello"
    elsewhere = url.replace("127.0.0.1", "localhost")
    assert _plain.get(elsewhere, {}, 9, 5, lambda: None) is None, "the certificate of another host"


# What it is for


@pytest.mark.parametrize("new", [False, True])
def test_an_update_imports_no_http_library(scene: Scene, machine: Callable[..., Machine], new: bool) -> None:
    """Half of the time of an update that finds nothing new would be these imports, and a third of its memory."""
    save_policy(scene.policy)
    if new:
        scene.publish("3.0.0", seed=3)
    fleet = machine(NESTPATCH_HOME=str(scene.folder / "user"))
    done = fleet.start("-X", "importtime", "-m", "nestpatch", "update", str(scene.model), "--quiet", "--json")
    assert done.returncode == 0, done.stderr
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert {"nestpatch.patcher.update", "numpy", "http.client"} <= names
    assert ('"updated"' in done.stdout) == new
    heavy = {
        "httpx",
        "httpx2",
        "httpcore",
        "httpcore2",
        "requests",
        "yaml",
        "rich",
        "filelock",
        "numpy.random",
        "numpy.ma",
        "jsonschema",
    }
    assert not names & heavy
    assert not {name for name in names if name.startswith("huggingface_hub.") and name != "huggingface_hub.constants"}
