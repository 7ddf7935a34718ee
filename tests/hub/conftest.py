"""A running Hub, machines that use it, and a way to reach it from the test's own process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nestpatch.hub import retry
from nestpatch.patcher.inplace import revert
from tests.helpers import tiny_checkpoint
from tests.hub.scene import REPO, Scene, new_scene
from tests.hub.web import Web
from tests.hubserver.accounts import READER, WRITER
from tests.hubserver.machine import Machine
from tests.hubserver.server import Hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub with nothing in it."""
    if shutil.which("git") is None:
        pytest.skip("the local Hub keeps its repositories in git, which is not installed")
    server = Hub(tmp_path / "hub")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def machine(hub: Hub, tmp_path: Path) -> Callable[..., Machine]:
    """Makes machines: `machine("a", token=..., HF_HUB_OFFLINE="1")`."""

    def make(name: str = "fleet", *, token: str | None = READER, **more: str) -> Machine:
        return Machine(tmp_path / name, hub.url, token, more)

    return make


@pytest.fixture
def publisher(machine: Callable[..., Machine]) -> Machine:
    """The machine of somebody who may write to acme/*."""
    return machine("publisher", token=WRITER)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Lets this process talk to the Hub, with a home of its own: the other tests run with HF_HUB_OFFLINE=1."""
    from huggingface_hub import close_session, constants

    home = tmp_path / "here"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    yield
    close_session()


@pytest.fixture
def scene(hub: Hub, online: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Scene:
    """A channel with version 1.0.0 and a model that has it from there; faults are not waited for."""
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    (tmp_path / "user").mkdir()
    monkeypatch.setenv("NESTPATCH_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(retry, "WAITS", (0.0, 0.0))
    made = new_scene(hub, tmp_path, tiny_checkpoint(tmp_path / "model"))
    made.publish("1.0.0")
    made.update(channels=[REPO])
    return made


@pytest.fixture
def shared(scene: Scene, tmp_path: Path) -> Path:
    """A folder that a channel was pushed into; the scene's model starts from its base."""
    revert(scene.model)
    scene.push(scene.pack("1.0.0"), f"file://{tmp_path / 'shared'}")
    return tmp_path / "shared"


@pytest.fixture
def web(shared: Path) -> Iterator[Web]:
    server = Web(shared)
    server.listener.start()
    yield server
    server.listener.stop()
