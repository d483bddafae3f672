"""Model cards: front matter that the Hub can read, tables that hold together, sources everywhere, and nobody's text lost."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from mpformer_hf.model_card import (
    add_tags,
    attach_card,
    is_by_a_person,
    main,
    render_card,
    render_texts,
    table,
)
from mpformer_hf.model_facts import DATA_SETS, LICENCES, Conversion, Detail, Licence, Score, Source, read_all_facts
from tests.unit.test_model_facts import CARDS, MEASURED, PAPER, family, make_facts, make_score, write
from tests.unit.test_readme import blocks_of


@pytest.fixture(scope="module")
def published():
    return read_all_facts(CARDS)


@pytest.fixture(scope="module")
def cards():
    return {path.stem: path.read_text() for path in sorted(CARDS.glob("*.md")) if path.name != "README.md"}


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def tables_of(text):
    """Tables as lists of rows, and rows as lists of cells."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            found.append(rows)
            rows = []
    return found


def results_of(text):
    [rows] = [rows for rows in tables_of(text) if rows[0][-2:] == ["percent", "source"]]
    return rows[2:]


# The rendered cards


def test_the_rendered_cards_are_those_of_the_facts(cards):
    assert {f"{name}.md": text for name, text in cards.items()} == render_texts(CARDS)


def test_the_hub_reads_the_front_matter_of_every_card_and_writes_the_same(cards):
    for name, text in cards.items():
        card = ModelCard(text)
        assert str(card) == text, name
        assert ModelCardData(**front_matter(text)).to_dict() == card.data.to_dict() == front_matter(text)


def test_the_front_matter_names_licence_library_task_and_data(cards, published):
    for name, text in cards.items():
        data = front_matter(text)
        assert data["license"] == "cc-by-nc-4.0"
        assert data["library_name"] == "transformers"
        assert data["pipeline_tag"] == "image-segmentation"
        assert data["datasets"] == [published[name].training_data[0].id]
        assert set(data["tags"]) >= {"image-segmentation", f"{published[name].task}-segmentation", "mpformer"}
        assert ("mask2former" in data["tags"]) == name.startswith("mask2former")


def test_every_score_of_the_facts_is_in_the_front_matter_with_its_source_and_as_quoted(cards, published):
    for name, text in cards.items():
        [model] = front_matter(text)["model-index"]
        assert model["name"] == name
        found = [
            (result["dataset"]["type"], result["dataset"]["split"], result["dataset"]["config"], metric["value"], url)
            for result in model["results"]
            for metric in result["metrics"]
            for url in [result["source"]["url"]]
        ]
        scores = published[name].scores
        assert sorted(found) == sorted((s.dataset, s.split, s.task, s.value, s.source.url) for s in scores)
        for result in model["results"]:
            assert result["source"]["name"].startswith("Quoted from: ")
            assert all(metric["name"].endswith("(quoted)") for metric in result["metrics"])
            assert not any({"verified", "verifyToken"} & metric.keys() for metric in result["metrics"])


def test_every_line_of_the_results_has_a_number_and_a_link_to_its_source(cards, published):
    for name, text in cards.items():
        rows = results_of(text)
        assert len(rows) == len(published[name].scores)
        for row in rows:
            assert 1 < float(row[3]) <= 100
            assert re.fullmatch(r"\[[^\]]+\]\(https://[^)\s]+\)", row[4])


def test_every_number_of_a_description_has_a_source(cards):
    for text in cards.values():
        sourced = [rows for rows in tables_of(text) if rows[0][-1] == "source"]
        assert len(sourced) == 3
        for row in (row for rows in sourced for row in rows[2:]):
            assert row[-1], row


def test_tables_hold_together(cards):
    for text in cards.values():
        for rows in tables_of(text):
            assert {len(row) for row in rows} == {len(rows[0])}
            assert set(rows[1]) == {"---"}


def test_a_card_says_that_its_scores_are_quoted_and_what_is_not_known(cards):
    for text in cards.values():
        assert "**All scores on this card are quoted**" in text
        assert "measured here" not in text
    assert "Not published:" in cards["mpformer-resnet50-coco-instance-12ep"]


def test_a_card_tells_the_licence_in_words(cards, published):
    for name, text in cards.items():
        section = text.partition("## Licence")[2].partition("## Citation")[0]
        assert published[name].licence.text in section
        assert "Apache-2.0" in section
        assert "Not for commercial use" in text
    assert "MODEL_ZOO.md#license" in LICENCES["mask2former-zoo"].text


def test_sources_that_nobody_can_check_are_on_no_card(cards):
    for text in cards.values():
        assert not re.search(r"wizwand|jishuzhan|assumed|recall|NOT FOUND", text, re.IGNORECASE)


def test_code_blocks_are_closed_and_python(cards):
    for name, text in cards.items():
        blocks = blocks_of(text)
        assert [block.language for block in blocks] == ["python", "python", "python", "bash", "bibtex"]
        for block in blocks[:3]:
            compile(block.source, name, "exec")
        assert f"--output-dir {name}" in blocks[3].source


def test_small_objects_are_a_limit_where_they_were_scored(cards):
    # 23.4 and 64.8 are those of the paper's table of COCO instances, ResNet-50.
    assert "(mask AP 23.4 against 64.8, see the table)" in cards["mask2former-resnet50-coco-instance"]
    assert "Small objects" not in cards["mask2former-resnet50-coco-panoptic"]


# Rendering


def test_what_was_measured_takes_the_place_of_what_is_quoted_in_the_front_matter_but_not_in_the_table():
    quoted = make_score(value=51.9, unit="percent")
    test_dev = make_score(value=58.3, unit="percent", split="test-dev")
    measured = make_score(value=0.51837, unit="fraction", source=MEASURED)
    text = str(render_card(make_facts(scores=(quoted, test_dev, measured))))
    results = front_matter(text)["model-index"][0]["results"]
    assert [(r["dataset"]["split"], r["metrics"][0]["value"], "source" in r) for r in results] == [
        ("test-dev", 58.3, True),
        ("val2017", 51.837, False),
    ]
    assert results[1]["metrics"][0]["name"] == "PQ, percent (measured here)"
    assert [(row[3], row[4].partition("]")[0]) for row in results_of(text)] == [
        ("51.9", "[a paper"),
        ("58.3", "[a paper"),
        ("51.84", "measured here: `python -m training.score model`"),
    ]
    assert "All scores on this card are quoted" not in text


def test_quoted_numbers_keep_their_digits():
    values = {"pq": 40.15, "sq": 52, "rq": 7.25}
    scores = tuple(make_score(metric=metric, value=value, unit="percent") for metric, value in values.items())
    assert [row[3] for row in results_of(str(render_card(make_facts(scores=scores))))] == ["40.15", "52.0", "7.25"]


def test_a_model_without_scores_says_so():
    text = str(render_card(make_facts()))
    assert "**This model has not been scored**" in text
    assert "model-index" not in front_matter(text)
    assert "## Results" not in text


def test_bars_and_line_breaks_do_not_end_a_table():
    rows = [["a | b", "two\nlines"]]
    assert table(["x", "y"], rows) == "| x | y |\n| --- | --- |\n| a \\| b | two lines |"
    detail = Detail("Odd | name", "1 |\n2", PAPER)
    for rows in tables_of(str(render_card(make_facts(details=(detail,))))):
        assert {len(row) for row in rows} == {len(rows[0])}


def test_a_licence_of_ones_own_has_its_name_and_link_in_the_front_matter():
    licence = Licence("other", "Ask us.", name="house-rules", link="https://example.org/rules")
    data = front_matter(str(render_card(make_facts(licence=licence))))
    assert (data["license"], data["license_name"], data["license_link"]) == (
        "other",
        "house-rules",
        "https://example.org/rules",
    )
    assert "license" not in front_matter(str(render_card(make_facts())))


def test_terms_that_are_not_known_are_not_made_up():
    text = str(render_card(make_facts(training_data=(DATA_SETS["mapillary-vistas"],))))
    assert (
        "| model | [Mapillary Vistas](https://www.mapillary.com/dataset/vistas) | not known to this card; ask its owners |"
        in text
    )


def test_a_conversion_is_told_with_command_file_versions_report_and_checks():
    conversion = Conversion(
        command="python -m conversion.convert_detectron2 model.pth",
        file_name="model.pth",
        sha256="ab" * 32,
        versions={"mpformer_hf": "0.1.0", "torch": "2.15.0"},
        report=("The label embedding begins fresh.",),
        checks=("A forward pass was finite.",),
    )
    text = str(render_card(make_facts(origin="mpformer", licence=LICENCES["mpformer"], conversion=conversion)))
    section = text.partition("## How it was made")[2].partition("## Licence")[0]
    for part in (conversion.command, "`model.pth`", "ab" * 32, "mpformer_hf 0.1.0, torch 2.15.0"):
        assert part in section
    assert "- The label embedding begins fresh.\n- A forward pass was finite." in section


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"label_embedding": "kept", "query_position_embedding": False}, ("was kept; evaluation", "have no position")),
        (
            {"label_embedding": "fresh"},
            ("One with random values was added", "position embedding of the queries was kept"),
        ),
    ],
)
def test_the_differences_of_converted_weights_say_what_became_of_the_embeddings(fields, expected):
    text = str(render_card(make_facts(origin="mask2former", licence=LICENCES["mask2former"], **fields)))
    section = text.partition("## Differences from the original")[2].partition("\n## ")[0]
    for words in (*expected, "BGR", "sorted by their score", "384x384"):
        assert words in section
    assert "## Differences" not in str(render_card(make_facts(**fields)))


# Whose text it is


def test_a_card_as_it_was_written_belongs_to_the_program_and_any_change_makes_it_a_persons():
    text = str(render_card(make_facts()))
    assert not is_by_a_person(text)
    assert not is_by_a_person(text.replace("\n", "\r\n"))
    assert not is_by_a_person(text + "\n\n")
    assert is_by_a_person(text.replace("library_name: transformers", "library_name: transformers\nlicense: mit"))
    assert is_by_a_person(text.replace("## Licence", "## License"))
    assert is_by_a_person(text + "One more sentence.\n")
    assert is_by_a_person("# My model\n")
    assert is_by_a_person("")


@pytest.mark.parametrize("digest", ["", "ab" * 16])
def test_tags_that_are_added_do_not_make_a_card_a_persons(digest):
    text = str(render_card(make_facts(weights_digest=digest)))
    tagged = add_tags(text, ["cats", "vision", "cats"])
    assert front_matter(tagged)["tags"] == [*front_matter(text)["tags"], "cats"]
    assert not is_by_a_person(tagged)
    assert tagged.rsplit("<!--")[-1].split("weights")[1:] == text.rsplit("<!--", maxsplit=1)[-1].split("weights")[1:]
    assert tagged.partition("\n# ")[2].partition("<!--")[0] == text.partition("\n# ")[2].partition("<!--")[0]
    assert add_tags(tagged, ["cats"]) == tagged


def test_tags_that_are_added_to_a_persons_card_leave_it_a_persons():
    tagged = add_tags("---\nlicense: mit\n---\n# Mine\n", ["cats"])
    assert front_matter(tagged) == {"license": "mit", "tags": ["cats"]}
    assert tagged.endswith("# Mine\n")
    assert is_by_a_person(tagged)


def test_a_card_is_written_where_there_is_none_and_replaces_an_earlier_one(tmp_path):
    first, second = render_card(make_facts()), render_card(make_facts(num_queries=6))
    assert attach_card(tmp_path, first)
    assert (tmp_path / "README.md").read_text() == str(first)
    assert attach_card(str(tmp_path), str(second))
    assert (tmp_path / "README.md").read_text() == str(second)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("text", ["# Mine\n", "", "\ufeff# With a mark\n", "\xff\xfe"])
def test_a_persons_readme_is_never_overwritten(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text.encode("latin-1", "replace") if text == "\xff\xfe" else text.encode())
    before = (tmp_path / "README.md").read_bytes()
    assert not attach_card(tmp_path, render_card(make_facts()))
    assert (tmp_path / "README.md").read_bytes() == before


def test_a_card_that_a_person_has_changed_is_never_overwritten(tmp_path):
    attach_card(tmp_path, render_card(make_facts()))
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("# A model", "# Our model"))
    assert not attach_card(tmp_path, render_card(make_facts(num_queries=6)))
    assert "# Our model" in path.read_text()


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder that exists nor a repository"):
        attach_card(tmp_path / "nowhere", render_card(make_facts()))


# The command


@pytest.fixture
def folder(tmp_path, capsys):
    """Facts of one model with its card, and a README.md of the folder."""
    write(tmp_path, family())
    (tmp_path / "README.md").write_text("# About this folder\n")
    main(["render", str(tmp_path)])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'model-a.md'}\n"
    return tmp_path


def run_check(folder):
    main(["render", str(folder), "--check"])


def test_cards_that_are_up_to_date_pass_the_check_and_are_not_written_again(folder, capsys):
    run_check(folder)
    assert capsys.readouterr().out == "Every card is up to date.\n"
    main(["render", str(folder)])
    assert capsys.readouterr().out == ""
    assert (folder / "README.md").read_text() == "# About this folder\n"


def test_a_card_behind_its_facts_fails_the_check_with_the_difference_until_it_is_rendered(folder):
    write(folder, family(title="Model A, improved"))
    before = (folder / "model-a.md").read_text()
    with pytest.raises(SystemExit) as stop:
        run_check(folder)
    assert "-# Model A\n+# Model A, improved\n" in stop.value.code
    assert "1 card(s) are not up to date" in stop.value.code
    assert (folder / "model-a.md").read_text() == before
    main(["render", str(folder)])
    run_check(folder)


def test_an_edited_and_a_missing_card_fail_the_check(folder):
    card = folder / "model-a.md"
    card.write_text(card.read_text().replace("51.9", "52.9"))
    with pytest.raises(SystemExit, match="not up to date"):
        run_check(folder)
    card.unlink()
    with pytest.raises(SystemExit, match="not up to date"):
        run_check(folder)


def test_a_card_without_facts_fails_the_check_and_is_removed_but_other_texts_stay(folder):
    (folder / "old.md").write_text((folder / "model-a.md").read_text())
    (folder / "notes.md").write_text("# Notes\n")
    with pytest.raises(SystemExit, match=r"old\.md"):
        run_check(folder)
    main(["render", str(folder)])
    assert sorted(path.name for path in folder.glob("*.md")) == ["README.md", "model-a.md", "notes.md"]


@pytest.mark.parametrize("content", [None, "{}", '{"sources": {}, "shared": {}, "checkpoints": [{}]}'])
def test_folders_without_usable_facts_end_with_a_sentence(tmp_path, content):
    if content is not None:
        write(tmp_path, content)
    with pytest.raises(SystemExit, match=r"^error: "):
        main(["render", str(tmp_path)])
    assert not list(tmp_path.glob("*.md"))


def test_facts_of_scores_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Score(
            metric="pq",
            value=51.9,
            unit="percent",
            task="panoptic",
            dataset="coco",
            split="val",
            source=Source("x", url="https://x.org"),
        ).value = 60.0


def test_the_readme_of_the_cards_names_every_file_of_facts():
    text = (Path(CARDS) / "README.md").read_text()
    assert set(re.findall(r"`([\w-]+\.json)`", text)) == {path.name for path in CARDS.glob("*.json")}
