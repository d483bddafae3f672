"""Alarms of a training that runs: what goes wrong silently, in one sentence each, with what it means and what to do.

    alarms = Alarms(max_steps, ...)
    sentences = alarms.observe(step, line, collect_facts(model, outputs, batch["class_labels"]))      at logging steps
    sentences = alarms.observe(step, score_line, {"object_share": ...})                                at evaluations

`Alarms` sees plain numbers alone. A cause is told once, and once more if it comes back after it was quiet for many steps. The
limits come first, each with its reason; every cause has a check of its own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.log_lines import KINDS, PILOT, levels_of
from training.optional_work import tell

# A cause that was quiet for this share of the training, but at least for so many steps, is news when it comes back.
QUIET_SHARE, LEAST_QUIET_STEPS = 0.05, 200
# Until then predictions of nothing are the way: "no object" is the class of most queries, and is learnt first. The original's
# models predict objects after a few hundred steps; a short training gets a quarter of its steps.
NULL_GRACE_STEPS, NULL_GRACE_SHARE = 2000, 0.25
# Objects predicted for one that there is. A model that has learnt anything predicts more than it finds; near 0 is collapse.
FEWEST_OBJECTS = 0.05
# The same without knowing how many there are: an image with a single object among 100 queries has ten times as many.
SMALLEST_OBJECT_SHARE = 0.001
# Of the label loss of one who knows how many objects there are, and nothing of the image. Real classes are not equally frequent,
# which makes guessing easier: even blind one comes below 1, and a model that sees comes far below.
BLIND_SHARE = 0.9
# Of the rows of attention masks. Queries of nothing have empty masks, a third to two thirds of all in trained models of digit
# scenes; if nearly all are empty, the masks guide no attention.
BLOCKED_SHARE = 0.9
# Segments that keep their query from one level to the next: 0.84 to 0.99 in trained models of digit scenes. Below a third, levels
# contradict each other. Early, matches change as they should, so only the second half counts.
LEAST_STABILITY, LATE_SHARE = 0.33, 0.5
# Mask losses of pilots, as a share of those of matched queries: 1 to 1.5 all through a training on digit scenes, because what
# pilots see is noisy. Below a fifth they copy it; it must also have fallen to half of what it was, or the data are just easy.
COPY_RATIO, COPY_FALL = 0.2, 0.5
# Norm of all gradients: 60 to 750 on digit scenes. Clipping to 0.01 in every step is the original's way, and no cause for alarm.
HUGE_NORM = 1e4
# Share of the time that is spent waiting for data.
WAITING_SHARE = 0.5
# Lines about steps in a row for causes that a single line may show by chance: the first line starts worker processes, and losses
# of a few batches vary.
PATIENCE = {"waiting": 3, "stability": 3, "copying": 3, "gradients": 2, "blind": 3}

Facts = Mapping[str, Any]

KEPT_COUNTERS = ("broken_images",)  # counted by the training, whose checkpoints keep it


class Alarms:
    """Watches a training; one instance a run, on the first process.

    `observe` reads these numbers from the line of the log and from `facts`; what is in neither is not watched:

        loss, mask, dice, pilot_mask, pilot_dice, learning_rate, images_per_second      as in the log
        levels                 losses by kind and level, for `cross_entropy`
        gradient_norm          mean norm before clipping
        waiting                share of the time that was spent waiting for data
        nonfinite_steps        steps in a row with non-finite matching costs
        surplus_segments       segments so far that no query was left for
        broken_images          images so far that could not be read, and `broken_names`, a list of some
        object_share           share of the queries that predict an object
        segments_per_image, num_queries, num_labels, no_object_weight, label_weight     of the batch and the model
        blocked_share          share of the rows of attention masks that forbid everything
        match_stability        for each level but the first, share of segments that keep their query
    """

    def __init__(
        self,
        max_steps: int,
        *,
        max_gradient_norm: float | None = None,
        num_workers: int | None = None,
        max_broken_images: int | None = None,
    ) -> None:
        """Take what the sentences say of the recipe.

        Args:
            max_steps: length of the training.
            max_gradient_norm: gradients are clipped to it; `None`: they are not.
            num_workers: processes that prepare batches.
            max_broken_images: one more stops the run.
        """
        self.max_steps = max_steps
        self.max_gradient_norm = max_gradient_norm
        self.num_workers = num_workers
        self.max_broken_images = max_broken_images
        self.quiet_steps = max(LEAST_QUIET_STEPS, round(QUIET_SHARE * max_steps))
        self.null_grace = min(NULL_GRACE_STEPS, round(NULL_GRACE_SHARE * max_steps))
        self._last_seen: dict[str, int] = {}  # cause: step in which it was last there, told or not
        self._in_a_row: dict[str, int] = {}  # cause: lines in a row that showed it
        self._counts: dict[str, int] = {}  # counter: its last value
        self._highest_ratio: float | None = None
        self._checks: dict[str, Callable[[int, Facts], str | None]] = {
            "nonfinite": self._check_nonfinite,
            "null": self._check_null,
            "blind": self._check_blind,
            "blocked": self._check_blocked,
            "stability": self._check_stability,
            "copying": self._check_copying,
            "gradients": self._check_gradients,
            "learning rate": self._check_learning_rate,
            "waiting": self._check_waiting,
            "surplus": self._check_surplus,
            "broken": self._check_broken,
        }

    def observe(self, step: int, line: Mapping[str, Any], facts: Facts | None = None) -> list[str]:
        """Look at a line of the log, and what else is known; returns the sentences that are due."""
        known = {**line, **(facts or {})}
        sentences = []
        for cause, check in self._checks.items():
            found = check(step, known)
            if found is None:
                continue
            self._in_a_row[cause] = self._in_a_row.get(cause, 0) + 1 if found else 0
            if not found or self._in_a_row[cause] < PATIENCE.get(cause, 1):
                continue
            last = self._last_seen.get(cause)
            if last is None or step - last > self.quiet_steps:
                sentences.append(found)
            self._last_seen[cause] = step
        return sentences

    def state_dict(self) -> dict[str, Any]:
        """What an uninterrupted run would remember, in types of JSON."""
        return {
            "last_seen": dict(self._last_seen),
            "in_a_row": dict(self._in_a_row),
            "counts": dict(self._counts),
            "highest_ratio": self._highest_ratio,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the state of an earlier session. Counters of the model begin at 0 in this one."""
        self._last_seen = dict(state["last_seen"])
        self._in_a_row = dict(state["in_a_row"])
        self._counts = {name: count for name, count in state["counts"].items() if name in KEPT_COUNTERS}
        self._highest_ratio = state["highest_ratio"]

    # Each check returns a sentence, "" if all is well, or None if it knows nothing.

    def _check_nonfinite(self, _step: int, known: Facts) -> str | None:
        loss, steps = known.get("loss"), known.get("nonfinite_steps")
        if loss is None and steps is None:
            return None
        if loss is not None and not math.isfinite(loss):
            what = f"The loss is {loss}"
        elif steps:
            what = f"Matching costs were not finite in the last {steps} steps"
        else:
            return ""
        return (
            f"{what}: queries and segments are paired at random, and after `max_nonfinite_steps` such steps in a row the training "
            "stops; lower `learning_rate`, check the images, or use `mixed_precision: bf16` instead of fp16."
        )

    def _check_null(self, step: int, known: Facts) -> str | None:
        share = known.get("object_share")
        if share is None or step < self.null_grace:
            return None
        expected = known.get("segments_per_image", 0) / known.get("num_queries", math.inf)
        if share >= (FEWEST_OBJECTS * expected if expected else SMALLEST_OBJECT_SHARE):
            return ""
        return (
            f"Nearly all queries predict nothing ({100 * share:.2f} % an object): results will be empty; look at the segments with "
            "training.check_data, raise `learning_rate`, or begin from a trained model (`model_name_or_path`)."
        )

    def _check_blind(self, step: int, known: Facts) -> str | None:
        per_level = levels_of(known).get("cross_entropy")
        needed = ("label_weight", "no_object_weight", "segments_per_image", "num_queries", "num_labels")
        if step < self.null_grace or not per_level or not known.keys() >= set(needed):
            return None
        label_weight, no_object_weight, *counts = (known[name] for name in needed)
        loss = math.fsum(per_level) / len(per_level) / label_weight
        blind = blind_label_loss(*counts, no_object_weight)
        if not loss >= BLIND_SHARE * blind:
            return ""
        return (
            f"The label loss ({loss:.2f} for each level) is that of guessing without looking at the image ({blind:.2f}): the model "
            "does not tell objects from nothing; check that labels belong to their images, or change `learning_rate`."
        )

    def _check_blocked(self, step: int, known: Facts) -> str | None:
        share = known.get("blocked_share")
        if share is None or step < self.null_grace:
            return None
        if share <= BLOCKED_SHARE:
            return ""
        return (
            f"{100 * share:.0f} % of the attention masks are empty: such queries look at the whole image, so that masks guide no "
            "attention; masks have collapsed, so lower `learning_rate`, and check that masks fit their images."
        )

    def _check_stability(self, step: int, known: Facts) -> str | None:
        shares = known.get("match_stability")
        if not shares or step < LATE_SHARE * self.max_steps:
            return None
        mean = math.fsum(shares) / len(shares)
        if not mean < LEAST_STABILITY:
            return ""
        return (
            f"Only {100 * mean:.0f} % of the segments keep their query from one decoder level to the next, late in the training: "
            "levels teach queries different things; train longer, lower `learning_rate`, or keep `model.mask_piloting: true`."
        )

    def _check_copying(self, _step: int, known: Facts) -> str | None:
        matched, piloted = mask_losses(known, ""), mask_losses(known, PILOT)
        if matched is None or piloted is None or not matched > 0 or not math.isfinite(piloted):
            return None
        ratio = piloted / matched
        self._highest_ratio = max(ratio, self._highest_ratio or ratio)
        if ratio >= COPY_RATIO or ratio > COPY_FALL * self._highest_ratio:
            return ""
        return (
            f"Mask losses of pilots are {100 * ratio:.0f} % of those of matched queries, and were {100 * self._highest_ratio:.0f} %: "
            "pilots copy the ground truth that they see, and matched queries do not gain from it; raise "
            "`model.pilot_mask_noise_ratio`."
        )

    def _check_gradients(self, _step: int, known: Facts) -> str | None:
        norm = known.get("gradient_norm")
        if norm is None or not math.isfinite(norm):  # float16 passes over such steps, and lowers its scale
            return None
        if norm <= HUGE_NORM:
            return ""
        limit = self.max_gradient_norm
        clipped = "and nothing clips them" if limit is None else f"and every step is clipped to {limit:g}"
        return (
            f"Gradients have a norm of {norm:.1e}, {clipped}: a few images decide where the training goes; lower `learning_rate`, "
            "or look for broken labels with training.check_data."
        )

    def _check_learning_rate(self, step: int, known: Facts) -> str | None:
        rate = known.get("learning_rate")
        if rate is None or step >= self.max_steps:
            return None
        if rate > 0:
            return ""
        return (
            f"The learning rate is {rate:g} with {self.max_steps - step} steps left: nothing is learnt in them; check "
            "`learning_rate`, `schedule_milestones` and `schedule_factor`."
        )

    def _check_waiting(self, _step: int, known: Facts) -> str | None:
        share = known.get("waiting")
        if share is None:
            return None
        if share <= WAITING_SHARE:
            return ""
        speed = known.get("images_per_second")
        words = "" if speed is None else f" ({speed:.1f} images/s)"
        now = "" if self.num_workers is None else f", now {self.num_workers}"
        return (
            f"{100 * share:.0f} % of the time is spent waiting for data{words}: images are prepared more slowly than they are "
            f"learnt from; raise `num_workers`{now}, up to the number of cores, or use smaller images."
        )

    def _check_surplus(self, _step: int, known: Facts) -> str | None:
        more = self._count_more("surplus_segments", known)
        if not more:
            return None if more is None else ""
        return (
            f"{more} more segments had no query left to learn them: images have more segments than the model has queries; raise "
            "`model.num_queries`."
        )

    def _check_broken(self, _step: int, known: Facts) -> str | None:
        more = self._count_more("broken_images", known)
        if not more:
            return None if more is None else ""
        names: Sequence[str] = known.get("broken_names") or ()
        # The log may be shared: names of files, not of folders.
        listed = f" ({', '.join(Path(str(name)).name for name in names[-3:])})" if names else ""
        limit = "" if self.max_broken_images is None else f"; more than {self.max_broken_images} stop the run"
        return (
            f"{more} more images could not be read, and were passed over{listed}: {known['broken_images']} so far{limit}; repair "
            "them, or take them out of the data set."
        )

    def _count_more(self, name: str, known: Facts) -> int | None:
        """How much a counter has grown since it was last seen."""
        if known.get(name) is None:
            return None
        before = self._counts.get(name, 0)
        self._counts[name] = int(known[name])
        return max(0, self._counts[name] - before)


def mask_losses(known: Facts, prefix: str) -> float | None:
    """Sum of the mask losses of matched queries (prefix "") or pilots; `None` if one is not known."""
    names = [f"{prefix}{kind}" for kind in KINDS if kind != "cross_entropy"]
    return math.fsum(known[name] for name in names) if known.keys() >= set(names) else None


def blind_label_loss(segments: float, num_queries: int, num_labels: int, no_object_weight: float) -> float:
    """Least label loss of predictions that are the same for every query and image, with classes of equal frequency.

    It is the entropy of the classes, weighted as the loss is.

    Args:
        segments: mean number in an image; of more than there are queries, the others are unmatched.
        num_queries: Q.
        num_labels: K.
        no_object_weight: of the class "no object" in the loss; the others have 1.
    """
    objects = min(segments, num_queries)
    nothing = no_object_weight * (num_queries - objects)
    total = objects + nothing
    shares = [(objects / total, num_labels), (nothing / total, 1)] if total else []
    return math.fsum(-share * math.log(share / classes) for share, classes in shares if share > 0)


# ---------------------------------------------------------------------------------------------------------------------
# Reading a model
# ---------------------------------------------------------------------------------------------------------------------


def collect_facts(
    model: nn.Module,
    outputs: Any = None,  # noqa: ANN401 - of the model
    class_labels: Sequence[Tensor] | None = None,
) -> dict[str, Any]:
    """Read what a model knows of its last step; it waits for the device, so call it at logging steps alone.

    Args:
        model: without wrappers. What its criterion and parts do not have is left out: `nonfinite_steps`, `surplus_segments` and
            `last_match_stability` of the criterion, `last_blocked_share` of any part.
        outputs: of the last forward pass.
        class_labels: of the last batch.
    """
    criterion = getattr(model, "criterion", None)
    facts: dict[str, Any] = {
        "nonfinite_steps": getattr(criterion, "nonfinite_steps", None),
        "surplus_segments": getattr(criterion, "surplus_segments", None),
        "no_object_weight": getattr(criterion, "no_object_weight", None),
        "label_weight": getattr(getattr(criterion, "weights", None), "label", None),
        "num_labels": getattr(criterion, "num_labels", None),
        "blocked_share": mean_of([getattr(part, "last_blocked_share", None) for part in model.modules()]),
    }
    stability = getattr(criterion, "last_match_stability", None)
    if stability is not None:
        facts["match_stability"] = [float(share) for share in stability]
    if outputs is not None:
        facts["object_share"] = float(object_share(outputs.class_queries_logits))
        facts["num_queries"] = outputs.class_queries_logits.shape[1]
    if class_labels:
        facts["segments_per_image"] = sum(map(len, class_labels)) / len(class_labels)
    return {name: value for name, value in facts.items() if value is not None}


@torch.no_grad()
def object_share(class_logits: Tensor) -> Tensor:
    """Share of the queries whose most probable class is an object.

    Args:
        class_logits: (B, Q, K + 1), the last class is "no object".

    Returns:
        float32, a scalar on the same device.
    """
    return (class_logits.argmax(dim=-1) != class_logits.shape[-1] - 1).float().mean()


def mean_of(values: Sequence[Any]) -> float | None:
    """Mean of numbers and tensors, all of their numbers alike; `None` if there are none."""
    known = [number for value in values if value is not None for number in torch.as_tensor(value).flatten().tolist()]
    return math.fsum(known) / len(known) if known else None


def announce(step: int, sentences: Sequence[str]) -> None:
    """Say alarms above the progress bar."""
    for sentence in sentences:
        tell(f"Alarm after step {step}: {sentence}")
