# SPDX-License-Identifier: Apache-2.0
import numpy as np
import onnx
from onnx import TensorProto, helper

from packager.cli.pack import pack
from tests.packager.anybody import arrays_of, make_model


def node(*words, **attributes):
    operator, *inputs, output = words
    return helper.make_node(operator, inputs, [output], **attributes)


def test_a_patch_to_a_second_output_that_is_not_finite_does_not_leave(
    tmp_path, command
):
    def save(name, slope):
        model = make_model(arrays_of(slope=np.array(slope, "f4")))
        model.graph.node.append(node("Div", "slope", "slope", "z"))
        value = helper.make_tensor_value_info("z", TensorProto.FLOAT, [])
        model.graph.output.append(value)
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    good, better, bad = (save(f"{n}.onnx", n / 4) for n in (2, 1, 0))
    assert command(pack, "--base", good, "--target", better)[0] == 0
    code, out, err = command(pack, "--base", good, "--target", bad)
    assert (code, out) == (5, "")
    assert "not finite (output 2 of 2)" in " ".join(err.split())
    assert not (tmp_path / "0.dpu").exists()
    assert command(pack, "--base", bad, "--target", good)[0] == 0
