# SPDX-License-Identifier: Apache-2.0
"""The command lines ``dpu-pack`` and ``dpu-patch``."""
