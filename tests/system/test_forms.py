# SPDX-License-Identifier: Apache-2.0
"""Files that other programs read: workflow, forms, citation."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[fw]*.yml"))
FILES = [
    *(ROOT / ".github").rglob("*.yml"),
    ROOT / ".pre-commit-config.yaml",
    ROOT / "CITATION.cff",
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_is_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_workflow_runs_what_can_be_run_at_home():
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    steps = [s["run"] for job in jobs.values() for s in job["steps"] if "run" in s]
    assert steps == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


@pytest.mark.parametrize("form", FORMS)
def test_a_form_has_what_it_must_have(form):
    fields = yaml.safe_load(form.read_text())
    assert fields["name"]
    assert fields["description"]
    ids = [field["id"] for field in fields["body"] if field["type"] != "markdown"]
    assert len(set(ids)) == len(ids) > 0


def test_make_alone_lists_what_it_can_do():
    lines = (ROOT / "Makefile").read_text().splitlines()
    targets = [
        line.split(":")[0] for line in lines if ":  ##" in line or "  ## " in line
    ]
    assert targets[0] == "help"
    phony = next(line for line in lines if line.startswith(".PHONY:")).split()[1:]
    assert set(phony) == set(targets)
