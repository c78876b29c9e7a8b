"""Checks: a measured deviation, the allowed one, and the tolerances that define parity."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# The tolerances that define parity with the recordings; each step allows what the steps before it cannot exclude.
PARAMETER_RELATIVE = 1e-4
PARAMETERS_OFF = 1e-3  # fraction of all values
WEIGHT_ABSOLUTE = 1e-5
WEIGHTS_OFF = 1e-3  # fraction of all elements
BLOCK_OFF = 0.05  # fraction of a block's output
BLOCK_ABSOLUTE = 1e-3  # where a block's output is not quantized: above float noise, below the effect of a flipped code
FLOOR_FACTOR = 3.0  # times the noise floor
TOP1_POINTS = 0.7
LOSS_RELATIVE = 1e-5
SEARCH_LOSS = 5e-4
SEARCH_NOISE = 2e-4  # the noise floor of a search's losses: losses closer than this can be ranked either way
FLOAT_LOGITS = 1e-4  # the float model has no steps that could flip


@dataclass(frozen=True)
class Check:
    """One comparison of a recorded quantity with ours.

    Attributes:
        group: The step that it belongs to.
        name: The quantity.
        measured: How far it is off.
        allowed: The largest `measured` that passes; None for a row that is reported but judged by its group's sum.
        unit: The unit of `measured`.
        largest: The largest deviation of an element.
        equal: The fraction of equal codes (for parameters: of values within the tolerance); None without codes.
        remark: Anything else that a reader should know.
        share: Whether measured and allowed are fractions.
    """

    group: str
    name: str
    measured: float
    allowed: float | None
    unit: str
    largest: float | None = None
    equal: float | None = None
    remark: str = ""
    share: bool = False

    @property
    def passed(self) -> bool:
        """Whether the deviation is allowed; NaN never is."""
        return self.allowed is None or self.measured <= self.allowed


@dataclass(frozen=True)
class Floor:
    """The noise floor of a reference: how 1 ulp of noise in the weights changes its own outputs, worst of 3 seeds.

    Attributes:
        reference: The reference.
        block_off: Fraction of the elements of block outputs that move.
        logits_mean: Mean absolute difference of logits.
    """

    reference: str
    block_off: float
    logits_mean: float


# How far the published code differs from itself between two machines: the share of elements of a block's output that
# differ, and the mean difference of logits.
_FLOORS = {
    "evolq_cfg_w4a8": Floor("evol-q", 0.014, 0.0057),
    "evolq_fq_w4a8": Floor("evol-q", 0.012, 0.0043),
    "evolq_fq_w8a8": Floor("evol-q", 0.048, 0.0069),
    "evolq_search_w4a8": Floor("evol-q", 0.0, 0.0043),
    "fqvit_w8a8_attn4": Floor("fq-vit", 0.120, 0.0441),
    "baseptq_cosine_w6a6": Floor("ptq4vit", 0.0, 0.0546),
    "ptq4vit_hessian_w6a6": Floor("ptq4vit", 0.884, 0.1497),
    "ptq4vit_l2_w6a6": Floor("ptq4vit", 0.0, 0.0),
    "repq_w4a4": Floor("repq-vit", 0.0, 0.0031),
    "erq_w4a4": Floor("erq", 0.309, 0.2194),
}
# The weights that the table was measured on (SHA-256 of that model.npz).
_MEASURED_ON = "ae411c1e17344d298bceb9e190258cf3ecba0d056f2608152cca9ca733855354"
# How many of 297 predictions may differ (step 4).
_PREDICTIONS = {"evol-q": 2, "fq-vit": 4, "ptq4vit": 4, "repq-vit": 2, "erq": 4}
_PREDICTIONS_OF = 297


@dataclass(frozen=True)
class Tolerances:
    """The deviations that one file may have, where they depend on the reference.

    Attributes:
        block_off: Fraction of a block's output.
        logits_mean: Mean absolute difference of logits; 0 where the reference's own reruns agreed (their disturbed
            weights round to the same codes), see `logits_checks`.
        predictions: Predictions that may differ, out of 297.
    """

    block_off: float
    logits_mean: float
    predictions: int

    def predictions_of(self, images: int) -> int:
        """Computes how many predictions may differ.

        Args:
            images: The number of test images.

        Returns:
            The number of predictions, in proportion, rounded up.
        """
        return math.ceil(self.predictions * images / _PREDICTIONS_OF)

    def top1_points_of(self, images: int) -> float:
        """Computes how far top-1 may be off; with few test images one image is more than 0.7 points.

        Args:
            images: The number of test images.

        Returns:
            Percentage points.
        """
        return max(TOP1_POINTS, 100.0 / images)


def find_tolerances(reference: str, stem: str, weights_sha256: str) -> Tolerances:
    """Finds the tolerances of a file: from its own row of the noise floor, else from the worst row of its reference.

    A search that is replayed from its recorded choices (PTQ4ViT's) has no floor at its blocks, because noise changes
    choices.

    Args:
        reference: The reference.
        stem: The file's name without its extension.
        weights_sha256: Digest of the file of weights; a row of the floor holds only for the weights it was measured on.

    Returns:
        The tolerances.
    """
    known = _FLOORS.get(stem) if weights_sha256 == _MEASURED_ON else None
    rows = [row for row in _FLOORS.values() if row.reference == reference] if known is None else [known]
    floor = FLOOR_FACTOR * max(row.block_off for row in rows)
    return Tolerances(
        block_off=BLOCK_OFF if reference == "ptq4vit" else min(1.0, max(BLOCK_OFF, floor)),
        logits_mean=FLOOR_FACTOR * max(row.logits_mean for row in rows),
        predictions=_PREDICTIONS[reference],
    )


def max_abs(difference: np.ndarray) -> float:
    """Computes the largest absolute value.

    Args:
        difference: Numbers of any shape.

    Returns:
        The largest magnitude; NaN if any element is, 0 for an empty array.
    """
    return float(np.max(np.abs(difference))) if difference.size else 0.0


def relative_deviation(ours: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    """Computes |ours - recorded| / |recorded|, element by element.

    Args:
        ours: Numbers.
        recorded: Numbers of the same shape.

    Returns:
        Float64 of that shape; 0 where both are equal, zeros included.
    """
    ours, recorded = np.asarray(ours, np.float64), np.asarray(recorded, np.float64)
    return np.where(ours == recorded, 0.0, np.abs(ours - recorded) / np.maximum(np.abs(recorded), 1e-12))


def exceeds(deviation: np.ndarray, tolerance: float) -> np.ndarray:
    """Finds the elements that deviate by more than the tolerance.

    Args:
        deviation: Signed or absolute deviations.
        tolerance: The largest magnitude that is within tolerance.

    Returns:
        Booleans of the same shape; True for NaN.
    """
    return ~(np.abs(deviation) <= tolerance)


def fraction(which: np.ndarray) -> float:
    """Computes the fraction of elements that are True.

    Args:
        which: Booleans of any shape.

    Returns:
        From 0 to 1; 0 for an empty array.
    """
    return float(np.mean(which)) if which.size else 0.0


def parameter_checks(
    group: str, arrays: Iterable[tuple[str, np.ndarray, np.ndarray]], allowed: float | None = PARAMETERS_OFF
) -> list[Check]:
    """Compares quantizer parameters (step 1): one row per array, and their sum as the verdict.

    Args:
        group: The rows' group.
        arrays: (name, ours, recorded) of each array.
        allowed: The fraction of all values that may be off; None leaves the sum without a verdict.

    Returns:
        The rows, and the row "all".
    """
    rows, deviations = [], []
    for name, ours, recorded in arrays:
        deviation = relative_deviation(ours, recorded)
        which = exceeds(deviation, PARAMETER_RELATIVE)
        remark = f"{int(which.sum())} of {which.size} off" if which.any() else ""
        share = fraction(which)
        rows.append(Check(group, name, share, None, "off", max_abs(deviation), 1 - share, remark))
        deviations.append(np.ravel(deviation))
    every = np.concatenate(deviations) if deviations else np.zeros(0)
    share = fraction(exceeds(every, PARAMETER_RELATIVE))
    unit = f"of {every.size} values off by more than {PARAMETER_RELATIVE:g} relative"
    return [*rows, Check(group, "all", share, allowed, unit, max_abs(every), 1 - share, share=True)]


@dataclass(frozen=True)
class Weight:
    """A weight of ours and the recorded one.

    Attributes:
        name: Its name in the report.
        ours: Our values.
        recorded: The recorded values, in the same layout.
        step: The step of a code, if it has codes.
        tolerance: The allowed absolute deviation.
    """

    name: str
    ours: np.ndarray
    recorded: np.ndarray
    step: np.ndarray | None = None
    tolerance: float = WEIGHT_ABSOLUTE


def weight_checks(group: str, weights: Iterable[Weight]) -> list[Check]:
    """Compares weights (step 2): one row per weight, and their sum as the verdict.

    Args:
        group: The rows' group.
        weights: The weights.

    Returns:
        The rows, and the row "all".
    """
    rows, deviations, which, same = [], [], [], []
    for weight in weights:
        deviation = weight.ours - weight.recorded
        wrong = exceeds(deviation, weight.tolerance)
        equal = None if weight.step is None else ~exceeds(deviation / weight.step, 0.5)
        codes = None if equal is None else fraction(equal)
        remark = "" if weight.tolerance == WEIGHT_ABSOLUTE else f"allowed {weight.tolerance:.2g}"
        rows.append(Check(group, weight.name, fraction(wrong), None, "off", max_abs(deviation), codes, remark))
        deviations.append(deviation.ravel())
        which.append(wrong.ravel())
        if equal is not None:
            same.append(equal.ravel())
    every = np.concatenate(deviations)
    share = fraction(np.concatenate(which))
    unit = f"of {every.size} elements off by more than {WEIGHT_ABSOLUTE:g}"
    equal_share = fraction(np.concatenate(same)) if same else None
    return [*rows, Check(group, "all", share, WEIGHTS_OFF, unit, max_abs(every), equal_share, share=True)]


def logits_checks(
    group: str,
    ours: np.ndarray,
    recorded: np.ndarray,
    limits: Tolerances,
    labels: np.ndarray | None = None,
    top1: float | None = None,
    equal: float | None = None,
) -> list[Check]:
    """Compares logits (step 4): mean difference, predictions, and top-1 if it is recorded.

    Against a noise floor of exactly 0 no mean is judged, since float rounding still flips a code in some image, which
    moves all logits of that image. All but BLOCK_OFF of the images must then agree as float logits do.

    Args:
        group: The rows' group.
        ours: Our logits [images, classes].
        recorded: The recorded logits, of the same shape.
        limits: The file's tolerances.
        labels: The images' labels [images]; None compares no top-1.
        top1: The recorded top-1, in percent; None compares no top-1.
        equal: The fraction of equal codes, for the report.

    Returns:
        The rows.
    """
    images = len(recorded)
    difference = ours - recorded
    disturbed = exceeds(np.max(np.abs(difference), -1), FLOAT_LOGITS)
    changed = float(np.sum(np.argmax(ours, -1) != np.argmax(recorded, -1)))
    checks = [
        Check(
            group,
            "mean difference",
            float(np.mean(np.abs(difference))),
            limits.logits_mean,
            "absolute",
            max_abs(difference),
            equal,
        ),
        Check(group, "predictions that differ", changed, limits.predictions_of(images), f"of {images} images"),
    ]
    if not limits.logits_mean:
        unit = f"of {images} images off by more than {FLOAT_LOGITS:g}"
        mean = f"mean difference {np.mean(np.abs(difference)):.2g}"
        checks[0] = Check(
            group, "images", fraction(disturbed), BLOCK_OFF, unit, max_abs(difference), equal, mean, share=True
        )
    if labels is not None and top1 is not None:
        right = float(np.mean(np.argmax(ours, -1) == labels)) * 100
        # The recorded percentage is a float32, so the comparison is in whole images.
        points = float(np.abs(np.round(right * images / 100) - np.round(float(top1) * images / 100))) * 100 / images
        remark = f"recorded {float(top1):.2f}%, ours {right:.2f}%"
        checks.append(Check(group, "top-1", points, limits.top1_points_of(images), "points", remark=remark))
    return checks
