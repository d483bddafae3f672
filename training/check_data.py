"""Look at a data set before it is trained on: `python -m training.check_data RECIPE` or `... PATH`; `--help` says more.

data sets ── every image read once ── numbers, classes, broken images, likely mistakes, memory ── report, JSON, pictures
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # started as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from training.data import DATASETS, SPLITS, TASKS, SegmentationDataset, Split, Task

if TYPE_CHECKING:
    from training.arguments import TrainingArguments
    from training.augmentation import Augmentation
    from training.data_check import SplitFacts
    from training.memory_estimate import MemoryEstimate

PROGRAM = "python -m training.check_data"
RECIPE_SUFFIXES = (".yaml", ".yml")
NUM_QUERIES = 100  # of the models of the paper
MOST_BROKEN = 10  # images that a training passes over, unless its recipe says otherwise
STREAMED_IMAGES = 1000  # that are read of a stream, unless a limit is given
REPORT_FILE, JSON_FILE, PICTURE_FILE = "report.txt", "report.json", "samples.png"
EXAMPLES = f"""\
what a recipe would train on; every key of a recipe is an option too, as of training.train:
  {PROGRAM} training/recipes/own_data/instance/gpu_16gb.yaml --dataset_options.path data/own
a folder or zip archive, whose format is found out:
  {PROGRAM} data/own --task instance
another one, of which 500 images are read:
  {PROGRAM} data/maps --dataset class_index --task semantic --dataset-option ignore_index=0 --limit 500
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; it ends with 1 if something is an error, and with a sentence if nothing can be looked at."""
    words = with_path_first(sys.argv[1:] if argv is None else argv)
    options, rest = make_parser().parse_known_args(words)
    is_recipe = options.source.lower().endswith(RECIPE_SUFFIXES)
    if rest and not is_recipe:
        make_parser().error(f"unknown option {rest[0]}")
    from training.recipe_files import RecipeError  # noqa: PLC0415 - `--help` need not wait for it

    try:
        has_errors = check_recipe(options, rest) if is_recipe else check_folder(options)
    except (RecipeError, ValueError) as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if has_errors else 0)


def with_path_first(argv: Sequence[str]) -> list[str]:
    """Write `--path PATH`, as recipes call it, as PATH."""
    words = list(argv)
    if "--path" in words[:-1]:
        place = words.index("--path")
        return [words[place + 1], *words[:place], *words[place + 2 :]]
    return words


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Read a data set, count what it holds, look for mistakes in its labels, estimate the memory of a training, and draw "
        "some images with their masks.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "source",
        metavar="RECIPE|PATH",
        help="a recipe (.yaml), or a folder, zip archive, or name on the Hub (also --path PATH)",
    )
    add("--split", choices=(*SPLITS, "both"), default="both", help="default: both, or train alone if there is no other")
    add(
        "--limit", type=int, metavar="N", help="read N images, spread over the data set (default: all; of streams 1000)"
    )
    add("--num-workers", type=int, default=2, metavar="N", help="processes that read images (default: 2)")
    add(
        "--output",
        type=Path,
        default=Path("outputs/check_data"),
        metavar="FOLDER",
        help=f"for {REPORT_FILE}, {JSON_FILE} and {PICTURE_FILE} (default: outputs/check_data)",
    )
    add("--json", action="store_true", help="print the report as JSON, for programs")
    add("--pictures", type=int, default=8, metavar="N", help="images that are drawn (default: 8; 0: none)")

    add = parser.add_argument_group("for a folder (a recipe says these itself)").add_argument
    add("--dataset", metavar="NAME", help=f"format: one of {', '.join(DATASETS)} (default: auto)")
    add("--task", choices=TASKS, help="default: instance")
    add(
        "--dataset-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the data set, such as classes=names.txt; may be repeated",
    )
    add("--num-queries", type=int, metavar="N", help=f"of the model (default: {NUM_QUERIES}, or those of the recipe)")
    add("--augmentation", metavar="PRESET", help="draw the images also as augmented: coco, ade20k_640 ...")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# The two kinds of sources
# ---------------------------------------------------------------------------------------------------------------------


def check_recipe(options: argparse.Namespace, rest: Sequence[str]) -> bool:
    """Check what a recipe would train on; returns whether there are errors."""
    from training.arguments import parse_arguments  # noqa: PLC0415 - `--help` need not wait for it
    from training.augmentation import Augmentation  # noqa: PLC0415

    # Both programs have these.
    shared = {"--dataset": options.dataset, "--task": options.task, "--augmentation": options.augmentation}
    words = [word for name, value in shared.items() if value is not None for word in (name, value)]
    arguments = parse_arguments([options.source, *words, *rest], PROGRAM)
    augmentation = Augmentation.from_recipe(arguments.augmentation) if arguments.augmentation else None
    return check(
        options,
        {split: (arguments.dataset, arguments.options_of(split)) for split in splits_of(options)},
        arguments.task,
        augmentation,
        arguments,
    )


def check_folder(options: argparse.Namespace) -> bool:
    """Check a folder; returns whether there are errors."""
    import yaml  # noqa: PLC0415 - `--help` need not wait for it

    from training.augmentation import Augmentation  # noqa: PLC0415

    named = [text.partition("=") for text in options.dataset_option]
    values = {name: yaml.safe_load(value) for name, _, value in named}
    task = options.task or "instance"
    is_drawn = "digit_scenes" in (options.dataset, options.source)
    name = "digit_scenes" if is_drawn else options.dataset or "auto"
    given = {"task": task, **({} if is_drawn else {"path": options.source}), **values}
    augmentation = None if options.augmentation is None else Augmentation.from_recipe(options.augmentation)
    return check(options, dict.fromkeys(splits_of(options), (name, given)), task, augmentation, None)


def splits_of(options: argparse.Namespace) -> tuple[Split, ...]:
    """Splits that are looked at."""
    return SPLITS if options.split == "both" else (options.split,)


def check(
    options: argparse.Namespace,
    sources: Mapping[Split, tuple[str, Mapping[str, Any]]],
    task: Task,
    augmentation: "Augmentation | None",
    arguments: "TrainingArguments | None",
) -> bool:
    """Read, report, draw; returns whether there are errors.

    Args:
        options: of the command line.
        sources: name and options of the data set of each split.
        task: which segments are reported.
        augmentation: to draw.
        arguments: of the recipe.
    """
    from training.data_check import read_facts, summarise  # noqa: PLC0415 - `--help` need not wait for it
    from training.data_check_text import report  # noqa: PLC0415
    from training.data_findings import find_problems  # noqa: PLC0415

    datasets, missing = open_all(sources, options)
    facts = {
        split: read_facts(dataset, split, task, limit=options.limit, num_workers=options.num_workers)
        for split, dataset in datasets.items()
    }
    num_queries = queries_of(options, arguments)
    limit = MOST_BROKEN if arguments is None else arguments.max_broken_images
    findings = [*find_problems(facts, max_broken_images=limit, num_queries=num_queries), *missing]
    summaries = [summarise(one, num_queries) for one in facts.values()]
    memory = None if arguments is None else estimate(arguments, datasets, facts)
    options.output.mkdir(parents=True, exist_ok=True)
    others = draw(options, datasets, facts, augmentation, 0 if arguments is None else arguments.seed)
    text = report(summaries, findings, memory, others)
    content = {
        "splits": {summary["split"]: summary for summary in summaries},
        "memory": memory if memory is None or isinstance(memory, str) else memory.to_dict(),
        "findings": [vars(finding) for finding in findings],
    }
    (options.output / REPORT_FILE).write_text(f"{text}\n", encoding="utf-8")
    (options.output / JSON_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(content) if options.json else text)
    return any(finding.level == "error" for finding in findings)


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


def open_all(
    sources: Mapping[Split, tuple[str, Mapping[str, Any]]], options: argparse.Namespace
) -> tuple[dict[Split, SegmentationDataset], list[Any]]:
    """Open the splits.

    Returns:
        The splits, and a warning if there is no validation split and none was asked for.
    """
    from training.data_findings import Finding  # noqa: PLC0415 - as above
    from training.official_files import FileError  # noqa: PLC0415

    datasets: dict[Split, SegmentationDataset] = {}
    missing: list[Finding] = []
    for split, (name, given) in sources.items():
        try:
            datasets[split] = open_split(name, split, given, options.limit)
        except FileError as error:
            if split == "train" or options.split != "both":
                raise
            missing.append(Finding("warning", f"The validation split cannot be opened: {error}"))
    return datasets, missing


def open_split(name: str, split: Split, given: Mapping[str, Any], limit: int | None) -> SegmentationDataset:
    """Open a split, whatever of it is broken; of a stream, the first images are kept in memory."""
    from training.data import open_segmentation_dataset  # noqa: PLC0415 - as above

    dataset = open_segmentation_dataset(name, split, **given)
    if name == "hub_stream":
        from training.streaming_rows import KeptRows  # noqa: PLC0415 - as above

        return KeptRows(dataset, limit or STREAMED_IMAGES)  # type: ignore[arg-type] - of this name
    return dataset


def queries_of(options: argparse.Namespace, arguments: "TrainingArguments | None") -> int:
    """Number of queries: of the command line, of the recipe, or the usual one."""
    if options.num_queries is not None:
        return options.num_queries
    return NUM_QUERIES if arguments is None else int(arguments.model.get("num_queries", NUM_QUERIES))


def estimate(
    arguments: "TrainingArguments", datasets: Mapping[Split, SegmentationDataset], facts: Mapping[Split, "SplitFacts"]
) -> "MemoryEstimate | str | None":
    """Estimate the memory of a training step, or say why that cannot be done."""
    from training.memory_estimate import estimate_memory  # noqa: PLC0415 - as above

    if "train" not in facts or not facts["train"].readable:
        return None
    train = facts["train"]
    most = max((len(classes) for classes in train.classes_of_images), default=0)
    sizes = [image.size for image in train.readable]
    try:
        return estimate_memory(arguments, datasets["train"], most, sizes)
    except (OSError, ValueError, ImportError) as error:
        return f"The memory of a training step cannot be estimated: {str(error).splitlines()[0]}"


def draw(
    options: argparse.Namespace,
    datasets: Mapping[Split, SegmentationDataset],
    facts: Mapping[Split, "SplitFacts"],
    augmentation: "Augmentation | None",
    seed: int,
) -> list[str]:
    """Write the pictures of the first split; returns lines that say where they are."""
    split, dataset = next(iter(datasets.items()))
    lines = [f"This report and its numbers: {options.output / REPORT_FILE}, {options.output / JSON_FILE}"]
    if options.pictures > 0 and facts[split].readable:
        from training.data_pictures import draw_samples  # noqa: PLC0415 - as above

        sheet = draw_samples(dataset, facts[split].readable, augmentation, num_images=options.pictures, seed=seed)
        sheet.save(options.output / PICTURE_FILE)
        lines.append(f"Images with their masks, look at them: {options.output / PICTURE_FILE}")
    return lines


if __name__ == "__main__":
    main()
