"""Larger caches in lower layers, smaller ones above (Cai et al. 2024, "PyramidKV: Dynamic KV Cache Compression based on
Pyramidal Information Funneling").

Lower layers spread their attention over many tokens, upper ones gather it in few. Scores are those of
:class:`dyninf.kv.SnapKV`; only the budgets differ, by the same step from layer to layer::

    TopK(scorer=SnapKV(), budget=pyramid_budgets(512, num_layers, recent=32), sinks=0, recent=32)

The mean is met up to the rounding of the step. The paper's code lowers the lowest layer's budget where the prompt is
shorter than that, and gives every layer the mean where the prompt is shorter than twice the mean; budgets here do not
depend on the prompt, and a layer that is larger than the text is not full.
"""


def pyramid_budgets(mean: int, num_layers: int, *, recent: int, beta: int = 20) -> tuple[int, ...]:
    """Return a budget (tokens) for each layer, descending.

    Args:
        mean: tokens of a layer on average, the recent ones included.
        recent: newest tokens, which every layer keeps.
        beta: the top layer chooses ``1 / beta`` of what it would in a cache of the mean size (at least 1).

    Raises:
        ValueError: if the mean leaves no token to choose, or there are fewer than two layers.
    """
    chosen = mean - recent
    if chosen < 1 or recent < 1 or beta < 1 or num_layers < 2:
        raise ValueError(
            f"expected a mean budget above recent >= 1, beta of at least 1 and two layers, got {mean=}, {recent=}, "
            f"{beta=}, {num_layers=}"
        )
    least = chosen // beta
    most = 2 * chosen - least
    step = (most - least) // (num_layers - 1)
    return tuple(most - layer * step + recent for layer in range(num_layers))
