"""Coverage-guided fuzzing of the patch reader with atheris.

    python -m tests.fuzz.fuzz -runs=100000               # from the committed corpus
    python -m tests.fuzz.fuzz -max_total_time=3600 DIR   # keeps new inputs there

Arguments are libFuzzer's. atheris is in the ``dev`` extra.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edge_runtime"]):
    from tests.fuzz.target import attempt

CORPUS = Path(__file__).parent / "corpus"


def main() -> None:
    """Fuzz until libFuzzer stops; a finding ends with a trace and an input file."""
    # libFuzzer keeps new inputs in the first folder: never in the committed one.
    named = any(not word.startswith("-") for word in sys.argv[1:])
    scratch = [] if named else [tempfile.mkdtemp(prefix="dpu-fuzz-")]
    arguments = [*sys.argv, *scratch, str(CORPUS)]
    atheris.Setup(arguments, attempt)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
