from __future__ import annotations

import pytest

from autocompress.tasks import progress


def test_short_work_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Bar("counting", 3) as bar:
        bar.advance(3)
    assert capsys.readouterr() == ("", "")


def test_long_work_is_shown_on_stderr_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_QUIET_SECONDS", -1.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.Bar("counting", 3) as bar:
        bar.advance(1)
        bar.advance(2)
    out, err = capsys.readouterr()
    assert out == ""
    assert "counting" in err
