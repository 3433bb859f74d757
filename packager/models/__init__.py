# SPDX-License-Identifier: Apache-2.0
"""Models that others made: ONNX, safetensors and PyTorch files."""
