"""The bundled encoder: two ONNX files, a tokenizer and their configuration; see MODEL_CARD.md."""
