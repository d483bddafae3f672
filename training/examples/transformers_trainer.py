"""The same model under `transformers.Trainer`, for people who keep their own loop.

    python -m training.examples.transformers_trainer --output-dir outputs/trainer --steps 200

A small panoptic model of digit scenes, from scratch, on the CPU. What a program of your own needs of it is marked 1 to
4; the rest is data and settings.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW, Optimizer
from transformers import Trainer, TrainingArguments, set_seed

from mpformer_hf import MPFormerConfig, MPFormerForUniversalSegmentation, MPFormerImageProcessor
from training.arguments import TrainingArguments as Recipe
from training.data import SegmentationDataset, SegmentationRow, load_segmentation_dataset
from training.evaluation import evaluate_model
from training.optimization import make_parameter_groups

SEED = 0

# Fields of MPFormerConfig. To begin with pretrained weights, make the model by `from_backbone("microsoft/resnet-50",
# id2label=...)`, or by `from_pretrained` of a MPFormer or Mask2Former, and leave `freeze_backbone_norm` at True.
SMALL_MODEL = {
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 48, 64],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "freeze_backbone_norm": False,
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "num_attention_heads": 4,
    "encoder_layers": 1,
    "encoder_feedforward_dim": 64,
    "decoder_layers": 4,
    "dim_feedforward": 64,
    "num_queries": 12,
    "train_num_points": 256,
}


class Collator:
    """1. Rows to inputs: images in one tensor, masks and classes in lists, as each image has a number of its own."""

    def __init__(self, processor: MPFormerImageProcessor) -> None:
        """Take the processor that predictions will be made with."""
        self.processor = processor

    def __call__(self, rows: Sequence[SegmentationRow]) -> dict[str, Any]:
        """Prepare a batch."""
        inputs = self.processor(
            [row["image"] for row in rows],
            mask_labels=[row["mask_labels"] for row in rows],
            class_labels=[row["class_labels"] for row in rows],
            return_tensors="pt",
        )
        return dict(inputs)


class SegmentationTrainer(Trainer):
    """Trainer with our parameter groups and scores. The loss needs nothing: the model computes it from its labels."""

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = recipe

    def create_optimizer(self, model: torch.nn.Module | None = None) -> Optimizer:
        """2. A lower learning rate for the backbone, and no weight decay on norms and embeddings."""
        if self.optimizer is None:
            groups = make_parameter_groups(self.model if model is None else model, self.recipe)
            self.optimizer = AdamW(groups, lr=self.recipe.learning_rate)
        return self.optimizer

    def evaluate(
        self,
        eval_dataset: SegmentationDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """3. Scores at the size of the ground truth, image by image; Trainer itself would keep the logits of all."""
        scores = evaluate_model(
            self.model,
            self.processing_class,
            self.eval_dataset if eval_dataset is None else eval_dataset,
            self.accelerator,
            self.recipe.task,
            batch_size=self.args.per_device_eval_batch_size,
        )
        metrics = {f"{metric_key_prefix}_pq": scores["All"]["pq"]}
        metrics |= {f"{metric_key_prefix}_pq_{name.lower()}": scores[name]["pq"] for name in ("Things", "Stuff")}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def make_trainer(options: argparse.Namespace) -> SegmentationTrainer:
    """Put data, model and settings together."""
    set_seed(SEED)  # of the weights; Trainer seeds the rest
    recipe = Recipe(
        output_dir=str(options.output_dir),
        model=SMALL_MODEL,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        backbone_learning_rate_factor=0.5,  # 0.1 if the backbone is pretrained
    )
    scenes = {"task": recipe.task, "image_size": options.image_size, "tell_digits_apart": False}
    train_data = load_segmentation_dataset("digit_scenes", "train", num_images=options.images, **scenes)
    validation_data = load_segmentation_dataset("digit_scenes", "validation", num_images=options.images // 4, **scenes)
    model = MPFormerForUniversalSegmentation(MPFormerConfig(**recipe.model, id2label=train_data.id2label))
    interval = max(1, options.steps // 2)
    processor = MPFormerImageProcessor(
        size={"max_height": options.image_size, "max_width": options.image_size},
        label_ids_to_fuse=list(train_data.stuff_ids),
    )
    return SegmentationTrainer(
        model=model,
        recipe=recipe,
        processing_class=processor,  # saved beside the model
        data_collator=Collator(processor),
        train_dataset=train_data,
        eval_dataset=validation_data,
        args=TrainingArguments(
            output_dir=str(options.output_dir),
            # 4. Trainer drops columns that `forward` does not name, before the collator sees them.
            remove_unused_columns=False,
            label_names=["mask_labels", "class_labels"],
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="polynomial",
            lr_scheduler_kwargs={"power": recipe.schedule_power, "lr_end": 0.0},
            max_grad_norm=recipe.max_gradient_norm,
            logging_steps=max(1, options.steps // 10),
            eval_strategy="steps",
            eval_steps=interval,
            save_strategy="steps",
            save_steps=interval,
            metric_for_best_model="pq",
            load_best_model_at_end=True,
            use_cpu=True,  # remove it to train on a GPU
            report_to=[],
            seed=SEED,
        ),
    )


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.examples.transformers_trainer", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the model and of its checkpoints")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps (default: 200)")
    parser.add_argument("--images", type=int, default=400, help="training images; a quarter of it for validation (400)")
    parser.add_argument("--image-size", type=int, default=96, help="side of the images in pixels (96)")
    parser.add_argument("--batch-size", type=int, default=4, help="images in a step (4)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="the highest (1e-3)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, save and score; returns the scores of the model in the output folder, as fractions."""
    options = parse_options(argv)
    trainer = make_trainer(options)
    trainer.train()
    trainer.save_model(str(options.output_dir))
    return trainer.evaluate()


if __name__ == "__main__":
    print(main())
