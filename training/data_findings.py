"""What is wrong, or looks wrong, with a data set: sentences with what to do.

An error makes a training fail or worthless; a warning is what people often did not mean. `find_problems` looks at the numbers alone.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from training.data_check import ImageFacts, SplitFacts
from training.image_files import name_some

# Names of classes that say that there is nothing; as parts of a name they say nothing ("void deck", "other vehicle").
NOTHING = (
    "background",
    "bg",
    "void",
    "unlabeled",
    "unlabelled",
    "ignore",
    "ignored",
    "none",
    "nothing",
    "no object",
    "null",
    "n/a",
)
MOST_NAMES = 12
LARGE_SHARE = 0.5  # of the pixels, that a class of backgrounds has
MOST_IMAGES = 0.9  # share of the images, that show it
EIGHT_BIT_VOID = 255
MUCH_OVERLAP = 0.05


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or looks so."""

    level: Literal["error", "warning"]
    text: str


def find_problems(
    facts: Mapping[str, SplitFacts], *, max_broken_images: int = 10, num_queries: int = 100
) -> list[Finding]:
    """Look at the splits, one by one and together; errors come first.

    Args:
        facts: of `train`, `validation` or both.
        max_broken_images: a training passes over so many.
        num_queries: of the model.
    """
    found = [finding for one in facts.values() for finding in _findings_of(one, max_broken_images, num_queries)]
    if len(facts) > 1:
        found += _findings_of_both(facts["train"], facts["validation"])
    return sorted(dict.fromkeys(found), key=lambda finding: finding.level)  # "error" comes before "warning"


def _findings_of(facts: SplitFacts, max_broken_images: int, num_queries: int) -> Iterator[Finding]:
    checks: tuple[Callable[[SplitFacts], Iterator[Finding]], ...] = (
        _check_content,
        _check_shifted_ids,
        _check_names,
        _check_background,
        _check_ids,
        _check_empty_classes,
        _check_ignored,
        _check_overlaps,
        _check_copies,
    )
    yield from _check_broken(facts, max_broken_images)
    for check in checks:
        yield from check(facts)
    crowded = sum(len(classes) > num_queries for classes in facts.classes_of_images)
    if crowded:
        most = max(len(classes) for classes in facts.classes_of_images)
        yield Finding(
            "warning",
            f"{crowded} of {len(facts.classes_of_images)} {facts.split} images have more segments than the model has queries "
            f"({num_queries}); the most are {most}. It can never find all of them: raise `model.num_queries`.",
        )
    yield from (Finding("warning", note) for note in facts.notes)


def _check_broken(facts: SplitFacts, limit: int) -> Iterator[Finding]:
    count = len(facts.broken)
    if not count:
        return
    if facts.split == "validation":
        yield Finding(
            "error", f"{count_of(count, 'validation image')} cannot be read, see the list. Scores need all of them."
        )
    elif not facts.readable:
        yield Finding("error", f"No training image of {count} can be read, see the list.")
    elif count > limit:
        yield Finding(
            "error",
            f"{count_of(count, 'training image')} cannot be read, see the list; a training stops after {limit} (`max_broken_images`).",
        )
    else:
        yield Finding(
            "warning",
            f"{count_of(count, 'training image')} cannot be read, see the list; another one would be taken instead.",
        )


def _check_content(facts: SplitFacts) -> Iterator[Finding]:
    if facts.readable and not facts.segments_of_class:
        yield Finding(
            "error",
            f"No {facts.split} image has a segment. Are these the right labels, and the right names of classes?",
        )
    counts = Counter(image.image_id for image in facts.readable)
    twice = [str(image_id) for image_id, count in counts.items() if count > 1]
    if twice:
        yield Finding("error", f"{len(twice)} image ids of the {facts.split} split are not unique: {name_some(twice)}.")


def _check_shifted_ids(facts: SplitFacts) -> Iterator[Finding]:
    """Find values that are one above the last class, or one below the first."""
    pattern = re.compile(r"has the values? \[?(\d+)\]?,.* have the values (\d+) to (\d+)", re.DOTALL)
    matches = [match for image in facts.broken if (match := pattern.search(image.error))]
    above = [match for match in matches if int(match[1]) == int(match[3]) + 1]
    below = [match for match in matches if int(match[1]) == int(match[2]) - 1]
    if above:
        value, first, _ = map(int, above[0].groups())
        yield Finding(
            "error",
            f"{count_of(len(above), f'{facts.split} image')} have the value {value}, one above the last class: the classes are numbered "
            f"from {first}, the files probably from {first + 1}. Say the values: `classes: {{{first + 1}: first name, ...}}`.",
        )
    if below:
        value = int(below[0][1])
        yield Finding(
            "error",
            f"{count_of(len(below), f'{facts.split} image')} have the value {value}, one below the first class. If it means that nothing "
            f"is known there, ignore it with `ignore_index: {value}`; else the numbers of the classes are one too high.",
        )


def _check_names(facts: SplitFacts) -> Iterator[Finding]:
    spellings = defaultdict(list)
    for name in facts.id2label.values():
        spellings[re.sub(r"[\s_-]+", " ", name.strip().lower())].append(name)
    for names in spellings.values():
        if len(set(names)) < len(names):
            yield Finding("error", f"Several classes are called {names[0]!r}. Give each class a name of its own.")
        elif len(names) > 1:
            words = " and ".join(map(repr, names))
            yield Finding("warning", f"The classes {words} differ in spelling alone. If they are one, join them.")


def _check_background(facts: SplitFacts) -> Iterator[Finding]:
    for class_id, name in facts.id2label.items():
        kind = "an object class" if class_id in facts.thing_ids else "a class"
        if name.strip().lower() in NOTHING and facts.segments_of_class[class_id]:
            yield Finding(
                "warning",
                f"{name!r} is {kind} with {facts.segments_of_class[class_id]} segments. The model needs no class for nothing: it says so "
                "by itself. Leave the class out, or ignore its pixels; keep it only if it is to be recognised like any other.",
            )
        elif class_id in facts.thing_ids and facts.task != "semantic" and _is_everywhere(facts.readable, class_id):
            yield Finding(
                "warning",
                f"{name!r} looks like the background: nearly every image has one mask of it, which covers most of the image. Is it "
                "meant to be an object class?",
            )


def _is_everywhere(images: list[ImageFacts], class_id: int) -> bool:
    """Say whether a class has one large mask in nearly every image, beside other segments."""
    single = [
        image
        for image in images
        if image.classes.count(class_id) == 1
        and image.areas[image.classes.index(class_id)] > LARGE_SHARE * image.pixels
        and len(image.classes) > 1
    ]
    return bool(images) and len(single) >= MOST_IMAGES * len(images)


def _check_ids(facts: SplitFacts) -> Iterator[Finding]:
    ids = facts.category_ids
    void = [
        class_id
        for class_id, category in ids.items()
        if category == EIGHT_BIT_VOID and facts.segments_of_class[class_id]
    ]
    if void:
        yield Finding(
            "warning",
            f'Class {facts.id2label[void[0]]!r} has the id 255, which most programs take for "ignored". Check that it is a class.',
        )
    high = [category for category in ids.values() if category > EIGHT_BIT_VOID]
    if high and facts.task == "semantic":
        yield Finding(
            "warning",
            f"{count_of(len(high), 'class')} with ids above 255 ({name_some([str(key) for key in high])}). Files of 8 bits cannot hold them: in these, "
            "256 is 0.",
        )


def _check_empty_classes(facts: SplitFacts) -> Iterator[Finding]:
    empty = [name for class_id, name in facts.id2label.items() if not facts.segments_of_class[class_id]]
    is_complete = facts.known_classes is not None or len(facts.images) == facts.num_images
    if not empty or not facts.segments_of_class or facts.split == "validation":
        return
    text = f"{len(empty)} of {len(facts.id2label)} classes have no segment in the {facts.split} split: {few(empty)}."
    if not is_complete:
        text += f" {len(facts.images)} of {facts.num_images} images were read."
    elif empty[0] == facts.id2label[0] and len(empty) == 1:
        text += " It is the first of the list: either the ids are shifted by one, or it is the group that some programs write before the classes."
    yield Finding("warning", text)


def _check_ignored(facts: SplitFacts) -> Iterator[Finding]:
    pixels = sum(image.pixels for image in facts.readable)
    ignored = sum(image.ignored_pixels for image in facts.readable)
    if len(facts.id2label) > 1 and len(facts.segments_of_class) == 1 and ignored:
        yield Finding(
            "warning",
            f"Only one class occurs ({facts.id2label[next(iter(facts.segments_of_class))]!r}), and {ignored / pixels:.0%} of the pixels are "
            "ignored. Masks of 0 and 255 look so: 255 is ignored unless `ignore_index` says otherwise.",
        )
    elif ignored > LARGE_SHARE * pixels:
        yield Finding(
            "warning",
            f"{ignored / pixels:.0%} of the pixels of the {facts.split} split are ignored. Is `ignore_index` right?",
        )


def _check_overlaps(facts: SplitFacts) -> Iterator[Finding]:
    segments = sum(len(image.areas) for image in facts.readable)
    overlapping = sum(image.overlapping for image in facts.readable)
    if facts.task == "panoptic" and overlapping:
        yield Finding(
            "warning",
            f"{overlapping} of {segments} segments of the {facts.split} split overlap others. Panoptic quality gives a pixel to one segment "
            "alone, the first; for objects that overlap use the task instance.",
        )


def _check_copies(facts: SplitFacts) -> Iterator[Finding]:
    counts = Counter(image.checksum for image in facts.readable)
    copies = sum(count - 1 for count in counts.values())
    if copies:
        yield Finding(
            "warning", f"{copies} of {len(facts.readable)} {facts.split} images are copies of others, pixel by pixel."
        )


def _findings_of_both(train: SplitFacts, validation: SplitFacts) -> Iterator[Finding]:
    if train.id2label != validation.id2label:
        first = min(set(train.id2label.items()) ^ set(validation.id2label.items()))
        yield Finding(
            "error", f"The splits have different classes, the first being {first}. Give both the same list of classes."
        )
        return
    unseen = [
        name
        for class_id, name in train.id2label.items()
        if validation.segments_of_class[class_id] and not train.segments_of_class[class_id]
    ]
    if unseen:
        yield Finding(
            "warning",
            f"{count_of(len(unseen), 'class')} of the validation split never occur in the training split: {few(unseen)}.",
        )
    seen = {image.checksum for image in train.readable}
    shared = [str(image.image_id) for image in validation.readable if image.checksum in seen]
    if shared:
        yield Finding(
            "warning",
            f"{len(shared)} validation images are training images too, pixel by pixel ({name_some(shared)}): scores on them say little.",
        )


def count_of(number: int, noun: str) -> str:
    """Write a number and its noun.

    >>> count_of(1, "training image"), count_of(2, "class")
    ('1 training image', '2 classes')
    """
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def few(names: list[str]) -> str:
    """Write the first names of a list."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
