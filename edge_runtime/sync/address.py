# SPDX-License-Identifier: Apache-2.0
"""Addresses of servers and proxies: what is asked, and what people may see. No I/O."""

import base64
from urllib.parse import unquote, urlsplit, urlunsplit

from edge_runtime.errors import SyncError


def plain_address(url: str) -> str:
    """Return an address without credentials: no user, no password, no query.

    Raises:
        ValueError: It is no address.
    """
    parts = urlsplit(url)
    if not parts.netloc:
        return url
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def part_login(url: str) -> tuple[str, str]:
    """Return an address without its user and password, and the header that says them.

    >>> part_login("https://ann:secret@box/digits")
    ('https://box/digits', 'Basic YW5uOnNlY3JldA==')

    Raises:
        ValueError: It is no address.
    """
    parts = urlsplit(url)
    login, _, host = parts.netloc.rpartition("@")
    if not login:
        return url, ""
    user, _, password = login.partition(":")
    words = f"{unquote(user)}:{unquote(password)}".encode(errors="surrogateescape")
    plain = urlunsplit(parts._replace(netloc=host))
    return plain, f"Basic {base64.b64encode(words).decode()}"


def origin(url: str) -> tuple[str, str]:
    """Return the server of an address: whoever gets a password for it."""
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.rpartition("@")[2]


def proxy_for(url: str, given: str = "") -> str:
    """Return the proxy to ask for an address; empty for none.

    Args:
        url: The address.
        given: The proxy, if somebody named one; else the environment may.

    Raises:
        SyncError: It is none that can be asked.
    """
    proxy = given or _of_environment(url)
    if not proxy:
        return ""
    proxy = proxy if "://" in proxy else f"http://{proxy}"  # as curl takes it
    try:
        parts = urlsplit(proxy)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return proxy
        found = plain_address(proxy)
    except ValueError:  # its words may hold the password
        found = "no address"
    raise SyncError(
        f"the proxy is {found}, expected http://HOST:PORT or https://HOST:PORT; it "
        "comes from --proxy, http_proxy or https_proxy",
        permanent=True,
    )


def _of_environment(url: str) -> str:
    from urllib.request import getproxies, proxy_bypass

    parts = urlsplit(url)
    if proxy_bypass(parts.hostname or ""):
        return ""
    return getproxies().get(parts.scheme, "")
