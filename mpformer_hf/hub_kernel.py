"""The deformable attention of the kernels hub: what happens after `from_pretrained(..., use_kernels=True)`.

transformers then replaces the forward of each `MultiScaleDeformableAttention` of the model by that of a downloaded layer. Here it
is decided whether that layer may run, and how: it takes one type for all, so it gets float32, and its output is cast back. It is
used only after it has passed a test in a process of its own (`kernel_self_test.py`), not while torch traces a model, and not on
what it cannot do. Else there is one line in the log, and the model goes on with its own implementation.

Axes: B images, Q queries, S cells of all levels, N heads, D channels of a head, L levels, K points.
"""

import base64
import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import import_utils

from .kernel_self_test import Candidate, Trial, describe, examine
from .position_embedding import cache_table

logger = logging.getLogger(__name__)

Shapes = tuple[tuple[int, int], ...]
Forward = Callable[..., Tensor]

LAYER_NAME = "MultiScaleDeformableAttention"
MOST_IMAGES_AT_ONCE = 64
MOST_ELEMENTS = 2**31  # the kernels count in 32 bits


# -------------------------------------------------------------------------------------------------------------- the choice


def find_kernel(layer: nn.Module, value: Tensor, locations: Tensor) -> Forward | None:
    """The forward of the hub's layer if one is attached to `layer` and may run on these tensors, else None.

    Raises:
        RuntimeError: MPFORMER_MSDA_BACKEND=hub, and it cannot run.
    """
    forced = read_forced_backend()
    if forced not in {None, "hub"}:
        return None
    kernel = None if torch.compiler.is_compiling() else attached_forward(layer)
    if kernel is None:
        if forced is not None:
            refuse_to_go_on(explain_unattached(layer))
        return None
    refusal = explain_refusal(kernel, value.device) or explain_misfit(value, locations)
    if refusal is not None and forced is not None:
        refuse_to_go_on(refusal)
    return kernel if refusal is None else None


@torch.compiler.assume_constant_result
def read_forced_backend() -> str | None:
    """MPFORMER_MSDA_BACKEND."""
    return os.environ.get("MPFORMER_MSDA_BACKEND") or None


def refuse_to_go_on(reason: str) -> NoReturn:
    """Say why the kernel that was asked for by name cannot run."""
    raise RuntimeError(
        f"MPFORMER_MSDA_BACKEND=hub, but no kernel of the kernels hub can be used: {reason.rstrip('.')}. "
        "Load the model with from_pretrained(..., use_kernels=True), or unset the variable."
    )


def explain_unattached(layer: nn.Module) -> str:
    """Why the layer has its own forward, or must use it."""
    if torch.compiler.is_compiling():
        return "kernels of the hub do not run while torch traces a model"
    return explain_missing_decorator(type(layer)) or "none is attached to this model"


def attached_forward(layer: nn.Module) -> Forward | None:
    """The function by which transformers has replaced the layer's forward; None if it is the layer's own."""
    # accelerate puts its hook into `forward` and what was there into `_old_forward`.
    for name in ("forward", "_old_forward"):
        bound = layer.__dict__.get(name)
        if isinstance(bound, MethodType) and bound.__func__ is not type(layer).forward:
            return bound.__func__
    return None


_refusals: dict[tuple[Forward, torch.device], str | None] = {}


def explain_refusal(kernel: Forward, device: torch.device) -> str | None:
    """None if the kernel passed its test on this device, else one line why not; the first time, that goes to the log."""
    key = (kernel, device)
    if key not in _refusals:
        candidate = describe_kernel(kernel)
        if isinstance(candidate, Candidate):
            verdict = examine(candidate, device)
            refuse(kernel, device, None if verdict.is_good else verdict.reason)
        else:
            refuse(kernel, device, candidate)
    return _refusals[key]


def refuse(kernel: Forward, device: torch.device, reason: str | None) -> None:
    """Remember why the kernel is not used on this device (None: it is), and say so."""
    _refusals[kernel, device] = reason
    if reason is not None:
        logger.warning(
            "The deformable attention of the kernels hub (%s) is not used: %s. The model goes on with its own.",
            kernel.__module__,
            reason.rstrip("."),
        )


def explain_misfit(value: Tensor, locations: Tensor) -> str | None:
    """None if these tensors are something for the kernels of the hub, else one line why not."""
    if value.dtype == torch.float64:
        return "it computes in float32, and the value is float64"
    if value.numel() == 0 or locations.numel() == 0:
        return "there is nothing to compute"
    if max(value.numel(), locations.numel()) >= MOST_ELEMENTS:
        return f"it counts in 32 bits, and a tensor has {max(value.numel(), locations.numel())} elements"
    return None


def explain_missing_decorator(layer_class: type[nn.Module]) -> str | None:
    """None if transformers can attach kernels to the class, else one line why not."""
    if hasattr(layer_class, "kernel_layer_name"):
        return None
    least = getattr(import_utils, "KERNELS_MIN_VERSION", "an unknown version")
    limit = getattr(import_utils, "KERNELS_MAX_VERSION", "an unknown version")
    try:
        installed = f"kernels {importlib.metadata.version('kernels')} is installed"
    except importlib.metadata.PackageNotFoundError:
        installed = "kernels is not installed"
    switch = os.environ.get("USE_HUB_KERNELS")
    return (
        f"transformers {transformers.__version__} attaches kernels only with {least} <= kernels < {limit}, and {installed}"
        + (f" (USE_HUB_KERNELS={switch})" if switch else "")
    )


# ------------------------------------------------------------------------------------------------------------- running it


def run_or_give_up(
    kernel: Forward, layer: nn.Module, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> Tensor | None:
    """As `run_kernel`; None if the kernel raised, which is then said once and the kernel never called again.

    Raises:
        RuntimeError: the kernel raised, and MPFORMER_MSDA_BACKEND=hub.
    """
    try:
        return run_kernel(kernel, layer, value, shapes, locations, weights)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if read_forced_backend() is not None:
            raise RuntimeError(f"The kernel of the kernels hub failed: {describe(error)}.") from error
        refuse(kernel, value.device, describe(error))
        return None


def run_kernel(
    kernel: Forward, layer: nn.Module, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """The operator on a kernel of the hub, differentiable; arguments as `ms_deform_attn`."""
    batch_size, num_queries, num_heads = locations.shape[:3]
    with torch.autocast(value.device.type, enabled=False):
        output = kernel(
            layer,
            value.float().contiguous(),
            level_sizes(shapes, value.device),
            list(shapes),
            level_starts(shapes, value.device),
            locations.float().contiguous(),
            weights.float().contiguous(),
            divide_batch(batch_size),
        )
    return output.view(batch_size, num_queries, num_heads, -1).to(value.dtype)


def divide_batch(batch_size: int) -> int:
    """How many images at once, `im2col_step`: the kernels take only divisors of the batch."""
    return max(step for step in range(1, min(batch_size, MOST_IMAGES_AT_ONCE) + 1) if batch_size % step == 0)


@cache_table
def level_sizes(shapes: Shapes, device: torch.device) -> Tensor:
    """Height and width of each level, int64, (L, 2)."""
    return torch.tensor(shapes, dtype=torch.int64, device=device)


@cache_table
def level_starts(shapes: Shapes, device: torch.device) -> Tensor:
    """The first cell of each level, int64, (L,)."""
    sizes = [height * width for height, width in shapes]
    return torch.tensor([sum(sizes[:level]) for level in range(len(sizes))], dtype=torch.int64, device=device)


# -------------------------------------------------------------------------------- finding the same kernel in another process


def describe_kernel(kernel: Forward) -> Candidate | str:
    """What another process needs to load the same kernel, or one line why it could not."""
    names = kernel.__module__.split(".")
    packages = (".".join(names[:count]) for count in range(1, len(names) + 1))
    root = next((name for name in packages if getattr(sys.modules.get(name), "__file__", None)), None)
    layer = kernel.__qualname__.rpartition(".")[0]
    if root is None or not layer or "<locals>" in layer:
        return f"{kernel.__module__}.{kernel.__qualname__} cannot be tested: it has no file that another process could load"
    return make_candidate(root, Path(str(sys.modules[root].__file__)), kernel.__module__, layer)


def make_candidate(root: str, file: Path, module: str, layer: str) -> Candidate:
    """What `load_layer` needs to load a layer of a kernel."""
    return Candidate(
        name="hub",
        version=fingerprint(file),
        opener="hub_kernel:open_layer",
        arguments={"root": root, "file": str(file), "module": module, "layer": layer},
        environment={"HF_HUB_OFFLINE": "1"},
    )


def fingerprint(file: Path) -> str:
    """Changes with the files of a kernel: the folder of a package, or the one file."""
    members = sorted(file.parent.rglob("*")) if file.name == "__init__.py" else [file]
    seen = hashlib.sha256()
    for member in members:
        if member.is_file() and "__pycache__" not in member.parts:
            status = member.stat()
            seen.update(f"{member}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return seen.hexdigest()


def open_layer(arguments: dict[str, str], device: torch.device) -> Trial:
    """The layer for its self-test."""
    del device
    return Trial(load_layer(**arguments))


def load_layer(root: str, file: str, module: str, layer: str) -> Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]:
    """The operator on a layer of a kernel, loaded from its files.

    Args:
        root: name of the outermost package.
        file: of that package.
        module: that holds the layer.
        layer: name of the class.
    """
    if root not in sys.modules:
        spec = importlib.util.spec_from_file_location(root, file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} cannot be imported")
        sys.modules[root] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[root])
    layer_class: Any = functools.reduce(getattr, layer.split("."), importlib.import_module(module))
    return functools.partial(run_kernel, layer_class.forward, layer_class())


# ------------------------------------------------------------------------------------------------------ loading a model


class KernelFallback:
    """Put before `PreTrainedModel` among the bases of a model: a kernel that cannot be had does not keep it from being loaded."""

    def set_use_kernels(self, use_kernels: bool, kernel_config: Any = None, mode: Any = None) -> None:  # noqa: ANN401 - transformers' types, which exist only with `kernels`
        """Attach kernels; say why where the hub does not answer or has no build for this machine.

        Args:
            use_kernels: True attaches them.
            kernel_config: transformers' `KernelConfig`.
            mode: `kernels.Mode`; by default that of the model, training or inference.

        Raises:
            ValueError: the installed version of `kernels` is not one that transformers takes, or the configuration is wrong.
        """
        attach = super().set_use_kernels  # type: ignore[misc]
        if not use_kernels or not import_utils.is_kernels_available():
            attach(use_kernels, kernel_config, mode)
            return
        if kernel_config is not None:
            kernel_config.sanitize_kernel_mapping(self)  # mistakes of the caller are no matter of the kernel
        refusal = None if kernel_config is not None else try_before_loading(self)  # type: ignore[arg-type]
        if refusal is None:
            try:
                attach(use_kernels, kernel_config, mode)
            except Exception as error:  # noqa: BLE001, RUF100 - not all kernels' and hubs' errors have a common type
                refusal = describe(error)
            else:
                if kernel_config is None:
                    trust_attached(self)  # type: ignore[arg-type]
                return
        # Layers of the backbone may have kernels of their own, which are not to blame.
        with hide_layer(self):  # type: ignore[arg-type]
            attach(use_kernels, kernel_config, mode)
        warn_once(refusal.rstrip("."))


@functools.cache
def warn_once(reason: str) -> None:
    """Say why, once: every change between training and evaluation comes here again."""
    logger.warning(
        "The deformable attention of the kernels hub is not used: %s. The model goes on with its own.", reason
    )


def trust_attached(model: nn.Module) -> None:
    """What was tried before it was loaded needs no second trial."""
    device = getattr(model, "device", None)
    if device is None or find_repository(device, is_training=model.training) is None:
        return
    for module in model.modules():
        kernel = attached_forward(module) if getattr(type(module), "kernel_layer_name", None) == LAYER_NAME else None
        if kernel is not None:
            _refusals.setdefault((kernel, device), None)


@contextlib.contextmanager
def hide_layer(model: nn.Module) -> Iterator[None]:
    """Keep `kernels` from seeing the layers of `model` that it could replace by deformable attention."""
    classes: set[Any] = {
        type(module) for module in model.modules() if getattr(type(module), "kernel_layer_name", None) == LAYER_NAME
    }
    for layer_class in classes:
        del layer_class.kernel_layer_name
    try:
        yield
    finally:
        for layer_class in classes:
            layer_class.kernel_layer_name = LAYER_NAME


def try_before_loading(model: nn.Module) -> str | None:
    """Let a child process load and test what transformers would load into this one: importing a kernel can end a process.

    Returns:
        None if it is good or `kernels` does not tell which one it is, else one line why not.
    """
    device = getattr(model, "device", None)
    repository = None if device is None else find_repository(device, is_training=model.training)
    if device is None or repository is None:
        return None
    packed = base64.b64encode(pickle.dumps(repository)).decode()
    candidate = Candidate("hub", name_version(repository), "hub_kernel:open_repository", {"repository": packed})
    verdict = examine(candidate, device)
    return None if verdict.is_good else verdict.reason


def name_version(repository: Any) -> str | None:  # noqa: ANN401 - a type of `kernels`
    """Revision or files of a kernel; None if they cannot be told, as offline."""
    try:
        folder = getattr(repository, "_repo_path", None)
        return str(repository) if folder is None else fingerprint(Path(folder) / "__init__.py")
    except Exception:  # the hub's errors have no common type
        return None


def find_repository(device: torch.device, *, is_training: bool) -> Any:  # noqa: ANN401
    """The repository that `kernels` would take the layer from; None if there is none for the device, or it cannot be told."""
    try:
        from kernels import Mode  # noqa: PLC0415
        from kernels.layer.globals import _KERNEL_MAPPING  # noqa: PLC0415
        from kernels.layer.repos import _select_repository  # noqa: PLC0415
        from transformers.integrations.hub_kernels import register_kernel_mapping_transformers  # noqa: PLC0415

        register_kernel_mapping_transformers()
        kind = "rocm" if device.type == "cuda" and torch.version.hip else device.type
        by_property = _KERNEL_MAPPING.get().get(LAYER_NAME, {}).get(kind)
        repositories = None if by_property is None else by_property.repos
        chosen = (
            _select_repository(repositories, mode=Mode.TRAINING if is_training else Mode.INFERENCE)
            if repositories
            else None
        )
    except (ImportError, AttributeError, TypeError):
        return None
    return None if chosen is None else chosen[0]


def open_repository(arguments: dict[str, str], device: torch.device) -> Trial:
    """The layer of a packed repository, for its self-test."""
    del device
    layer_class = pickle.loads(base64.b64decode(arguments["repository"])).load()  # noqa: S301, RUF100 - packed by the parent
    return Trial(functools.partial(run_kernel, layer_class.forward, layer_class()))
