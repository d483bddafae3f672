"""Records of a scoring run: nothing that was scored is lost, nothing counts twice."""

import json
from dataclasses import asdict

import pytest

from training.folders import replace_folder
from training.score_records import ImageRecord, RecordFolder

SETTINGS = {"model": "m", "batch_size": 1}


def make_record(index: int, **fields) -> ImageRecord:
    return ImageRecord(
        index=index, image_id=f"image {index}", height=4, width=6, scores=f"[{index}]", analysis="[]", **fields
    )


def write_records(folder: RecordFolder, run: int, rank: int, *records: ImageRecord) -> None:
    with folder.open(run, rank) as file:
        for record in records:
            file.write(json.dumps(asdict(record)) + "\n")


@pytest.fixture
def folder(tmp_path) -> RecordFolder:
    return RecordFolder.beside(tmp_path / "results")


def indices(folder: RecordFolder) -> list[int]:
    return sorted(record.index for record in folder.read())


def test_the_records_are_beside_the_results_under_a_hidden_name(tmp_path, folder):
    assert folder.path == tmp_path / ".results.unfinished"


def test_records_come_back_as_they_were_written(folder):
    folder.begin(SETTINGS)
    records = [
        make_record(0, layers='["x", {}]', predictions=[{"image_id": "image 0", "score": 0.1 + 0.2}]),
        make_record(1, truths=[{"id": 1, "segments_info": []}]),
    ]
    write_records(folder, 1, 0, *records)
    assert list(folder.read()) == records


def test_a_record_is_there_as_soon_as_its_line_is_written(folder):
    folder.begin(SETTINGS)
    with folder.open(1, 0) as file:
        file.write(json.dumps(asdict(make_record(7))) + "\n")
        assert indices(folder) == [7]


def test_the_records_of_several_processes_and_runs_are_joined(folder):
    assert folder.begin(SETTINGS) == 1
    write_records(folder, 1, 0, make_record(0), make_record(2))
    write_records(folder, 1, 1, make_record(1))
    assert folder.begin(SETTINGS) == 2
    write_records(folder, 2, 0, make_record(3))
    assert indices(folder) == [0, 1, 2, 3]
    assert folder.begin(SETTINGS) == 3


def test_runs_are_counted_as_numbers_and_not_as_text(folder):
    folder.begin(SETTINGS)
    for run in (9, 10):
        write_records(folder, run, 0, make_record(run))
    assert folder.begin(SETTINGS) == 11


def test_an_image_that_two_runs_have_scored_counts_once(folder):
    folder.begin(SETTINGS)
    write_records(folder, 1, 0, make_record(0), make_record(1))
    write_records(folder, 2, 0, make_record(1))
    assert indices(folder) == [0, 1]


@pytest.mark.parametrize("cut", [1, 20, None])
def test_a_line_that_was_torn_is_passed_over(folder, cut):
    folder.begin(SETTINGS)
    write_records(folder, 1, 0, make_record(0))
    torn = json.dumps(asdict(make_record(1)))[: -1 if cut is None else cut]
    path = folder.path / "records-1-0.jsonl"
    path.write_text(path.read_text() + torn)
    assert indices(folder) == [0]
    folder.begin(SETTINGS)
    write_records(folder, 2, 0, make_record(1))
    assert indices(folder) == [0, 1]


def test_other_settings_begin_anew(folder):
    folder.begin(SETTINGS)
    write_records(folder, 1, 0, make_record(0))
    (folder.path / "predictions").mkdir()
    assert folder.begin({**SETTINGS, "batch_size": 2}) == 1
    assert indices(folder) == []
    assert not (folder.path / "predictions").exists()


def test_the_order_of_the_settings_means_nothing(folder):
    folder.begin(SETTINGS)
    write_records(folder, 1, 0, make_record(0))
    folder.begin(dict(reversed(SETTINGS.items())))
    assert indices(folder) == [0]


def test_two_runs_never_write_into_one_file(folder):
    folder.begin(SETTINGS)
    write_records(folder, 1, 0, make_record(0))
    with pytest.raises(FileExistsError):
        folder.open(1, 0)


def test_only_the_results_are_left_when_the_records_are_cleared(folder):
    folder.begin(SETTINGS)
    write_records(folder, 1, 0, make_record(0))
    (folder.path / "results.json").write_text("{}")
    (folder.path / "predictions").mkdir()
    folder.clear()
    assert sorted(path.name for path in folder.path.iterdir()) == ["predictions", "results.json"]


def test_a_complete_folder_takes_the_place_of_another_with_all_that_was_in_it(tmp_path):
    old, new = tmp_path / "results [1]", tmp_path / "new"
    leftover = tmp_path / ".results [1].previous-12345"  # of a run that was killed
    for path, name in ((old, "old.txt"), (new, "new.txt"), (leftover, "older.txt")):
        path.mkdir()
        (path / name).write_text(name)
    replace_folder(old, new)
    assert [path.name for path in tmp_path.iterdir()] == ["results [1]"]
    assert [path.name for path in old.iterdir()] == ["new.txt"]
