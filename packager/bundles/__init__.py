# SPDX-License-Identifier: Apache-2.0
"""What a new device is installed from, made from a round or from a model file."""
