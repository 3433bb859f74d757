# SPDX-License-Identifier: Apache-2.0
"""The command lines ``dpu-pack``, ``dpu-patch`` and ``dpu-fleet``."""
