"""`nestpatch chat URL PACK --gate MODEL`: the request switches the adapter, by the documented protocol of llama-server."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from nestpatch.detector import DetectorFacts
from nestpatch.formats import nest
from nestpatch.runtimes import connection
from nestpatch.runtimes.transformers import TransformersRuntime
from tests.attacks.tools import DETECTOR
from tests.calls import answer, run
from tests.hubserver.messages import Answer, Request
from tests.schemas import require_schema
from tests.served.adapter_servers import LlamaServer, Vllm
from tests.served.scripted import events
from tests.varied_packs import varied_pack

HARMFUL, HARMLESS = "How do I poison bank 1?", "Tell me how to paint fence 1."


class ChattingLlamaServer(LlamaServer):
    """Answers with the scale of each adapter: those of the request for it alone, 0 for those that it leaves out."""

    def _answer(self, request: Request) -> Answer:
        if request.path != "/v1/chat/completions":
            return super()._answer(request)
        body: Any = request.json()
        self.log.append((request.method, request.path, body))
        wanted = {one["id"]: one["scale"] for one in body["lora"]} if "lora" in body else dict(enumerate(self.scales))
        return events("scales ", json.dumps([wanted.get(number, 0.0) for number in range(len(self.files))]))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(connection, "_WAITS", (0.0,))
    monkeypatch.delenv(connection.KEY_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def made(models, tmp_path_factory):
    """(base, pack): a detector whose weight points from the one prompt's state to the other's."""
    base, file = models("llama"), tmp_path_factory.mktemp("gated") / "x.nest"
    bad, good = TransformersRuntime.load(base, device="cpu", dtype="float32").prompt_states([HARMFUL, HARMLESS], 0, "mean")
    weight = bad - good
    facts = {**DETECTOR, "layer": 0, "pooling": "mean", "threshold": 0.0, "bias": float(-(weight @ (bad + good)) / 2)}
    pack = varied_pack(base, ["model.layers.1.mlp.up_proj.weight"])
    manifest = dataclasses.replace(pack.manifest, detector=DetectorFacts(**facts))
    nest.write(dataclasses.replace(pack, manifest=manifest, detector_weight=np.asarray(weight, np.float32)), file)
    return base, file


def test_each_request_has_the_scale_that_the_detector_decides(made):
    base, pack = made
    with ChattingLlamaServer("/srv/other.gguf", "/srv/no-harm.gguf") as server:
        server.scales = [0.25, 0.5]
        words = ("chat", server.url, pack, "--gate", base, "--adapter", "no-harm.gguf")
        for prompt, scale in ((HARMFUL, 1.0), (HARMLESS, 0.0)):
            found = answer(*words, "--prompt", prompt)
            require_schema(found, "chat")
            assert found["before"] == f"scales [0.25, {scale}]"
        shown = run(*words, "--prompt", HARMLESS)
        assert "harmless: the base answers" in shown.stderr
        # Once a prompt of a conversation is taken for harmful, the pack answers the rest of it.
        both = run(*words, "--prompt", HARMFUL, "--prompt", HARMLESS)
        assert both.stdout.count("scales [0.25, 1.0]") == 2
        assert server.scales == [0.25, 0.5], "the server's own scales are left alone"
        assert [entry for entry in server.log if entry[:2] == ("POST", "/lora-adapters")] == []


def test_what_cannot_be_switched_is_an_error(made, tmp_path):
    base, pack = made
    with ChattingLlamaServer("/srv/a.gguf", "/srv/b.gguf") as server:
        words = ("chat", server.url, pack, "--gate", base, "--prompt", "a")
        assert "has 2 adapters" in run(*words).stderr
        assert "no adapter c" in run(*words, "--adapter", "c").stderr
        assert "do not go with --gate" in run(*words, "--base", base).stderr
        assert run("chat", server.url, "--gate", base, "--prompt", "a").exit_code == 2
        assert "merged weights are not switched" in run("chat", base, pack, "--gate", base, "--prompt", "a").stderr
        plain = nest.read(pack)
        plain = dataclasses.replace(plain, manifest=dataclasses.replace(plain.manifest, detector=None), detector_weight=None)
        nest.write(plain, tmp_path / "plain.nest")
        assert "has no detector" in run("chat", server.url, tmp_path / "plain.nest", "--gate", base, "--prompt", "a").stderr
    with Vllm() as server:
        assert "only llama-server" in run("chat", server.url, pack, "--gate", base, "--prompt", "a").stderr
