# SPDX-License-Identifier: Apache-2.0
"""Programs that reproduce the paper's tables."""
