# SPDX-License-Identifier: Apache-2.0
"""Recipes: the TOML files that say what is trained and how."""
