# SPDX-License-Identifier: Apache-2.0
"""From a torch module to a graph, weights and init recipe that a device can run."""
