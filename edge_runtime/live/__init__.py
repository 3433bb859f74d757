# SPDX-License-Identifier: Apache-2.0
"""What running programs answer with: predictors that follow the store, and proofs."""
