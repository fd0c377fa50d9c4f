"""The TPUs that kernels are compiled for, and which of them compile what by default."""

import pytest

TPUS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def in_turn(cases):
    """Every case for every TPU: by default the first few cases for one TPU each, all of them different; others slow."""
    return [
        pytest.param(
            case,
            tpu,
            id=f"{number}-{tpu}",
            marks=[pytest.mark.slow] * (turn != number),
        )
        for number, case in enumerate(cases)
        for turn, tpu in enumerate(TPUS)
    ]
