# SPDX-License-Identifier: Apache-2.0
"""Round folders as the packager reads them."""
