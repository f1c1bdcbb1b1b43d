"""`wardround-site data`: register folders of images, check them, show what is known of a case, forget them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UsageError

if TYPE_CHECKING:
    from client.registry import Registry

REGISTRY_VARIABLE = "WARDROUND_SITE_REGISTRY"
_HTML = "write a report with pictures; it stays at the site"
_DEFAULT_REGISTRY = "wardround-site.sqlite"


def add_data_commands(commands: Any) -> None:
    """Adds `data` and what belongs to it to the sub-commands of `wardround-site` (what `add_subparsers` returned)."""
    data = commands.add_parser("data", help="register this site's images and check them", description=__doc__)
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--registry",
        type=Path,
        metavar="FILE",
        help=f"the site's registry (default: ${REGISTRY_VARIABLE}, or {_DEFAULT_REGISTRY} in this folder)",
    )
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON")

    add = actions.add_parser("add", parents=[common, as_json], help="register a folder under a name")
    add.add_argument("name", metavar="NAME", help="a name of your choice")
    add.add_argument("path", type=Path, metavar="PATH", help="the folder; it is read in place")
    add.add_argument(
        "--label-map",
        "--labels-map",
        action="append",
        default=[],
        metavar="'[CLASS:] VALUE -> INDEX'",
        help="the class that a label's stored value means, such as 'tumour: 4 -> 1'; give it again for each value",
    )
    add.add_argument(
        "--channel-map",
        "--modality",
        action="append",
        default=[],
        metavar="'NAME=PATTERN'",
        help="a modality and what its series or files have in their names, such as 'FLAIR=dark.?fluid'",
    )
    add.add_argument(
        "--label",
        default="",
        metavar="PATTERN",
        help="what labels have in their names, where they lie among the images (not with images/ and labels/)",
    )
    add.add_argument(
        "--patient-pattern",
        default="",
        metavar="REGEX",
        help="finds the patient in a case's name (in DICOM: in its folders), as its first group, such as '^(P[0-9]+)_'",
    )
    add.add_argument(
        "--level",
        type=int,
        default=0,
        metavar="N",
        help="read images and labels at this level of their pyramids (default: 0, the full resolution)",
    )
    add.set_defaults(handler=_handler("add"))

    add.epilog = "Ends in 3, and registers nothing, where the folder holds no case."
    show_all = actions.add_parser("list", parents=[common, as_json], help="what is registered")
    show_all.set_defaults(handler=_handler("list_all"))

    check = actions.add_parser("check", parents=[common, as_json], help="examine a data set's cases")
    check.add_argument(
        "name",
        metavar="NAME|FOLDER",
        help="registered data sets (several separated by commas), or a folder, which stays unregistered",
    )
    check.add_argument("--study", type=Path, metavar="FILE", help="check against what this study asks for")
    check.add_argument("--html", type=Path, metavar="FILE", help=_HTML)
    check.set_defaults(handler=_handler("check"))

    before_start = commands.add_parser(
        "check", parents=[common, as_json], help="check this site's images and labels against a study (`data check`)"
    )
    before_start.add_argument("study", type=Path, metavar="STUDY", help="the coordinator's study file")
    before_start.add_argument(
        "--data",
        dest="name",
        required=True,
        metavar="NAME|FOLDER",
        help="as for `start`: registered data sets (several separated by commas), or a folder of cases",
    )
    before_start.add_argument("--html", type=Path, metavar="FILE", help=_HTML)
    before_start.set_defaults(handler=_handler("check"))

    show = actions.add_parser("show", parents=[common, as_json], help="what is known of one case")
    show.add_argument("case", metavar="CASE", help="its name, as `data check` prints it")
    show.add_argument("--data", metavar="NAME", help="the data set, where several have such a case")
    show.add_argument("--study", type=Path, metavar="FILE", help="judge the case by what this study asks for")
    show.set_defaults(handler=_handler("show"))

    remove = actions.add_parser("remove", parents=[common], help="forget a data set; its files stay")
    remove.add_argument("name", metavar="NAME", help="of the data set, as `data list` prints it")
    remove.set_defaults(handler=_handler("remove"))


def registry_path(given: Path | None) -> Path:
    """Where the registry is that a command uses."""
    return given or Path(os.environ.get(REGISTRY_VARIABLE) or _DEFAULT_REGISTRY)


def open_registry(given: Path | None, *, make: bool = False) -> Registry:
    """The registry that a command uses.

    Raises
    ------
    UsageError : there is none, and it is not to be made.
    RunFolderError : it cannot be used.
    """
    from client.registry import Registry

    path = registry_path(given)
    if not make and not path.exists():
        raise UsageError(
            f"{path}: there is no registry; register data with `wardround-site data add`, or give the right --registry"
        )
    return Registry(path)


def _handler(name: str) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        from client import data_commands  # what reads images takes a while to load

        action: Callable[[argparse.Namespace], int] = getattr(data_commands, name)
        return action(options)

    return run
