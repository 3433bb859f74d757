# SPDX-License-Identifier: Apache-2.0
"""Models that others made: ONNX and safetensors files."""
