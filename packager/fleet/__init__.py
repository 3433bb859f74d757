# SPDX-License-Identifier: Apache-2.0
"""Releases of a run in a place that any number of devices read: ``dpu-fleet``."""
