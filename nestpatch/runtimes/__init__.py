"""Loaded models behind one protocol: transformers, llama.cpp and onnxruntime.

`protocol.open_runtime` is the way in. `transformers` and `weights` also serve training and export, which need the
PyTorch model itself.
"""
