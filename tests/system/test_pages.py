"""The pages in a real browser: alone on loopback, following what happens, readable by everybody."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.site_status import SiteStatus
from common.security.certificates import CERTIFICATE, KEY, issue
from common.security.revocation import RevocationFile, revoke
from common.security.signing import load_signer
from server.dashboard.setup import prepare
from server.dashboard.tokens import PageTokens
from tests.common.webpage.pages import in_thread
from tests.server.dashboard.runs import WrittenRun
from tests.system.browsing import CHROMIUM, FOLLOWING, command_page

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium is installed here, and pages are tested in a real browser"
    ),
]
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "narrow": {"color_scheme": "light", "viewport": {"width": 375, "height": 740}},
}


class Live(WrittenRun):
    """A run that seems to go on, and where its page is."""

    url = ""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    run = Live(tmp_path_factory.mktemp("live") / "run", dimensions=3)
    run.audit()
    run.samples(3)
    run.samples(6)
    run.status()
    with run.folder.locked(), command_page("server.cli", "--run", str(run.folder.path)) as run.url:
        yield run


def test_a_page_loads_whole_without_any_other_host(live: Live, tab: Any) -> None:
    opened = tab()
    page = opened.open(live.url)
    opened.see_all()
    assert page.locator("#now .headline").inner_text().startswith("Training, round 7 of 24")
    assert page.locator("#cohort tbody tr").count() == 5
    assert page.locator("svg.main-svg").count() >= 5
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_the_end_of_a_round_appears_and_is_said(live: Live, tab: Any) -> None:
    page = tab().open(live.url)
    ended = live.done + 1
    live.end_round()
    live.status()
    page.wait_for_selector(f'tr[data-round="{ended}"]', state="attached")
    page.wait_for_function(f"() => document.getElementById('said').textContent.includes('round {ended}')")
    assert f"{ended} of 24 rounds done" in page.locator("#now").inner_text()
    page.locator("[data-chart=quality]").scroll_into_view_if_needed()
    page.wait_for_function(f"() => document.querySelector('[data-chart=quality]').data?.[0].x.at(-1) === {ended}")


def test_what_a_reader_has_open_and_holds_stays_when_the_page_changes(live: Live, tab: Any) -> None:
    page = tab().open(live.url)
    page.locator("#quality-tables > summary").click()
    page.locator("#quality-tables .scroll").first.focus()
    page.evaluate("window.held = document.activeElement")
    live.end_round()
    live.status()
    page.wait_for_selector(f'tr[data-round="{live.done}"]')
    assert page.evaluate("document.activeElement === window.held")
    assert page.locator("#quality-tables").get_attribute("open") is not None
    assert page.locator("#quality-tables tbody tr").first.is_visible()


def test_a_killed_site_is_shown_and_so_is_its_return(live: Live, tab: Any) -> None:
    page = tab().open(live.url)
    row = page.locator("#cohort tr", has=page.locator("th", has_text="west"))
    live.status(sites={"west": {"connected": False, "stage": "waiting", "last_seen_at": time.time() - 90}})
    row.get_by_text("not connected").wait_for()
    assert "its site to dial in" in row.inner_text()
    page.locator("#alerts", has_text="west").wait_for()
    assert page.locator("#now .next").inner_text().startswith("What to do: ")
    live.status()
    row.get_by_text("training", exact=True).wait_for()


def test_a_coordinator_that_goes_is_missed_and_one_that_comes_back_is_followed(
    tmp_path: Path,
    serve: Any,
    tab: Any,
) -> None:
    run = Live(tmp_path / "run")
    with contextlib.ExitStack() as lock:
        lock.enter_context(run.folder.locked())
        page = tab().open(serve("server.cli", "--run", run.folder.path))
        assert page.locator("#now .chip").inner_text() == "training"
        lock.close()  # as when it is killed: it says nothing
        page.locator("#now .chip", has_text="not running").wait_for()
        assert "Start the coordinator again" in page.locator("#now .next").inner_text()
        assert "coordinator ended without a word" in page.locator("#alerts").inner_text()
        with run.folder.locked():
            run.status("waiting for sites", kind=None)
            page.locator("#now .chip", has_text="waiting for sites").wait_for()
            run.status()
            page.locator("#now .chip", has_text="training").wait_for()
            assert page.locator("#line").inner_text() == "live"


def test_a_page_whose_server_goes_says_so(tmp_path: Path, browser: Any) -> None:
    run = Live(tmp_path / "run")
    context = browser.new_context()  # its console says that the line broke
    page = context.new_page()
    with command_page("server.cli", "--run", str(run.folder.path)) as url:
        page.goto(url)
        page.locator("#line", has_text="live").wait_for()
    page.locator("#line", has_text="no line to this page's server").wait_for()
    context.close()


def test_fifty_sites_and_five_hundred_rounds_are_drawn(tmp_path: Path, serve: Any, tab: Any) -> None:
    run = Live(tmp_path / "run", sites=50, rounds=500, done=499)
    with run.folder.locked():
        opened = tab()
        page = opened.open(serve("server.cli", "--run", run.folder.path))
        opened.see_all()
        assert page.locator("#cohort tbody tr").count() == 50
        points = page.evaluate(
            "Math.max(...[...document.querySelectorAll('[data-chart]')].flatMap(e => e.data.map(d => d.x.length)))"
        )
        assert 100 < points <= 200
        assert page.locator("[data-chart=origin-dice] .heatmaplayer image").count() == 1
        run.end_round()
        run.status()
        page.wait_for_selector('tr[data-round="500"]', state="attached")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("where", ["run", "site", "login"])
def test_everybody_can_read_it(
    live: Live,
    tmp_path: Path,
    serve: Any,
    tab: Any,
    look: str,
    where: str,
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    opened = tab(**LOOKS[look])
    with contextlib.ExitStack() as stack:
        if where == "site":
            stack.enter_context(SiteStatus(tmp_path, "cells", "north"))({"state": "training", "batch": 1, "batches": 8})
            opened.open(serve("client.cli", "--work", tmp_path))
        elif where == "login":
            opened.page.goto(serve("server.cli", "--run", live.folder.path, "--login"))
        else:
            live.status(sites={"west": {"connected": False, "stage": "waiting"}, "south": {"stage": "failed"}})
            page = opened.open(live.url)
            opened.see_all()
            page.locator("#quality-tables > summary").click()
        found = axe.Axe().run(opened.page).response["violations"]
        serious = [
            (one["id"], [node["html"][:150] for node in one["nodes"]])
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
        assert serious == []
        assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_slices_of_a_volume_are_gone_through_by_keyboard(live: Live, tab: Any) -> None:
    page = tab().open(live.url)
    slider, picture = page.locator("#slice-0"), page.locator('[data-case="0"] [data-picture="truth"]')
    assert picture.get_attribute("src") == "/samples/6/0/1/truth.png"
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert picture.get_attribute("src") == "/samples/6/0/2/truth.png"
    assert "z = 6" in page.locator("#samples").inner_text()
    page.locator("#sample-round").select_option("3")
    assert picture.get_attribute("src") == "/samples/3/0/2/truth.png"
    live.samples(live.done)  # newer ones come: what the reader has chosen stays
    page.locator("#sample-round option", has_text=f"{live.done} (newest)").wait_for(state="attached")
    assert picture.get_attribute("src") == "/samples/3/0/2/truth.png"


def test_dice_and_iou_are_a_choice(live: Live, tab: Any) -> None:
    opened = tab()
    page = opened.open(live.url)
    opened.see_all()
    page.get_by_text("IoU", exact=True).first.click()
    chart = page.locator("[data-charts=class]")
    assert chart.get_attribute("data-chart") == "class-iou"
    page.wait_for_function("() => document.querySelector('[data-charts=class]').layout.yaxis.title.text === 'IoU'")


def test_a_login_is_asked_for_given_and_taken_away(live: Live, browser: Any) -> None:
    tokens = PageTokens(live.folder.path)
    token, text = tokens.make("observer", "kim", time.time() + 3600)
    context = browser.new_context()  # its console says that a login was refused
    page = context.new_page()
    with command_page("server.cli", "--run", str(live.folder.path), "--login") as url:
        page.goto(url)
        assert page.url.endswith("/login") and "cells" not in page.content()
        page.get_by_label("Token").fill("wrp_wrong")
        page.keyboard.press("Enter")
        page.get_by_role("alert").wait_for()
        page.get_by_label("Token").fill(text)
        page.keyboard.press("Enter")
        page.locator("#line", has_text="live").wait_for()
        assert page.locator(".top .end").inner_text().startswith("observer kim")
        assert page.locator("#cohort progress").count() == 0
        assert page.evaluate("document.cookie") == ""
        tokens.revoke(token.id, time.time())
        page.wait_for_url("**/login")
    context.close()


def test_a_certificate_of_the_study_opens_the_page_until_it_is_revoked(
    tmp_path: Path, browser: Any, request: pytest.FixtureRequest
) -> None:
    run = Live(tmp_path / "run")
    coordinator, member = run.identities(), run.folder.identity / "member"
    issue(member, run.folder.identity / "authority", "kim", "observer")
    served = prepare(run.folder, "0.0.0.0:8443")  # as beyond loopback, and then on loopback alone
    run.status()
    with run.folder.locked(), in_thread(served.app, served.tls) as url:
        certificate = {"origin": url, "certPath": str(member / CERTIFICATE), "keyPath": str(member / KEY)}
        # The browser does not know the study's authority; whether pages are told apart by it is tested without one.
        context = browser.new_context(ignore_https_errors=True, client_certificates=[certificate])
        request.addfinalizer(context.close)
        page = context.new_page()
        page.goto(url)
        page.wait_for_function(FOLLOWING)
        assert "observer kim" in page.locator("header").inner_text()
        signer = load_signer(coordinator)
        revoke(RevocationFile(coordinator, signer.authority), signer, "observer", "kim", "laptop stolen", time.time())
        page.wait_for_url(f"{url}/login")  # by itself
        stranger = browser.new_context(ignore_https_errors=True)
        request.addfinalizer(stranger.close)
        page = stranger.new_page()
        page.goto(url)
        assert page.url == f"{url}/login"


def test_the_pages_of_a_real_study(
    undisturbed: tuple[Any, subprocess.CompletedProcess[str]],
    serve: Any,
    tab: Any,
) -> None:
    setting, done = undisturbed
    assert done.returncode == 0, done.stderr
    opened = tab()
    page = opened.open(serve("server.cli", "--run", setting.run.path))
    opened.see_all()
    assert page.locator("#now .chip").inner_text() == "finished"
    assert page.locator("#versions tbody tr").count() == 1
    assert page.locator("#time svg.main-svg").count() >= 1
    assert page.locator("#samples img").first.evaluate("image => image.naturalWidth") > 0
    assert "signed head" in page.locator("#audit").inner_text().lower()
    page = tab().open(serve("client.cli", "--work", setting.run.path / "sites" / "east"))
    assert page.locator("#now .chip").inner_text() == "finished"
    assert page.locator("#left tbody tr").count() >= 3
    assert page.locator("#approvals .chip").inner_text() == "approved"
