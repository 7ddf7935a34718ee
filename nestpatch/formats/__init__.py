"""What is on disk: one reader and one writer for each format.

`checkpoint` is the protocol of all model formats, `opening` opens any of them: `safetensors`, `gguf`, `onnx`. `nest` is the
format of packs, `lora` writes packs as adapters. `provenance` is what exported files record about their packs, `protobuf` the
wire format of ONNX and sentencepiece files.
"""
