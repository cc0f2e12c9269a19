"""Fetching one file over HTTP so that a broken transfer is never mistaken for a whole one.

A file is written under a temporary name beside its final place, its size and SHA-256 are checked, it is flushed to the
disk, and only then renamed. Whoever sees the final name sees the whole file; of several processes that fetch at once,
the last to rename wins, with the same bytes.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, Any, Final, Protocol

from overlap.bars import Bar
from overlap.errors import ModelError

TRIES: Final = 3
"""How often a transfer is begun or resumed before it is given up."""
TIMEOUT_S: Final = 30.0
"""How long the other side may be silent."""
CHUNK: Final = 1 << 20
_DROPPED: Final = (urllib.error.URLError, http.client.HTTPException, OSError)
_INDEX_TYPES: Final = "application/vnd.pypi.simple.v1+json, text/html;q=0.1"


class _Advances(Protocol):
    def update(self, n: int, /) -> Any: ...


@contextlib.contextmanager
def written_whole(final: Path) -> Iterator[IO[bytes]]:
    """Give a temporary file beside `final` that becomes `final` if the block ends well, and is removed if not."""
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)  # mkstemp makes 0600; a cache may be shared
        Path(name).replace(final)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_sha256(file: IO[bytes], expected: str, what: str) -> None:
    """Raise ModelError unless the whole of `file` has this SHA-256 (hex)."""
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    found = digest.hexdigest()
    if found != expected:
        raise ModelError(
            f"{what} has the SHA-256 {found}, not {expected}: it is broken, or not the file that overlap was written "
            "for. Nothing was kept. Try again, or try another package index."
        )


def link_in_index(index_url: str, project: str, filename: str) -> str:
    """Return the address of `filename` as a Python package index (PEP 691 JSON, or PEP 503 HTML) gives it.

    Raises ModelError if the index has no such file, and lets connection errors through.
    """
    page_url = f"{index_url.rstrip('/')}/{project}/"
    with _open(page_url, {"Accept": _INDEX_TYPES}) as answer:
        body: bytes = answer.read()
        page_url = _with_login_of(page_url, answer.url)
        if "json" in (answer.headers.get("Content-Type") or ""):
            links = {str(file["filename"]): str(file["url"]) for file in json.loads(body)["files"]}
        else:
            links = _html_links(body.decode("utf-8", "replace"))
    if filename not in links:
        raise ModelError(
            f"The package index {_without_login(index_url)} has no {filename}. Use another index, or pass the path of "
            "a model."
        )
    return _with_login_of(page_url, urllib.parse.urljoin(page_url, links[filename]))


def download(url: str, out: IO[bytes], *, label: str, progress: bool, wait_s: float = 0.5) -> None:
    """Write what `url` serves to `out`, going on where a dropped connection broke off.

    `progress` shows a bar on stderr. Between two tries it waits `wait_s` seconds, then twice as long. Raises the last
    try's error (OSError or http.client.HTTPException) after TRIES tries that brought nothing more.
    """
    with Bar(desc=label, unit="B", unit_scale=True, unit_divisor=1024, disable=not progress) as bar:
        failures = 0
        while True:
            before = out.tell()
            try:
                _transfer(url, out, bar)
            except _DROPPED as error:
                # A server that says no will say it again; a connection that brought something may be tried for ever.
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
                failures = 1 if out.tell() > before else failures + 1
                if refused or failures >= TRIES:
                    raise
                time.sleep(wait_s * 2 ** (failures - 1))
            else:
                return


def _transfer(url: str, out: IO[bytes], bar: Any) -> None:
    """Run one connection: ask for what is missing in `out`, and append it."""
    start = out.tell()
    headers = {"Range": f"bytes={start}-"} if start else {}
    with _open(url, headers) as answer:
        if start and answer.status != http.HTTPStatus.PARTIAL_CONTENT:  # the server knows no ranges: from the start
            out.seek(0)
            out.truncate()
            bar.reset()
            start = 0
        length = answer.headers.get("Content-Length")
        if length is not None:
            bar.total = start + int(length)
            bar.refresh()
        _copy(answer, out, bar)
        if length is not None and out.tell() != start + int(length):
            raise http.client.IncompleteRead(b"", start + int(length) - out.tell())


def _copy(source: IO[bytes], out: IO[bytes], bar: _Advances) -> None:
    read: Callable[[int], bytes] = getattr(source, "read1", source.read)  # read1 keeps what came before a drop
    while chunk := read(CHUNK):
        out.write(chunk)
        bar.update(len(chunk))


def extract(source: IO[bytes], out: IO[bytes], *, size: int, label: str, progress: bool) -> None:
    """Copy a stream of `size` bytes (a member of an archive) to `out`, with a bar on stderr if asked."""
    with Bar(
        desc=label, total=size, unit="B", unit_scale=True, unit_divisor=1024, disable=not progress, leave=False
    ) as bar:
        _copy(source, out, bar)


def _open(url: str, headers: dict[str, str]) -> Any:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ModelError(f"A package index is an http or https address, not {_without_login(url)!r}.")
    request = urllib.request.Request(_without_login(url), headers={"User-Agent": "overlap", **headers})
    if parts.username is not None:
        login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)  # the scheme was checked


def _without_login(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _with_login_of(known: str, url: str) -> str:
    """Return `url` with the user and password of `known` if both are on the same host."""
    ours, theirs = urllib.parse.urlsplit(known), urllib.parse.urlsplit(url)
    if ours.username is None or theirs.username is not None or ours.hostname != theirs.hostname:
        return url
    return urllib.parse.urlunsplit(theirs._replace(netloc=f"{ours.netloc.rpartition('@')[0]}@{theirs.netloc}"))


def _html_links(page: str) -> dict[str, str]:
    """Return the links of a PEP 503 page: file name -> address."""
    links: dict[str, str] = {}

    class _Anchors(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            address = dict(attrs).get("href")
            if tag == "a" and address:
                path = urllib.parse.urlsplit(address).path
                links[urllib.parse.unquote(path.rpartition("/")[2])] = address

    _Anchors().feed(page)
    return links
