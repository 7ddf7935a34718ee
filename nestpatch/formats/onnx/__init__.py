"""ONNX models as checkpoints: where their weights lie, whatever tool wrote them."""
