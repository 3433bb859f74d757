# SPDX-License-Identifier: Apache-2.0
"""Weights with fewer mantissa bits: the same model, smaller patches.

The bits that are dropped are mostly noise, and noise does not compress. Rounding comes
before validation, so that accuracy, fingerprint and device are all of these weights.
"""

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.weights import Weights, pack_weights

FLOAT32_BITS = 23  # of a float32's mantissa, the leading 1 not counted


def round_weights(weights: Weights, base: Weights, bits: int) -> Weights:
    """Round every float32 value that differs from the base, compared as bits.

    To the nearest value with ``bits`` mantissa bits, ties to even, as IEEE 754 does it:
    7 bits are bfloat16's. A value beyond the largest one becomes infinite. Values that
    equal the base, infinities, NaN and other types stay as they are.

    Args:
        weights: What is to be deployed.
        base: What it started from, with the same tensors.
        bits: Mantissa bits to keep, 1 to 23.
    """
    if bits == FLOAT32_BITS:
        return weights
    arrays = {name: np.array(array) for name, array in weights.items()}
    types = {tensor.name: tensor.dtype for tensor in weights.layout.tensors}
    for name, array in arrays.items():
        if types[name] == "F32":
            changed = array.view("<u4") != base[name].view("<u4")
            changed &= np.isfinite(array)
            array[changed] = round_mantissa(array[changed], bits)
    return pack_weights(arrays, types)


def round_mantissa(values: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Round finite float32 values to ``bits`` mantissa bits, ties to even."""
    drop = FLOAT32_BITS - bits
    if not drop:
        return values
    word = values.view("<u4")
    # Adding just under half a unit, and the last bit that stays, carries where it must;
    # a carry out of the mantissa into the exponent is the next power of two: right too.
    odd = (word >> np.uint32(drop)) & np.uint32(1)
    word = word + (np.uint32((1 << (drop - 1)) - 1) + odd)
    rounded: NDArray[np.float32] = (word >> np.uint32(drop) << np.uint32(drop)).view(
        "<f4"
    )
    return rounded
