# SPDX-License-Identifier: Apache-2.0
import numpy as np
import onnx
import pytest

from tests.packager.anybody import arrays_of, make_model


@pytest.fixture
def old(tmp_path):
    """``old.onnx``."""
    onnx.save(make_model(), tmp_path / "old.onnx")
    return tmp_path / "old.onnx"


@pytest.fixture
def new(tmp_path):
    """``new.onnx``: two elements differ, written on another day, weights beside it."""
    arrays = arrays_of()
    arrays["w1"][2, 3] += 1
    arrays["slope"] = np.array(0.2, "f4")
    onnx.save(
        make_model(arrays, remark="another day"),
        tmp_path / "new.onnx",
        save_as_external_data=True,
        location="new.bin",
        size_threshold=60,  # the shape stays inside
    )
    return tmp_path / "new.onnx"
