"""What `--data` means: registered data sets by their names, or a folder of cases."""

from __future__ import annotations

from pathlib import Path

from client.data_cli import open_registry, registry_path
from client.selection import SiteCases, select_cases, select_folder
from common.errors import UsageError
from common.study import Study


def select(study: Study, data: str, work: Path, registry: Path | None) -> SiteCases:
    """The cases of registered data sets, or of a folder; a registered name goes before a folder of that name.

    Parameters
    ----------
    data : names of data sets, separated by commas, or a folder's path.
    work : a folder where what was found in a folder of cases is remembered.
    registry : the file where data sets are registered, as given.

    Raises
    ------
    UsageError : it is neither.
    DataError : see `client.selection`.
    """
    names = data.split(",")
    if registry is not None or registry_path(registry).exists():
        with open_registry(registry) as opened:
            known = {data_set.name for data_set in opened.data_sets()}
            if known.issuperset(names) or not Path(data).is_dir():
                return select_cases(study, names, opened)
    if Path(data).is_dir():
        return select_folder(study, Path(data), work / "folder.sqlite")
    raise UsageError(
        f"--data {data}: neither a registered data set nor a folder; register it with `wardround-site data add`, or "
        "correct the path"
    )
