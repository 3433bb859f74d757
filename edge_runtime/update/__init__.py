# SPDX-License-Identifier: Apache-2.0
"""One update from patch to commit: admission, trial, hooks, rollback."""
