"""What all pages share: who may ask, what answers carry, what open pages are told."""

from __future__ import annotations

import asyncio
import doctest
import gzip
import json
from collections.abc import Mapping
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

import common.webpage.rendering
import common.webpage.wording
from common.errors import NetworkError
from common.webpage.assets import PLOTLY, Assets, Body
from common.webpage.guard import HEADERS, LOOPBACK, guarded_app
from common.webpage.live import MOST_READERS, Reader, Readers
from common.webpage.page import LivePage
from common.webpage.serving import serve
from common.wire.addresses import Address, is_loopback
from tests.common.webpage.pages import client_of, events


@pytest.mark.parametrize("module", [common.webpage.wording, common.webpage.rendering])
def test_the_examples_in_the_words_are_right(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


class Counter(LivePage[int, str]):
    """A page of a number that a test sets; its batch may wait."""

    def __init__(self) -> None:
        super().__init__("client.site_page", "site.html", ("privacy",), LOOPBACK)
        self.number = self.batch = 0
        self.looks = 0

    def stamp(self) -> tuple[int, int]:
        return self.number, self.batch

    def look(self) -> int:
        self.looks += 1
        return self.number

    def content(self, state: int, audience: str) -> Mapping[str, Any]:
        privacy = {"epsilon": state, "budget": 8, "delta": 1e-5, "protects": f"<b>{audience}</b>"}
        return {"title": f"{state} for {audience}", "heading": "count", "privacy": privacy}

    def news(self, before: int, state: int, audience: str) -> str:
        return f"{before} became {state}" if before != state else ""

    def routes(self) -> list[web.RouteDef]:
        async def page(request: web.Request) -> web.Response:
            return await self.answer_page(request.query.get("who", "all"), work="w")

        async def stream(request: web.Request) -> web.StreamResponse:
            return await self.answer_events(request, request.query.get("who", "all"))

        async def broken(request: web.Request) -> web.Response:
            raise RuntimeError("the secret /root/path")

        async def taken(request: web.Request) -> web.Response:
            return web.Response(text="taken")

        return [
            web.get("/", page), web.get("/events", stream), web.get("/broken", broken), web.post("/form", taken),
        ]  # fmt: skip


def test_every_answer_carries_the_headers_also_errors() -> None:
    async def scenario() -> None:
        async with client_of(Counter().app()) as client:
            for path in ("/", "/static/page.css", "/nothing", "/broken"):
                answer = await client.get(path)
                assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS, path
            policy = HEADERS["Content-Security-Policy"]
            assert "unsafe" not in policy and "http" not in policy
            assert (await client.get("/")).headers["Cache-Control"] == "no-store"

    asyncio.run(scenario())


def test_a_defect_says_nothing_of_inside() -> None:
    async def scenario() -> None:
        async with client_of(Counter().app()) as client:
            answer = await client.get("/broken")
            text = await answer.text()
            assert answer.status == 500
            assert "secret" not in text and "RuntimeError" not in text and "Traceback" not in text

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8080", 200), ("localhost", 200), ("LOCALHOST:1", 200), ("[::1]:9", 200),
        ("evil.example", 421), ("evil.example:8080", 421), ("127.0.0.1.evil.example", 421), ("", 421), ("[::2]", 421),
        ("localhost.", 421),
    ],
)  # fmt: skip
def test_only_its_own_names_are_answered(host: str, status: int) -> None:
    async def scenario() -> None:
        async with client_of(Counter().app()) as client:
            assert (await client.get("/", headers={"Host": host})).status == status

    asyncio.run(scenario())


def test_forms_are_taken_from_its_own_origin_alone() -> None:
    async def scenario() -> None:
        async with client_of(Counter().app()) as client:
            own = str(client.make_url("")).rstrip("/")
            for headers, status in (
                ({"Origin": own}, 200),
                ({}, 200),
                ({"Origin": "https://evil.example"}, 403),
                ({"Origin": "null"}, 403),
                ({"Sec-Fetch-Site": "cross-site"}, 403),
            ):
                assert (await client.post("/form", headers=headers)).status == status, headers
            assert (await client.put("/form")).status == 405
            assert (await client.post("/form", data=b"x" * 100_000)).status in (200, 413)

    asyncio.run(scenario())


def test_what_is_shown_is_escaped() -> None:
    async def scenario() -> None:
        async with client_of(Counter().app()) as client:
            text = await (await client.get("/", params={"who": "<script>"})).text()
            assert "<b><script>" not in text and "&lt;b&gt;&lt;script&gt;" in text

    asyncio.run(scenario())


def test_files_are_found_by_name_alone() -> None:
    async def scenario() -> None:
        async with client_of(Counter().app()) as client:
            for name in ("..%2f..%2fpyproject.toml", "%2e%2e/page.py", "....//x", "page.css%00", "", "."):
                assert (await client.get(f"/static/{name}")).status in (404, 400), name

    asyncio.run(scenario())


def test_files_are_kept_by_browsers_and_compressed() -> None:
    async def scenario() -> None:
        page = Counter()
        async with client_of(page.app()) as client:
            url = page.assets.url("page.css")
            answer = await client.get(url)
            assert "immutable" in answer.headers["Cache-Control"]
            assert answer.headers.get("Content-Encoding") == "gzip"
            again = await client.get("/static/page.css", headers={"If-None-Match": answer.headers["ETag"]})
            assert again.status == 304
            assert (await client.get("/static/page.css?v=other")).headers["Cache-Control"] == "no-cache"

    asyncio.run(scenario())


def test_what_many_are_sent_is_compressed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    body, calls = Body(b"figures " * 1000), []
    compress = gzip.compress
    monkeypatch.setattr(gzip, "compress", lambda *args, **options: calls.append(1) or compress(*args, **options))
    taken, plain = (make_mocked_request("GET", "/", headers=headers) for headers in ({"Accept-Encoding": "gzip"}, {}))
    answers = [body.response(request, {"ETag": '"1"'}, "application/json") for request in (taken, taken, plain)]
    assert len(calls) == 1
    assert [answer.headers.get("Content-Encoding") for answer in answers] == ["gzip", "gzip", None]
    assert {(answer.headers["ETag"], answer.headers["Vary"]) for answer in answers} == {('"1"', "Accept-Encoding")}
    assert gzip.decompress(answers[0].body) == answers[2].body == body.content


def test_the_script_that_draws_is_the_packages_own() -> None:
    assets = Assets()
    assert b"plotly.js" in assets[PLOTLY].content[:200]
    assert assets.marks, "Plotly's styles for maps have another guard: the page's console would show an error"


def test_an_open_page_is_told_what_is_there_and_then_what_changed() -> None:
    async def scenario() -> None:
        page = Counter()
        async with client_of(page.app()) as client, client.get("/events") as stream:
            assert {name for name, _ in await events(stream, 3)} == {"part", "title", "figures"}
            await asyncio.sleep(1.2)  # nothing has changed: nothing is said
            page.number = 5
            told = dict(await events(stream, 3))
            assert "epsilon 5.00" in json.loads(told["part"])["html"]
            assert json.loads(told["title"]) == {"title": "5 for all"}
            assert json.loads(told["said"]) == {"words": "0 became 5"}

    asyncio.run(scenario())


def test_one_look_serves_all_pages_and_none_is_taken_where_nobody_looks() -> None:
    async def scenario() -> None:
        page = Counter()
        async with client_of(page.app()) as client:
            await asyncio.sleep(1.2)
            assert page.looks == 0
            streams = [await client.get("/events") for _ in range(20)]
            for stream in streams:
                await events(stream, 3)
            before = page.looks
            page.number = 1
            for stream in streams:
                assert "part" in dict(await events(stream, 3))
            assert page.looks - before <= 2  # the change, and perhaps one of the clock's
            for stream in streams:
                stream.close()

    asyncio.run(scenario())


def test_what_may_wait_is_looked_at_some_seconds_later_unless_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        page = Counter()
        monkeypatch.setattr("common.webpage.page._PROGRESS_SECONDS", 3600.0)
        await page.current(patient=True)
        page.batch = 1
        await page.current(patient=True)
        assert page.looks == 1
        await page.current()
        assert page.looks == 2
        page.number = 1
        await page.current(patient=True)
        assert page.looks == 3
        page.batch = 2
        monkeypatch.setattr("common.webpage.page._PROGRESS_SECONDS", 0.0)
        await page.current(patient=True)
        assert page.looks == 4

    asyncio.run(scenario())


def test_a_section_is_drawn_anew_only_where_its_content_has_changed() -> None:
    page = Counter()
    first, again, other = (page._drawn(page.content(number, "all"), "all") for number in (1, 1, 2))
    assert again["privacy"] is first["privacy"]
    assert "epsilon 2.00" in other["privacy"] and other["title"] == "2 for all"
    assert "&lt;b&gt;b&lt;" in page._drawn(page.content(2, "b"), "b")["privacy"]


def test_audiences_see_their_own() -> None:
    async def scenario() -> None:
        page = Counter()
        async with client_of(page.app()) as client:
            first, second = await client.get("/events?who=a"), await client.get("/events?who=b")
            await events(first, 3)
            await events(second, 3)
            page.number = 2
            assert json.loads(dict(await events(first, 3))["title"])["title"] == "2 for a"
            assert json.loads(dict(await events(second, 3))["title"])["title"] == "2 for b"
            first.close()
            second.close()

    asyncio.run(scenario())


def test_a_slow_reader_gets_the_newest_of_each_part() -> None:
    async def scenario() -> None:
        reader = Reader()
        for number in range(1000):
            reader.tell("a", b"%d " % number)
        reader.tell("b", b"b")
        assert await reader.take() == b"999 b"

    asyncio.run(scenario())


def test_too_many_readers_are_turned_away() -> None:
    readers = Readers()
    held = [readers.reading("all") for _ in range(MOST_READERS)]
    for one in held:
        one.__enter__()
    with pytest.raises(web.HTTPServiceUnavailable), readers.reading("all"):
        pass
    for one in held:
        one.__exit__(None, None, None)
    assert len(readers) == 0 and readers.audiences == []


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("a.org", False),
    ],
)
def test_loopback_is_told_from_the_rest(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_a_port_in_use_is_named() -> None:
    async def scenario() -> None:
        async with client_of(guarded_app(LOOPBACK)) as client:
            with pytest.raises(NetworkError, match="is in use; stop what listens there, or choose another port"):
                await serve(guarded_app(LOOPBACK), Address("127.0.0.1", client.port), None, lambda url: None)

    asyncio.run(scenario())
