"""A run's page in a process of its own beside the run: it may fail, be killed or be slow, and the run goes on."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from common.wire.addresses import is_loopback, parse_address
from server.run_folder import RunFolder

_GRACE_SECONDS: Final = 3.0
_ROOT: Final = Path(__file__).resolve().parents[2]
LOG: Final = "page.log"


@contextlib.contextmanager
def page_beside(
    run: RunFolder, listen: str | None, identity: Path | None, say: Callable[[str], None]
) -> Iterator[None]:
    """A page in a process of its own while a run goes on; whatever becomes of the page, the run goes on.

    Parameters
    ----------
    listen : None: no page.
    say : told where the page is, or why there is none.

    Raises
    ------
    NetworkError : `listen` is no address; nothing has begun then.
    """
    if listen is None:
        yield
        return
    address = parse_address(listen)
    url = f"{'http' if is_loopback(address.host) else 'https'}://{address}/"
    command = [sys.executable, "-P", "-m", "server.cli", "page", "--run", str(run.path), "--listen", listen]
    command += ["--with-stdin", *(["--identity", str(identity)] if identity is not None else [])]
    process: subprocess.Popen[bytes] | None = None
    try:
        with (run.path / LOG).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # it ends when this end closes, however this process ends
                stdout=log,
                stderr=log,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))},
                start_new_session=True,
            )
        say(f"The page of this run: {url} (what becomes of it is in {run.path / LOG})")
    except OSError as error:
        say(f"There is no page of this run: it cannot be started ({error.strerror})")
    try:
        yield
    finally:
        if process is not None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS)
            process.kill()
            process.wait()
            assert process.stdin is not None, "it was asked for"
            process.stdin.close()
