"""Templates to HTML: every value is escaped, and what a template asks for that is not there is an error."""

from __future__ import annotations

import datetime
import http
from collections.abc import Mapping
from typing import Any

from aiohttp import web
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from common.webpage.wording import amount, figure, relative_day
from common.wording import counted

_WORDS = {
    401: "You are not logged in, or your login has ended.",
    403: "Your role may not see this.",
    404: "There is nothing here.",
    413: "That is too long.",
    421: "This page does not answer to the name that you asked by.",
    500: "This is a defect of Wardround; the log of this page says more.",
    503: "Too many pages are open; close some.",
}


def environment(*packages: str) -> Environment:
    """Templates of these packages, and of this one."""
    made = Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in (*packages, "common.webpage")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "figure": figure,
        "amount": amount,
        "moment": moment,
        "day": day,
        "clock": clock,
        "code": code,
        "counted": counted,
    }
    made.globals["relative_day"] = relative_day
    return made


def moment(seconds: float | None) -> str:
    """A Unix time as HTML's `datetime` has it, in UTC."""
    if not seconds:
        return ""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def day(seconds: float | None) -> str:
    """The day of a Unix time, in UTC."""
    return moment(seconds)[:10]


def clock(seconds: float) -> str:
    """Hours and minutes of a Unix time, in UTC."""
    return moment(seconds)[11:16]


def code(text: str) -> Markup:
    """Text in which commands stand between backticks, as HTML.

    >>> code("run `wardround invite <name>` there")
    Markup('run <code>wardround invite &lt;name&gt;</code> there')
    """
    parts = str(escape(text)).split("`")
    if len(parts) % 2 == 0:  # one that opens and never closes
        return escape(text)
    return Markup("".join(f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts)))


_errors = environment()


def error_page(status: int, headers: Mapping[str, str]) -> web.Response:
    """The page of an error: what it is, and nothing of what is inside."""
    phrase = http.HTTPStatus(status).phrase
    words = _WORDS.get(status, "This cannot be answered.")
    kept: dict[str, Any] = {name: value for name, value in headers.items() if name in ("Allow", "Location")}
    body = _errors.get_template("error.html").render(status=status, phrase=phrase, words=words)
    return web.Response(text=body, status=status, content_type="text/html", headers=kept)
