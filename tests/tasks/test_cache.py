from __future__ import annotations

from pathlib import Path

import pytest

from autocompress.tasks.cache import cache_directory, store


def test_the_folder_is_the_first_one_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory() == tmp_path / "own"
    monkeypatch.delenv("AUTOCOMPRESS_CACHE")
    assert cache_directory() == tmp_path / "xdg" / "autocompress"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == tmp_path / "home" / ".cache" / "autocompress"


def test_what_is_stored_is_there(cache: Path) -> None:
    assert store("name", b"content")
    assert [(p.name, p.read_bytes()) for p in cache.iterdir()] == [("name", b"content")]


def test_a_folder_that_cannot_be_written_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="set AUTOCOMPRESS_CACHE to a folder that can be written"):
        assert not store("name", b"content")
