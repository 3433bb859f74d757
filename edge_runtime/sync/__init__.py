# SPDX-License-Identifier: Apache-2.0
"""The network side of a device: it fills the agent's folder, nothing else."""
