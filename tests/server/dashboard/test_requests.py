"""Whatever is sent to a page: it answers, never with a 500, and says nothing of the machine."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.dashboard.access import Access
from server.dashboard.app import Dashboard
from server.dashboard.tokens import PageTokens
from tests.common.webpage.pages import client_of, in_thread
from tests.server.dashboard.runs import WrittenRun

LEAKS = (b"Traceback", b'File "/', b"root:x", b"site-packages", b"page_tokens", b"BEGIN PRIVATE KEY", b"BEGIN EC")
PATHS = (
    "/", "/events", "/figures.json", "/rounds.csv", "/login", "/logout", "/static/", "/samples/", "/samples/6/0/0/",
    "/samples/6/0/0/image.png", "/static/page.css", "/samples/99999999999999999999/0/0/image.png",
)  # fmt: skip
CLIMBS = ("..", "%2e%2e", "..%2f", "%2F", "%00", "....//", "\\..\\", "~", "identity", "coordinator.lock", "study.yaml")
text = st.text(st.characters(codec="ascii", exclude_characters=" \r\n\0#?"), max_size=30)
segments = st.one_of(text, st.sampled_from(CLIMBS), st.integers(-1, 10**12).map(str))
paths = st.one_of(
    st.builds(lambda start, rest: start + "/".join(rest), st.sampled_from(PATHS), st.lists(segments, max_size=4)),
    st.lists(segments, max_size=6).map(lambda parts: "/" + "/".join(parts)),
)
methods = st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "X"])
values = st.text(st.characters(codec="latin-1", exclude_characters="\r\n\0"), max_size=60)
headers = st.dictionaries(
    st.sampled_from(
        ["Host", "Cookie", "If-None-Match", "Accept-Encoding", "Range", "Origin", "Content-Type", "X-Test"]
    ),
    st.one_of(
        values, st.sampled_from(["127.0.0.1", "localhost:1", "wardround_page=x", "multipart/form-data; boundary=x"])
    ),
    max_size=4,
)
fuzzing = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=["open", "login"])
def page(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[tuple[str, Path]]:
    run = WrittenRun(tmp_path_factory.mktemp("fuzzed") / "run", done=3)
    run.samples()
    run.identities()
    PageTokens(run.folder.path).make("observer", "kim", 4e9)
    access = Access(PageTokens(run.folder.path) if request.param == "login" else None)
    with in_thread(Dashboard(run.folder, access, ["127.0.0.1", "localhost"]).served()) as url:
        yield url, run.folder.path


def answer(url: str, method: str, path: str, sent: dict[str, str], body: bytes) -> tuple[int, bytes]:
    """Status and body; of a stream only its beginning."""
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=20)
    try:
        connection.putrequest(method, path, skip_host="Host" in sent, skip_accept_encoding=True)
        for name, value in sent.items():
            connection.putheader(name, value.encode("latin-1"))
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        return response.status, response.read1(1 << 20) if path.startswith("/events") else response.read()
    finally:
        connection.close()


@fuzzing
@given(method=methods, path=paths, sent=headers, body=st.binary(max_size=200))
def test_no_request_brings_it_down_or_makes_it_talk(
    page: tuple[str, Path], method: str, path: str, sent: dict[str, str], body: bytes
) -> None:
    url, folder = page
    try:
        status, said = answer(url, method, path, sent, body)
    except (http.client.HTTPException, ValueError):  # nothing that HTTP allows to be sent
        return
    assert status < 500, (method, path, sent)
    assert not any(leak in said for leak in LEAKS), (path, said[:500])
    if status != 200:
        assert str(folder).encode() not in said


@settings(parent=fuzzing, max_examples=60)
@given(
    content=st.one_of(
        st.binary(max_size=300), st.binary(max_size=100).map(lambda x: b"GET / HTTP/1.1\r\n" + x + b"\r\n\r\n")
    )
)
def test_bytes_that_are_no_http_are_turned_away(page: tuple[str, Path], content: bytes) -> None:
    url, folder = page
    where = urlsplit(url)
    with socket.create_connection((where.hostname or "", where.port or 0), timeout=20) as line:
        line.sendall(content)
        line.shutdown(socket.SHUT_WR)
        said = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := line.recv(65536):
                said += piece
    assert not any(leak in said for leak in LEAKS)
    assert b" 500 " not in said.split(b"\r\n")[0]
    if b" 200 " not in said.split(b"\r\n")[0]:
        assert str(folder).encode() not in said


def test_it_still_answers_afterwards(page: tuple[str, Path]) -> None:
    assert answer(page[0], "GET", "/login", {}, b"")[0] == 200


def test_files_of_the_run_cannot_be_reached(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.samples()
    run.identities()

    async def scenario() -> None:
        async with client_of(Dashboard(run.folder, Access(None), ["127.0.0.1"]).served()) as client:
            for path in (
                "/study.yaml", "/status.json", "/identity/coordinator/identity.key", "/static/../study.yaml",
                "/samples/../study.yaml", "/samples/6/0/0/..%2f..%2f..%2fstudy.png", "/samples/6/0/0/index.json",
                "/samples/round-0006/index.json",
            ):  # fmt: skip
                assert (await client.get(path)).status in (400, 404), path

    asyncio.run(scenario())


def test_the_row_of_a_round_is_told_at_once_and_the_progress_of_batches_later(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.status()
    page = Dashboard(run.folder, Access(None), ["127.0.0.1"])
    before = page.stamp()
    run.status(sites={"west": {"batch": 3}})
    progress = page.stamp()
    assert progress[0] == before[0] and progress[1] != before[1]
    run.end_round()
    assert page.stamp()[0] != before[0]
