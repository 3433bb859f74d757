# SPDX-License-Identifier: Apache-2.0
"""The device's folder: slots, state, and the one commit point."""
