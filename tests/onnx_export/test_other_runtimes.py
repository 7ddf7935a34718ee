"""What serves the exports elsewhere: onnxruntime-genai and transformers.js give the same greedy tokens.

Both are looked for where they are usually installed (NODE_PATH for the latter); without them these tests are skipped.
"""

from __future__ import annotations

import json
import shutil
import subprocess

import numpy as np
import pytest

from nestpatch.export.adapters import export_onnx_adapter
from nestpatch.runtimes.onnx import OnnxRuntime
from tests.helpers import FUSED, tiny_pack

PROMPT = [5, 100, 77, 300, 12, 9, 30, 31, 32, 33, 34, 35, 36, 37]
"""Longer than the sliding window of the tiny models."""
NEW = 20
KINDS = [
    ("llama-tied", {}),
    ("gemma3", {}),
    ("mistral", {}),
    ("qwen3", {"dtype": "fp16"}),
    ("llama-tied", {"bits": 4}),
    ("phi3", {"adapter_ready": True}),
]
NODE = shutil.which("node")
ASK = """
const { AutoModelForCausalLM, AutoTokenizer, Tensor, env } = require('@huggingface/transformers');
env.allowRemoteModels = false;
env.localModelPath = '/';
(async () => {
  const [folder, count, ...prompt] = process.argv.slice(1);
  const row = (values) => new Tensor('int64', BigInt64Array.from(values), [1, prompt.length]);
  const options = { subfolder: '', local_files_only: true };
  const model = await AutoModelForCausalLM.from_pretrained(folder, options);
  const out = await model.generate({
    inputs: row(prompt.map(BigInt)), attention_mask: row(prompt.map(() => 1n)), max_new_tokens: Number(count), do_sample: false,
  });
  const tokenizer = await AutoTokenizer.from_pretrained(folder, { local_files_only: true });
  const chat = tokenizer.apply_chat_template([{ role: 'user', content: 'hi' }], { tokenize: false });
  console.log(JSON.stringify({ ids: Array.from(out.data).map(Number).slice(prompt.length), chat }));
})();
"""


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join([kind[0], *map(str, kind[1].values())]))
def export(request, exports):
    family, options = request.param
    return exports(family, **options)


def ours(folder, adapter=None):
    (answer,) = OnnxRuntime(folder, adapter, threads=1).greedy([PROMPT], NEW, {2})
    assert len(set(answer)) > 1 or folder.name == "gemma3"
    return answer


def genai(folder, adapter=None):
    """The tokens that onnxruntime-genai adds."""
    library = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = library.Model(str(folder))
    parameters = library.GeneratorParams(model)
    parameters.set_search_options(max_length=len(PROMPT) + NEW, do_sample=False)
    generator = library.Generator(model, parameters)
    if adapter is not None:
        adapters = library.Adapters(model)
        adapters.load(str(adapter), "nest")
        generator.set_active_adapter(adapters, "nest")
    generator.append_tokens(np.array(PROMPT, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return generator.get_sequence(0).tolist()[len(PROMPT) :]


def test_onnxruntime_genai_says_the_same(export):
    assert genai(export.path) == ours(export.path)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_onnxruntime_genai_takes_the_adapter(family, exports, sources, tmp_path):
    folder = exports(family, adapter_ready=True).path
    pack = tiny_pack(sources(family), scale=0.4, tensors=FUSED if family == "phi3" else None)
    file = export_onnx_adapter(pack, folder, tmp_path / "patch.onnx_adapter").output
    assert genai(folder, file) == ours(folder, file) != ours(folder)


def test_transformers_js_says_the_same(export, tokenizer):
    if NODE is None:
        pytest.skip("Node.js is not installed")
    found = subprocess.run(
        [NODE, "-e", "require.resolve('@huggingface/transformers')"], capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.skip("transformers.js is not installed where NODE_PATH says")
    done = subprocess.run(
        [NODE, "-e", ASK, str(export.path), str(NEW), *map(str, PROMPT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["ids"] == ours(export.path)
    assert said["chat"] == tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
