# SPDX-License-Identifier: Apache-2.0
"""Debian packages of the device's runtime, and what proves that they install."""
