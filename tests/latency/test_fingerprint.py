from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from autocompress import environment
from autocompress.latency import device_fingerprint, fingerprint

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
