"""The compiled operator `torch.ops.mpformer.ms_deform_attn`, its build, and the choice among backends.

    python -m mpformer_hf.ops doctor    which backend runs here, and why not the others
    python -m mpformer_hf.ops build     compile now instead of at first use

Files of models never import this package: they look the operator up as `torch.ops.mpformer` (see `deformable_attention.py`).
"""

import functools
import importlib.util
import logging

from . import build, operator

logger = logging.getLogger(__name__)

__all__ = ["build", "register"]


@functools.cache
def register() -> str | None:
    """Register the operator with torch, for the devices that have a kernel; the package does this when it is imported.

    Nothing is compiled or loaded here. The CPU always has a kernel: the compiled library, built at first use if need be, or plain
    PyTorch. A GPU has one when a library was built for it or deformops is installed.

    Returns:
        None, or one line why it could not be done: models then use plain PyTorch, and `doctor` shows the line.
    """
    try:
        operator.define()
        operator.implement("cpu")
        if build.find_library("cuda") is not None or importlib.util.find_spec("deformops") is not None:
            operator.implement("cuda")
    except Exception as error:
        logger.warning("The operator could not be registered with torch %s.", error)
        return f"registration with torch failed: {type(error).__name__}: {error}"
    return None
