"""Models that others made: ONNX and safetensors files."""
