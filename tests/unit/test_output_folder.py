"""Folders and files appear complete or not at all."""

from pathlib import Path

import pytest

from conversion import ConversionError, output_folder
from conversion.output_folder import new_file, new_folder


def fill(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    (folder / f"{text}.txt").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_a_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "new" / "deep" / "target"
    with new_folder(target) as unfinished:
        fill(unfinished, "first")
        assert not target.exists()
    assert contents(target) == {"config.json": "first", "first.txt": "first"}
    assert [entry.name for entry in target.parent.iterdir()] == ["target"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "target").mkdir()
    with new_folder(tmp_path / "target") as unfinished:
        fill(unfinished, "first")
    assert contents(tmp_path / "target")["config.json"] == "first"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_after_an_error_nothing_is_left(tmp_path, error):
    def fail() -> None:
        with new_folder(tmp_path / "new" / "target") as unfinished:
            fill(unfinished, "first")
            raise error

    with pytest.raises(ConversionError if error is OSError else error):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("in_one_step", [True, False])
def test_overwriting_replaces_everything_or_nothing(tmp_path, monkeypatch, in_one_step):
    if not in_one_step:  # as on other systems than Linux
        monkeypatch.setattr(output_folder.sys, "platform", "darwin")
    target = tmp_path / "target"
    with new_folder(target) as unfinished:
        fill(unfinished, "first")

    def fail() -> None:
        with new_folder(target, overwrite=True) as unfinished:
            fill(unfinished, "second")
            raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        fail()
    assert contents(target) == {"config.json": "first", "first.txt": "first"}
    with new_folder(target, overwrite=True) as unfinished:
        fill(unfinished, "second")
    assert contents(target) == {"config.json": "second", "second.txt": "second"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


def test_a_folder_that_was_filled_meanwhile_is_not_replaced(tmp_path):
    def fill_both() -> None:
        with new_folder(tmp_path / "target") as unfinished:
            fill(unfinished, "first")
            (tmp_path / "target").mkdir()
            (tmp_path / "target" / "mine.txt").write_text("mine")

    with pytest.raises(ConversionError, match="not empty"):
        fill_both()
    assert contents(tmp_path / "target") == {"mine.txt": "mine"}


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link") as unfinished:
        fill(unfinished, "first")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real")["config.json"] == "first"


def test_a_folder_that_holds_an_input_is_never_replaced(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.pth").write_text("weights")

    def overwrite() -> None:
        with new_folder(tmp_path, overwrite=True, inputs=[tmp_path / "model.pth"]):
            pass

    with pytest.raises(ConversionError, match="would replace"):
        overwrite()


def test_a_file_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "new" / "model.pth"
    with new_file(target) as unfinished:
        unfinished.write_text("first")
        assert not target.exists()
    assert target.read_text() == "first"

    def write(text: str, overwrite: bool) -> None:
        with new_file(target, overwrite=overwrite) as unfinished:
            unfinished.write_text(text)
            if text == "broken":
                raise ValueError("stopped")

    with pytest.raises(ConversionError, match="there already"):
        write("second", overwrite=False)
    with pytest.raises(ValueError, match="stopped"):
        write("broken", overwrite=True)
    assert target.read_text() == "first"
    write("second", overwrite=True)
    assert target.read_text() == "second"
    assert [entry.name for entry in target.parent.iterdir()] == ["model.pth"]


def test_a_place_below_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("text")

    def write_below() -> None:
        with new_folder(tmp_path / "file" / "target"):
            pass

    with pytest.raises(ConversionError, match="cannot be written"):
        write_below()
