"""Shapes of known models against the parameter counts that their publishers state."""

import jax
import pytest

from dyninf.configs.models import shapes
from dyninf.models.parameters import abstract_model


@pytest.mark.parametrize(
    ("name", "count"),
    # As the safetensors headers of the published checkpoints add up.
    [
        ("llama3.2-1b", 1_235_814_400),
        ("llama3-8b", 8_030_261_248),
        ("llama3.1-8b", 8_030_261_248),
        ("llama3.1-70b", 70_553_706_496),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_parameters_are_counted_as_published(name, count):
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_model(shapes()[name]))) == count
