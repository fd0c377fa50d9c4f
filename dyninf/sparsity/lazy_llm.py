"""Drop tokens of a prompt on the way up (Fu et al. 2024, "LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM
Inference").

What a layer pays attention to from the last token of a prompt, averaged over its heads, says which tokens the first new
token depends on. Before some layers the tokens with the least of it are dropped: they run no layer above, and leave no
keys there. Tokens that stay keep their positions.

Differences from the paper:

- Dropped tokens do not return. There the state in which a token was dropped is kept, every decode step chooses anew
  among all tokens, and one that is chosen then runs the layers that it lacks, once. Here decoded tokens read, in each
  layer, every token that the prompt left there: a text that turns to a part of the prompt which its end did not look
  at reads the lower layers' keys of it alone, and decoding reads as much as there is instead of a choice of it.
- Budgets are tokens, where the paper keeps shares of a prompt (its figure: seven tenths after 30, 60 and 90 % of the
  layers). A prompt that is shorter than a budget is not touched.
- Of equal tokens the first are kept; the last token of a prompt always is.
- The slots of dropped tokens exist and are skipped: nothing of the cache's memory is saved.
"""

import jax
import jax.numpy as jnp

from dyninf.depth.base import require_integer
from dyninf.pytree import pytree
from dyninf.sparsity.base import PromptObs, SparsityPolicy
from dyninf.sparsity.probes import block_attention, last_queries


@pytree(static=("layers", "budgets"))
class LazyLLM(SparsityPolicy):
    """Keep the tokens that the last token of a prompt attends to most, fewer from stage to stage.

    Layers above a stage cost what prompts of ``budget`` tokens cost. Deciding costs ``2 T N H`` FLOPs a stage and a
    gather of the states. Exact for prompts of no more tokens than the smallest budget.

    Args:
        layers: before these layers tokens are dropped, ascending (1 to the number of layers less 1).
        budgets: tokens of a prompt that are left from each of them on, none larger than the one before (at least 1).
    """

    layers: tuple[int, ...]
    budgets: tuple[int, ...]

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """Layers and how many tokens are left from there on."""
        return tuple(zip(self.layers, self.budgets, strict=True))

    def worth(self, obs: PromptObs) -> jax.Array:
        """Return what the last token pays to each token, a mean over the heads ``[B, T]``, float32."""
        paid_BN1T, _ = block_attention(obs, last_queries(obs, 1), jnp.ones((1, 1, 1, 1)), 1)
        return jnp.mean(paid_BN1T[:, :, 0], axis=1)

    def validate(self, num_layers: int, num_heads: int) -> None:
        """Raise ValueError if layers and budgets do not fit each other or the model."""
        if len(self.layers) != len(self.budgets):
            raise ValueError(f"expected a budget for each layer of LazyLLM, got {self.layers} and {self.budgets}")
        for layer in self.layers:
            require_integer("a layer of LazyLLM", layer, 1, num_layers - 1)
        for budget in self.budgets:
            require_integer("a budget of LazyLLM", budget, 1, float("inf"))
        if list(self.layers) != sorted(set(self.layers)) or list(self.budgets) != sorted(self.budgets, reverse=True):
            raise ValueError(
                f"expected ascending layers and budgets that do not grow for LazyLLM, got {self.layers} and "
                f"{self.budgets}"
            )
