# SPDX-License-Identifier: Apache-2.0
"""Run and round folders as the trainer writes them."""
