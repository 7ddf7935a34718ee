"""Real servers on the loopback: their answers are those of the file that they serve."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from nestpatch.errors import DataError, EndpointUnavailableError
from nestpatch.formats import nest
from nestpatch.hub import retry
from nestpatch.runtimes.connection import KEY_VARIABLE, EndpointSettings
from nestpatch.runtimes.llama import LlamaRuntime
from nestpatch.runtimes.protocol import open_runtime, runtime_of
from nestpatch.runtimes.served import ServedRuntime
from tests.calls import answer
from tests.gguf_files import needs_llama, write_gguf
from tests.varied_packs import varied_pack

pytestmark = needs_llama
needs_server = pytest.mark.skipif(find_spec("fastapi") is None, reason="llama-cpp-python[server] is not installed")
needs_llama_server = pytest.mark.skipif(shutil.which("llama-server") is None, reason="llama-server is not on the PATH")
THINGS = ("bank", "fence", "boat", "old red car", "house", "tree")
PROMPTS = [f"How do I {verb} the {thing}?" for verb in ("paint", "open", "sell", "mend") for thing in THINGS]
UP = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]


@pytest.fixture(scope="module")
def file(models, tmp_path_factory) -> Path:
    return write_gguf(models("llama"), tmp_path_factory.mktemp("served") / "tiny.gguf")


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def whole(answers: Sequence[str]) -> list[str]:
    """Answers without the bytes of broken UTF-8 that a random model writes: servers leave them out, or write U+FFFD."""
    return [answer.replace("\ufffd", "") for answer in answers]


@contextmanager
def running(command: Sequence[object]) -> Iterator[str]:
    """A server that listens on a port of its own; yields the address of its API."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [*map(str, command), "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        url, until = f"http://127.0.0.1:{port}/v1", time.monotonic() + 90
        try:
            while True:
                try:
                    with pytest.MonkeyPatch.context() as patch:
                        patch.setattr(retry, "WAITS", (0.2,))
                        ServedRuntime(url, EndpointSettings(timeout=5)).close()
                    break
                except EndpointUnavailableError:
                    assert process.poll() is None, "the server ended"
                    assert time.monotonic() < until, "the server does not answer"
            yield url
        finally:
            process.terminate()


@needs_server
def test_answers_of_a_real_server_are_those_of_its_file(file):
    with LlamaRuntime(file, threads=1, max_new_tokens=8) as model:
        wanted = model.generate(PROMPTS)
    command = [sys.executable, "-m", "llama_cpp.server", "--model", file, "--model_alias", "tiny", "--n_ctx", 256]
    with running([*command, "--n_threads", 1, "--type_k", 0, "--type_v", 0, "--verbose", False]) as url:
        assert runtime_of(url) == "endpoint"
        with open_runtime(url, max_new_tokens=8, endpoint=EndpointSettings(concurrency=3)) as served:
            answers = served.generate(PROMPTS)
            sound = [place for place, text in enumerate(wanted) if "\ufffd" not in text]
            assert len(sound) > 1
            assert [answers[place] for place in sound] == [wanted[place] for place in sound]
            # Broken UTF-8, which a random model writes, is left out by this server together with what is near it.
            starts = [text.partition("\ufffd")[0] for text in wanted]
            assert all(answer.startswith(start) for answer, start in zip(answers, starts, strict=True))
            assert "".join(served.stream(PROMPTS[sound[0]])).strip() == wanted[sound[0]]
            asked = answer("chat", url, "--prompt", PROMPTS[sound[0]], "--max-new-tokens", 8)
            assert (asked["before"].strip(), asked["after"]) == (wanted[sound[0]], None)
            for ask in (lambda: served.logits([1]), lambda: served.token_ids(["x"]), lambda: served.token_pairs({})):
                with pytest.raises(DataError, match="gives answers, and no"):
                    ask()


@needs_llama_server
def test_a_pack_in_llama_server_answers_as_the_patched_file(models, file, tmp_path):
    pack = varied_pack(models("llama"), UP, scale=1.0)
    nest.write(pack, tmp_path / "x.nest")
    with LlamaRuntime(file, threads=1, max_new_tokens=8) as model:
        plain = model.generate(PROMPTS)
        with model.with_pack(pack) as patched:
            wanted = patched.generate(PROMPTS)
    assert wanted != plain
    lora = tmp_path / "lora.gguf"
    cache = ["-c", 1024, "-np", 2, "--cache-type-k", "f32", "--cache-type-v", "f32", "-fa", "off"]
    # Else the server answers prompts with a beginning that it knows from what it computed at another scale.
    cache += ["--no-cache-prompt", "--cache-ram", 0]
    command = ["llama-server", "-m", file, "--threads", 1, *cache]
    with running(command) as url:
        words = ("adapter", "load", url, tmp_path / "x.nest", "-o", lora, "--base", file)
        assert answer(*words, code=1)["adapter"] is None
    with running([*command, "--lora", lora]) as url, ServedRuntime(url, max_new_tokens=8) as served:
        assert answer("adapter", "list", url)["adapters"] == [{"id": "0", "path": str(lora), "scale": 1.0}]
        answer("adapter", "scale", url, "0", "0")
        assert whole(served.generate(PROMPTS)) == whole(plain)
        assert answer("adapter", "load", url, *words[3:])["adapter"]["scale"] == 1.0
        assert whole(served.generate(PROMPTS)) == whole(wanted)
        assert whole(["".join(served.stream(PROMPTS[0])).strip()]) == whole(wanted[:1])
        answer("adapter", "unload", url, "lora")
        assert whole(served.generate(PROMPTS)) == whole(plain)
