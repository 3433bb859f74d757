# SPDX-License-Identifier: Apache-2.0
"""Places by their addresses: a folder, ``file://``, or a URL of an object store."""

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from edge_runtime.errors import AddressError
from packager.fleet.place import FolderPlace, Place

SCHEMES = ("s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "memory")
_S3_ENDPOINTS = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
_EXPECTED = "expected a folder, file://, s3://, gs:// or az://"


def open_place(
    url: str,
    *,
    single_publisher: bool = False,
    say: Callable[[str], None] = lambda _words: None,
) -> Place:
    """Return the place with an address; nothing is read or written yet.

    Args:
        url: A folder's path or its ``file://`` URL; or the URL of a prefix in an object
            store: ``s3://BUCKET/PREFIX``, ``gs://``, ``az://``. Credentials come from
            the environment, never from the address. S3's relatives are found by
            ``?endpoint=https://HOST`` or AWS_ENDPOINT.
        single_publisher: Go on where the store has no conditional writes, as nobody
            else publishes there.
        say: Told what a person should hear.

    Raises:
        AddressError: It is none of these.
        ModuleNotFoundError: It is an object store, and ``obstore`` is not installed.
    """
    try:
        parts = urlsplit(url)
    except ValueError as err:  # what it holds may be a secret
        raise AddressError(f"this is no address ({err}): {_EXPECTED}") from None
    if "://" not in url:
        if parts.scheme in (*SCHEMES, "file", "http", "https"):
            raise AddressError(
                f"found {url.partition('?')[0]}, expected {parts.scheme}:// (or ./ "
                "before the name of a folder)"
            )
        return FolderPlace(Path(url))
    name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
    if "@" in parts.netloc:
        raise AddressError(
            f"{name}: the address holds a user or a password, which would end in logs; "
            "give credentials by the environment (AWS_ACCESS_KEY_ID and so on)"
        )
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return FolderPlace(Path(unquote(parts.path)))
    if parts.scheme not in SCHEMES:
        more = "; a web server is read by devices, not written" * (
            parts.scheme in ("http", "https")
        )
        raise AddressError(f"found {name}, {_EXPECTED}{more}")
    if parts.fragment:
        raise AddressError(f"{name}: found #..., which no address of a place has")
    endpoint = _endpoint(parts.scheme, parts.query, name)
    return _object_place(url.partition("?")[0], name, endpoint, single_publisher, say)


def _endpoint(scheme: str, query: str, name: str) -> str:
    """Return the server that an address asks for; empty for the usual one."""
    asked = dict(parse_qsl(query))
    if (scheme not in ("s3", "s3a") or asked.keys() - {"endpoint"}) and asked:
        raise AddressError(
            f"{name}: found the options {', '.join(sorted(asked))}, expected none, "
            "or endpoint for s3://; everything else comes from the environment"
        )
    endpoint = asked.get("endpoint", "")
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise AddressError(f"{name}: endpoint has to begin with https:// or http://")
    if "@" in endpoint:
        raise AddressError(f"{name}: endpoint must not hold credentials")
    return endpoint


def _object_place(
    url: str,
    name: str,
    endpoint: str,
    single_publisher: bool,
    say: Callable[[str], None],
) -> Place:
    # Late: folders need no library.
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    from packager.fleet.object_place import CLIENT, RETRIES, ObjectPlace, plain

    known = [endpoint, *(os.environ.get(name, "") for name in _S3_ENDPOINTS)]
    plain_http = next(filter(None, known), "").lower().startswith("http://")
    is_memory = url.startswith("memory:")
    options = {"client_options": CLIENT | {"allow_http": plain_http}}
    options |= {"retry_config": RETRIES}
    if endpoint:
        options["config"] = {"endpoint": endpoint}
    try:
        store = from_url(url, **({} if is_memory else options))
    except (BaseError, ValueError) as err:
        raise AddressError(
            f"{name}: {plain(str(err).partition(chr(10) * 2)[0])}"
        ) from None
    return ObjectPlace(store, name, single_publisher=single_publisher, say=say)
