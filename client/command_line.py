"""The parser of `wardround-site`: an argument that means nothing is told with the usage of its sub-command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

_UNQUOTED = (
    "argument --label-map: the rule must stand in quotes, such as --label-map '1 -> 1': the shell took the > for "
    "itself, and has made an empty file in this folder that is called like the class; remove it"
)


class CommandParser(argparse.ArgumentParser):
    """As its base, whose sub-parsers leave unknown arguments to the parser above them, with the usage of that one."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Ends the program with exit code 2 where an argument is left over."""
        is_unquoted = (
            args is not None and "-" in args and any(text.startswith(("--label-map", "--labels-map")) for text in args)
        )
        if is_unquoted and any("--label-map" in action.option_strings for action in self._actions):
            self.error(_UNQUOTED)  # nothing takes a single dash: it is what the shell leaves of an arrow
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return found, left
