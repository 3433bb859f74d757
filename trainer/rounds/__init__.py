# SPDX-License-Identifier: Apache-2.0
"""Many rounds of one run: what each starts from, trains and deploys."""
