# SPDX-License-Identifier: Apache-2.0
"""The dashboard for Grafana shows what the agent really writes."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest

from edge_runtime.update.device import Device
from packager.build import pack_round
from packager.bundles.from_round import build_bundle
from packager.rounds.folder import read_round
from tests.crash import world
from tests.edge_runtime.agent.test_agent import Watch, parse

FILE = Path(__file__).parents[2] / "examples" / "fleet" / "grafana.json"
SCRAPED = {"instance", "job"}  # labels that Prometheus adds
SOURCE = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}


@pytest.fixture(scope="module")
def dashboard():
    return json.loads(FILE.read_text())


@pytest.fixture
def written(new_run, tmp_path):
    """Labels of each metric that a real agent writes, with their values."""
    run = new_run("cam", run_id="ab" * 16)
    run.add(0)
    run.add(1)
    bundle = build_bundle(read_round(run.path / "round_00"))
    Device.install(tmp_path / "store", bundle.data, trial=world.no_trial)
    watch = Watch(tmp_path).start()
    watch.put("round_01.dpu", pack_round(read_round(run.path / "round_01")).data)
    watch.look()
    found = {}
    for name, *labels in parse(watch.prom.read_text()):
        for label, value in labels:
            found.setdefault(name, {}).setdefault(label, set()).add(value)
        found.setdefault(name, {})
    return found


def expressions(dashboard):
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def test_each_metric_and_label_is_one_that_the_agent_writes(dashboard, written):
    shown = list(expressions(dashboard))
    variables = dashboard["templating"]["list"]
    shown += [(v["name"], v["query"]["query"]) for v in variables]
    for title, words in shown:
        names = set(re.findall(r"\bdpu_\w+", words))
        assert names, title
        assert names <= written.keys(), title
        known = SCRAPED.union(*(written[name] for name in names))
        grouped = re.findall(r"\bby \(([^)]*)\)", words)
        labels = {label.strip() for group in grouped for label in group.split(",")}
        labels |= set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)\s*\"", words))
        assert labels <= known, title
        for label, value in re.findall(r'(\w+)="([^"$]*)"', words):
            assert all(value in written[name][label] for name in names), title


def test_every_metric_of_the_agent_is_shown(dashboard, written):
    words = " ".join(words for _, words in expressions(dashboard))
    assert [name for name in written if name not in words] == []


def test_the_file_has_the_form_that_grafana_imports(dashboard):
    """With an input for the data source, so that it fits anybody's."""
    (source,) = dashboard["__inputs"]
    assert (source["name"], source["type"], source["pluginId"]) == (
        *("DS_PROMETHEUS", "datasource"),
        "prometheus",
    )
    assert dashboard["id"] is None
    assert re.fullmatch("[a-z-]{1,40}", dashboard["uid"])
    assert dashboard["schemaVersion"] >= 36
    assert dashboard["title"]
    panels, required = dashboard["panels"], dashboard["__requires"]
    kinds = {r["id"] for r in required if r["type"] == "panel"}
    assert {panel["type"] for panel in panels} == kinds
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"] == SOURCE
        assert all(t["datasource"] == SOURCE for t in panel["targets"])
        references = [target["refId"] for target in panel["targets"]]
        assert references == sorted(set(references))


def test_no_panel_covers_another(dashboard):
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(p["x"] + p["w"] <= 24 for p in places)
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below
