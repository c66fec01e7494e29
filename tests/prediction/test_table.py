"""A latency table round-trips, grows safely, says where it belongs, and refuses what no measurement gives."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from autocompress import files
from autocompress.environment import cache_directory
from autocompress.errors import ConfigError, TableMismatchError
from autocompress.measurement.fingerprint import device_fingerprint
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.prediction import table as tables
from autocompress.prediction.table import LatencyTable, find_table, table_path
from autocompress.prediction.table_rows import COLUMNS, LayerRow, NetworkRow, policy_text, read_policy
from tests.prediction.tables import DEVICE, layer_row, network_row, profiled, table

# -- the file ---------------------------------------------------------------------------------------------------------


def test_a_table_round_trips(tmp_path: Path) -> None:
    made = profiled(policies=8)
    made.save(tmp_path / "deep" / "openvino.csv")
    again = LatencyTable.load(tmp_path / "deep" / "openvino.csv")
    assert again.layers == made.layers
    assert [r for r in again.networks if r.ok] == [r for r in made.networks if r.ok]
    assert [r.policy for r in again.networks] == [r.policy for r in made.networks]
    assert (again.device, again.engine, again.engine_version) == (DEVICE, "openvino", "2026.4.1-22982")
    assert (again.threads, again.batch_size) == (1, 1)
    assert [r.measured_at for r in again.networks] == [r.measured_at for r in made.networks]
    again.save(tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "deep" / "openvino.csv").read_bytes()


def test_the_device_it_was_made_on_comes_back_whole(tmp_path: Path) -> None:
    here = device_fingerprint()
    table(network_row(), path=tmp_path / "t.csv", device=here)
    again = LatencyTable.load(tmp_path / "t.csv")
    assert again.device == here
    again.check(here, "openvino", "2026.4.1-22982", 1, 1)
    assert not again.foreign


def test_an_unsupported_network_keeps_the_runtimes_words_and_no_figures(tmp_path: Path) -> None:
    row = NetworkRow.unsupported("aaaa", "a", CompressionPolicy(), 'could not,\n  "create" it', 7, held_out=True)
    table(row, path=tmp_path / "t.csv")
    (again,) = LatencyTable.load(tmp_path / "t.csv").networks
    assert (again.status, again.error, again.macs, again.held_out) == ("unsupported", 'could not, "create" it', 7, True)
    assert math.isnan(again.ratio) and math.isnan(again.latency_ms) and not again.ok


def test_names_that_pandas_takes_for_missing_are_names(tmp_path: Path) -> None:
    made = table(network_row(network="1e10", name="NA"), layer_row(layer="nan", kernel="", ranks=()),
                 path=tmp_path / "t.csv")  # fmt: skip
    again = LatencyTable.load(tmp_path / "t.csv")
    assert (again.networks, again.layers) == (made.networks, made.layers)
    assert again.layers[0].ranks == ()


def test_figures_have_seven_digits() -> None:
    assert network_row(ratio=0.61234567891).ratio == 0.6123457


def test_the_frame_has_exact_types_and_every_row_says_where_it_is_from() -> None:
    made = table(network_row(), layer_row(), NetworkRow.unsupported("aaaa", "a", CompressionPolicy(), "no", 7))
    frame = made.frame()
    assert list(frame.columns) == list(COLUMNS)
    numbers = {column: dtype for column, dtype in COLUMNS.items() if dtype != "str"}
    assert {column: str(frame[column].dtype) for column in numbers} == numbers
    assert list(frame["kind"]) == ["network", "network", "layer"]
    for column in ("engine", "engine_version", "threads", "batch_size", "device", "device_name", "device_hash"):
        assert frame[column].notna().all() and frame[column].nunique() == 1
    assert frame["latency_ms"].to_list()[::2] == [0.3, 0.0123]
    assert pd.isna(frame["latency_ms"].iloc[1]) and frame["dense_dtype"].to_list() == ["bf16", "fp32", "bf16"]
    assert not frame[[column for column in COLUMNS if column not in numbers]].isna().any().any()


def test_the_gpu_names_the_device() -> None:
    assert table(device={**DEVICE, "gpu": {"name": "NVIDIA L4"}}).device_name == "NVIDIA L4"
    assert table().device_name == DEVICE["cpu"]


def test_a_device_without_a_name_for_its_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="no hash"):
        LatencyTable({"slug": "a"}, "openvino", "1")


# -- growing ----------------------------------------------------------------------------------------------------------


def test_appended_rows_are_on_disk_at_once_networks_last(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    made = table(path=path)
    made.append(network_row(), layer_row(), layer_row(layer="fc"))
    assert [line["kind"] for line in _lines(path)] == ["device", "layer", "layer", "network"]
    made.append(network_row(macs=3))
    again = LatencyTable.load(path)
    assert (again.networks, again.layers) == (made.networks, made.layers)
    assert all(row.measured_at.endswith("Z") for row in (*again.networks, *again.layers))
    again.append(network_row(macs=4))
    assert [r.macs for r in LatencyTable.load(path).networks] == [21_000_000, 3, 4]


@pytest.mark.parametrize("cut", [1, 5, 40, 200])
def test_a_line_cut_short_by_a_crash_is_left_out_and_removed(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "t.csv"
    table(network_row(macs=1), network_row(macs=2, name="réseau"), path=path)
    path.write_bytes(path.read_bytes()[:-cut])
    again = LatencyTable.load(path)
    # Without its line end alone nothing is missing.
    assert [r.macs for r in again.networks] == ([1, 2] if cut == 1 else [1])
    again.append(network_row(macs=3))
    expected = [1, 2, 3] if cut == 1 else [1, 3]
    assert [r.macs for r in LatencyTable.load(path).networks] == expected


def test_a_cut_inside_a_letter_or_a_block_of_zeros_is_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table(network_row(macs=1), path=path)
    whole = path.read_bytes()
    for torn in ("network,é".encode()[:-1], b"\0" * 512):
        path.write_bytes(whole + torn)
        assert [r.macs for r in LatencyTable.load(path).networks] == [1]


def test_a_table_that_a_spreadsheet_or_pandas_rewrote_is_read_and_grows(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table(network_row(macs=1), layer_row(), path=path)
    cells = pd.read_csv(path, dtype=str, keep_default_na=False)
    cells["note"] = "mine"
    path.write_bytes(b"\xef\xbb\xbf" + cells[cells.columns[::-1]].to_csv(index=False, lineterminator="\r\n").encode())
    again = LatencyTable.load(path)
    again.append(network_row(macs=2))
    assert [r.macs for r in LatencyTable.load(path).networks] == [1, 2]
    assert list(pd.read_csv(path).columns) == list(COLUMNS)


def test_a_file_removed_meanwhile_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    made = table(network_row(macs=1), path=path)
    path.unlink()
    made.append(network_row(macs=2))
    assert [r.macs for r in LatencyTable.load(path).networks] == [1, 2]


def test_no_room_while_appending_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.csv"
    made = table(network_row(macs=1), path=path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(ConfigError, match=r"t\.csv cannot be written: No space left on device.*is kept"):
        made.append(network_row(macs=2))
    assert path.read_bytes() == before
    assert [r.macs for r in made.networks] == [1]
    monkeypatch.undo()
    made.append(network_row(macs=2))
    assert [r.macs for r in LatencyTable.load(path).networks] == [1, 2]


def test_no_room_while_saving_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.csv"
    made = table(network_row(macs=1), path=path)
    before = path.read_bytes()
    monkeypatch.setattr(files.os, "fsync", _full)
    with pytest.raises(ConfigError, match="No space left on device"):
        made.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_resuming_begins_goes_on_or_sets_aside(tmp_path: Path) -> None:
    path = tmp_path / "openvino.csv"
    made, moved = LatencyTable.resume(path, DEVICE, "openvino", "1")
    assert (moved, made.networks, path.exists()) == (None, [], True)
    made.append(network_row())
    again, moved = LatencyTable.resume(path, DEVICE, "openvino", "1")
    assert (moved, len(again.networks)) == (None, 1)
    newer, moved = LatencyTable.resume(path, DEVICE, "openvino", "2")
    assert (newer.networks, newer.engine_version) == ([], "2")
    assert moved is not None and moved.name == "openvino.old-1.csv"
    assert len(LatencyTable.load(moved).networks) == 1
    assert LatencyTable.resume(path, DEVICE, "openvino", "3")[1] == tmp_path / "openvino.old-2.csv"
    path.write_text("nothing of the kind")
    with pytest.raises(ConfigError, match="lacks the columns"):
        LatencyTable.resume(path, DEVICE, "openvino", "3")


# -- what it belongs to -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine_version": "2027.0"}, r"engine version: 2026\.4\.1-22982, here 2027\.0"),
        ({"engine": "onnxruntime"}, "engine: openvino, here onnxruntime"),
        ({"threads": 2}, "threads: 1, here 2"),
        ({"batch_size": 8}, "batch size: 1, here 8"),
        ({"device": {**DEVICE, "cpu": "AMD EPYC 7763"}}, "processor: Intel.*, here AMD EPYC 7763"),
        ({"device": {**DEVICE, "features": ["avx2"]}}, "instructions missing here: avx512_vnni, avx512f"),
    ],
)
def test_a_table_from_elsewhere_is_refused_or_marked(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    table(network_row(), path=tmp_path / "t.csv")
    found = LatencyTable.load(tmp_path / "t.csv")
    here: dict[str, Any] = {
        "device": DEVICE, "engine": "openvino", "engine_version": "2026.4.1-22982", "threads": 1, "batch_size": 1,
    }  # fmt: skip
    found.check(**here)
    with pytest.raises(TableMismatchError, match=said + ".*autocompress profile.*--allow-foreign-table"):
        found.check(**{**here, **changes})
    assert not found.foreign
    found.check(**{**here, **changes}, allow_foreign=True)
    assert found.foreign and len(found.differences) == 1
    part = found.of_network("aaaa000000000001")
    assert part.foreign
    with pytest.raises(TableMismatchError, match="takes no rows"):
        part.append(network_row())


def test_of_network_is_a_copy_without_a_file(tmp_path: Path) -> None:
    made = table(network_row(), network_row(network="b", name="other"), layer_row(), path=tmp_path / "t.csv")
    before = (tmp_path / "t.csv").read_bytes()
    part = made.of_network("b")
    assert ([r.name for r in part.networks], part.layers) == (["other"], [])
    part.append(network_row(network="b"))
    assert (tmp_path / "t.csv").read_bytes() == before
    assert made.names == {"aaaa000000000001": "cifar10 resnet20", "b": "other"}


def test_the_baseline_is_what_was_measured_when_nothing_disturbed() -> None:
    made = table(*[network_row(baseline_ms=ms) for ms in (1.9, 5.0, 6.0, 2.0, 7.0, 5.5)],
                 NetworkRow.unsupported("aaaa000000000001", "a", CompressionPolicy(), "no", 7))  # fmt: skip
    assert made.baseline_ms("aaaa000000000001") == 2.0
    assert made.baseline_ms("unknown") is None


def test_the_users_table_is_found_before_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, shipped = tmp_path / "cache", tmp_path / "shipped"
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(mine))
    monkeypatch.setattr(tables, "shipped_tables", lambda: shipped)
    assert cache_directory() == mine
    assert find_table("openvino", DEVICE, "aaaa000000000001", None) is None
    there = shipped / DEVICE["slug"] / "openvino.csv"
    table(network_row(), path=there)
    assert find_table("openvino", DEVICE, "aaaa000000000001", None) == there
    assert find_table("openvino", DEVICE, "another", None) is None
    assert find_table("onnxruntime", DEVICE, "aaaa000000000001", None) is None
    assert find_table("openvino", {**DEVICE, "slug": "x"}, "aaaa000000000001", None) is None
    own = table_path("openvino", DEVICE)
    assert own == mine / "latency_tables" / DEVICE["slug"] / "openvino.csv"
    table(network_row(network="b"), path=own)
    assert find_table("openvino", DEVICE, "aaaa000000000001", None) == there
    table(network_row(), path=own)
    assert find_table("openvino", DEVICE, "aaaa000000000001", None) == own
    assert find_table("openvino", DEVICE, "aaaa000000000001", tmp_path / "else") == there
    own.write_text("kind\n")
    with pytest.raises(ConfigError, match="lacks the columns"):
        find_table("openvino", DEVICE, "aaaa000000000001", None)


def test_other_threads_and_batches_have_files_of_their_own() -> None:
    assert table_path("openvino", DEVICE, Path("x"), threads=2, batch_size=8).name == "openvino-2threads-batch8.csv"


def test_the_shipped_folder_is_in_the_repository() -> None:
    assert (tables.shipped_tables() / "README.md").is_file()


# -- bad input --------------------------------------------------------------------------------------------------------


def _edit(column: str, value: str, kind: str = "network") -> Callable[[list[dict[str, str]]], None]:
    def edit(lines: list[dict[str, str]]) -> None:
        next(line for line in lines if line["kind"] == kind)[column] = value

    return edit


# The file has the device in row 2, a layer in 3, networks in 4 and 5.
BAD = {
    "no latency": (_edit("latency_ms", ""), "row 4: latency_ms is ''; it must be a number"),
    "NaN": (_edit("ratio_low", "nan"), "row 4: ratio_low is 'nan'; it must be a number"),
    "infinite": (_edit("baseline_ms", "inf"), "row 4: baseline_ms is 'inf'"),
    "negative": (_edit("latency_ms", "-0.3"), r"row 4: latency_ms is -0\.3; it must be a positive"),
    "zero": (_edit("latency_ms", "0.0", "layer"), r"row 3: latency_ms is 0\.0; it must be a positive"),
    "ratio of zero": (_edit("ratio", "0"), r"row 4: ratio is 0\.0; it must be a positive"),
    "interval": (_edit("ratio_low", "3"), r"row 4: ratio_low is 3\.0, above the ratio_high of 0\.62"),
    "negative spread": (_edit("spread_ms", "-1"), "row 4: spread_ms is -1"),
    "no samples": (_edit("n", "0"), "row 4: n is 0"),
    "broken count": (_edit("macs", "1.5"), r"row 4: macs is '1\.5'; it must be a whole number"),
    "word": (_edit("in_channels", "many", "layer"), "row 3: in_channels is 'many'"),
    "ranks": (_edit("ranks", "8;12", "layer"), "row 3: ranks is '8;12'"),
    "share": (_edit("inputs_int8", "1.5", "layer"), r"row 3: inputs_int8 is 1\.5"),
    "op": (_edit("op", "convolution", "layer"), "row 3: op is 'convolution'.*conv"),
    "flag": (_edit("noisy", "maybe"), "row 4: noisy is 'maybe'"),
    "status": (_edit("status", "okay"), "row 4: status is 'okay'.*Did you mean 'ok'"),
    "no name": (_edit("network", " ", "layer"), "row 3: network is empty"),
    "kind": (_edit("kind", "kernel"), "row 4: kind is 'kernel'; it must be device, network, layer"),
    "date": (_edit("measured_at", "yesterday"), "row 4: measured_at is 'yesterday'"),
    "policy cut": (_edit("policy", '{"version":1'), "row 4: policy is .* not JSON"),
    "policy's key": (_edit("policy", '{"version":1,"prune":{}}'), "row 4: policy: Unknown key 'prune'"),
    "policy's value": (_edit("policy", '{"version":1,"pruning":{"a":2}}'), "row 4: policy: .*'a' is 2"),
    "policy's type": (_edit("policy", '{"version":1,"pruning":[1]}'), "row 4: policy"),
    "later policy": (_edit("policy", '{"version":9}'), "row 4: policy: Policy version 9"),
    "device": (_edit("device_hash", "ffff"), "mixes devices: device_hash is '0123456789abcdef' in row 2 .* row 4"),
    "engine": (_edit("engine", "onnxruntime"), "mixes engines: .* row 4"),
    "version": (_edit("engine_version", "2025.1"), r"mixes engine versions: .*'2025\.1' in row 4"),
    "threads": (_edit("threads", "4", "layer"), "mixes numbers of threads: .* row 3"),
    "batch": (_edit("batch_size", "", "layer"), "row 3: batch_size is empty"),
    "fingerprint": (_edit("fingerprint", "{", "device"), "row 2: fingerprint is not JSON"),
    "other fingerprint": (_edit("fingerprint", '{"hash":"1"}', "device"), "row 2: fingerprint does not belong"),
    "no device": (lambda lines: lines.pop(0), "no row of kind 'device'"),
    "no rows": (lambda lines: lines.clear(), "has a header but no rows"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "said"), BAD.values(), ids=BAD)
def test_bad_cells_are_named(tmp_path: Path, edit: Callable[[list[dict[str, str]]], None], said: str) -> None:
    path = tmp_path / "t.csv"
    table(layer_row(), network_row(macs=1), network_row(macs=2), path=path)
    lines = _lines(path)
    edit(lines)
    _write(path, lines)
    with pytest.raises(ConfigError, match=said) as raised:
        LatencyTable.load(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "is not CSV"),
        (b"a,b\n1,2\n1,2,3\n", "is not CSV: .*line 3, saw 3"),
        (b'a,b\n1,"2\n', "is not CSV"),
        (b"network,latency_ms\nx,1\n", "lacks the columns kind, name, layer"),
        (b'{"a": 1}\n', "lacks the columns"),
        (b"\0\0\0\0\n", "lacks the columns|is not CSV|is empty"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as raised:
        LatencyTable.load(path)
    assert str(path) in str(raised.value)


def test_a_row_longer_or_shorter_than_the_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table(network_row(), path=path)
    head, device, row = path.read_text().splitlines()
    path.write_text(f"{head}\n{device},more\n{row},more\n")
    with pytest.raises(ConfigError, match="more cells than the header"):
        LatencyTable.load(path)
    path.write_text(f"{head}\n{device}\n{row.rpartition(',')[0]}\n")
    with pytest.raises(ConfigError, match="row 3: device_hash is empty"):
        LatencyTable.load(path)


def test_a_missing_column_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with pytest.raises(ConfigError, match=r"t\.csv does not exist.*autocompress profile"):
        LatencyTable.load(path)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        LatencyTable.load(tmp_path)
    table(network_row(), path=path)
    pd.read_csv(path, dtype=str).drop(columns=["spread_ms"]).to_csv(path, index=False)
    with pytest.raises(ConfigError, match="lacks the column spread_ms"):
        LatencyTable.load(path)


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (network_row, {"ratio": 0.0}),
        (network_row, {"latency_ms": math.nan}),
        (network_row, {"macs": -1}),
        (network_row, {"status": "fine"}),
        (network_row, {"name": ""}),
        (layer_row, {"time_ms": 0.0}),
        (layer_row, {"out_channels": 0}),
        (layer_row, {"positions": 2.5}),
        (layer_row, {"n": math.nan}),
        (layer_row, {"ranks": (0,)}),
        (layer_row, {"op": "pool"}),
    ],
)
def test_no_bad_row_can_be_made(make: Callable[..., NetworkRow | LayerRow], changes: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make(**changes)


# -- policies ---------------------------------------------------------------------------------------------------------


def test_policies_are_canonical_and_say_only_what_they_change() -> None:
    assert policy_text(CompressionPolicy()) == '{"version":1}'
    policy = CompressionPolicy(
        "bf16", {"b": 0.5, "a": 0.25}, {"fc": LayerPolicy("int8"), "c": LayerPolicy("dense", 0.5)}
    )
    assert policy_text(policy) == (
        '{"dense_dtype":"bf16","layers":{"c":{"rank_ratio":0.5},"fc":{"dtype":"int8"}},'
        '"pruning":{"a":0.25,"b":0.5},"version":1}'
    )
    for each in (policy, CompressionPolicy(), replace(policy, removed_blocks=("x", "ü"))):
        assert read_policy(policy_text(each)) == each
        assert read_policy(policy_text(each)).hash == each.hash
        json.loads(policy_text(each))


def _lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, lines: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def _full(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
