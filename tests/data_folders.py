"""Small data sets in every format that `training.data` reads, written from digit scenes with plain code of this file.

`make_scenes` draws rows in the form of the interface: objects that overlap, a crowd region, void. Each `write_*` takes such rows and
writes the official files of its format; `pack` turns a folder, or its parts, into zip archives; `assert_reads_back_equal` compares.
"""

import itertools
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from training.data import DATASETS, DigitScenes, SegmentationRow, Split
from training.task_scores import TASK_SCORES

NAMES = ("digit", "china", "flower")  # class ids 0 (thing), 1, 2 (stuff)
SIZE = (80, 112)
SPLITS: dict[Split, tuple[str, str, str]] = {
    "train": ("train", "training", "train2017"),
    "validation": ("val", "validation", "val2017"),
}


@dataclass(frozen=True)
class Scene:
    """A row, and the name that its files have."""

    name: str
    row: SegmentationRow


def make_scenes(
    split: Split = "train", number: int = 3, *, overlapping: bool = False, crowd: bool = True
) -> list[Scene]:
    """Draw scenes with a void corner; the second has a crowd region, the last has no object.

    Args:
        split: of the digit scenes.
        number: of scenes.
        overlapping: objects reach over each other: each is widened by two pixels, and no stuff is reported.
        crowd: whether the first object of the second scene is a crowd region instead.
    """
    data = DigitScenes(split, preset="hard", image_size=SIZE, tell_digits_apart=False, num_images=1000, seed=3)
    rich = itertools.islice((row for row in data if (row["class_labels"] == 0).sum() >= 3), number - 1)
    bare = next(row for row in data if not (row["class_labels"] == 0).any())
    return tuple(
        Scene(
            f"scene {position}" if position == 1 else f"{split}_{position:03d}",
            prepare(row, position, overlapping, crowd),
        )
        for position, row in enumerate([*rich, bare])
    )


def prepare(row: SegmentationRow, position: int, overlapping: bool, crowd: bool) -> SegmentationRow:
    masks, classes = row["mask_labels"].copy(), row["class_labels"]
    if overlapping:
        masks, classes = masks[classes == 0], classes[classes == 0]
        masks = np.stack([widen(mask) for mask in masks]) if len(masks) else masks
    else:
        masks[:, :5, :7] = False
    kept = masks.any(axis=(1, 2))
    masks, classes = masks[kept], classes[kept]
    prepared: SegmentationRow = {
        "image_id": position,
        "image": row["image"],
        "mask_labels": masks,
        "class_labels": classes,
    }
    if position == 1 and crowd:
        first = int(np.flatnonzero(classes == 0)[0])
        prepared |= {
            "mask_labels": np.delete(masks, first, axis=0),
            "class_labels": np.delete(classes, first),
            "crowd_masks": masks[first : first + 1],
            "crowd_labels": classes[first : first + 1],
        }
    if not overlapping:
        prepared["ignore_mask"] = ~masks.any(axis=0)
    return prepared


def widen(mask: np.ndarray) -> np.ndarray:
    wide = np.pad(mask, 2)
    return np.logical_or.reduce(
        [wide[y : y + mask.shape[0], x : x + mask.shape[1]] for y in range(5) for x in range(5)]
    )


def segments_of(row: SegmentationRow) -> list[tuple[np.ndarray, int, bool]]:
    """List mask, class and whether it is a crowd region."""
    objects = [(mask, int(key), False) for mask, key in zip(row["mask_labels"], row["class_labels"], strict=True)]
    crowds = zip(row.get("crowd_masks", ()), row.get("crowd_labels", ()), strict=True)
    return [*objects, *((mask, int(key), True) for mask, key in crowds)]


def save_image(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)  # that of JPEG files alone


def save_map(values: np.ndarray, path: Path) -> None:
    """Write grey values of 8 or 16 bits."""
    save_image(Image.fromarray(values.astype(np.uint8 if values.max(initial=0) < 256 else np.uint16)), path)


def save_json(content: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def runs_of(mask: np.ndarray) -> list[int]:
    """Count the runs of a mask, column by column, beginning with background; one pixel after the other."""
    counts, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------------------------------


def write_coco_instances(scenes: Sequence[Scene], root: Path, split: Split = "train") -> None:
    """Category ids 18, 44 and 90; image ids above 255; the masks as run lengths that are not compressed."""
    folder = SPLITS[split][2]
    images, annotations = [], []
    for scene in scenes:
        image_id = 100_000 + scene.row["image_id"]
        save_image(scene.row["image"], root / folder / f"{scene.name}.png")
        images.append({"id": image_id, "file_name": f"{scene.name}.png", "height": SIZE[0], "width": SIZE[1]})
        for mask, class_id, is_crowd in segments_of(scene.row):
            annotations.append(
                {
                    "id": 7000 + len(annotations),
                    "image_id": image_id,
                    "category_id": (18, 44, 90)[class_id],
                    "segmentation": {"size": list(SIZE), "counts": runs_of(mask)},
                    "iscrowd": int(is_crowd),
                    "area": int(mask.sum()),
                    "bbox": [0, 0, 1, 1],
                }
            )
    categories = [{"id": key, "name": name} for key, name in zip((18, 44, 90), NAMES, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    save_json(content, root / "annotations" / f"instances_{folder}.json")


def write_coco_panoptic(scenes: Sequence[Scene], root: Path, split: Split = "train", *, first_id: int = 70_000) -> None:
    """Segment ids from `first_id` on, so of all three bytes; 2**24 - 1 among them."""
    folder = SPLITS[split][2]
    images, annotations = [], []
    for scene in scenes:
        image_id = scene.row["image_id"]
        save_image(scene.row["image"], root / folder / f"{scene.name}.png")
        images.append({"id": image_id, "file_name": f"{scene.name}.png", "height": SIZE[0], "width": SIZE[1]})
        ids, infos = np.zeros(SIZE, dtype=np.int64), []
        for number, (mask, class_id, is_crowd) in enumerate(segments_of(scene.row)):
            key = 2**24 - 1 if number == 0 else first_id + 300 * number
            ids[mask] = key
            infos.append(
                {"id": key, "category_id": (18, 44, 90)[class_id], "iscrowd": int(is_crowd), "area": int(mask.sum())}
            )
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        save_image(Image.fromarray(colours), root / "annotations" / f"panoptic_{folder}" / f"{scene.name}.png")
        annotations.append({"image_id": image_id, "file_name": f"{scene.name}.png", "segments_info": infos})
    categories = [
        {"id": key, "name": name, "isthing": int(key == 18)} for key, name in zip((18, 44, 90), NAMES, strict=True)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    save_json(content, root / "annotations" / f"panoptic_{folder}.json")


def write_ade20k(scenes: Sequence[Scene], root: Path, split: Split = "train") -> None:
    """Classes bed (8, the first thing), wall (1) and building (2)."""
    folder = SPLITS[split][1]
    for scene in scenes:
        semantic, instances = np.zeros(SIZE, dtype=np.int64), np.zeros((*SIZE, 3), dtype=np.uint8)
        for number, (mask, class_id, _) in enumerate(segments_of(scene.row), start=1):
            semantic[mask] = (8, 1, 2)[class_id]
            if class_id == 0:
                instances[mask] = (1, number, 200)
        save_image(scene.row["image"], root / "images" / folder / f"{scene.name}.jpg")
        save_map(semantic, root / "annotations" / folder / f"{scene.name}.png")
        save_image(Image.fromarray(instances), root / "annotations_instance" / folder / f"{scene.name}.png")


def write_cityscapes(scenes: Sequence[Scene], root: Path, split: Split = "train") -> None:
    """Labels car (26), building (11) and sky (23); the void corner is out of the picture (3) and a caravan (29)."""
    folder = SPLITS[split][0]
    for scene in scenes:
        city = root / "{}" / folder / "ulm"
        instances = np.full(SIZE, 3, dtype=np.int64)
        instances[0, 0] = 29_004
        for number, (mask, class_id, is_crowd) in enumerate(segments_of(scene.row)):
            label = (26, 11, 23)[class_id]
            instances[mask] = label if is_crowd or class_id else 1000 * label + number
        labels = np.where(instances >= 1000, instances // 1000, instances)
        train_ids = np.full(SIZE, 255, dtype=np.int64)
        for label, train_id in ((26, 13), (11, 2), (23, 10)):
            train_ids[labels == label] = train_id
        name = f"ulm_{scene.row['image_id']:06d}_000019"
        save_image(scene.row["image"], Path(str(city).format("leftImg8bit")) / f"{name}_leftImg8bit.png")
        for kind, values in (("instanceIds", instances), ("labelIds", labels), ("labelTrainIds", train_ids)):
            save_map(values, Path(str(city).format("gtFine")) / f"{name}_gtFine_{kind}.png")


def write_mapillary(scenes: Sequence[Scene], root: Path, split: Split = "train", *, version: str = "v1.2") -> None:
    """Three classes and `Unlabeled`, which stands second to last here."""
    folder = root / SPLITS[split][1]
    labels = [
        {"readable": "China", "name": "a--china", "instances": False, "evaluate": True},
        {"readable": "Digit", "name": "a--digit", "instances": True, "evaluate": True},
        {"readable": "Unlabeled", "name": "void--unlabeled", "instances": False, "evaluate": False},
        {"readable": "Flower", "name": "a--flower", "instances": False, "evaluate": True},
    ]
    save_json({"labels": labels, "version": version}, root / f"config_{version}.json")
    for scene in scenes:
        instances = np.full(SIZE, 2 * 256, dtype=np.int64)
        for number, (mask, class_id, _) in enumerate(segments_of(scene.row)):
            instances[mask] = 256 * (1, 0, 3)[class_id] + (number if class_id == 0 else 0)
        save_image(scene.row["image"], folder / "images" / f"{scene.name}.jpg")
        save_map(instances, folder / version / "instances" / f"{scene.name}.png")
        save_map(instances // 256, folder / version / "labels" / f"{scene.name}.png")


def write_class_index(scenes: Sequence[Scene], root: Path, split: Split = "train") -> None:
    """Values 0, 300 and 7, so 16 bits; 65535 is void, and instances have numbers of three bytes."""
    folder = SPLITS[split][0]
    for scene in scenes:
        values, numbers = np.full(SIZE, 65_535, dtype=np.int64), np.zeros(SIZE, dtype=np.int64)
        for number, (mask, class_id, is_crowd) in enumerate(segments_of(scene.row), start=1):
            values[mask] = (300, 0, 7)[class_id]
            if class_id == 0 and not is_crowd:
                numbers[mask] = 2**24 - number
        colours = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], axis=-1).astype(np.uint8)
        save_image(scene.row["image"], root / "images" / folder / f"{scene.name}.png")
        save_map(values, root / "labels" / folder / f"{scene.name}.png")
        save_image(Image.fromarray(colours), root / "instances" / folder / f"{scene.name}.png")
    classes = [
        {"id": value, "name": name, "isthing": value == 300} for value, name in zip((300, 0, 7), NAMES, strict=True)
    ]
    save_json(classes, root / "classes.json")


def write_yolo(scenes: Sequence[Scene], root: Path, split: Split = "train") -> None:
    """Each object is the box of its mask, as a polygon; so write scenes whose masks are boxes (`boxed`)."""
    folder = SPLITS[split][0]
    for scene in scenes:
        lines = []
        for mask, class_id, _ in segments_of(scene.row):
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            (top, bottom), (left, right) = ((line[0], line[-1] + 1) for line in (rows, columns))
            corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
            lines.append(" ".join([str(class_id), *(f"{x / SIZE[1]} {y / SIZE[0]}" for x, y in corners)]))
        save_image(scene.row["image"], root / "images" / folder / f"{scene.name}.png")
        if lines:
            path = root / "labels" / folder / f"{scene.name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {"path": "../elsewhere", "train": "images/train", "val": "images/val", "names": dict(enumerate(NAMES))}
    (root / "data.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def boxed(scenes: Sequence[Scene]) -> list[Scene]:
    """Replace each object by its box, and leave out crowds."""
    changed = []
    for scene in scenes:
        masks = [mask.any(axis=1)[:, None] & mask.any(axis=0)[None, :] for mask in scene.row["mask_labels"]]
        row: SegmentationRow = {
            "image_id": scene.row["image_id"],
            "image": scene.row["image"],
            "mask_labels": np.stack(masks) if masks else scene.row["mask_labels"],
            "class_labels": scene.row["class_labels"],
        }
        changed.append(Scene(scene.name, row))
    return changed


WRITERS: dict[str, Callable[..., None]] = {
    "coco_instances": write_coco_instances,
    "coco_panoptic": write_coco_panoptic,
    "ade20k": write_ade20k,
    "cityscapes": write_cityscapes,
    "mapillary_vistas": write_mapillary,
    "class_index": write_class_index,
    "yolo": write_yolo,
}


# ---------------------------------------------------------------------------------------------------------------------
# Archives
# ---------------------------------------------------------------------------------------------------------------------


def pack(folder: Path, archive: Path, within: str = "", method: int = zipfile.ZIP_DEFLATED) -> None:
    """Write the files of a folder into a zip archive, below the folder `within`."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", method) as opened:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                opened.write(path, Path(within, path.relative_to(folder)).as_posix())


def pack_parts(root: Path, target: Path) -> None:
    """Write each top folder of a data set into an archive of its own, stored or deflated in turn; copy its other files."""
    target.mkdir(parents=True)
    for position, path in enumerate(sorted(root.iterdir())):
        if path.is_dir():
            method = zipfile.ZIP_STORED if position % 2 else zipfile.ZIP_DEFLATED
            pack(path, target / f"{path.name}.zip", path.name, method)
        else:
            (target / path.name).write_bytes(path.read_bytes())


# ---------------------------------------------------------------------------------------------------------------------
# Comparison
# ---------------------------------------------------------------------------------------------------------------------


def known_segments(row, id2label):
    """Count (class, mask) of a row that was read: the segments, and the crowd regions."""
    crowds = zip(row.get("crowd_masks", ()), row.get("crowd_labels", ()), strict=True)
    return tuple(
        Counter((id2label[int(class_id)], mask.tobytes()) for mask, class_id in pairs)
        for pairs in (zip(row["mask_labels"], row["class_labels"], strict=True), crowds)
    )


def write_official(reader, task, target):
    """Write the ground truth of a reader as the scoring program does, and its images."""
    scores, entries, images = TASK_SCORES[task](reader), [], []
    for row in reader:
        entries += scores.write_truth(row, target / "truth")
        file_name = f"{row['image_id']}.png"
        save_image(row["image"], target / "images" / file_name)
        height, width = row["mask_labels"].shape[1:]
        images.append({"id": row["image_id"], "file_name": file_name, "height": height, "width": width})
    content = scores.truth_file(entries, images)
    if content is not None:
        save_json(content, target / "truth.json")
    return scores


def read_official(scores, task, target):
    options = {"task": task, "path": str(target), "images": "images", "cache_dir": str(target / "cache")}
    if task == "instance":
        return DATASETS["coco_instances"]("train", annotations="truth.json", **options)
    if task == "panoptic":
        return DATASETS["coco_panoptic"]("train", annotations="truth.json", **options)
    classes = {str(entry["id"]): entry["name"] for entry in scores.categories()}
    things = [entry["name"] for entry in scores.categories() if entry["isthing"]]
    options |= {"classes": classes, "things": things, "labels": "truth", "ignore_index": scores.no_category}
    return DATASETS["class_index"]("train", **options)


def assert_reads_back_equal(dataset, task, target):
    """Write the ground truth of a data set in the official form of a task, read it, and compare."""
    again = read_official(write_official(dataset, task, target), task, target)
    ids = getattr(dataset, "category_ids", {class_id: class_id + 1 for class_id in dataset.id2label})
    assert (again.id2label, again.category_ids) == (dataset.id2label, ids)
    assert (again.thing_ids, again.stuff_ids) == (dataset.thing_ids, dataset.stuff_ids)
    rows = {str(row["image_id"]): row for row in again}
    assert len(rows) == len(dataset)
    for row in (dataset[number] for number in range(len(dataset))):
        other = rows[str(row["image_id"])]
        assert other["image"].tobytes() == row["image"].tobytes()
        assert known_segments(other, again.id2label) == known_segments(row, dataset.id2label)
        if task != "instance":
            unknown = ~np.logical_or.reduce([*row["mask_labels"], *row.get("crowd_masks", ())])
            np.testing.assert_array_equal(other.get("ignore_mask", np.zeros(unknown.shape, bool)), unknown)
