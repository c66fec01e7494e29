from __future__ import annotations

from pathlib import Path

import pytest

from autocompress.tasks.cache import store


def test_what_is_stored_is_there(cache: Path) -> None:
    assert store("name", b"content")
    assert [(p.name, p.read_bytes()) for p in cache.iterdir()] == [("name", b"content")]


def test_a_folder_that_cannot_be_written_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="set AUTOCOMPRESS_CACHE to a folder that can be written"):
        assert not store("name", b"content")
