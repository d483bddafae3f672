"""What a YAML file says of a network, beside what the checkpoint's shapes show of it. The checkpoint is the network, so it wins."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Size

from conversion import ConversionError
from conversion.detectron2_keys import Value
from conversion.detectron2_yaml import Detectron2Config, shown


@dataclass
class Evidence:
    """A configuration, the shapes of a checkpoint, and what there is to report about the two.

    Attributes:
        config: the configuration.
        weights: original name -> shape.
        notes: sentences for the person who converts.
    """

    config: Detectron2Config
    weights: Mapping[str, Size]
    notes: list[str] = field(default_factory=list)

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Return the shape of a tensor that must be there and have `rank` axes, none of them empty."""
        if name not in self.weights:
            raise ConversionError(
                f"The checkpoint has no {name}. Expected a MP-Former or Mask2Former of Detectron2, with a multi-scale deformable "
                "pixel decoder and a multi-scale masked transformer decoder."
            )
        shape = tuple(self.weights[name])
        if len(shape) != rank or 0 in shape:
            raise ConversionError(f"{name} must have {rank} axes, none of size 0, got the shape {shape}.")
        return shape

    def count(self, prefix: str) -> int:
        """Count the entries "<prefix>.0.", "<prefix>.1.", ... of a list of modules; none may be left out."""
        starts = {
            name.removeprefix(f"{prefix}.").partition(".")[0] for name in self.weights if name.startswith(f"{prefix}.")
        }
        if missing := sorted({str(index) for index in range(len(starts))} - starts):
            raise ConversionError(f"The checkpoint has {len(starts)} entries of {prefix}, but not number {missing[0]}.")
        return len(starts)

    def settle(self, key: str, found: Value) -> Value:
        """Return what the checkpoint shows, and report a configuration that says otherwise."""
        said = self.config.get(key)
        same = (
            list(said) == list(found) if isinstance(found, Sequence) and not isinstance(found, str) else said == found
        )
        if not same and self.config.is_set(key):
            self.notes.append(
                f"{key} is {shown(said)} in the configuration, but the checkpoint has {shown(found)}, which is used."
            )
        return found

    def require(self, key: str, allowed: Collection[Value], reason: str) -> None:
        """Refuse a value that the configuration sets and this package has nothing for."""
        value = self.config.get(key)
        if self.config.is_set(key) and value not in allowed:
            raise ConversionError(
                f"{key} is {shown(value)}; expected {' or '.join(shown(one) for one in allowed)}. {reason} If the checkpoint was "
                f"trained otherwise, pass the override `{key} VALUE`."
            )

    def expect(self, key: str, name: str, found: int, expected: int, reason: str) -> None:
        """Refuse a tensor whose size on one axis this package has nothing for."""
        if found != expected:
            raise ConversionError(f"{key}: {name} has {found} {reason}; expected {expected}.")

    def in_range(self, key: str, low: float, high: float) -> Value:
        """Return the configuration's value, which must be in [low, high]."""
        value = self.config.get(key)
        if not low <= value <= high:
            raise ConversionError(f"{key} must be from {low} to {high}, got {shown(value)}.")
        return value


def agree(key: str, sizes: Mapping[str, int]) -> int:
    """Return the one size that several tensors must have in common.

    Args:
        key: the configuration's key for that size, for the message.
        sizes: name of a tensor -> its size on the axis in question.
    """
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{size} in {name}" for name, size in sizes.items())
        raise ConversionError(
            f"The checkpoint contradicts itself on {key}: {listed}. The file is damaged, or of another model."
        )
    return next(iter(sizes.values()))
