from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autocompress import environment
from autocompress.measurement import fingerprint
from autocompress.measurement.fingerprint import device_fingerprint, differences

CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 85
model name\t: Intel(R) Xeon(R) Gold 6130 CPU @ 2.10GHz
stepping\t: 4
flags\t\t: fpu avx2 avx512f avx512_vnni

processor\t: 1
model name\t: another
"""


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    monkeypatch.setattr(environment, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(fingerprint, "_GOVERNOR", tmp_path / "governor")
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    return tmp_path


def test_this_device() -> None:
    found = device_fingerprint()
    assert found == device_fingerprint()
    assert json.loads(json.dumps(found)) == found
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*-\d+c-[0-9a-f]{6}", found["slug"])
    assert found["slug"].endswith(found["hash"][:6])


def test_fields(system: Path) -> None:
    found = device_fingerprint()
    assert found["cpu"] == "Intel(R) Xeon(R) Gold 6130 CPU @ 2.10GHz"
    assert (found["vendor"], found["family"], found["model"], found["stepping"]) == ("GenuineIntel", "6", "85", "4")
    assert found["features"] == ["avx2", "avx512f", "avx512_vnni"]
    assert found["cores"] == 8
    assert found["governor"] is None
    assert found["slug"].startswith("intel-xeon-gold-6130-8c-")


def test_governor_is_recorded_but_does_not_identify(system: Path) -> None:
    before = device_fingerprint()
    (system / "governor").write_text("powersave\n")
    after = device_fingerprint()
    assert after["governor"] == "powersave"
    assert (after["hash"], after["slug"]) == (before["hash"], before["slug"])


def test_instructions_and_cores_identify(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = {device_fingerprint()["hash"]}
    (system / "cpuinfo").write_text(CPUINFO.replace(" avx512_vnni", ""))
    hashes.add(device_fingerprint()["hash"])
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    hashes.add(device_fingerprint()["hash"])
    assert len(hashes) == 3


def test_a_system_that_tells_nothing(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (system / "cpuinfo").unlink()
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "")
    found = device_fingerprint()
    assert found["cpu"] == "unknown"
    assert found["slug"].startswith("unknown-8c-")


GPU: dict[str, Any] = {
    "name": "NVIDIA L4",
    "compute_capability": "8.9",
    "driver": "595.71.05",
    "clocks_mhz": {"sm": 2040, "memory": 6251},
    "power_limit_w": 72.0,
}


def ran(engine: str, version: str, *, threads: int = 1, batch_size: int = 1, gpu: bool = False) -> dict[str, Any]:
    """The device and how an engine ran on it, as latency tables keep it."""
    how = {"engine": engine, "engine_version": version, "threads": threads, "batch_size": batch_size}
    return {**device_fingerprint(gpu=gpu), **how}


def with_gpu(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    card = {**GPU, **changes}
    monkeypatch.setattr(fingerprint, "first_gpu", lambda: SimpleNamespace(identity=lambda: card))
    return ran("tensorrt", "11.0", gpu=True)


def test_it_is_plain_data_that_does_not_differ_from_itself(system: Path) -> None:
    found = device_fingerprint()
    assert found["gpu"] is None
    assert json.loads(json.dumps(found)) == found
    assert differences(found, json.loads(json.dumps(found))) == []


def test_a_gpu_identifies_the_device_only_where_engines_run_on_it(
    system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = device_fingerprint()
    found = with_gpu(monkeypatch)
    assert found["gpu"] == GPU
    assert found["slug"].startswith("nvidia-l4-8c-") and found["hash"] != alone["hash"]
    assert device_fingerprint() == alone
    # Driver and clocks change with an update, on the same device.
    assert with_gpu(monkeypatch, driver="600.1")["hash"] == found["hash"]
    assert with_gpu(monkeypatch, name="NVIDIA L40")["hash"] != found["hash"]


def test_differences_in_words(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ran("openvino", "2026.4.1", threads=2)
    (system / "cpuinfo").write_text(CPUINFO.replace("6130", "6230").replace("avx512_vnni", "amx_tile"))
    (system / "governor").write_text("powersave\n")
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    found = ran("onnxruntime", "1.31.0", threads=1, batch_size=4)
    assert differences(expected, found) == [
        "processor: Intel(R) Xeon(R) Gold 6130 CPU @ 2.10GHz, here Intel(R) Xeon(R) Gold 6230 CPU @ 2.10GHz",
        "logical processors: 8, here 4",
        "engine: openvino, here onnxruntime",
        "engine version: 2026.4.1, here 1.31.0",
        "threads: 2, here 1",
        "batch size: 1, here 4",
        "processor instructions missing here: avx512_vnni",
        "processor instructions only here: amx_tile",
    ]


def test_differences_of_the_governor_and_of_text(system: Path) -> None:
    (system / "governor").write_text("powersave\n")
    before = ran("openvino", "2026.4.1")
    (system / "governor").write_text("performance\n")
    after = ran("openvino", "2026.4.1")
    assert differences(before, after) == ["clock governor: powersave, here performance"]
    # As read back from a text file, and from an old one that lacks an entry.
    assert differences({**after, "threads": "1", "batch_size": "1"}, after) == []
    del before["governor"]
    assert differences(before, after) == []


def test_differences_of_gpus(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = with_gpu(monkeypatch)
    other = with_gpu(
        monkeypatch,
        name="NVIDIA A10",
        compute_capability="8.6",
        driver="600.1",
        clocks_mhz={"sm": 1695, "memory": 6251},
    )
    assert differences(expected, other) == [
        "GPU: NVIDIA L4, here NVIDIA A10",
        "GPU compute capability: 8.9, here 8.6",
        "GPU driver: 595.71.05, here 600.1",
        "highest GPU clocks in MHz: sm 2040, memory 6251, here sm 1695, memory 6251",
    ]
    without = ran("tensorrt", "11.0")
    assert differences(expected, without) == ["GPU: NVIDIA L4, here none"]
    assert differences(without, expected) == ["GPU: none, here NVIDIA L4"]
