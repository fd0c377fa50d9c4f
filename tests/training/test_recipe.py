"""What a recipe refuses, by name."""

import math

import pytest

from dyninf.training.recipe import Recipe

SIZES = {"steps": 10, "batch_size": 2, "length": 8, "warmup": 3}


def test_edges_are_accepted():
    Recipe(**SIZES | {"warmup": 9, "dropout": 1, "e_scale": 0, "weight_decay": 0, "beta2": 0, "seed": 2**32 - 1})
    Recipe(**SIZES | {"steps": 1, "warmup": 0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("batch_size", -1),
        ("length", 0),
        ("chunk", 0),
        ("exit_period", 0),
        ("rank", 0),
        ("phase", 0),
        ("price", -0.1),
        ("price", math.nan),
        ("kind", "calm"),
        ("eval_every", 0),
        ("eval_batches", 0),
        ("save_every", 0),
        ("warmup", 10),
        ("warmup", -1),
        ("warmup", 0.5),
        ("learning_rate", 0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("beta2", 1),
        ("clip", 0),
        ("clip", math.nan),
        ("dropout", 1.1),
        ("dropout", math.nan),
        ("e_scale", -1),
        ("e_scale", math.inf),
        ("seed", -1),
        ("seed", 2**32),
        ("exit_curriculum", "spiral"),
        ("compute_dtype", "float16"),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^expected {name} .* got {value!r}"):
        Recipe(**SIZES | {name: value})
