"""What the people of `test_hub_round_trip.py` do, each in a process of their own.

python hub_users.py ROLE FOLDER REPOSITORY COPY

They write the numbers that they got to FOLDER, and the title of each part of their work to standard error, so that a message
there has an address. A stranger has no package `mpformer_hf`: its import is refused.
"""

import json
import os
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_file
from torch import Tensor

PACKAGE = "mpformer_hf"
AUTO_MODELS = ("AutoModelForUniversalSegmentation", "AutoModelForImageSegmentation", "AutoModel")


class Refuse(MetaPathFinder):
    """Lets nobody import the package."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def become_a_stranger() -> None:
    sys.meta_path.insert(0, Refuse())
    try:
        __import__(PACKAGE)
    except ModuleNotFoundError:
        return
    raise AssertionError(f"{PACKAGE} can be imported, so this is not a stranger's process.")


def begin(part: str) -> None:
    sys.stderr.write(f"== {part}\n")
    sys.stderr.flush()


def picture() -> PIL.Image.Image:
    blocks = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(blocks.repeat(20, 0).repeat(20, 1))


def compute(model: torch.nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """What a model with or without class head says."""
    with torch.no_grad():
        outputs = model.eval()(pixels)
    masks = outputs.masks_queries_logits
    classes = getattr(outputs, "class_queries_logits", None)
    found = {"masks": masks if isinstance(masks, Tensor) else masks[-1]}
    return found if classes is None else found | {"classes": classes}


def segment(segmenter: Any) -> dict[str, Tensor]:
    """The masks of a pipeline, in its order."""
    panoptic = segmenter(picture(), threshold=0.0, mask_threshold=0.4, overlap_mask_area_threshold=0.0)
    semantic = segmenter(picture(), subtask="semantic")
    assert semantic, "a semantic map has segments always"
    masks = [np.asarray(one["mask"]).copy() for one in panoptic + semantic]
    return {"pipeline": torch.from_numpy(np.stack(masks))}


def load_everything(name: str, **arguments: Any) -> tuple[dict[str, Tensor], list[type]]:
    """Load what a repository or folder holds, in every way, and compute."""
    found, classes = {}, []
    config = transformers.AutoConfig.from_pretrained(name, **arguments)
    processor = transformers.AutoImageProcessor.from_pretrained(name, **arguments)
    pixels = processor(picture(), return_tensors="pt").pixel_values
    found["pixels"] = pixels
    classes += [type(config), type(processor)]
    for auto in AUTO_MODELS:
        model = getattr(transformers, auto).from_pretrained(name, **arguments)
        classes.append(type(model))
        found |= {f"{auto} {kind}": value for kind, value in compute(model, pixels).items()}
    segmenter = transformers.pipeline("image-segmentation", name, **arguments)
    return found | segment(segmenter), classes


def load_and_save(folder: Path, title: str, name: str, **arguments: Any) -> None:
    begin(title)
    found, classes = load_everything(name, **arguments)
    save_file({key: value.contiguous() for key, value in found.items()}, folder / f"{title}.safetensors")
    described = [f"{one.__module__}.{one.__name__}" for one in classes]
    (folder / f"{title}.json").write_text(json.dumps(described))


def head_of(repository: str) -> str:
    return HfApi().model_info(repository).sha


def push(folder: Path, repository: str, _: str) -> None:
    """The author: pushes with a wrong token, then properly, then once more until the test kills this process."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from mpformer_hf import MPFormerImageProcessor  # noqa: PLC0415 - strangers have no package
    from tests.factories import tiny_model  # noqa: PLC0415

    model = tiny_model()
    processor = MPFormerImageProcessor(size={"shortest_edge": 48, "longest_edge": 96}, label_ids_to_fuse=[1])
    begin("wrong token")
    try:
        model.push_to_hub(repository, token="wrong")
    except HfHubHTTPError as error:
        (folder / "refused.json").write_text(json.dumps(error.response.status_code))
    begin("push")
    model.push_to_hub(repository)
    processor.push_to_hub(repository)
    begin("compute")
    # What strangers have: the compiled operator, which rounds otherwise, is not among the files on the Hub.
    os.environ["MPFORMER_MSDA_BACKEND"] = "embedding_bag"
    write_numbers(folder, "author", model, processor)
    del os.environ["MPFORMER_MSDA_BACKEND"]
    write_numbers(folder, "author, own operator", model, processor)
    begin("interrupted")
    sys.stdout.write("pushed\n")
    sys.stdout.flush()
    sys.stdin.readline()
    with torch.no_grad():
        model.class_predictor.bias.add_(1.0)
    model.push_to_hub(repository)


def write_numbers(folder: Path, title: str, model: Any, processor: Any) -> None:
    """What `load_and_save` writes, of models that were never saved."""
    from mpformer_hf import MPFormerModel  # noqa: PLC0415

    pixels = processor(picture(), return_tensors="pt").pixel_values
    base = MPFormerModel(model.config)
    base.load_state_dict(model.model.state_dict())
    found = {"pixels": pixels}
    for auto in AUTO_MODELS:
        computed = compute(base if auto == "AutoModel" else model, pixels)
        found |= {f"{auto} {kind}": value for kind, value in computed.items()}
    found |= segment(transformers.pipeline("image-segmentation", model=model, image_processor=processor))
    save_file({key: value.contiguous() for key, value in found.items()}, folder / f"{title}.safetensors")


def borrow(folder: Path, repository: str, copy: str) -> None:
    """A stranger: loads, saves, loads what was saved, and pushes it to another repository."""
    become_a_stranger()
    arguments = {"trust_remote_code": True}
    load_and_save(folder, "stranger", repository, revision=head_of(repository), **arguments)
    begin("stranger saves")
    saved = folder / "saved_by_the_stranger"
    model = transformers.AutoModelForUniversalSegmentation.from_pretrained(
        repository, revision=head_of(repository), **arguments
    )
    processor = transformers.AutoImageProcessor.from_pretrained(repository, revision=head_of(repository), **arguments)
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    load_and_save(folder, "stranger, saved", str(saved), **arguments)
    begin("stranger pushes")
    model.push_to_hub(copy)
    processor.push_to_hub(copy)


def borrow_copy(folder: Path, _: str, copy: str) -> None:
    """Another stranger: loads what the first one has pushed, first without a revision."""
    become_a_stranger()
    begin("no revision")
    transformers.AutoModelForImageSegmentation.from_pretrained(copy, trust_remote_code=True)
    load_and_save(folder, "copy", copy, revision=head_of(copy), trust_remote_code=True)


def borrow_with_lowest_versions(folder: Path, repository: str, _: str) -> None:
    """A stranger with the oldest transformers."""
    become_a_stranger()
    assert transformers.__version__ == "5.17.0"
    load_and_save(folder, "lowest versions", repository, revision=head_of(repository), trust_remote_code=True)


def own(folder: Path, repository: str, copy: str) -> None:
    """Someone who has the package: needs no flag, also for what a stranger has pushed; trains, saves and loads again."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import mpformer_hf  # noqa: F401, PLC0415

    load_and_save(folder, "owner", repository)
    load_and_save(folder, "owner, copy", copy)
    load_and_save(folder, "owner, saved by the stranger", str(folder / "saved_by_the_stranger"))
    begin("owner trains")
    model = transformers.AutoModelForUniversalSegmentation.from_pretrained(copy).train()
    processor = transformers.AutoImageProcessor.from_pretrained(copy)
    masks = np.zeros((1, 60, 80), dtype=bool)
    masks[0, 10:30] = True
    batch = processor(picture(), mask_labels=[masks], class_labels=[[1]], return_tensors="pt")
    model(**batch).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    trained = folder / "trained"
    for part in (model, processor):
        part.save_pretrained(trained, push_to_hub=True, repo_id="trained")
    load_and_save(folder, "owner, trained", str(trained))
    expected = compute(model, processor(picture(), return_tensors="pt").pixel_values)
    save_file(expected, folder / "trained, in memory.safetensors")


ROLES = {role.__name__: role for role in (push, borrow, borrow_copy, borrow_with_lowest_versions, own)}

if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    role, where, pushed_to, copied_to = sys.argv[1:]
    ROLES[role](Path(where), pushed_to, copied_to)
