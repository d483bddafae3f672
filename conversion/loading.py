"""Models of transformers' format, loaded completely or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import logging

from conversion import ConversionError

Model = TypeVar("Model", bound=PreTrainedModel)
Processor = TypeVar("Processor", bound=BaseImageProcessor)


def load_complete(model_class: type[Model], name_or_folder: str) -> Model:
    """Load a model in evaluation mode.

    Raises:
        ConversionError: there is none, or its weights are not all there; transformers would only warn and draw random ones.
    """
    try:
        model, report = model_class.from_pretrained(name_or_folder, output_loading_info=True)
    except Exception as error:  # of transformers, huggingface_hub, safetensors and json
        reason = " ".join(str(error).split())[:500]
        raise ConversionError(
            f"Expected a {model_class.__name__} in `{name_or_folder}`, but it cannot be loaded: {reason}"
        ) from error
    for what in ("missing", "unexpected", "mismatched"):
        if names := sorted(map(str, report[f"{what}_keys"])):
            raise ConversionError(
                f"Expected the weights of a {model_class.__name__} in `{name_or_folder}`, but {len(names)} are {what}, such as "
                f"{names[0]}. Download it again, or pass a model of this kind."
            )
    return model.eval()


def load_processor(processor_class: type[Processor], name_or_folder: str) -> Processor | None:
    """Load an image processor; `None` when there is none."""
    try:
        return processor_class.from_pretrained(name_or_folder)
    except OSError:  # transformers' answer to a file that is not there
        return None
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        raise ConversionError(f"The image processor in `{name_or_folder}` cannot be loaded: {reason}") from error


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Switch transformers' progress bars off: the programs say themselves what they do."""
    had_them = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_them:
            logging.enable_progress_bar()
