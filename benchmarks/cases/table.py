"""The README's table of what the files of the engines hold: `python -m benchmarks.cases.table`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.cases.registry import CASES, REFUSED, WORKS

HERE = Path(__file__).parent
_BEGIN, _END = "<!-- table: begin -->", "<!-- table: end -->"
_SHOWN = 90


def read_table(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a file by case; of cases that are no more, none."""
    table = pd.read_csv(path, keep_default_na=False, na_values={"drop_pp": [""]})
    return {row["case"]: row for row in table.to_dict("records") if row["case"] in CASES}


def came(row: dict[str, Any]) -> str:
    """Return what came of a case, in a few words."""
    if not row["right"]:
        return f"**wrong**: {row['wrong']}".replace("|", "/")
    if row["exit_code"] in REFUSED:
        return "refused"
    if row["exit_code"] not in WORKS:
        return f"exit code {row['exit_code']}, named"
    if row["stage"] == "baseline":
        return "nothing faster, uncompressed"
    drop = row["drop_pp"]
    figure = "0" if abs(drop) < 0.05 else f"{-drop:+.1f}"
    return f"{figure} pp" + (", limit missed" if row["exit_code"] else "")


def _left(row: dict[str, Any]) -> str:
    said = (row["left_alone"] if row["exit_code"] in WORKS else row["said"]).replace("|", "/")
    return f"{said[:_SHOWN]}…" if len(said) > _SHOWN else said


def write_readme() -> None:
    """Put the table into the README."""
    tables = {path.stem: read_table(path) for path in sorted(HERE.glob("*.csv"), reverse=True)}
    counted = "; ".join(
        f"{engine}: {sum(row['right'] for row in rows.values())} of {len(rows)} right"
        for engine, rows in tables.items()
    )
    heads = ["case", "kind of fault", "public source", "right answer", *tables, "left alone, or refused"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, case in CASES.items():
        found = [rows.get(name) for rows in tables.values()]
        last = next((_left(row) for row in found if row is not None), "")
        cells = ["" if row is None else came(row) for row in found]
        lines.append(f"| {' | '.join([name, case.fault, case.source, case.answer, *cells, last])} |")
    path = HERE / "README.md"
    before, _, rest = path.read_text().partition(_BEGIN)
    text = "\n".join([counted + ".", "", *lines])
    path.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{rest.partition(_END)[2]}")


if __name__ == "__main__":
    write_readme()
