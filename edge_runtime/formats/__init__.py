# SPDX-License-Identifier: Apache-2.0
"""Bytes to values and back: an attacker's bytes end here.

Every file format of the device: weight files, patches, bundles, contracts, init
recipes. It knows nothing of a store, of inference or of the command line.
"""
