"""The report of `training.check_data` as text, for people at a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from training.data_findings import Finding, count_of
from training.memory_estimate import MemoryEstimate

BAR_WIDTH = 32  # characters of the longest bar
NAME_WIDTH = 24
MOST_CLASSES = 60  # with a line of their own, in a histogram
GIB = 2**30


def report(
    summaries: Iterable[Mapping[str, Any]],
    findings: Sequence[Finding],
    memory: MemoryEstimate | str | None,
    others: Sequence[str] = (),
) -> str:
    """Write everything.

    Args:
        summaries: of the splits, see `training.data_check.summarise`.
        findings: what is wrong.
        memory: the estimate, or why there is none; `None` leaves it out.
        others: further lines, such as where the pictures are.
    """
    parts = [split_text(summary) for summary in summaries]
    if memory is not None:
        parts.append(memory if isinstance(memory, str) else memory_text(memory))
    parts.append(findings_text(findings))
    return "\n\n".join([*parts, *(["\n".join(others)] if others else [])])


def split_text(summary: Mapping[str, Any]) -> str:
    """Write the numbers of a split, its classes and its broken images."""
    read, images = summary["images_read"], summary["images"]
    heading = f"{summary['split']}, task {summary['task']}: {images} images"
    if read < images:
        known = "; segments and classes are those of all, by the index" if summary["counted_from_index"] else ""
        heading += f", {read} of them read{known}"
    counted = len(summary["classes"])
    lines = [
        heading,
        "-" * len(heading),
        *table(
            {
                "segments": f"{summary['segments']}, {three(summary['segments_an_image'])} an image",
                "images without any": summary["images_without_segments"],
                f"more than {summary['num_queries']} segments": summary["images_with_more_segments_than_queries"],
                "crowd regions": summary["crowd_regions"],
                "pixels": pixels_text(summary["pixels"]),
                "overlapping segments": f"{summary['overlapping_segments']:.1%}",
                "below 32 x 32 pixels": f"{summary['small_segments']:.1%} of the segments",
                "height": three(summary["heights"]),
                "width": three(summary["widths"]),
                "broken images": len(summary["broken_images"]),
            }
        ),
        *(f"  {error}" for error in summary["broken_images"]),
        "",
        f"{counted} classes, segments of each (images):",
        *histogram(summary["classes"]),
    ]
    return "\n".join(lines)


def table(entries: Mapping[str, object]) -> list[str]:
    """Write names and values in two columns."""
    width = max(map(len, entries))
    return [f"{name:{width}}  {value}" for name, value in entries.items()]


def three(spread: Mapping[str, float] | None) -> str:
    """Write smallest, median and largest."""
    return (
        "-" if spread is None else f"{spread['min']:g} / {spread['median']:g} / {spread['max']:g} (min / median / max)"
    )


def pixels_text(shares: Mapping[str, float]) -> str:
    """Write what the pixels belong to."""
    names = {"segments": "segments", "crowd": "crowds", "ignored": "ignored", "void": "nothing"}
    text = ", ".join(f"{words} {shares[name]:.1%}" for name, words in names.items())
    return f"{text}; several segments {shares['several_segments']:.1%}"


def histogram(classes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write a bar for each class, the largest first; of many classes the first and the last."""
    ordered = sorted(classes, key=lambda entry: -entry["segments"])
    most = max((entry["segments"] for entry in ordered), default=0)
    lines = [bar(entry, most) for entry in ordered]
    if len(lines) <= MOST_CLASSES:
        return lines
    half = MOST_CLASSES // 2
    return [*lines[:half], f"  ... {len(lines) - 2 * half} classes between ...", *lines[-half:]]


def bar(entry: Mapping[str, Any], most: int) -> str:
    """Write the line of a class."""
    name = entry["name"] if len(entry["name"]) <= NAME_WIDTH else f"{entry['name'][: NAME_WIDTH - 3]}..."
    length = -(-BAR_WIDTH * entry["segments"] // most) if most else 0
    kind = "thing" if entry["isthing"] else "stuff"
    return f"  {name:{NAME_WIDTH}} {kind} {'#' * length:{BAR_WIDTH}} {entry['segments']:>8} ({entry['images']})"


def memory_text(memory: MemoryEstimate) -> str:
    """Write the estimate with its parts."""
    heading = f"Memory of a training step, on each GPU: about {memory.total / GIB:.1f} GiB (an estimate)"
    parts = {
        "weights": f"{gibibytes(memory.weights)}, {memory.parameters / 1e6:.1f} million parameters",
        "gradients": gibibytes(memory.gradients),
        "optimiser": gibibytes(memory.optimizer),
        "activations": f"{gibibytes(memory.activations)}, {memory.batch_size} images of {memory.height} x {memory.width} and "
        f"{memory.queries} queries, those of mask piloting included",
        "targets": gibibytes(memory.targets),
        "CUDA itself": gibibytes(memory.context),
    }
    hint = (
        "The tensors that autograd keeps were counted, without a GPU; a peak may be 20 % off. Too much? Halve `batch_size` and double "
        "`gradient_accumulation_steps`, or set `gradient_checkpointing: true`."
    )
    return "\n".join([heading, "-" * len(heading), *table(parts), hint])


def gibibytes(count: int) -> str:
    """Write bytes."""
    return f"{count / GIB:.2f} GiB"


def findings_text(findings: Sequence[Finding]) -> str:
    """Write what is wrong, or that nothing is."""
    if not findings:
        return "Nothing looks wrong."
    errors = sum(finding.level == "error" for finding in findings)
    heading = f"{count_of(errors, 'error')}, {count_of(len(findings) - errors, 'warning')}"
    return "\n".join([heading, "-" * len(heading), *(f"{finding.level}: {finding.text}" for finding in findings)])
