"""`wardround-site page`: the hospital's own page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

DEFAULT_LISTEN: Final = "127.0.0.1:8081"


def add_page_command(commands: Any) -> None:
    """Adds `page` to the sub-commands of `wardround-site`."""
    page = commands.add_parser(
        "page",
        help="show this site as a live page, on this machine",
        description="Serves a page of what this site does, what left it and what was approved, until it is stopped. "
        "It only reads the --work folder, and is served on loopback alone: a site opens no port to anybody.",
    )
    page.add_argument("--work", type=Path, required=True, help="the --work folder the site was started with")
    page.add_argument(
        "--listen", metavar="HOST:PORT", default=DEFAULT_LISTEN, help="loopback address (default: %(default)s)"
    )
    page.add_argument(
        "--authority", type=Path, metavar="FILE", help="ca.crt of the study (default: $WARDROUND_AUTHORITY)"
    )
    page.set_defaults(handler=_page)


def _page(options: argparse.Namespace) -> int:
    import asyncio

    from client.site_page.app import SitePage
    from common.errors import RunFolderError, UsageError
    from common.security.authorities import trusted_authority
    from common.webpage.serving import serve
    from common.wire.addresses import is_loopback, parse_address

    address = parse_address(options.listen)
    if not is_loopback(address.host):
        raise UsageError(
            f"--listen {options.listen}: a site's page is for its own machine; give a loopback address such as "
            f"{DEFAULT_LISTEN}, and reach it from elsewhere by an SSH tunnel"
        )
    if not options.work.is_dir():
        raise RunFolderError(f"{options.work}: the folder does not exist; give the --work folder of a site")
    authority = trusted_authority(options.authority)

    def say(url: str) -> None:
        print(f"The page of {options.work}: {url} (of this machine alone); stop it with Ctrl-C", flush=True)

    asyncio.run(serve(SitePage(options.work, authority).app(), address, None, say))
    return 0
