# SPDX-License-Identifier: Apache-2.0
"""Which network and which run a patch belongs to: the ``model`` of its header.

Two runs of one recipe train the same network, often from the same init weights, and
still are two models: a patch of one must not reach the devices of the other. So the
identity has two halves of 16 bytes. The first half names the network; the second half
is the run's id, which lies in ``model/run.json`` and travels in the bundle. A run
without an id, from before there were any, is named by the whole hash of its network.

    >>> network = network_id(b"header", b"graph")
    >>> Identity(network, None).model == network
    True
    >>> Identity(network, Run("00" * 16, "digits")).model[:32] == network[:32]
    True
"""

import hashlib
import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from edge_runtime.errors import WeightsError, WrongModelError
from edge_runtime.formats.header import PatchHeader
from edge_runtime.formats.json_file import parse_record
from edge_runtime.formats.model_folder import RUN_NAME
from edge_runtime.reading import read_bounded

SCHEMA = 1
MAX_NAME = 100  # characters of a run's name that travel
HALF = 32  # hexadecimal digits: of a run's id, and of a network in an identity
SHOWN = 12  # digits that a message shows


@dataclass(frozen=True, slots=True)
class Run:
    """A training history of one network, told apart from every other.

    Attributes:
        id: 32 hexadecimal digits.
        name: For people; no part of the identity.
    """

    id: str
    name: str = ""

    def __str__(self) -> str:
        """Say which run this is, in words."""
        return f"run {self.name} ({self.id[:SHOWN]})" if self.name else _run(self.id)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a device or a run folder is, before any weight is looked at.

    Attributes:
        network: :func:`network_id` of tensor table and graph.
        run: The run; None where it has no id.
    """

    network: str
    run: Run | None

    @property
    def model(self) -> str:
        """The ``model`` of every patch of this run, 64 hexadecimal digits."""
        return self.network[:HALF] + self.run.id if self.run else self.network

    def difference(self, model: str) -> str:
        """Say in words how the ``model`` of a patch differs from this one."""
        own = str(self.run) if self.run else "a model without a run's id"
        if not same_network(model, self.network):
            return (
                f"the patch is for another network: it names model {model[:SHOWN]}, "
                f"here is {self.model[:SHOWN]}"
            )
        if model == self.network:
            return (
                f"the patch is of this network, but of a run without an id; this "
                f"device holds {own}"
            )
        return (
            f"the patch is of another run of this network ({_run(model[HALF:])}), this "
            f"device holds {own}"
        )


def wrong_model(
    header: PatchHeader, model: str, identity: Callable[[], Identity] | None = None
) -> WrongModelError | None:
    """Say why a patch is not for the network and run ``model``; None if it is.

    Args:
        header: The patch's header.
        model: Identity of what the patch is for, 64 hexadecimal digits.
        identity: Gives network and run behind it, where they are known: asked only
            for the words of the refusal.
    """
    stated = header.model
    if stated == model:
        return None
    words = (
        identity().difference(stated)
        if identity
        else "the patch is for another network or run: it names model "
        f"{stated}, here is {model}"
    )
    return WrongModelError(
        f"{words}; fetch the patch of this device's run, or install that run's bundle "
        "into an empty folder",
        expected=stated,
        actual=model,
    )


def same_network(model: str, other: str) -> bool:
    """Tell whether two identities are of one network, whatever their runs."""
    return model[:HALF] == other[:HALF]


def _run(identifier: str) -> str:
    return f"run {identifier[:SHOWN]}"


def network_id(header: bytes, graph: bytes) -> str:
    """Identify a network: its tensor table and its graph, without any weight.

    Args:
        header: The weight file's header (``Layout.header``).
        graph: The bytes of the ONNX graph.
    """
    return hashlib.sha256(header + hashlib.sha256(graph).digest()).hexdigest()


def run_id(text: str = "") -> str:
    """Return a run's id.

    Args:
        text: Where it comes from: 32 hexadecimal digits are the id itself, any other
            text gives one of its own. By default the id is drawn at random.
    """
    if not text:
        return secrets.token_hex(HALF // 2)
    if re.fullmatch(f"[0-9a-f]{{{HALF}}}", text.lower()):
        return text.lower()
    raw = text.encode(errors="surrogatepass")
    return hashlib.sha256(raw).hexdigest()[:HALF]


def encode_run(run: Run) -> bytes:
    """Encode a run as the bytes of ``run.json``."""
    # A folder may be called anything; what a terminal would act on is spelled out.
    name = run.name if run.name.isprintable() else ascii(run.name)
    record = {"schema": SCHEMA, "id": run.id, "name": name[:MAX_NAME]}
    return json.dumps(record).encode() + b"\n"


def parse_run(data: bytes) -> Run:
    """Parse the bytes of ``run.json``.

    Raises:
        WeightsError: Malformed, or of a newer schema.
    """
    record = parse_record(data, "run_bytes", RUN_NAME, WeightsError)
    record.schema(SCHEMA)
    try:
        found = record.matching("id", f"[0-9a-f]{{{HALF}}}", f"{HALF} hex digits")
        name = record.text("name", "")
        # It is shown on terminals: no escape codes, no halves of characters.
        if not name.isprintable() or len(name) > MAX_NAME:
            raise record.problem("name", f"at most {MAX_NAME} plain characters")
    except WeightsError as err:
        raise WeightsError(f"{err}; take it from the run or bundle again") from err
    return Run(found, name)


def read_run(folder: str | PathLike[str]) -> Run | None:
    """Read which run a ``model`` folder belongs to; None where it has no id.

    Raises:
        OSError: The file is there and cannot be read.
        WeightsError: It is malformed.
    """
    path = Path(folder, RUN_NAME)
    try:
        data = read_bounded(path, "run_bytes", RUN_NAME, WeightsError)
    except FileNotFoundError:
        return None
    return parse_run(data)


def identify(header: bytes, graph: bytes, folder: str | PathLike[str]) -> Identity:
    """Return the identity of a ``model`` folder.

    Args:
        header: Of the weight file (:attr:`edge_runtime.formats.layout.Layout.header`).
        graph: The bytes of ``graph.onnx``.
        folder: Where ``run.json`` lies, if there is one.

    Raises:
        OSError: ``run.json`` cannot be read.
        WeightsError: It is malformed.
    """
    return Identity(network_id(header, graph), read_run(folder))
