"""Everything that a recipe asks for: data sets, model, processor, and where an earlier session has stopped."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, set_seed
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from mpformer_hf import MPFormerForUniversalSegmentation, MPFormerImageProcessor
from training.arguments import FREE_WHEN_RESUMING, PARTS, RecipeError, TrainingArguments
from training.augmentation import Augmentation
from training.broken_images import SkippingBroken
from training.checkpoints import Checkpoint, CheckpointFolder, as_json, require_same_settings
from training.data import SegmentationDataset, load_segmentation_dataset
from training.deepspeed_state import configure_deepspeed, is_deepspeed
from training.loop import HOW_TO_BEGIN_ANEW, TrainingRun
from training.monitor import live_folder
from training.sampling import list_classes, repeat_factors
from training.sharing import prepare_repository
from training.starting_point import build_model, freeze
from training.streaming_rows import KeptRows, is_stream
from training.trackers import require_trackers, tracker_options

FSDP_VERSION = 2


def prepare_run(arguments: TrainingArguments) -> TrainingRun:
    """Make the data sets, the model and the processor.

    Raises:
        RecipeError: one of them cannot be made as the recipe says.
    """
    require_trackers(arguments.trackers)
    checkpoints = CheckpointFolder(arguments.output_dir)
    with blame_recipe(f"Accelerate cannot begin (`mixed_precision: {arguments.mixed_precision}`)"):
        accelerator = Accelerator(
            mixed_precision=arguments.mixed_precision,
            **tracker_options(arguments.trackers, live_folder(checkpoints)),
            # The loop takes the batches of a step before it runs them: the end of the loader says nothing about the last step.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=arguments.gradient_accumulation_steps, sync_with_dataloader=False
            ),
        )
    require_known_sharding(accelerator)
    if is_deepspeed(accelerator):
        configure_deepspeed(accelerator, arguments)
    repository = None
    if arguments.push_to_hub is not None:
        repository = prepare_repository(
            accelerator, arguments.hub_model_id, arguments.output_dir, arguments.hub_private
        )
    checkpoint = find_unfinished_run(arguments, checkpoints, accelerator)
    set_seed(arguments.seed)
    train_data, validation_data = load_data(arguments)
    for data in (train_data, validation_data):
        for note in getattr(data, "notes", ()):
            accelerator.print(f"note: {note}")
    with blame_recipe("`augmentation` cannot be used"):
        if arguments.augmentation:
            Augmentation.from_recipe(arguments.augmentation)
    with blame_recipe("The model cannot be made"):
        model, note = build_model(arguments, train_data)
    if note:
        accelerator.print(note)
    freeze(model, PARTS, arguments.frozen)
    if arguments.gradient_checkpointing:
        # Before transformers 5.23 it has the second name.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable()
    if arguments.compile:
        compile_parts(model)
    with blame_recipe("The image processor cannot be made"):
        processor = build_processor(arguments, train_data)
    # From here on every process draws noise and points of its own.
    set_seed(arguments.seed, device_specific=True)
    return TrainingRun(
        arguments,
        accelerator,
        synchronise_norms(model, accelerator),
        processor,
        train_data,
        validation_data,
        checkpoints,
        checkpoint,
        repeats=count_repeats(arguments, train_data, accelerator),
        repository=repository,
    )


def load_data(arguments: TrainingArguments) -> tuple[SegmentationDataset, SegmentationDataset | None]:
    """Make the data sets for training and, if it is scored, for validation."""
    with blame_recipe("The data set cannot be made"):
        train_data = load_segmentation_dataset(arguments.dataset, "train", **arguments.options_of("train"))
        validation_data = None
        if arguments.evaluate or arguments.evaluation_steps:
            validation_data = load_segmentation_dataset(
                arguments.dataset, "validation", **arguments.options_of("validation")
            )
        if validation_data is not None and is_stream(validation_data):
            validation_data = KeptRows(validation_data)
    for data, split in ((train_data, "training"), (validation_data, "validation")):
        if data is not None and not is_stream(data) and len(data) == 0:
            raise RecipeError(f"The {split} split of {arguments.dataset} has no images.")
    if validation_data is not None and validation_data.id2label != train_data.id2label:
        differing = sorted(set(train_data.id2label.items()) ^ set(validation_data.id2label.items()))
        raise RecipeError(
            f"The two splits of {arguments.dataset} have different classes, the first being {differing[0]}. Give both files the "
            "same list of classes, or set `evaluate: false`."
        )
    return train_data, validation_data


def count_repeats(
    arguments: TrainingArguments, train_data: SegmentationDataset, accelerator: Accelerator
) -> list[float] | None:
    """How often each image comes in an epoch; `None` is once."""
    if arguments.repeat_threshold is None:
        return None
    if is_stream(train_data):
        raise RecipeError(
            "`repeat_threshold` counts the classes of all images, which a stream does not know. Remove it."
        )
    data = SkippingBroken(train_data, arguments.max_broken_images)
    return repeat_factors(list_classes(data, is_shown=accelerator.is_main_process), arguments.repeat_threshold)


def find_unfinished_run(
    arguments: TrainingArguments, checkpoints: CheckpointFolder, accelerator: Accelerator
) -> Checkpoint | None:
    """Find where to go on.

    Raises:
        CheckpointError: an unfinished run of another recipe is in the way.
    """
    checkpoint = checkpoints.find_together(accelerator) if arguments.resume else None
    if checkpoint is not None:
        way_out = f"Go on with the settings from before. {HOW_TO_BEGIN_ANEW}"
        compares = arguments.keep_best or arguments.early_stopping is not None
        # Scores of averages and of weights cannot be compared.
        free = [name for name in FREE_WHEN_RESUMING if not (compares and name == "save_average")]
        require_same_settings(checkpoint, as_json(arguments.to_dict()), free, way_out)
    return checkpoint


def require_known_sharding(accelerator: Accelerator) -> None:
    """Refuse weights in parts of kinds that checkpoints of this program cannot gather."""
    kind = accelerator.distributed_type
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if kind == DistributedType.FSDP and plugin is not None and plugin.fsdp_version == FSDP_VERSION:
        return
    if kind in (DistributedType.FSDP, DistributedType.MEGATRON_LM):
        name = "the first version of FSDP" if kind == DistributedType.FSDP else kind.value
        raise RecipeError(
            f"Accelerate is configured for {name}, whose weights and optimiser lie in parts that checkpoints of this program cannot "
            "collect. Use `--config_file training/accelerate/fsdp.yaml`, or `multi_gpu_ddp.yaml` where the model fits on each GPU."
        )


def build_processor(arguments: TrainingArguments, dataset: SegmentationDataset) -> MPFormerImageProcessor:
    """Make the processor; segments of stuff classes are joined in results, unless the recipe says otherwise."""
    fields = {"label_ids_to_fuse": list(dataset.stuff_ids), **arguments.processor}
    if arguments.model_name_or_path is not None:
        return MPFormerImageProcessor.from_pretrained(arguments.model_name_or_path, **fields)
    return MPFormerImageProcessor(**fields)


def synchronise_norms(model: MPFormerForUniversalSegmentation, accelerator: Accelerator) -> nn.Module:
    """Let trained batch norms see the batches of all processes; PyTorch can do so on accelerators alone."""
    if accelerator.num_processes == 1 or model.config.freeze_backbone_norm or accelerator.device.type == "cpu":
        return model
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def compile_parts(model: MPFormerForUniversalSegmentation) -> None:
    """Compile what sees tensors of the same shapes in each step; the decoder's number of queries changes, and stays as it is."""
    model.model.pixel_level_module.encoder.compile()
    model.model.pixel_level_module.decoder.compile()


@contextmanager
def blame_recipe(what: str) -> Iterator[None]:
    """Turn errors that a recipe has caused into a sentence."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, StrictDataclassError) as error:
        raise RecipeError(f"{what}: {error}") from error
