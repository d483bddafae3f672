"""A grid of pictures of a data set: images with their masks, as they are stored and as the augmentation makes them."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from mpformer_hf.visualization import DrawnSegment, draw_segments
from training.augmentation import Augmentation, pad_row
from training.data import SegmentationDataset, SegmentationRow
from training.data_check import ImageFacts
from training.metrics.image_scores import to_numpy

PANEL = 320  # longer side of a picture
MARGIN, CAPTION = 8, 20
PAPER, INK = (255, 255, 255), (40, 40, 40)
IMAGES_A_ROW = 4
STRIPE = 4  # pixels
GREY = 128


def draw_samples(
    dataset: SegmentationDataset,
    facts: Sequence[ImageFacts],
    augmentation: Augmentation | None,
    *,
    num_images: int = 8,
    num_augmented: int = 3,
    seed: int = 0,
) -> Image.Image:
    """Draw some images, one a row: as it is stored, then as it is augmented in the first epochs.

    Args:
        dataset: read by position.
        facts: of the images that can be read, from which some are chosen.
        augmentation: of the training; `None` draws the images as they are stored alone.
        num_images: rows.
        num_augmented: pictures of the augmentation in each row.
        seed: of the training.

    Returns:
        RGB image.
    """
    rows = []
    for fact in tqdm(choose(facts, num_images), desc="drawing", unit="image"):
        row = dataset[fact.position]
        title = f"{fact.image_id}: {fact.size[0]} x {fact.size[1]}, {len(fact.classes)} segments"
        panels = [(title, draw_row(row, dataset.id2label))]
        if augmentation is not None:
            for epoch in range(num_augmented):
                padded = pad_row(augmentation(row, seed=seed, epoch=epoch, index=fact.position))
                title = f"epoch {epoch}: {padded['image'].height} x {padded['image'].width}"
                panels.append((title, draw_row(padded, dataset.id2label)))
        rows.append(panels)
    if augmentation is None:  # nothing stands beside a picture, so other images do
        panels = [panel for row in rows for panel in row]
        rows = [panels[start : start + IMAGES_A_ROW] for start in range(0, len(panels), IMAGES_A_ROW)]
    return arrange(rows)


def choose(facts: Sequence[ImageFacts], number: int) -> list[ImageFacts]:
    """Choose images at equal distances, the one with most segments, and one with a crowd or ignored pixels."""
    if len(facts) <= number:
        return list(facts)
    special = [
        max(facts, key=lambda fact: len(fact.classes)),
        max(facts, key=lambda fact: fact.crowd_pixels + fact.ignored_pixels),
    ]
    spread = [facts[place * len(facts) // number] for place in range(number)]
    chosen = {fact.position: fact for fact in [*special, *spread]}
    return sorted(list(chosen.values())[:number], key=lambda fact: fact.position)


def draw_row(row: SegmentationRow, id2label: dict[int, str]) -> Image.Image:
    """Draw a row: its segments, its crowds, and in grey stripes what is ignored."""
    segments = [
        DrawnSegment(torch.from_numpy(np.array(mask)), int(class_id), f"{prefix}{id2label[int(class_id)]}")
        for prefix, masks, classes in (
            ("", "mask_labels", "class_labels"),
            ("crowd of ", "crowd_masks", "crowd_labels"),
        )
        for mask, class_id in zip(to_numpy(row.get(masks, ())), to_numpy(row.get(classes, ())), strict=True)
    ]
    image = row["image"]
    if "ignore_mask" in row:
        pixels = np.array(image)
        rows, places = np.indices(pixels.shape[:2])
        pixels[to_numpy(row["ignore_mask"]) & ((rows + places) // STRIPE % 2 == 0)] = GREY
        image = Image.fromarray(pixels)
    return draw_segments(image, segments, longest_side=PANEL)


def arrange(rows: Sequence[Sequence[tuple[str, Image.Image]]]) -> Image.Image:
    """Put captioned pictures into rows."""
    heights = [max(picture.height for _, picture in row) + CAPTION + MARGIN for row in rows]
    width = max((len(row) for row in rows), default=0) * (PANEL + MARGIN) + MARGIN
    sheet = Image.new("RGB", (max(width, 1), sum(heights) + MARGIN), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, (caption, picture) in enumerate(row):
            left = MARGIN + column * (PANEL + MARGIN)
            draw.text((left, top), shorten(caption, draw, font), fill=INK, font=font)
            sheet.paste(picture, (left, top + CAPTION))
        top += height
    return sheet


def shorten(caption: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut a caption to the width of a picture."""
    length = len(caption)
    while draw.textlength(caption[:length], font=font) > PANEL:
        length -= 1
    return caption[:length]
