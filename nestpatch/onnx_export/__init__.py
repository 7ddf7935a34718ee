"""transformers models to ONNX graphs that can be served. Imports torch, as nest_train does."""
