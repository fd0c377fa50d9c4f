"""Drop tokens of a prompt on the way up (Fu et al. 2024, "LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM
Inference").

What a layer pays attention to from the last token of a prompt, averaged over its heads, says which tokens the first new
token depends on. Before some layers the tokens with the least of it are dropped: they run no layer above, and leave no
keys there. Tokens that stay keep their positions.

Differences from the paper:

- There the state in which a token was dropped is kept, every decode step chooses anew among all tokens, and one that is
  chosen then runs the layers that it lacks, once. Here ``revive`` of them at most return in a step, those of the
  highest worth (:mod:`dyninf.revival`), and what is chosen are tokens of the prompt: decoded tokens run every layer and
  are always read.
- Without revival (``revive=0``) dropped tokens do not return, and decoding chooses nothing: it reads, in each layer,
  every token that the prompt left there. A text that turns to a part of the prompt which its end did not look at then
  reads the lower layers' keys of it alone.
- What a step does not choose is hidden from it by a mask: decoding reads no fewer bytes for it.
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


@pytree(static=("layers", "budgets", "revive"))
class LazyLLM(SparsityPolicy):
    """Keep the tokens that the last token of a prompt attends to most, fewer from stage to stage.

    Layers above a stage cost what prompts of ``budget`` tokens cost. Deciding costs ``2 T N H`` FLOPs a stage and a
    gather of the states. Exact for prompts of no more tokens than the smallest budget. Revival costs what
    ``1 + revive`` tokens a sequence cost in the layers above the first stage, at every decode step, and needs
    ``depth=RunAll()``.

    Args:
        layers: before these layers tokens are dropped, ascending (1 to the number of layers less 1).
        budgets: tokens of a prompt that are left from each of them on, none larger than the one before (at least 1).
            With revival, also how many of them a decode step reads there at most.
        revive: dropped tokens that return in a decode step, at most, at each of these layers (0 for no revival).
    """

    layers: tuple[int, ...]
    budgets: tuple[int, ...]
    revive: int = 0

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
        require_integer("revive of LazyLLM", self.revive, 0, float("inf"))
        if list(self.layers) != sorted(set(self.layers)) or list(self.budgets) != sorted(self.budgets, reverse=True):
            raise ValueError(
                f"expected ascending layers and budgets that do not grow for LazyLLM, got {self.layers} and "
                f"{self.budgets}"
            )
