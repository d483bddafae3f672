"""Draw what a trained model sees: `python -m training.predictions FOLDER`.

The model is loaded the way its users load it, by `pipeline("image-segmentation", FOLDER)`, and runs on validation images of
the data set that it was trained on. Image, ground truth and prediction come side by side into FOLDER/predictions.png.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import pipeline

from training.arguments import RecipeError, TrainingArguments, make_arguments, read_recipe
from training.data import Task, load_segmentation_dataset
from training.folders import RECIPE_FILE
from training.validation_pictures import draw_rows

PICTURE_FILE = "predictions.png"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m training.predictions", description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="output_dir of training.train")
    parser.add_argument("--num-images", type=int, default=6, metavar="N", help="validation images to draw (default: 6)")
    options = parser.parse_args(argv)
    try:
        path = draw_predictions(options.folder, options.num_images)
    except RecipeError as error:
        sys.exit(f"error: {error}")
    print(f"Predictions for {options.num_images} validation images are in {path}.")


def draw_predictions(folder: Path, num_images: int = 6) -> Path:
    """Predict the first validation images and write the picture into the folder of the model.

    Args:
        folder: result of `training.train`, with the recipe in it.
        num_images: at least 1; no more than the validation split has are drawn.

    Returns:
        Path of the picture.
    """
    if num_images < 1:
        raise RecipeError(f"--num-images must be at least 1, got {num_images}.")
    arguments = read_arguments(folder)
    dataset = load_segmentation_dataset(arguments.dataset, "validation", **arguments.options_of("validation"))
    rows = [dataset[index] for index in range(min(num_images, len(dataset)))]
    results = predict(folder, [row["image"] for row in rows], arguments.task)
    path = folder / PICTURE_FILE
    draw_rows(rows, results, arguments.task, dataset.id2label).save(path)
    return path


def read_arguments(folder: Path) -> TrainingArguments:
    """Read the recipe of a trained model."""
    recipe = folder / RECIPE_FILE
    if not recipe.exists():
        raise RecipeError(f"{folder} holds no {RECIPE_FILE}. Pass the output_dir of a finished training.")
    return make_arguments(read_recipe(recipe), str(recipe))


def predict(folder: Path, images: Sequence[Any], task: Task) -> list[list[dict[str, Any]]]:
    """Load the model and run the pipeline, with the thresholds that are stored with the model."""
    segment = pipeline("image-segmentation", model=str(folder))
    processor = segment.image_processor
    # The pipeline would put thresholds of its own, made for another model, in the place of the stored ones.
    names = {"threshold": "score_threshold", "mask_threshold": "mask_threshold"}
    names["overlap_mask_area_threshold"] = "overlap_mask_area_threshold"
    thresholds = {argument: getattr(processor, name) for argument, name in names.items()}
    return [segment(image, subtask=task, **thresholds) for image in images]


if __name__ == "__main__":
    main()
