"""transformers models as ONNX graphs. Imports torch."""
