"""ONNX models as checkpoints, whatever tool wrote them.

`checkpoint`, `folder` and `graph` are public. Inside: `_tensors` reads where a graph's data is, `_weights` lists its weights
and how their rows are stored, `_finder` matches them to a pack's names, `_layout` reads and writes rows, `_nbits` quantizes.
"""
