# SPDX-License-Identifier: Apache-2.0
"""How large a patch will be, for whoever has to stay below a limit.

A trainer with a budget is given this function; it need not know any more of packing.
"""

from collections.abc import Sequence

from edge_runtime.formats.subspace import Term
from edge_runtime.formats.weights import Weights
from packager.build import build_patch, header_for

_ANY_MODEL = "0" * 64  # the size does not depend on it


def patch_size(base: Weights, target: Weights, terms: Sequence[Term] = ()) -> int:
    """Return the bytes of the patch from ``base`` to ``target``, by packing it.

    Args:
        base: The weights that it leads from.
        target: The weights that it leads to.
        terms: The subspaces on the way, if there are any.

    Raises:
        WrongModelError: The weight files hold different tensors.
    """
    header = header_for(base, target, model=_ANY_MODEL, round_=0, counter=0)
    return len(build_patch(base, target, header, terms=terms))
