"""The committed results as a Markdown table; ``python -m benchmarks.strangers.table`` writes it into the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autocompress.files import read_json, write_text
from autocompress.runs.records import EQUAL
from benchmarks.strangers.networks import NETWORKS

HERE = Path(__file__).parent
_BEGIN, _END = "<!-- table: begin -->", "<!-- table: end -->"
_RIVALS = ("nncf", "nncf-accuracy-control", "onnxruntime-static", "onnxruntime-dynamic")
_HEAD = (
    "| network | limit | met? | ratio | drop | minutes asked, taken | trials | NNCF | with accuracy control "
    "| ONNX Runtime static | dynamic | a rival better? |"
)
# A drop that differs by less is a tie, in points.
_TIE_PP = 0.1


def table(results: Path) -> str:
    """Return the results of a folder as a Markdown table with a sentence that counts them."""
    documents = [read_json(results / f"{name}.json") for name in NETWORKS if (results / f"{name}.json").exists()]
    searched = [document for document in documents if "search" in document]
    met = sum(_met(document) for document in searched)
    beaten = sum(bool(_better(document)) for document in searched)
    rows = [_row(document) for document in documents]
    timed = sum(bool(document.get("compared", {}).get("timed")) for document in searched)
    nobody = sum(not _met(document) and not _rival_met(document) for document in searched)
    count = (
        f"{met} of {len(searched)} searches met both limits; of the others, no rival's file met them in {nobody}. "
        f"A rival was better in {beaten} of the {timed} whose rivals were timed."
        if searched
        else "No search has been run yet."
    )
    return "\n".join([_HEAD, "|" + "---|" * (_HEAD.count("|") - 1), *rows, "", count])


def write_table(results: Path, readme: Path | None) -> str:
    """Return the table, and lay it between the marks of a README."""
    text = table(results)
    if readme is not None:
        before, _, rest = readme.read_text().partition(_BEGIN)
        after = rest.partition(_END)[2]
        write_text(readme, f"{before}{_BEGIN}\n{text}\n{_END}{after}")
    return text


def _row(document: dict[str, Any]) -> str:
    asked, network = document["asked"], NETWORKS[document["network"]]
    limit = f"{asked['target_latency']}, {asked['max_drop'].removesuffix('pp')} points"
    cells = [f"{document['network']}: {network.what}, {network.measured}", limit, *_search_cells(document)]
    compared = document.get("compared", {})
    rows = {row["rival"]: row for row in compared.get("rows", ())}
    cells += [_rival_cell(rows.get(rival), compared) for rival in _RIVALS]
    unknown = "not timed" if "search" in document else ""
    cells.append(", ".join(_better(document)) or ("no" if compared.get("timed") else unknown))
    return "| " + " | ".join(cells) + " |"


def _search_cells(document: dict[str, Any]) -> list[str]:
    search = document.get("search")
    if search is None:
        return [""] * 5
    minutes = f"{document['asked']['minutes']:g}, {search['seconds'] / 60:.1f}"
    summary = search.get("summary")
    if summary is None:
        last = search.get("said", "").splitlines()[-1:] or [""]
        return ["**no**", f"exit code {search['exit_code']}: {last[0][:120].replace('|', '/')}", "", minutes, ""]
    best = summary["best"]
    return [
        "yes" if _met(document) else "**no**",
        f"{best['latency_ratio']:.3f}x ({summary['baseline']['latency_ms']:.3g} ms {summary['baseline']['dtype']})",
        _points(best["accuracy_drop_pp"], summary["baseline"]["accuracy"]),
        minutes,
        f"{summary['n_trials']} ({summary['n_failed']} failed)",
    ]


def _rival_cell(row: dict[str, Any] | None, compared: dict[str, Any]) -> str:
    if row is None:
        return str(compared.get("error", ""))[-120:].replace("\n", " ").replace("|", "/")
    if "error" in row:
        return f"failed: {row['error'][-160:].replace('|', '/')}"
    ratio = f"{row['ratio']:.3f}x, " if "ratio" in row else ""
    other = row["engine"] != compared["engine"] and "ratio_to_dense" in row
    return (
        ratio + f"{row['drop_pp']:.2f} points" + (f" ({row['ratio_to_dense']:.2f}x of the search's)" if other else "")
    )


def _points(drop: float, dense: float) -> str:
    return f"{drop:.2f} points of {100 * dense:.1f}"


def _met(document: dict[str, Any]) -> bool:
    summary = document.get("search", {}).get("summary")
    return summary is not None and bool(summary["best"]["feasible"])


def _rival_met(document: dict[str, Any]) -> bool:
    """Return whether some rival's file meets both limits; True where they were not timed."""
    asked, compared = document["asked"], document.get("compared", {})
    if not compared.get("timed"):
        return True
    ratio, drop = (float(asked[key].rstrip("xp")) for key in ("target_latency", "max_drop"))
    rows = (row for row in compared["rows"] if "ratio_to_dense" in row)
    return any(row["ratio_to_dense"] <= ratio and row["drop_pp"] <= drop for row in rows)


def _better(document: dict[str, Any]) -> list[str]:
    """Return the rivals that are better than what was found: as good and faster, or within the drop where it is not.

    All were timed in the same rounds, against the same uncompressed network in the search's engine.
    """
    compared = document.get("compared", {})
    if "search" not in document or not compared.get("timed"):
        return []
    allowed, ours = float(document["asked"]["max_drop"].removesuffix("pp")), compared.get("ours")
    found = []
    for row in compared["rows"]:
        if "ratio_to_dense" not in row or row["drop_pp"] > allowed:
            continue
        if (
            ours is None
            or ours["drop_pp"] > allowed
            or (
                row["drop_pp"] <= ours["drop_pp"] + _TIE_PP
                and row["ratio_to_dense"] < ours["ratio_to_dense"] * (1 - EQUAL)
            )
        ):
            found.append(row["rival"])
    return found


if __name__ == "__main__":
    print(write_table(HERE / "results", HERE / "README.md"))
