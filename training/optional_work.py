"""Work beside a training that may fail without stopping it: logs of others, pictures, uploads."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


@contextmanager
def optional_work(what: str) -> Iterator[None]:
    """Turn any error of the block into a sentence; a request to stop is none.

    Args:
        what: beginning of the sentence, such as "The curves cannot be drawn".
    """
    try:
        yield
    except Exception as error:  # of other people's programs and servers
        tell(f"{what}: {describe(error)}. The training is not affected.")


def describe(error: BaseException) -> str:
    """Name an error in one line."""
    words = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def tell(sentence: str) -> None:
    """Say something above the progress bar."""
    tqdm.write(sentence, file=sys.stderr)
