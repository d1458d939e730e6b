"""The range of every number that a user gives to sampling: stated once, for the command line, the config and Python.

The ranges are wide: nobody needs what lies outside, and everything inside gives finite images on the bases that we know.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmdit_lora.errors import InputError, clip


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; NaN and the infinities are in none.

    Args:
        above, below: `low`, `high` itself is outside. whole: integers only.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool | str | bytes):
            return False
        if self.whole and not isinstance(value, int):
            # NumPy's integers and torch's scalars are no int; what has an exact integer value may stand for one.
            index = getattr(value, "__index__", None)
            if index is None:
                return False
            value = index()
        try:
            number = value if isinstance(value, int) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            return False
        low = self.low < number if self.above else self.low <= number
        return low and (number < self.high if self.below else number <= self.high)

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        low, high = f"{self.low:,.15g}", f"{self.high:,.15g}"
        if self.above and self.below:
            return f"{kind} between {low} and {high}"
        if self.above:
            return f"{kind} above {low}, up to {high}"
        return f"{kind} from {low} to {'below ' if self.below else ''}{high}"

    def check(self, value: Any, location: str) -> Any:
        """`value`, which is in the range.

        Raises:
            InputError: it is not; `location` names the option, argument or key.
        """
        if value not in self:
            raise InputError(f"is {clip(repr(value), 60)}", location=location, hint=f"give {self}")
        return value

    def parse(self, text: str) -> Any:
        """A number from a command line: the `type` of an argument of argparse.

        Raises:
            ArgumentTypeError: it is no number, or out of the range.
        """
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            value = None
        if value not in self:
            raise ArgumentTypeError(f"is {clip(text, 60)}; give {self}")
        return value


ADAPTER_WEIGHT = Range(-100, 100)
LAYOUT_SCALE = Range(-100, 100)
GUIDANCE = Range(0, 1000)
SHARE = Range(0, 1)
PART = Range(0, 1, above=True, below=True)  # a share that leaves something on both sides
STEPS = Range(1, 10_000, whole=True)
SIDE = Range(1, 16_384, whole=True)
BATCH = Range(1, 65_536, whole=True)
COUNT = Range(1, 10**9, whole=True)
# An entry of a weight is far below 100; an adapter's change of more than this makes images of nothing but overflow.
MAX_UPDATE = 1e4
SEED = Range(0, 2**32 - 1, whole=True)  # NumPy takes no larger one

# Arguments of the pipelines' calls, ours and diffusers'; a number that is not here must be finite.
OF_ARGUMENT = {
    "layout_scale": LAYOUT_SCALE,
    "scale": ADAPTER_WEIGHT,  # of all adapters, in `joint_attention_kwargs`
    "num_inference_steps": STEPS,
    "num_images_per_prompt": BATCH,
    "guidance_scale": GUIDANCE,
    "true_cfg_scale": GUIDANCE,
    "skip_layer_guidance_scale": GUIDANCE,
    "strength": SHARE,
    "height": SIDE,
    "width": SIDE,
    "sigmas": SHARE,
    "max_sequence_length": Range(1, 65_536, whole=True),
}
FINITE = Range(-1e30, 1e30)
_LISTS = {"sigmas"}
_NEVER_NONE = {"layout_scale", "scale", "num_images_per_prompt"}  # None stands for the base's own in all others


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Every number among the arguments of a call, also in lists.

    Raises:
        InputError: one is NaN, infinite or outside its range, or no number; it names the argument.
    """
    for name, value in arguments.items():
        within = OF_ARGUMENT.get(name)
        if within is None:
            for number in value if isinstance(value, list | tuple) else [value]:
                if isinstance(number, float):
                    FINITE.check(number, name)
        elif value is None and name not in _NEVER_NONE:
            continue
        elif name not in _LISTS:
            within.check(value, name)
        elif not hasattr(value, "__len__") or isinstance(value, str | bytes):
            raise InputError(f"is {clip(repr(value), 60)}", location=name, hint="give a list of numbers")
        else:
            for number in value:
                within.check(number, name)


def check_window(window: Any, location: str = "layout_window") -> None:
    """Part of the sampling steps where the layout acts.

    Raises:
        InputError: it is not two numbers with 0 <= start < end <= 1.
    """
    if not isinstance(window, list | tuple):
        raise InputError(f"is {clip(repr(window), 60)}", location=location, hint="give 0 <= start < end <= 1")
    if len(window) != 2 or any(side not in SHARE for side in window) or window[0] >= window[1]:
        raise InputError(
            f"is {clip(' '.join(map(str, window)), 60)}", location=location, hint="give 0 <= start < end <= 1"
        )


def check_adapter_weights(weights: Any) -> None:
    """The weights of `set_adapters`: a number, None, a dict of numbers by block, or a list of these.

    Raises:
        InputError: one is no number in `ADAPTER_WEIGHT`.
    """
    if isinstance(weights, Mapping):
        weights = list(weights.values())
    if isinstance(weights, list | tuple):
        for weight in weights:
            check_adapter_weights(weight)
    elif weights is not None:
        ADAPTER_WEIGHT.check(weights, "the weight of an adapter")
