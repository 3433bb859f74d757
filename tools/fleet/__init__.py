# SPDX-License-Identifier: Apache-2.0
"""A fleet that is simulated: real code for each distinct state, NumPy for the crowd."""
