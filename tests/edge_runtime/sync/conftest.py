# SPDX-License-Identifier: Apache-2.0
"""A published run and a device at its first round: made once, copied for each test."""

import shutil

import pytest

from tests.conftest import RunOnDisk
from tests.edge_runtime.sync.server import FileServer
from tests.edge_runtime.sync.world import World


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """Return what makes a world of some class in a folder; each is built once."""
    built = {}

    def make(kind, folder):
        if kind not in built:
            base = built[kind] = tmp_path_factory.mktemp(kind.__name__)
            run = RunOnDisk(base / "runs" / "tiny")
            for number in range(5):
                run.add(number)
            world = kind(base)
            world.publish(0)
            world.install()
        shutil.copytree(built[kind], folder)
        return kind(folder)

    return make


@pytest.fixture
def world(template, tmp_path):
    return template(World, tmp_path / "world")


@pytest.fixture
def server(world):
    with FileServer(world.place.root) as server:
        yield server
        server.shutdown()
