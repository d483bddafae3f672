"""Curves: what is drawn is what the log says, in files that are complete, for one run and for several."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from training.curves import compare_runs, draw_levels, draw_run, main, read_runs, save_figure, smooth, write_curves
from training.log_lines import LogError


def make_log(steps=range(10, 60, 10), piloted=True, scale=1.0):
    """Lines about steps, whose losses are `scale` / step times 1, 2, 3 at two levels; scores at steps 20 and 40."""
    log = []
    for step in steps:
        kinds = {kind: scale * factor / step for factor, kind in enumerate(("cross_entropy", "mask", "dice"), start=1)}
        kinds |= {f"pilot_{kind}": 2 * value for kind, value in kinds.items()} if piloted else {}
        line = {"step": step, "loss": sum(kinds.values()), **kinds}
        line["levels"] = {kind: [0.75 * value, 0.25 * value] for kind, value in kinds.items()}
        line |= {"learning_rate": 1e-3 / step, "images_per_second": 8.0 + step}
        log.append(line)
        if step in {20, 40}:
            log.append({"step": step, "scores": {"PQ": step / 100, "PQ things": step / 200}})
    return log


def lines_of(axes):
    """Label to (steps, values) of the lines of a panel."""
    return {
        line.get_label(): (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
        for line in axes.lines
    }


def panels_of(figure):
    return {axes.get_title(): axes for axes in figure.axes}


def test_every_panel_of_a_run_shows_its_numbers():
    panels = {title: lines_of(axes) for title, axes in panels_of(draw_run(make_log())).items()}
    steps = [10, 20, 30, 40, 50]
    assert panels["loss"] == {"all terms": (steps, pytest.approx([18 / step for step in steps]))}
    parts = panels["parts of the loss"]
    assert set(parts) == {"label", "mask", "dice", "label, pilots", "mask, pilots", "dice, pilots"}
    assert parts["dice, pilots"] == (steps, pytest.approx([6 / step for step in steps]))
    levels = panels["loss of each level, matched queries"]
    assert levels["level 0"] == (steps, pytest.approx([4.5 / step for step in steps]))
    assert levels["level 1 (last)"] == (steps, pytest.approx([1.5 / step for step in steps]))
    assert panels["validation"] == {
        "PQ: 40.0": ([20, 40], pytest.approx([20, 40])),
        "PQ things: 20.0": ([20, 40], pytest.approx([10, 20])),
    }
    assert panels["learning rate"]["highest group"][1] == pytest.approx([1e-3 / step for step in steps])
    assert panels["speed"]["images/s"] == (steps, [18, 28, 38, 48, 58])


def test_all_panels_have_the_same_steps():
    assert {tuple(map(float, axes.get_xlim())) for axes in draw_run(make_log()).axes} == {(0.0, 1.03 * 50)}


def test_each_kind_of_loss_has_a_panel_of_its_levels_pilots_below():
    titles = list(panels_of(draw_levels(make_log())))
    assert titles == [
        f"{kind} loss, {part}" for part in ("matched queries", "pilots") for kind in ("label", "mask", "dice")
    ]
    assert len(draw_levels(make_log(piloted=False)).axes) == 3
    panel = lines_of(panels_of(draw_levels(make_log(steps=[10])))["mask loss, pilots"])
    assert panel == {"level 0": ([10], [pytest.approx(0.3)]), "level 1 (last)": ([10], [pytest.approx(0.1)])}


def test_losses_that_are_not_finite_are_gaps():
    log = make_log()
    log[0]["loss"], log[1]["loss"] = math.inf, math.nan
    values = lines_of(panels_of(draw_run(log))["loss"])["all terms"][1]
    assert [math.isnan(value) for value in values] == [True, True, False, False, False]


def test_alarms_are_marked_where_they_were():
    log = make_log()
    assert "alarm" not in lines_of(panels_of(draw_run(log))["loss"])
    log[2]["alarms"] = ["Something."]
    assert lines_of(panels_of(draw_run(log))["loss"])["alarm"][0] == [log[2]["step"]]


def test_many_points_become_means_over_neighbours_on_top_of_pale_points():
    assert smooth([1.0, 3.0, 5.0, 7.0, 9.0], 2) == [2.0, 6.0, 9.0]
    assert smooth([math.nan, 3.0, math.nan, math.nan], 2)[0] == 3.0
    assert math.isnan(smooth([math.nan, 3.0, math.nan, math.nan], 2)[1])
    log = [{"step": step, "loss": float(step)} for step in range(1, 501)]
    pale, bold = panels_of(draw_run(log))["loss"].lines
    assert (len(pale.get_xdata()), len(bold.get_xdata())) == (500, 100)
    assert pale.get_alpha() < 1
    assert bold.get_ydata()[0] == 3.0  # of 1 to 5


def test_the_same_log_gives_the_same_files_and_nothing_else(tmp_path):
    log = make_log(piloted=False)
    paths = [tmp_path / "one" / "curves.png", tmp_path / "one" / "levels.png"]
    assert write_curves(log, tmp_path / "one", "run") == paths
    save_figure(draw_levels(log, "run"), tmp_path / "again.png")
    assert paths[1].read_bytes() == (tmp_path / "again.png").read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["curves.png", "levels.png"]
    with Image.open(tmp_path / "one" / "curves.png") as picture:
        assert picture.size == (1500, 820)


def test_logs_without_levels_or_without_any_line_are_drawn_as_far_as_they_go(tmp_path):
    assert write_curves([], tmp_path / "none") == []
    assert not (tmp_path / "none").exists()
    assert write_curves([{"step": 3, "scores": {"AP": 0.5}}], tmp_path) == [tmp_path / "curves.png"]


def test_runs_are_compared_by_what_both_have(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("training.curves.save_figure", lambda figure, path: figures.append((figure, path)))
    logs = {"piloted": make_log(), "plain": make_log(piloted=False, scale=2.0)}
    compare_runs(logs, tmp_path / "both.png")
    ((figure, _),) = figures
    panels = {title: lines_of(axes) for title, axes in panels_of(figure).items()}
    assert list(panels) == [
        "loss of matched queries",
        "label loss",
        "mask loss",
        "dice loss",
        "validation: PQ",
        "speed",
    ]
    assert all(list(lines) == ["piloted", "plain"] for lines in panels.values())
    assert panels["loss of matched queries"]["piloted"][1] == pytest.approx([6 / step for step in range(10, 60, 10)])
    assert panels["loss of matched queries"]["plain"][1] == pytest.approx([12 / step for step in range(10, 60, 10)])
    assert panels["validation: PQ"]["plain"] == ([20, 40], pytest.approx([20, 40]))
    assert len(figure.legends[0].get_texts()) == 2


def write_log(folder, log):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log))


def test_the_program_compares_finished_and_unfinished_runs(tmp_path, capsys):
    write_log(tmp_path / "finished", make_log())
    for step in (20, 40):
        write_log(tmp_path / f"other.checkpoints/step-{step:08d}", make_log(steps=range(10, step + 1, 10)))
    output = tmp_path / "both.svg"
    main([str(tmp_path / "finished"), f"second={tmp_path / 'other'}", "--output", str(output)])
    assert capsys.readouterr().out == f"The curves of 2 runs are in {output}.\n"
    assert read_runs([str(tmp_path / "other")])["other"] == make_log(steps=range(10, 41, 10))
    text = output.read_text()
    assert "<!-- finished -->" in text
    assert "<!-- second -->" in text
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["both.svg"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{0}/none"], "holds no log.jsonl. Pass the output_dir of training.train"),
        (["{0}/run", "{0}/run"], "Two runs are called 'run'. Give them names: NAME="),
        (["{0}/run", "--output", "{0}/plot.gif"], "should end with one of .png, .svg, .pdf"),
        (["{0}/empty", "a={0}/empty"], "no run has a line in its log"),
    ],
)
def test_mistakes_end_with_a_sentence(tmp_path, arguments, sentence):
    write_log(tmp_path / "run", make_log())
    write_log(tmp_path / "empty", [])
    with pytest.raises(SystemExit) as stop:
        main([argument.format(tmp_path) for argument in arguments])
    assert sentence in stop.value.code


def test_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path):
    (tmp_path / "curves.png").write_bytes(b"before")
    (tmp_path / ".curves.png.unfinished").mkdir()  # in the way
    with pytest.raises(OSError, match="unfinished"):
        write_curves([{"step": 3, "loss": 0.5}], tmp_path)
    assert (tmp_path / "curves.png").read_bytes() == b"before"


def test_formats_are_checked_before_anything_is_written(tmp_path):
    with pytest.raises(LogError, match="should end with"):
        compare_runs({"a": make_log()}, tmp_path / "plot.bmp")
    assert list(tmp_path.iterdir()) == []
