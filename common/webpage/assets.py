"""The files that pages need, read from the installed packages: found by their exact name, never by a path."""

from __future__ import annotations

import base64
import gzip
import hashlib
import mimetypes
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final

from aiohttp import web

PLOTLY: Final = "plotly.min.js"
VARY: Final = {"Vary": "Accept-Encoding"}
_YEAR: Final = 365 * 24 * 3600
_WORTH_COMPRESSING: Final = 1400  # bytes; less fits into one packet anyway


class Body:
    """What many browsers are sent: compressed at most once."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    @cached_property
    def compressed(self) -> bytes | None:
        """By gzip; None where that is not worth it."""
        return gzip.compress(self.content, 6, mtime=0) if len(self.content) > _WORTH_COMPRESSING else None

    def response(
        self, request: web.Request, headers: Mapping[str, str], content_type: str, charset: str | None = None
    ) -> web.Response:
        """As this browser takes it."""
        body, sent = self.content, {**headers, **VARY}
        if self.compressed is not None and "gzip" in request.headers.get("Accept-Encoding", ""):
            body = self.compressed
            sent["Content-Encoding"] = "gzip"
        return web.Response(body=body, headers=sent, content_type=content_type, charset=charset)


class Asset:
    """One file: its bytes, read when they are first asked for, and what HTTP says of it."""

    def __init__(self, name: str, source: Traversable) -> None:
        self.name = name
        self._source = source
        self.content_type = mimetypes.guess_type(name)[0] or "application/octet-stream"

    @cached_property
    def content(self) -> bytes:
        """The file."""
        return self._source.read_bytes()

    @property
    def text(self) -> str:
        """The file as text."""
        return self.content.decode()

    @cached_property
    def body(self) -> Body:
        """What is sent."""
        return Body(self.content)

    @cached_property
    def digest(self) -> str:
        """What tells this version of the file from another one."""
        return hashlib.sha256(self.content).hexdigest()[:16]

    def response(self, request: web.Request) -> web.Response:
        """The file, or 304 where the browser has it."""
        fresh = request.query.get("v") == self.digest
        headers = {
            "ETag": f'"{self.digest}"',
            "Cache-Control": f"private, max-age={_YEAR}, immutable" if fresh else "no-cache",
        }
        if f'"{self.digest}"' in request.headers.get("If-None-Match", ""):
            return web.Response(status=304, headers={**headers, **VARY})
        charset = "utf-8" if self.content_type.startswith("text/") else None
        return self.body.response(request, headers, self.content_type, charset)


class Assets:
    """The files of `static/` in some packages, and the script that draws charts, from its own package.

    Parameters
    ----------
    packages : whose `static/` is served besides that of this package; names are to differ.
    """

    def __init__(self, packages: Iterable[str] = ()) -> None:
        self._by_name: dict[str, Asset] = {}
        for package in (__package__, *packages):
            folder = files(package).joinpath("static")
            for source in folder.iterdir() if folder.is_dir() else ():
                self._by_name[source.name] = Asset(source.name, source)
        self._by_name[PLOTLY] = Asset(PLOTLY, files("plotly").joinpath("package_data", PLOTLY))

    def __getitem__(self, name: str) -> Asset:
        return self._by_name[name]

    def url(self, name: str) -> str:
        """Where a page finds the file: another address for each version of it, so that browsers may keep it."""
        return f"/static/{name}?v={self._by_name[name].digest}"

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """Ids of elements that a page with charts holds, so that Plotly adds no styles for maps: CSP would stop it."""
        return tuple(re.findall(r'if\(!document\.getElementById\("([0-9a-f]{64})"\)\)', self[PLOTLY].text))

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answers `GET /static/{name}`."""
        asset = self._by_name.get(request.match_info["name"])
        if asset is None:
            raise web.HTTPNotFound
        return asset.response(request)


def script_hash(script: str) -> str:
    """What a Content-Security-Policy allows a script in the page itself by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
