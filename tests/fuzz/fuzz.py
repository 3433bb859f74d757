# SPDX-License-Identifier: Apache-2.0
"""Coverage-guided fuzzing of everything that reads what others wrote, with atheris.

    python -m tests.fuzz.fuzz -runs=100000                 # patches, from the corpus
    python -m tests.fuzz.fuzz --target state -runs=100000  # another target
    python -m tests.fuzz.fuzz --all 3600                   # an hour for each of them
    python -m tests.fuzz.fuzz -max_total_time=3600 DIR     # keeps new inputs there

Other arguments are libFuzzer's. atheris is in the ``dev`` extra.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edge_runtime", "packager"]):
    from tests.fuzz.readers import READERS, reader
    from tests.fuzz.target import attempt

CORPUS = Path(__file__).parent / "corpus"
INTERRUPTED = 72  # what libFuzzer ends with after Ctrl-C
TARGETS = ("patch", *READERS)


def main() -> None:
    """Fuzz until libFuzzer stops; a finding ends with a trace and an input file."""
    words = sys.argv[1:]
    if words[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\nTargets: {', '.join(TARGETS)}")
        return
    if words[:1] == ["--all"]:
        sys.exit(fuzz_all(int(words[1]), words[2:]))
    target = "patch"
    if words[:1] == ["--target"]:
        target, words = words[1], words[2:]
    work = attempt if target == "patch" else reader(target)
    # libFuzzer keeps new inputs in the first folder: never in the committed one.
    named = any(not word.startswith("-") for word in words)
    scratch = [] if named else [tempfile.mkdtemp(prefix="dpu-fuzz-")]
    corpus = [str(CORPUS)] if target == "patch" else []
    atheris.Setup([sys.argv[0], *words, *scratch, *corpus], work)
    atheris.Fuzz()


def fuzz_all(seconds: int, words: list[str]) -> int:
    """Fuzz each target for so long, and print how often it was tried."""
    worst = 0
    for target in TARGETS:
        command = [sys.executable, "-m", "tests.fuzz.fuzz", "--target", target, *words]
        done = subprocess.run(
            [*command, f"-max_total_time={seconds}"],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        runs = re.findall(r"(?:Done |^#)(\d+)", done.stderr, re.M)[-1:]
        print(
            target,
            *runs,
            "executions",
            "" if done.returncode in (0, INTERRUPTED) else "FOUND",
            flush=True,
        )
        if done.returncode:
            print(done.stderr[-4000:], file=sys.stderr)
        worst = max(worst, done.returncode)
    return worst


if __name__ == "__main__":
    main()
