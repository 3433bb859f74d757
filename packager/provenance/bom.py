# SPDX-License-Identifier: Apache-2.0
"""The bill of materials: CycloneDX 1.6, a machine-learning model with its model card.

Serial number and order come from the release itself, so that the same release gives the
same bytes. The task is named only where the contract names classes, the data set and
the measures only where ``round.json`` states them.
"""

import json
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from edge_runtime.errors import TrustError
from edge_runtime.formats.json_file import parse_record
from edge_runtime.formats.model_folder import WEIGHTS_NAME
from packager.provenance.facts import Facts

MODEL_KIND = "machine-learning-model"
_DATA = (".npz", ".json", ".safetensors")  # the rest are files


def encode_bom(facts: Facts, time: str = "") -> bytes:
    """Return the bill of materials of a release.

    Args:
        facts: What is known of it.
        time: When, in ISO 8601; empty to leave it out.
    """
    parts = {f"{facts.kind}/{name}": digest for name, digest in facts.parts.items()}
    components = [
        *(_component(name, digest, "file") for name, digest in facts.files.items()),
        *(
            _component(name, digest, "data" if name.endswith(_DATA) else "file")
            for name, digest in parts.items()
        ),
    ]
    tool = {"type": "application", "name": "dpu-edge", "version": version("dpu-edge")}
    metadata: dict[str, Any] = {
        "tools": {"components": [tool]},
        "component": _model(facts),
    }
    if time:
        metadata["timestamp"] = time
    names = "\n".join(
        f"{n} {d}" for n, d in sorted({**facts.subjects, **parts}.items())
    )
    record = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, names)}",
        "version": 1,
        "metadata": metadata,
        "components": components,
    }
    return json.dumps(record, indent=1).encode() + b"\n"


def stated_target(data: bytes) -> str:
    """Return the SHA-256 of the weights that a bill of materials is about.

    Raises:
        TrustError: It is malformed, or is about something else.
    """
    bom = parse_record(data, "record_bytes", "the bill of materials", TrustError)
    model = bom.record("metadata").record("component")
    if model.text("type") != MODEL_KIND:
        raise model.problem("type", f'"{MODEL_KIND}"')
    found = [h for h in model.records("hashes") if h.text("alg") == "SHA-256"]
    if not found:
        raise model.problem("hashes", "a SHA-256")
    return found[0].digest("content")


def _component(name: str, digest: str, kind: str) -> dict[str, Any]:
    return {"type": kind, "bom-ref": name, "name": name, "hashes": _hashes(digest)}


def _hashes(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]


def _model(facts: Facts) -> dict[str, Any]:
    properties = {
        "file": WEIGHTS_NAME,
        "round": facts.round,
        "counter": facts.counter,
        "model": facts.model,
        "parent": facts.parent,
    }
    return {
        "type": MODEL_KIND,
        "bom-ref": WEIGHTS_NAME,
        "name": facts.run or facts.name,
        "version": str(facts.counter),
        "hashes": _hashes(facts.target),
        "modelCard": _card(facts),
        "properties": [
            {"name": f"dpu-edge:{name}", "value": str(value)}
            for name, value in properties.items()
        ],
    }


def _card(facts: Facts) -> dict[str, Any]:
    contract = facts.contract
    parameters: dict[str, Any] = {}
    if contract.get("classes"):
        parameters["task"] = "classification"
    if name := _stated(facts, "model", "name"):
        parameters["modelArchitecture"] = name
    if data := _stated(facts, "data", "set"):
        parameters["datasets"] = [{"type": "dataset", "name": data}]
    for side in ("inputs", "outputs"):
        if formats := [_format(entry) for entry in contract.get(side) or ()]:
            parameters[side] = [{"format": text} for text in formats]
    card: dict[str, Any] = {"modelParameters": parameters} if parameters else {}
    metrics = facts.record.get("metrics")
    if isinstance(metrics, Mapping) and metrics:
        known = {n: v for n, v in metrics.items() if v is not None}
        measures = [{"type": n, "value": str(v)} for n, v in known.items()]
        card["quantitativeAnalysis"] = {"performanceMetrics": measures}
    return card


def _stated(facts: Facts, part: str, name: str) -> str | None:
    """Return a text of the recipe in ``round.json``, if that has one."""
    config = facts.record.get("config")
    section = config.get(part) if isinstance(config, Mapping) else None
    value = section.get(name) if isinstance(section, Mapping) else None
    return value if isinstance(value, str) and value else None


def _format(entry: Mapping[str, Any]) -> str:
    sizes = [
        str(size) if size is not None else "any" if axis else "batch"
        for axis, size in enumerate(entry.get("shape") or ())
    ]
    return f"{entry.get('name')}: {entry.get('dtype')} [{', '.join(sizes)}]"
