# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a device, and what to do about it."""
