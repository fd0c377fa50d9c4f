"""Record at which depths real tokens leave a model, for ``bench/depth.py --study batch``.

``python bench/record.py FILE`` runs the shipped model's held-out text under an exit plan, token by token as decoding
would, and writes the layers that each token of each sequence needed.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import dyninf
from dyninf.cli.common import add_model_options, load
from dyninf.cli.heldout import read_documents, windows_of
from dyninf.cli.plan_options import read_plan


def main() -> int:
    """Write the depths as one JSON object: ``depths [sequences, tokens]`` and where they come from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    add_model_options(parser)
    parser.add_argument("--plan", default="exit_capped")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each sequence, behind as many of prompt")
    arguments = parser.parse_args()
    loaded, length = load(arguments), 2 * arguments.tokens
    num_layers = len(loaded.model.layers)
    plan = read_plan(arguments.plan, [], num_layers)
    windows = windows_of(loaded, read_documents(loaded, None), length=length, max_tokens=length * arguments.sequences)
    prompts = jnp.full(arguments.sequences, arguments.tokens)
    run = jax.jit(lambda model, tokens_BT: dyninf.forward(model, tokens_BT, plan, prompt_lengths=prompts).needed)
    needed_BT = np.asarray(run(loaded.model, jnp.asarray(windows.inputs)))[:, arguments.tokens :]
    about = {
        "model": loaded.name,
        "plan": arguments.plan,
        "num_layers": num_layers,
        "mean": round(float(needed_BT.mean()), 3),
        "depths": needed_BT.tolist(),
    }
    arguments.file.write_text(json.dumps(about) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
