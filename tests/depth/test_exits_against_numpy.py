"""Whole early-exit generations against an independent implementation in numpy, float64.

One sequence at a time, one token at a time, plain loops over layers and over the slots that may be read: nothing is
shared with the library but the weights.
"""

import numpy as np
import pytest

from dyninf import Plan
from dyninf.depth import (
    Confidence,
    DecayingThreshold,
    DepthDecay,
    ExitAt,
    Patience,
    Saturation,
    SkipLayers,
    at_layers,
    every,
    first_of,
)

L, NEW = 6, 7
LENGTHS = np.array([7, 4, 5])


class NumpyDecoder:
    """A transformer with one cache entry per (layer, position), ``None`` where nothing was written."""

    def __init__(self, model):
        def wide(param):
            return np.asarray(param[...], np.float64)

        names = ("norm_attn", "wqkv", "wo", "norm_mlp", "w_gate_up", "w_down")
        self.layers = [{name: wide(getattr(layer, name)) for name in names} for layer in model.layers]
        self.embedding, self.head, self.norm = wide(model.embedding), wide(model.unembedding), wide(model.norm_final)
        self.eps, self.theta = model.config.norm_eps, model.config.rope_theta
        self.cache = [{} for _ in self.layers]

    def rms(self, x, scale):
        return x / np.sqrt((x * x).mean() + self.eps) * scale

    def logits(self, x):
        return self.rms(x, self.norm) @ self.head

    def rotate(self, x, position):
        half = len(x) // 2
        angle = position * self.theta ** (-np.arange(half) / half)
        first, second = x[:half], x[half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin])

    def store(self, index, x, position):
        """Write what the layer would write for this state."""
        layer = self.layers[index]
        kv = np.einsum("d,dkmh->kmh", self.rms(x, layer["norm_attn"]), layer["wqkv"][:, :, -2:])
        keys = np.stack([self.rotate(head, position) for head in kv[:, 0]])
        self.cache[index][position] = (keys, kv[:, 1])

    def run(self, index, x, position):
        layer = self.layers[index]
        self.store(index, x, position)
        queries = np.einsum("d,dkmh->kmh", self.rms(x, layer["norm_attn"]), layer["wqkv"][:, :, :-2])
        entries = list(self.cache[index].values())
        keys, values = np.stack([k for k, _ in entries]), np.stack([v for _, v in entries])
        heads = []
        for kv_head, group in enumerate(queries):
            for query in group:
                query = self.rotate(query, position)
                scores = keys[:, kv_head] @ query / np.sqrt(len(query))
                weights = np.exp(scores - scores.max())
                heads.append(weights / weights.sum() @ values[:, kv_head])
        x = x + np.einsum("nh,nhd->d", np.stack(heads), layer["wo"])
        gate, up = np.einsum("d,dcf->cf", self.rms(x, layer["norm_mlp"]), layer["w_gate_up"])
        return x + (gate / (1 + np.exp(-gate)) * up) @ layer["w_down"]


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def confident(measure, threshold):
    """A rule in numpy: whether to exit, from the logits, the last two states, the index of the token and a memory."""

    def rule(logits, x, prev, step, memory):
        if measure == "saturation":
            return x @ prev / np.linalg.norm(x) / np.linalg.norm(prev) > threshold
        probs = softmax(logits)
        top = np.sort(probs)[::-1]
        value = {
            "max_prob": top[0],
            "margin": top[0] - top[1],
            "entropy": 1 + (probs * np.log(probs + 1e-300)).sum() / np.log(len(probs)),
        }[measure]
        return value > threshold

    return rule


def calm(threshold, temperature, length):
    def rule(logits, x, prev, step, memory):
        return softmax(logits).max() > 0.9 * threshold + 0.1 * threshold * np.exp(-temperature * step / length)

    return rule


def patient(patience):
    def rule(logits, x, prev, step, memory):
        token = int(np.argmax(logits))
        memory["count"] = memory["count"] + 1 if memory.get("token") == token else 0
        memory["token"] = token
        return memory["count"] >= patience

    return rule


def either(*rules):
    def rule(logits, x, prev, step, memory):
        answers = [one(logits, x, prev, step, memory) for one in rules]
        return any(answers)

    return rule


def decode(model, prompt, rule, decisions, skipped, fill):
    """Tokens, logits and layers needed of one sequence, greedily."""
    decoder = NumpyDecoder(model)
    tokens, logits, needed, position = [], [], [], 0
    feed = list(prompt)
    while len(tokens) < NEW:
        step = position - len(prompt)
        x = prev = decoder.embedding[feed[position]]
        ran, memory, exited = 0, {}, False
        for index in range(L):
            governed = step >= 0
            if governed and not exited and index in decisions:
                exited = rule(decoder.logits(x), x, prev, step, memory)
            if exited and fill == "propagate":
                decoder.store(index, x, position)
            if exited or index in skipped(step):
                continue
            x, prev, ran = decoder.run(index, x, position), x, ran + 1
        position += 1
        if step >= 0:
            needed.append(ran)
        if step >= -1:
            logits.append(decoder.logits(x))
            tokens.append(int(np.argmax(logits[-1])))
            feed.append(tokens[-1])
    return tokens, logits, needed


def nothing(step):
    return ()


def never(*_):
    return False


ALL = tuple(range(1, L))
# Their parts stand in cases beside them, "saturation" in tests/depth/test_exits.py by hand: in slow runs.
ALIKE = ("saturation", "dense", "max_prob", "margin", "entropy", "patience_every_2", "first_of", "exit_at")
CASES = {
    "dense": (Plan(), never, (), nothing),
    "max_prob": (Plan(depth=Confidence(threshold=0.9)), confident("max_prob", 0.9), ALL, nothing),
    "margin": (
        Plan(depth=every(Confidence(threshold=0.8, measure="margin"), step=2)),
        confident("margin", 0.8),
        (2, 4),
        nothing,
    ),
    "entropy": (
        Plan(depth=at_layers(Confidence(threshold=0.85, measure="entropy"), layers=(1, 4))),
        confident("entropy", 0.85),
        (1, 4),
        nothing,
    ),
    "saturation": (Plan(depth=Saturation(threshold=0.9)), confident("saturation", 0.9), ALL, nothing),
    "patience": (Plan(depth=Patience(patience=2)), patient(2), ALL, nothing),
    "patience_every_2": (Plan(depth=every(Patience(patience=1), step=2)), patient(1), (2, 4), nothing),
    "calm": (
        Plan(depth=DecayingThreshold(policy=Confidence(threshold=0.97), temperature=4.0, length=8.0)),
        calm(0.97, 4.0, 8.0),
        ALL,
        nothing,
    ),
    "first_of": (
        Plan(depth=first_of(Confidence(threshold=0.95), Patience(patience=2))),
        either(confident("max_prob", 0.95), patient(2)),
        ALL,
        nothing,
    ),
    "capped": (
        Plan(depth=first_of(Confidence(threshold=0.95), ExitAt(layer=4))),
        confident("max_prob", 0.95),
        ALL,
        lambda step: (4, 5),
    ),
    "masked": (Plan(depth=Confidence(threshold=0.9), fill="mask"), confident("max_prob", 0.9), ALL, nothing),
    "exit_at": (Plan(depth=ExitAt(layer=4)), never, (), lambda step: (4, 5)),
    "skip_after_prompt": (
        Plan(depth=SkipLayers(layers=(1, 3), prompt=False)),
        never,
        (),
        lambda step: (1, 3) if step >= 0 else (),
    ),
    # 6 * 0.8 ** i = 6, 4.8, 3.84, 3.07, 2.46, ... layers, never fewer than two.
    "decay": (
        Plan(depth=DepthDecay(kind="power", alpha=0.8, flex_start=1, tail=1)),
        never,
        (),
        lambda step: range(1, 1 + min(4, 6 - int(6 * 0.8 ** max(step, 0)))),
    ),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in CASES])
def test_tokens_logits_and_depths_are_those_of_numpy(roll, name):
    plan, rule, decisions, skipped = CASES[name]
    prompts = np.random.default_rng(0).integers(0, 61, (3, 7))
    got = roll(plan, prompts, LENGTHS)
    depths = set()
    for row, length in enumerate(LENGTHS):
        tokens, logits, needed = decode(roll.model, prompts[row, :length], rule, decisions, skipped, plan.fill)
        assert got.tokens[row].tolist() == tokens, f"row {row}"
        assert got.stats.needed[:, row].tolist() == needed, f"row {row}"
        np.testing.assert_allclose(got.logits[row], logits, rtol=1e-3, atol=1e-3)  # float32, 6 layers, logits up to 30
        depths |= set(needed)
    assert len(depths) > 1 or name in ("dense", "exit_at", "skip_after_prompt"), "the case exits nowhere"
