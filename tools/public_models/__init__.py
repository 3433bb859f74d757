# SPDX-License-Identifier: Apache-2.0
"""Models of other people, from PyPI, around the whole circle."""
