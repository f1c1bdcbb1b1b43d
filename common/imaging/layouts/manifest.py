"""Tables at the top of a folder: `cases.csv` says which files make a case, `patients.csv` whose images they are.

Both are CSV with a first row of column names, separated by commas or semicolons, in UTF-8.

`cases.csv` has the column `case`; the columns `patient` and `label` may follow, and each other column is a modality
(`image` where there is but one). A cell is the path of a file or of the folder of a DICOM series, from the table's
folder on; an empty cell is an image that is not there. `patients.csv` has the columns `case` and `patient`.
"""

from __future__ import annotations

import csv
import io
import unicodedata
from pathlib import Path

from common.imaging.case import Case
from common.imaging.findings import Code, Finding
from common.imaging.layouts.options import Found, Layout
from common.imaging.layouts.tree import is_there
from common.wording import listed

CASES_TABLE = "cases.csv"
PATIENTS_TABLE = "patients.csv"
_ADVICE = "Correct the table: a first row of column names, then a row for each case, separated by commas, in UTF-8."


def cases_of_table(folder: Path, layout: Layout) -> Found:
    """The cases of `cases.csv`. Rows that say nothing usable are findings; whether files exist is not looked at."""
    found = Found()
    rows = _rows(folder / CASES_TABLE, ("case",), Code.TABLE, found.findings)
    cases: dict[str, Case] = {}
    for number, row in rows:
        name = row.pop("case")
        where = f"{CASES_TABLE} row {number}"
        patient = row.pop("patient", "") or layout.patient_in(name) or name
        label = row.pop("label", "")
        images = {
            "" if column.lower() == "image" else column: layout.source(folder / cell)
            for column, cell in row.items()
            if cell
        }
        if not name:
            found.findings.append(_fault(f"{where}: has no case's name", case=where))
        elif name in cases:
            message = f"{where}: is about a case of a row before"
            found.findings.append(Code.NAME_TWICE.finding(message, case=name, file=CASES_TABLE, advice=_ADVICE))
        elif not images:
            found.findings.append(_fault(f"{where}: names no image", case=name))
        else:
            cases[name] = Case(name, patient, images, layout.source(folder / label) if label else None)
    found.cases.extend(cases[name] for name in sorted(cases))
    return found


def patients_of_table(folder: Path, findings: list[Finding]) -> dict[str, str]:
    """The patient of each case by `patients.csv`; empty where there is no such table."""
    if not is_there(folder / PATIENTS_TABLE):
        return {}
    patients: dict[str, str] = {}
    for number, row in _rows(folder / PATIENTS_TABLE, ("case", "patient"), Code.UNREADABLE, findings):
        row["case"] = unicodedata.normalize("NFC", row["case"])  # as names of files are
        if not row["case"] or not row["patient"] or patients.get(row["case"], row["patient"]) != row["patient"]:
            findings.append(
                Code.UNREADABLE.finding(
                    f"{PATIENTS_TABLE} row {number}: does not give one patient to one case",
                    case=row["case"] or f"{PATIENTS_TABLE} row {number}",
                    file=PATIENTS_TABLE,
                    advice="Correct the row; without it, cases of one patient may train and validate.",
                )
            )
        else:
            patients[row["case"]] = row["patient"]
    return patients


def rows_without_cases(names: list[str]) -> list[Finding]:
    """An error about the folder: a name that is written in another way leaves its case without its patient."""
    if not names:
        return []
    return [
        Code.UNREADABLE.finding(
            f"{PATIENTS_TABLE}: no case is called {listed(names)}",
            file=PATIENTS_TABLE,
            advice="Write the names as `data check` does, or remove the rows: otherwise cases of one patient may train "
            "and validate.",
        )
    ]


def cases_without_rows(names: list[str]) -> list[Finding]:
    """A warning about the folder: each of these cases counts as a patient of its own."""
    if not names:
        return []
    return [
        Code.IGNORED_FILE.finding(
            f"{PATIENTS_TABLE}: has no row for {listed(names)}",
            file=PATIENTS_TABLE,
            advice="Add the rows, unless each of these cases is a patient's only one.",
        )
    ]


def _rows(
    path: Path, required: tuple[str, ...], code: Code, findings: list[Finding]
) -> list[tuple[int, dict[str, str]]]:
    """Numbers (the first row is 1) and cells of the rows, by column; faults become findings of the code."""
    try:
        text = path.read_text("utf-8-sig")  # spreadsheets write a byte order mark
        if "\0" in text:
            raise csv.Error("it holds zero bytes")
        header = text.partition("\n")[0]
        separator = ";" if header.count(";") > header.count(",") else ","
        table = list(csv.reader(io.StringIO(text), delimiter=separator, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = (
            error.strerror if isinstance(error, OSError) else "not UTF-8" if isinstance(error, ValueError) else error
        )
        findings.append(code.finding(f"table {path.name}: cannot be read ({reason})", file=path.name, advice=_ADVICE))
        return []
    columns = [column.strip() for column in table[0]] if table else []
    columns = [column.lower() if column.lower() in ("case", "patient", "label") else column for column in columns]
    missing = [column for column in required if column not in columns]
    # Studies name modalities whatever the capitals: of T1 and t1 one would be lost.
    if missing or len({column.lower() for column in columns}) != len(columns) or "" in columns:
        fault = f"has no column {missing[0]!r}" if missing else "has a column without a name, or one name twice"
        findings.append(code.finding(f"table {path.name}: {fault}", file=path.name, advice=_ADVICE))
        return []
    rows = []
    for number, cells in enumerate(table[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(columns):
            where = f"{path.name} row {number}"
            message = f"{where}: has {len(cells)} cells, not {len(columns)}"
            findings.append(code.finding(message, case=where, file=path.name, advice=_ADVICE))
            continue
        rows.append((number, {column: cell.strip() for column, cell in zip(columns, cells, strict=True)}))
    return rows


def _fault(message: str, case: str = "") -> Finding:
    return Code.TABLE.finding(message, case=case, file=CASES_TABLE)
