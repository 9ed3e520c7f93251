"""Output directories and files: refused early, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from fxprune.core.errors import OutputError
from fxprune.core.output import prepare_output, staged_directory, write_json

MARKERS = ["fxprune.json", "report.json", "genai_config.json", "export.json", "model.onnx"]


def old_output(path: Path, marker: str = "fxprune.json") -> Path:
    (path / "sub").mkdir(parents=True)
    (path / marker).write_text("{}")
    (path / "sub" / "old").write_text("old")
    return path


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def write_half(staging: Path, failure: type[BaseException]) -> None:
    (staging / "half").write_text("half")
    raise failure


def test_prepare_accepts_missing_and_empty_places_and_leaves_no_trace(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "c"
    assert prepare_output(target, overwrite=False) == target.resolve()
    assert names(tmp_path) == []
    empty = tmp_path / "empty"
    empty.mkdir()
    assert prepare_output(empty, overwrite=False) == empty.resolve()
    assert names(empty) == []


def test_prepare_refuses_a_full_directory_without_overwrite(tmp_path: Path) -> None:
    target = old_output(tmp_path / "out")
    with pytest.raises(OutputError, match="not empty"):
        prepare_output(target, overwrite=False)


@pytest.mark.parametrize("marker", MARKERS)
def test_prepare_overwrites_what_we_wrote(tmp_path: Path, marker: str) -> None:
    target = old_output(tmp_path / "out", marker)
    assert prepare_output(target, overwrite=True) == target.resolve()
    assert (target / "sub" / "old").read_text() == "old"


def test_prepare_tells_a_model_config_from_any_other(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    for content in ('{"port": 80}', "[]", "not json"):
        (target / "config.json").write_text(content)
        with pytest.raises(OutputError, match="does not look like"):
            prepare_output(target, overwrite=True)
    (target / "config.json").write_text('{"model_type": "llama"}')
    assert prepare_output(target, overwrite=True) == target.resolve()


def test_overwrite_refuses_directories_that_are_not_ours(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(OutputError, match="does not look like a model"):
        prepare_output(tmp_path, overwrite=True)
    with pytest.raises(OutputError), staged_directory(tmp_path, overwrite=True):
        pytest.fail("the body must not run")
    assert (tmp_path / "letters.txt").read_text() == "dear"


def test_overwrite_refuses_working_home_and_git_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("work", "home", "clone"):
        old_output(tmp_path / name)
    (tmp_path / "clone" / ".git").mkdir()
    monkeypatch.chdir(tmp_path / "work" / "sub")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    for name, reason in (("work", "working"), ("home", "home"), ("clone", "git")):
        with pytest.raises(OutputError, match=reason):
            prepare_output(tmp_path / name, overwrite=True)


def test_prepare_refuses_files(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="is a file"):
            prepare_output(file, overwrite=overwrite)
    with pytest.raises(OutputError):
        prepare_output(file / "below", overwrite=True)
    assert file.read_text() == "x"


def test_prepare_refuses_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/proc/self").is_dir():  # refuses new directories even to root
        with pytest.raises(OutputError, match="not writable"):
            prepare_output("/proc/self/fxprune/out", overwrite=False)
    read_only = tmp_path / "read_only"
    read_only.mkdir()
    make = Path.mkdir

    def mkdir(self: Path, *args: object, **kwargs: object) -> None:
        if self.parent == read_only:
            raise PermissionError(13, "Permission denied", str(self))
        make(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", mkdir)
    for target in (read_only / "out", read_only):
        with pytest.raises(OutputError, match="not writable"):
            prepare_output(target, overwrite=False)


def test_staged_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with staged_directory(target, overwrite=False) as staging:
        assert staging.parent == target.parent
        assert not target.exists()
        (staging / "weights").write_text("1")
    assert names(target) == ["weights"]
    assert names(target.parent) == ["out"]
    other = tmp_path / "other"
    other.mkdir()
    assert target.stat().st_mode == other.stat().st_mode


def test_staged_directory_replaces_everything(tmp_path: Path) -> None:
    target = old_output(tmp_path / "out")
    with staged_directory(target, overwrite=True) as staging:
        (staging / "new").write_text("new")
        assert (target / "sub" / "old").read_text() == "old"
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


def test_staged_directory_follows_a_symbolic_link(tmp_path: Path) -> None:
    target = old_output(tmp_path / "real")
    link = tmp_path / "link"
    link.symlink_to(target)
    with staged_directory(link, overwrite=True) as staging:
        (staging / "new").write_text("new")
    assert link.is_symlink()
    assert names(target) == ["new"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_directory_whole(tmp_path: Path, failure: type[BaseException]) -> None:
    target = old_output(tmp_path / "out")
    with pytest.raises(failure), staged_directory(target, overwrite=True) as staging:
        write_half(staging, failure)
    assert (target / "sub" / "old").read_text() == "old"
    assert names(tmp_path) == ["out"]
    with pytest.raises(failure), staged_directory(tmp_path / "fresh", overwrite=False) as staging:
        write_half(staging, failure)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("failure", [OSError("disk"), KeyboardInterrupt()])
def test_a_failed_swap_puts_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    target = old_output(tmp_path / "out")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self.name.endswith(".staging"):
            raise failure
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    expected = OutputError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected), staged_directory(target, overwrite=True) as staging:
        (staging / "new").write_text("new")
    assert (target / "sub" / "old").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_what_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="not empty"), staged_directory(target, overwrite=False):
        old_output(target)
    assert (target / "sub" / "old").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_old_output_that_cannot_be_removed_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = old_output(tmp_path / "out")

    def busy(path: Path, **_: object) -> None:
        raise OSError(f"{path} is busy")

    with staged_directory(target, overwrite=True) as staging:
        (staging / "new").write_text("new")
        monkeypatch.setattr(shutil, "rmtree", busy)
    assert names(target) == ["new"]
    assert "could not be removed" in caplog.text


def test_write_json_round_trip_and_replace(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    write_json(file, {"a": [1, 2.5, None], "ü": "ß"})
    write_json(file, {"b": "—"})
    assert json.loads(file.read_text(encoding="utf-8")) == {"b": "—"}
    assert names(tmp_path) == ["report.json"]


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": float("inf")}, {"x": object()}, {"x": "\ud800"}])
def test_write_json_refuses_what_is_not_json_and_keeps_the_old_file(tmp_path: Path, bad: object) -> None:
    file = tmp_path / "report.json"
    write_json(file, {"kept": 1})
    with pytest.raises(OutputError, match="not JSON"):
        write_json(file, bad)
    assert json.loads(file.read_text()) == {"kept": 1}
    assert names(tmp_path) == ["report.json"]


def test_write_json_failure_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.json"
    write_json(file, {"kept": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_json(file, {"lost": 1})
    assert json.loads(file.read_text()) == {"kept": 1}
    assert names(tmp_path) == ["report.json"]
    with pytest.raises(OutputError):
        write_json(tmp_path / "missing" / "x.json", {})
