# SPDX-License-Identifier: Apache-2.0
"""What a patch or a run holds, as data, text and pages."""
