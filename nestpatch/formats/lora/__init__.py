"""Packs as adapters that other programs load beside a model: `peft` (PEFT, vLLM), `gguf` (llama.cpp), `onnx` (onnxruntime).

`factors` is what the LoRA formats share.
"""
