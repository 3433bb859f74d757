# SPDX-License-Identifier: Apache-2.0
"""Sync over TLS with an own authority and a client certificate, and by a proxy."""

import ssl
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import ClassVar
from urllib.request import ProxyHandler, build_opener

import pytest

from edge_runtime.errors import SyncError
from edge_runtime.sync.http import HttpSource
from edge_runtime.sync.plan import SyncResult
from tests.edge_runtime.sync.certificates import Authority
from tests.edge_runtime.sync.server import FileServer


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "ca")


@pytest.fixture
def server(world, authority):
    world.publish(1)
    with FileServer(world.place.root) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(authority.certify("web"))
        context.load_verify_locations(str(authority.ca))
        context.verify_mode = ssl.CERT_REQUIRED
        server.socket = context.wrap_socket(server.socket, server_side=True)
        yield server
        server.shutdown()


def url(server):
    return f"https://127.0.0.1:{server.server_port}"


def test_an_own_authority_and_a_client_certificate_are_enough(world, server, authority):
    source = HttpSource(
        url(server), ca=str(authority.ca), cert=str(authority.certify("board-7"))
    )
    assert world.look(source).result is SyncResult.FETCHED


def test_a_server_of_another_authority_is_refused(world, server, authority):
    source = HttpSource(url(server), cert=str(authority.certify("board-7")))
    with pytest.raises(SyncError, match="certificate"):
        world.look(source)


def test_a_device_without_its_certificate_is_refused(world, server, authority):
    with pytest.raises(SyncError):
        world.look(HttpSource(url(server), ca=str(authority.ca)))


class Proxy(BaseHTTPRequestHandler):
    seen: ClassVar = []
    logins: ClassVar = []

    def do_GET(self):
        self.seen.append(self.path)
        self.logins.append(self.headers["Proxy-Authorization"])
        with build_opener(ProxyHandler({})).open(self.path) as answer:
            data = answer.read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("said", ["option", "environment", "no scheme"])
def test_a_proxy_is_asked_where_one_is_given(world, monkeypatch, said):
    world.publish(1)
    with (
        FileServer(world.place.root) as server,
        ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy,
    ):
        Thread(target=proxy.serve_forever, daemon=True).start()
        address, Proxy.seen = f"http://127.0.0.1:{proxy.server_port}", []
        if said == "no scheme":
            address = address.replace("http://", "ann:secret@")
        Proxy.logins = []
        if said == "option":
            source = HttpSource(server.url, proxy=address)
        else:
            monkeypatch.setenv("http_proxy", address)
            monkeypatch.delenv("no_proxy", raising=False)
            source = HttpSource(server.url)
        assert world.look(source).result is SyncResult.FETCHED
        assert Proxy.seen[0] == f"{server.url}/stable.head"
        has_login = Proxy.logins[0] == "Basic YW5uOnNlY3JldA=="
        assert has_login == (said == "no scheme")
        proxy.shutdown(), server.shutdown()


@pytest.mark.parametrize(
    "proxy",
    ["socks5://ann:secret@127.0.0.1:1", "http://", "http://[x", "http://secret@h:x"],
)
def test_a_proxy_of_another_kind_is_refused_in_words(monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(SyncError, match="expected http://HOST:PORT") as caught:
        HttpSource("http://127.0.0.1:9/digits")
    assert caught.value.permanent
    assert "secret" not in str(caught.value)
