"""Checkpoints of others in, ours out: Hugging Face, Google's TensorFlow 1, StableHLO, ONNX."""
