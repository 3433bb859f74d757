# SPDX-License-Identifier: Apache-2.0
"""Updates without a person: look at a folder, decide, apply, report."""
