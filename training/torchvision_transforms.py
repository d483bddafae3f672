"""Transforms of torchvision.transforms.v2 that a recipe names, on image and masks together.

    transforms:
      - {name: RandomRotation, degrees: 10, fill: 128}
      - {name: GaussianBlur, kernel_size: 5}

They see the image as `tv_tensors.Image` and all masks as one `tv_tensors.Mask`, so those that move pixels move both, and those
that change colours change the image alone; `fill` is for the image alone too. Their random numbers come from torch's generator
of the CPU, which is seeded from that of the row and put back afterwards.
"""

import difflib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from torchvision.transforms import v2

Row = TypeVar("Row", bound=Mapping[str, Any])
MASKS = ("mask_labels", "crowd_masks", "ignore_mask")
LABELS = {"mask_labels": "class_labels", "crowd_masks": "crowd_labels"}
SEEDS = 2**53  # as many as a double between 0 and 1 tells apart


def check_transforms(settings: Sequence[Mapping[str, Any]]) -> None:
    """Refuse transforms that torchvision does not know, or whose arguments it refuses."""
    for one in settings:
        make_transform(one)


def make_transform(settings: Mapping[str, Any]) -> "v2.Transform":
    """Make one transform of its name and its arguments.

    Raises:
        ValueError: a sentence for the user; it names the nearest name or argument that is known.
    """
    from torchvision import tv_tensors  # noqa: PLC0415
    from torchvision.transforms import v2  # noqa: PLC0415 - a second; most recipes need none of it

    known = [name for name, one in vars(v2).items() if inspect.isclass(one) and issubclass(one, v2.Transform)]
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    name = str(arguments.pop("name", None))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"`transforms`: torchvision.transforms.v2 has no transform {name!r}. Did you mean `{near}`?")
    parameters = list(inspect.signature(getattr(v2, name)).parameters)
    for key in arguments:
        if key not in parameters:
            near = difflib.get_close_matches(str(key), parameters, n=1, cutoff=0.0)
            hint = f" Did you mean `{near[0]}`?" if near else " It has none."
            raise ValueError(f"`transforms`: {name} has no argument `{key}`.{hint}")
    if "fill" in arguments:
        # A number would fill the masks too, and what comes in from outside belongs to no segment.
        arguments["fill"] = {tv_tensors.Image: arguments["fill"], "others": 0}
    try:
        return getattr(v2, name)(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`transforms`: {name} cannot be made of {dict(settings)}: {error}") from error


def apply_transforms(row: Row, settings: Sequence[Mapping[str, Any]], rng: np.random.Generator) -> Row:
    """Apply transforms to an augmented row.

    Args:
        row: `image` of 8 bits, and bool masks of its size.
        settings: see `make_transform`.
        rng: one number is drawn, the seed of all of them.

    Returns:
        A new row. Masks that have no pixel left are dropped, and their labels too.

    Raises:
        ValueError: the image came out in another size, in another type, or without three channels.
    """
    from torchvision import tv_tensors  # noqa: PLC0415

    pixels = torch.from_numpy(np.array(row["image"])).permute(2, 0, 1)
    names = [name for name in MASKS if name in row]
    stacks = [row[name].reshape(-1, *pixels.shape[1:]) for name in names]
    masks = torch.from_numpy(np.concatenate(stacks).view(np.uint8))
    sample = tv_tensors.Image(pixels), tv_tensors.Mask(masks)
    with seeded(int(rng.random() * SEEDS)):
        for one in settings:
            sample = make_transform(one)(*sample)
    image, changed = (part.as_subclass(torch.Tensor) for part in sample)
    if image.shape != pixels.shape or image.dtype != torch.uint8 or changed.shape[1:] != pixels.shape[1:]:
        raise ValueError(
            f"`transforms` must leave images of 8 bits and of their size, but {tuple(pixels.shape)} uint8 became "
            f"{tuple(image.shape)} {image.dtype}. Set `size` instead of resizing, and leave out conversions of types."
        )
    result: dict[str, Any] = {**row, "image": Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())}
    parts = np.split(changed.numpy() > 0, np.cumsum([len(stack) for stack in stacks])[:-1])
    for name, part in zip(names, parts, strict=True):
        if name in LABELS:
            kept = part.any(axis=(1, 2))
            result[name], result[LABELS[name]] = part[kept], row[LABELS[name]][kept]
        else:
            result[name] = part[0]
    return result  # type: ignore[return-value]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator of the CPU, and put it back as it was; those of accelerators are left alone."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
