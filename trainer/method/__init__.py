# SPDX-License-Identifier: Apache-2.0
"""Deep Partial Updating itself: scores, selection, and the hooks around an optimizer.

Usable alone, around any training loop (Qu, Liu, Thiele, ECCV 2022).
"""
