# SPDX-License-Identifier: Apache-2.0
"""Programs around the product; not part of the wheel."""
