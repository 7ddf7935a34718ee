"""Models of transformers as ONNX graphs: `exporter.export_onnx` is public. Imports torch, on first use."""
