"""ONNX models as checkpoints, whatever tool wrote them.

`checkpoint` and `folder` are public. Inside: `_graph` and `_tensors` read the file, `_weights` lists its weights and how their
rows are stored, `_finder` matches them to a pack's names, `_layout` reads and writes rows, `_nbits` is a quantized type.
"""
