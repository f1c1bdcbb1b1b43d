"""What both commands share: a failure becomes one message and a documented exit code; JSON for programs."""

from __future__ import annotations

import json
import os
import select
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Final

from common.errors import WardroundError
from common.version import VERSION

INTERNAL_ERROR: Final = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED: Final = 130  # 128 + SIGINT, as shells say it
BROKEN_PIPE: Final = 141  # 128 + SIGPIPE
STOPPED: Final = 143  # 128 + SIGTERM
EXIT_CODES: Final[Mapping[int, str]] = MappingProxyType(
    {
        0: "Success.",
        2: "Wrong arguments, or a study or policy file with an unknown key, a wrong type or an impossible value.",
        3: "Images or labels are missing, unreadable, or do not fit each other or the study.",
        4: "The coordinator's port is in use, an address is malformed or not in the coordinator's certificate, or "
        "something else answers there.",
        5: "A certificate, key or signature is missing, unreadable or expired, or somebody else's.",
        6: "Coordinator and site hold different plans: another study file, or another version.",
        7: "A run or work folder is missing, in use, of another study, or cannot be read or written.",
        8: "A message or a stored file is torn or damaged.",
        9: "The model could not be converted, or a published file does not do what it should.",
        10: "Training, evaluation or a whole study could not be completed.",
        11: "The site's operator has not approved the study, or has rejected it, or an approval was tampered with.",
        12: "The site's own policy forbids what was asked.",
        INTERNAL_ERROR: "A defect of Wardround; the message names a file with the details.",
        INTERRUPTED: "Interrupted by Ctrl-C; a simulation and `personalize` end so on SIGTERM and SIGHUP too.",
        BROKEN_PIPE: "Whoever read the output went away.",
        STOPPED: "Asked to stop by SIGTERM; the coordinator ends so on Ctrl-C too.",
    }
)
"""What each exit code of a command means, as docs/operations.md says it at more length."""


def exit_codes_epilog() -> str:
    """The exit codes as the end of a `--help` text (for `argparse.RawDescriptionHelpFormatter`)."""
    return "exit codes:\n" + "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items())


def run_command(main: Callable[[], int]) -> int:
    """Runs a command and returns its exit code, whatever happens.

    A `WardroundError` is printed and ends in its own code; Ctrl-C in 130; a reader of the output that went away in 141,
    silently; anything else is a defect, whose traceback goes to a file in the system's temporary folder, and ends in
    70. `SystemExit`, by which argparse ends, passes.
    """
    threading.excepthook = _thread_failed
    try:
        try:
            code = main()
            sys.stdout.flush()
        except BaseExceptionGroup as group:  # of a task group; its first cause is what ended the others
            raise next(_leaves(group)) from group
    except WardroundError as error:
        _say("error", str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _say("", "stopped")
        return INTERRUPTED
    except BrokenPipeError as error:
        if _output_is_broken():
            return BROKEN_PIPE
        return _defect(error)
    except Exception as error:
        return _defect(error)
    return code


def print_json(value: Any) -> None:
    """A command's result for programs."""
    print(json.dumps(value, indent=1))


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """The exceptions in a group, those that say most to a user first."""
    flat: list[BaseException] = []
    groups: list[BaseExceptionGroup[BaseException]] = [group]
    while groups:
        for error in groups.pop().exceptions:
            if isinstance(error, BaseExceptionGroup):
                groups.append(error)
            else:
                flat.append(error)
    return iter(sorted(flat, key=lambda error: not isinstance(error, WardroundError)))


def _output_is_broken() -> bool:
    """Whether nobody reads our output any more; if so, what is left of it goes nowhere."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(output, 0)  # errors and hang-ups are always reported
    broken = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if broken:  # the interpreter flushes once more when it ends, and would complain
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, output)
        os.close(null)
    return broken


def _thread_failed(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is not None and not issubclass(arguments.exc_type, SystemExit):
        _defect(arguments.exc_value)


def _defect(error: BaseException) -> int:
    summary = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    details = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix="wardround-", suffix=".log", delete=False
        ) as file:
            file.write(f"Wardround {VERSION}, Python {sys.version}\n{' '.join(sys.argv)}\n\n{details}")
        where = f"details in {file.name}"
    except OSError as failure:
        where = f"details could not be written ({failure})"
    _say("internal error", f"{summary}; this is a defect of Wardround; {where}")
    return INTERNAL_ERROR


def _say(kind: str, message: str) -> None:
    with suppress(OSError, ValueError):  # where nobody listens there is nobody to tell
        if kind and sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
            kind = f"\x1b[31m{kind}:\x1b[0m "
        elif kind:
            kind += ": "
        print(kind + message, file=sys.stderr, flush=True)
