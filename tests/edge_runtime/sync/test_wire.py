# SPDX-License-Identifier: Apache-2.0
"""What comes before a body is bounded and counted, wherever the server points to."""

import os
import socket
import ssl
import threading
import time
from contextlib import contextmanager

import pytest

from edge_runtime.errors import SyncError
from edge_runtime.sync.http import HttpSource, open_source
from edge_runtime.sync.source import FolderSource, UnusableError
from edge_runtime.sync.wire import HANDSHAKE_BYTES, HEADER_BYTES
from tests.edge_runtime.sync.certificates import Authority

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


class Raw:
    """A server on loopback that sends what a test yields, and counts it."""

    def __init__(self, answer, context=None):
        self.answer, self.context, self.bytes, self.asked = answer, context, 0, b""
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                try:
                    if self.context:
                        connection = self.context.wrap_socket(
                            connection, server_side=True
                        )
                    request = connection.recv(4096)
                    self.bytes += len(request)
                    self.asked += request
                    for piece in self.answer():
                        self.bytes += len(piece)  # before anybody has it
                        connection.sendall(piece)
                    connection.close()
                except OSError:
                    continue  # the client had enough


@contextmanager
def serving(answer, context=None):
    server = Raw(answer, context)
    try:
        yield server
    finally:
        server.listener.close()


def redirect(url):
    return f"HTTP/1.1 302 X\r\nLocation: {url}\r\nContent-Length: 0\r\n\r\n".encode()


def read(source, path="x"):
    with source.get(path) as answer:
        return answer.body.read(100)


def forever(piece, pause=0.0):
    while True:
        yield piece
        time.sleep(pause)


def test_every_byte_of_an_answer_is_counted():
    with serving(lambda: [OK]) as server:
        source = HttpSource(f"http://{server.address}")
        assert read(source) == b"hi"
        assert source.spent == server.bytes


@pytest.mark.parametrize(
    ("tag", "kept"),
    [(b'"a"', '"a"'), (b'"' + b"x" * 10_000 + b'"', ""), (b'"\xe9"', "")],
    ids=["short", "long", "odd"],
)
def test_a_tag_is_kept_only_where_the_state_has_room_for_it(tag, kept):
    answer = OK.replace(b"\r\n\r\n", b"\r\nETag: %b\r\n\r\n" % tag)
    with serving(lambda: [answer]) as server:
        source = HttpSource(f"http://{server.address}")
        with source.get("x") as found:
            assert (found.tag, found.body.read(9)) == (kept, b"hi")


@pytest.mark.parametrize(
    "piece", [b"HTTP/1.1 100 X\r\n\r\n", b"HTTP/1.1 100 X\r\nA: %b\r\n" % (b"x" * 9999)]
)
def test_headers_without_an_end_are_cut(piece):
    with serving(lambda: forever(piece)) as server:
        source = HttpSource(f"http://{server.address}")
        with pytest.raises(SyncError, match="bytes before a body"):
            read(source)
        assert source.spent < HEADER_BYTES + 10_000


@pytest.mark.parametrize("end", range(1, len(OK) - 2))
def test_headers_that_break_off_are_no_headers(end):
    with (
        serving(lambda: [OK[:end]]) as server,
        pytest.raises(SyncError, match="no answer"),
    ):
        read(HttpSource(f"http://{server.address}"))


def test_a_redirection_to_another_host_is_followed_and_counted():
    with serving(lambda: [OK]) as other:
        there = redirect(f"http://{other.address}/y")
        with serving(lambda: [there]) as server:
            source = HttpSource(f"http://{server.address}")
            assert read(source) == b"hi"
            assert source.spent == server.bytes + other.bytes


def test_redirections_in_a_circle_end():
    with (
        serving(lambda: [redirect("/x")]) as server,
        pytest.raises(SyncError, match="redirection in a row") as caught,
    ):
        read(HttpSource(f"http://{server.address}"))
    assert caught.value.permanent


def test_no_redirection_leads_out_of_tls(tmp_path):
    authority = Authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.certify("server"))
    with serving(lambda: [OK]) as plain:
        there = redirect(f"http://{plain.address}/x")
        with serving(lambda: [there], context) as server:
            for scheme in ("https", "HTTPS"):
                source = HttpSource(
                    f"{scheme}://{server.address}", ca=str(authority.ca)
                )
                with pytest.raises(SyncError, match="anybody on the way"):
                    read(source)
        assert plain.bytes == 0
    # A second connection is a second handshake, which budgets count.
    with serving(lambda: [OK], context) as server:
        source = HttpSource(f"https://{server.address}", ca=str(authority.ca))
        assert [read(source), read(source)] == [b"hi", b"hi"]
        assert source.spent == server.bytes + 2 * HANDSHAKE_BYTES


@pytest.mark.parametrize(
    "answer",
    [
        redirect("http://[x"),
        b"HTTP/1.1 206 X\r\nContent-Range: bytes %b-\r\n\r\n" % (b"9" * 5000),
    ],
)
def test_headers_that_are_none_are_no_fault_of_the_program(answer):
    with serving(lambda: [answer]) as server, pytest.raises(SyncError):
        read(HttpSource(f"http://{server.address}"))


def test_a_length_that_is_no_number_is_none():
    answer = b"HTTP/1.1 200 X\r\nContent-Length: %b\r\n\r\nhi" % (b"9" * 5000)
    with serving(lambda: [answer]) as server:
        assert read(HttpSource(f"http://{server.address}")) == b"hi"


@pytest.mark.parametrize("url", ["https://[abc/x", "http://a\u2100/"])
def test_what_is_no_address_is_refused_in_words(url):
    with pytest.raises(SyncError, match="no address"):
        HttpSource(url)
    with pytest.raises(SyncError, match="no address"):
        open_source(url)


def test_no_message_tells_the_credentials_of_an_address():
    source = HttpSource("http://me:secret@127.0.0.1:9/digits?key=secret")
    with pytest.raises(SyncError) as caught:
        read(source)
    assert str(caught.value).startswith("http://127.0.0.1:9/digits/x: no answer")
    assert "secret" not in str(caught.value)


def test_an_address_with_a_password_sends_it_to_that_server_alone():
    login = b"Authorization: Basic YW5uOnNlY3JldA==\r\n"
    with serving(lambda: [OK]) as other:
        there = redirect(f"http://{other.address}/y")
        with serving(lambda: [there]) as server:
            read(source := open_source(f"http://ann:s%65cret@{server.address}/digits"))
            source.put(f"http://ann:secret@{server.address}/r/1.json", b"{}")
    assert server.asked.count(login) == 2
    assert b"GET /digits/x " in server.asked
    assert b"Authorization" not in other.asked


@pytest.mark.parametrize("rest", ["?sig=secret", "#secret", "?"])
def test_an_address_that_no_file_can_be_below_is_refused(rest):
    with pytest.raises(SyncError, match="expected a folder's address") as caught:
        open_source(f"https://ann:secret@example.org/digits{rest}")
    assert caught.value.permanent
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "words"), [(401, "USER:PASSWORD"), (403, "may not"), (407, "the proxy")]
)
def test_who_may_not_read_is_told_so(world, status, words):
    answer = f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n".encode()
    with (
        serving(lambda: [answer]) as server,
        pytest.raises(SyncError, match=f"says {status}; .*{words}") as caught,
    ):
        world.look(HttpSource(f"http://{server.address}"))
    assert "folder" not in str(caught.value)


def test_what_fails_while_a_folder_is_read_is_told_as_it_is(tmp_path):
    (tmp_path / "here").write_bytes(b"hi")
    with pytest.raises(FileNotFoundError), FolderSource(tmp_path).get("here"):
        (tmp_path / "nowhere" / "copy").write_bytes(b"hi")


def test_a_pipe_or_a_device_on_a_stick_holds_nobody(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link"):
        with (
            pytest.raises(UnusableError, match="no ordinary file"),
            FolderSource(tmp_path).get(name),
        ):
            pass


def test_nothing_of_a_file_on_a_stick_is_read_before_its_size_is_known(tmp_path):
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 30)
    (tmp_path / "stable.head").symlink_to("huge")  # publishers may link
    with FolderSource(tmp_path).get("stable.head") as answer:
        assert (answer.status, answer.size, answer.tag) == (200, 1 << 30, "")


def test_a_server_that_is_away_is_told_in_words():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(SyncError) as caught:
        read(HttpSource(f"http://127.0.0.1:{port}"))
    assert "no answer (Failed to establish a new connection: [Errno" in str(
        caught.value
    )


def test_a_kept_connection_that_ends_under_a_request_is_no_failure():
    asked = []

    def serve(listener):
        for answers in ([OK, b""], [OK]):  # the second request meets the end
            connection, _ = listener.accept()
            with connection:
                for answer in answers:
                    asked.append(connection.recv(4096))
                    connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        source = HttpSource(f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert [read(source), read(source)] == [b"hi", b"hi"]
        thread.join(10)
        assert source.spent == 2 * len(OK) + sum(map(len, asked))
    assert len(asked) == 3
