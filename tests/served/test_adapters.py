"""`nestpatch adapter`: packs in running servers, which speak the documented protocols (adapter_servers.py).

tests/nest_train/test_served.py uses llama-server itself, where it is on the PATH.
"""

from __future__ import annotations

import json
import shutil

import pytest

from nestpatch.formats import nest
from nestpatch.runtimes import connection
from tests.calls import answer, refused, run
from tests.export.families import make
from tests.helpers import tiny_pack
from tests.schemas import require_schema
from tests.served.adapter_servers import LlamaServer, Vllm
from tests.served.scripted import Chat


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(connection, "_WAITS", (0.0,))
    monkeypatch.delenv(connection.KEY_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a base and a pack for it."""
    folder = tmp_path_factory.mktemp("adapters")
    base = make("llama3", folder / "base")
    nest.write(tiny_pack(base), folder / "no-harm-1.0.0.nest")
    return folder


@pytest.fixture
def pack(made, tmp_path):
    return shutil.copy(made / "no-harm-1.0.0.nest", tmp_path / "no-harm-1.0.0.nest")


def test_llama_server_is_started_with_the_file_and_then_its_scale_is_set(made, pack, tmp_path):
    file = tmp_path / "lora.gguf"
    with LlamaServer("/srv/other.gguf") as server:
        words = ("adapter", "load", server.url, pack, "-o", file, "--base", made / "base")
        found = answer(*words, code=1)
        require_schema(found, "adapter load")
        assert (found["adapter"], found["start"]) == (None, f"llama-server -m BASE.gguf --lora {file}")
        assert file.is_file()
        assert [entry for entry in server.log if entry[0] == "POST"] == []
        assert f"--lora {file}" in run(*words).stdout
        # The server was started again, with the file and with another adapter at a scale of its own.
        server.files, server.scales = ["/srv/other.gguf", f"/elsewhere/{file.name}"], [0.25, 0.0]
        elsewhere = f"/elsewhere/{file.name}"
        error = answer(*words, "--strength", "0.5", code=2)["error"]
        assert f"from {elsewhere}, and none from {file}" in error["message"]
        assert f"--server-path {elsewhere}" in error["advice"]
        assert server.scales == [0.25, 0.0]
        found = answer(*words, "--strength", "0.5", "--server-path", elsewhere)
        require_schema(found, "adapter load")
        assert found["adapter"] == {"id": "1", "path": f"/elsewhere/{file.name}", "scale": 0.5}
        assert server.scales == [0.25, 0.5]
        answer("adapter", "scale", server.url, "lora.gguf", "1.25")
        assert server.scales == [0.25, 1.25]
        found = answer("adapter", "unload", server.url, "1")
        require_schema(found, "adapter unload")
        assert server.scales == [0.25, 0.0]
        found = answer("adapter", "list", server.url)
        require_schema(found, "adapter list")
        assert [one["scale"] for one in found["adapters"]] == [0.25, 0.0]
        assert "no adapter lora-2" in run("adapter", "scale", server.url, "lora-2", "1").stderr
        server.files, server.scales = [str(file), str(file)], [0.0, 0.0]
        assert f"has 2 adapters from {file}" in answer(*words, code=2)["error"]["message"]
        assert server.scales == [0.0, 0.0]


def test_vllm_loads_and_drops_while_it_runs(pack, tmp_path):
    with Vllm() as server:
        words = ("adapter", "load", server.url, pack, "-o", tmp_path / "lora", "--strength", "0.5")
        found = answer(*words)
        require_schema(found, "adapter load")
        name = found["adapter"]["id"]
        assert server.adapters == {name: str(tmp_path / "lora")}
        assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
        asked = len(server.log)
        assert answer(*words) == found, "what is loaded is not loaded again"
        assert all(method == "GET" for method, _, _ in server.log[asked:])
        assert "has an adapter" in run("adapter", "load", server.url, pack, "-o", tmp_path / "lora-2").stderr
        assert [one["id"] for one in answer("adapter", "list", server.url)["adapters"]] == [name]
        assert "vLLM has no scales" in run("adapter", "scale", server.url, name, "0.5").stderr
        answer("adapter", "unload", server.url, name)
        assert server.adapters == {}
        assert "no adapter" in run("adapter", "unload", server.url, name).stderr
        answer("adapter", "load", server.url, pack, "-o", tmp_path / "lora", "--strength=0.5", "--name=safe")
        assert list(server.adapters) == ["safe"]


def test_a_server_that_may_not_change_says_how_it_is_started(pack, tmp_path):
    with Vllm(updates=False) as server:
        text = refused("EndpointAnswerError", "adapter", "load", server.url, pack, "-o", tmp_path / "lora")
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in text
    with Vllm() as server:
        words = ("adapter", "load", server.url, pack, "-o", tmp_path / "lora", "--server-path", "/nowhere/lora")
        assert "No adapter found for /nowhere/lora" in refused("EndpointAnswerError", *words)


def test_another_file_at_the_output_is_not_loaded(pack, tmp_path):
    (tmp_path / "lora.gguf").write_bytes(b"another adapter")
    with LlamaServer(str(tmp_path / "lora.gguf")) as server:
        refused("OutputError", "adapter", "load", server.url, pack, "-o", tmp_path / "lora.gguf")
        assert server.scales == [1.0]
        assert all(method == "GET" for method, _, _ in server.log)


def test_an_altered_pack_and_another_base_are_not_loaded(made, pack, tmp_path):
    other = make("llama3", tmp_path / "other")
    for file in other.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        header = 8 + int.from_bytes(data[:8], "little")
        data[header:] = bytes(len(data) - header)
        file.write_bytes(data)
    with Vllm() as server:
        refused("BaseMismatchError", "adapter", "load", server.url, pack, "-o", tmp_path / "lora", "--base", other)
        broken = tmp_path / "broken.nest"
        broken.write_bytes(b"x" * 100)
        refused("PackFormatError", "adapter", "load", server.url, broken, "-o", tmp_path / "lora")
        assert server.adapters == {}
        assert not (tmp_path / "lora").exists()


def test_other_servers_are_named_with_a_way_out(pack, tmp_path):
    with Chat("tiny") as server:
        found = answer("adapter", "list", server.url, code=2)["error"]
        assert "neither llama-server nor vLLM" in found["message"]
        assert "--server llama-server or vllm" in found["advice"]
        refused("EndpointAnswerError", "adapter", "list", server.url, "--server", "llama-server")
    assert "is not the address of a server" in run("adapter", "list", "localhost").stderr
