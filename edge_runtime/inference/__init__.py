# SPDX-License-Identifier: Apache-2.0
"""From an input to an output: the graph, the weights, and what runs them."""
