"""Models and packs in the formats that other programs load.

Public are the verbs and what they return:

- `gguf.export_gguf`: a GGUF file for llama.cpp.
- `safetensors.export_safetensors`: a release, whose files list the packs that they contain.
- `onnx.exporter.export_onnx`: a directory for onnxruntime, onnxruntime-genai and transformers.js.
- `adapters.export_lora`, `export_gguf_lora`, `export_onnx_adapter`: a pack as an adapter that is loaded beside the base.
- `results`: one value per verb.

Exporters of whole models take `(model, pack, output)`, exporters of adapters `(pack, output)`; every option is a keyword. Rows
are merged while they are read: a patched model never exists on disk except in its new format.
"""
