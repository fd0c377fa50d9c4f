"""Plans that ``dyninf calibrate`` found, read back from its files."""

import json
import math
from pathlib import Path

import dyninf
from dyninf.depth import Confidence, Saturation
from dyninf.training.calibrate import CalibratedExits

RULES = {
    "max_prob": Confidence(threshold=1.0),
    "margin": Confidence(threshold=1.0, measure="margin"),
    "entropy": Confidence(threshold=1.0, measure="entropy"),
    "saturation": Saturation(threshold=1.0),
}


def read_calibrated(file: str | Path) -> dyninf.Plan:
    """Return the plan that ``dyninf calibrate --json`` wrote.

    Raises:
        ValueError: if the file holds something else.
    """
    try:
        written = json.loads(Path(file).read_text(encoding="utf-8"))
        exits = CalibratedExits(
            layers=tuple(written["layers"]),
            thresholds=tuple(math.inf if value is None else float(value) for value in written["thresholds"]),
            peak=written["peak"],
            num_layers=written["num_layers"],
            shares=tuple(written["shares"]),
            mean_layers=written["calibrated_layers"],
        )
        return dyninf.Plan(depth=exits.policy(RULES[written["rule"]]), fill=written["fill"])
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"expected a file of 'dyninf calibrate --json', got {str(file)!r}: {reason}") from None
