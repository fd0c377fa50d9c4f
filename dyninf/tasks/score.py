"""Answer the questions of samples with a model under a plan, and score the answers.

The question is either part of the prompt (``query="with"``), or fed token by token after the context was prefilled
(``query="after"``): a cache that a plan compresses at prefill is then compressed before the question is known.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.cache import CacheSpec
from dyninf.forward import forward
from dyninf.generate import decode_step, generate, prefill
from dyninf.model import CausalLM, max_length, vocab_size
from dyninf.plan import Plan, check
from dyninf.sampling import Greedy
from dyninf.tasks.sample import Answer, Sample, check_counts

SLOT_MULTIPLE = 8  # what kernels that decode by index read at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleResult:
    """What a model answered.

    Attributes:
        score: 0 to 1, by the sample's metric.
        exact: whether the answer begins with exactly the sample's target tokens.
        depths: of the needles that hold the answers.
        generated: tokens of the answer.
        text: the answer decoded; empty for tasks made of tokens.
    """

    task: str
    score: float
    exact: bool
    depths: tuple[float, ...]
    generated: tuple[int, ...]
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The results of all samples, in their order."""

    results: tuple[SampleResult, ...]

    @property
    def score(self) -> float:
        """Mean score."""
        return float(np.mean([result.score for result in self.results]))

    @property
    def exact(self) -> float:
        """Share of answers that are the target token for token."""
        return float(np.mean([result.exact for result in self.results]))

    def by_depth(self, num_bins: int = 5) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean score of the samples in each bin of mean needle depth, NaN where empty, and their number."""
        check_counts(num_bins=num_bins)
        placed = [result for result in self.results if result.depths]
        depths = np.asarray([np.mean(result.depths) for result in placed])
        bins = np.minimum(depths * num_bins, num_bins - 1).astype(int)
        counts = np.bincount(bins, minlength=num_bins)
        sums = np.bincount(bins, weights=[result.score for result in placed], minlength=num_bins)
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan), counts


def holds(answer: Answer, generated: Sequence[int], text: str = "") -> bool:
    """Return whether a generation contains an answer: text whatever its case, or a run of ids."""
    if isinstance(answer, str):
        return answer.lower() in text.lower()
    width = len(answer)
    return any(tuple(generated[start : start + width]) == answer for start in range(len(generated) - width + 1))


def score_answers(sample: Sample, generated: Sequence[int], text: str = "") -> float:
    """Return the score of a generation: ``all`` is the share of the answers in it, ``part`` 1 if any is."""
    found = [holds(answer, generated, text) for answer in sample.answers]
    return float(any(found)) if sample.metric == "part" else float(np.mean(found))


def evaluate_task(
    model: CausalLM,
    plan: Plan | None,
    samples: Sequence[Sample],
    *,
    tokenizer: Any = None,
    query: Literal["with", "after"] = "with",
    batch_size: int = 8,
    stop: Sequence[int] = (),
) -> TaskResult:
    """Generate an answer to every sample, greedily whatever the plan's sampler, and score it.

    With ``query="after"`` the tokens of the question are decoded tokens: they cost a decode step each, and a depth
    policy decides for them as for generated ones. Both ways give the same answers under ``Plan()``.

    Args:
        plan: ``None`` is the dense model.
        tokenizer: decodes answers that are text; not needed for tasks made of tokens.
        batch_size: sequences that are answered at once.
        stop: ids that end an answer.

    Raises:
        ValueError: if there are no samples, one is longer than the model's context or has tokens that the model does
            not know, or the plan does not fit the model.
    """
    plan = Plan() if plan is None else plan
    check(plan, model)
    plan = dataclasses.replace(plan, sampler=Greedy())
    if query not in ("with", "after"):
        raise ValueError(f"expected query 'with' or 'after', got {query!r}")
    if tokenizer is None and any(isinstance(answer, str) for sample in samples for answer in sample.answers):
        raise ValueError("expected a tokenizer, because answers are text, got None; pass the one of the samples")
    _check_samples(model, samples, batch_size)
    answers: dict[int, np.ndarray] = {}
    for group in _groups(samples, max_length(model)):
        found = _answer(model, plan, [samples[i] for i in group], query, batch_size, stop)
        answers |= dict(zip(group, found, strict=True))
    return TaskResult(results=tuple(_result(s, answers[i], tokenizer, stop) for i, s in enumerate(samples)))


def forced_accuracy(
    model: CausalLM, plan: Plan | None, samples: Sequence[Sample], *, batch_size: int = 8
) -> tuple[np.ndarray, ...]:
    """Return, for each sample, which of its target tokens the model finds most probable when fed those before.

    By teacher forcing in one pass, the context and the question counting as prompt.

    Raises:
        ValueError: as :func:`evaluate_task`.
    """
    plan = Plan() if plan is None else plan
    check(plan, model)
    _check_samples(model, samples, batch_size)
    texts = [sample.prompt_ids + sample.target_ids for sample in samples]
    width, answer = max(map(len, texts)), max(len(sample.target_ids) for sample in samples)
    right: list[np.ndarray] = []
    for batch in _batches(list(zip(samples, texts, strict=True)), batch_size):
        tokens, lengths = _pad([text for _, text in batch], width)
        prompts = np.asarray([len(sample.prompt_ids) for sample, _ in batch], np.int32)
        # Beyond a short target the last position is read again, and not looked at.
        positions = np.minimum(prompts[:, None] - 1 + np.arange(answer), lengths[:, None] - 2)
        choices = np.asarray(_forced_choices(model, plan, tokens, lengths, prompts, positions))
        targets = [np.asarray(sample.target_ids) for sample, _ in batch]
        right += [row[: len(target)] == target for row, target in zip(choices, targets, strict=True)]
    return tuple(right[: len(samples)])


def _answer(
    model: CausalLM, plan: Plan, samples: Sequence[Sample], query: str, batch_size: int, stop: Sequence[int]
) -> list[np.ndarray]:
    """Return the generated tokens of every sample, as many as the longest answer may take."""
    num_new = max(sample.max_new_tokens for sample in samples)
    widths = [max(len(ids) for ids in part) for part in _parts(samples, query)]
    capacity = -(-(sum(widths) + num_new) // SLOT_MULTIPLE) * SLOT_MULTIPLE
    answers: list[np.ndarray] = []
    for batch in _batches(samples, batch_size):
        arrays = [_pad(part, width) for part, width in zip(_parts(batch, query), widths, strict=True)]
        if query == "with":
            tokens, lengths = arrays[0]
            out = generate(model, tokens, plan, lengths=lengths, max_new_tokens=num_new, stop=stop).tokens
        else:
            spec = CacheSpec(capacity=capacity)
            out = _answer_after(model, plan, *arrays[0], *arrays[1], spec=spec, num_new=num_new)
        answers += list(np.asarray(out))
    return answers[: len(samples)]


def _check_samples(model: CausalLM, samples: Sequence[Sample], batch_size: int) -> None:
    """Refuse samples that the model cannot answer."""
    check_counts(batch_size=batch_size)
    if not samples:
        raise ValueError("expected at least one sample, got none")
    limit = max_length(model)
    for index, sample in enumerate(samples):
        if not (sample.context_ids and sample.question_ids and sample.target_ids and sample.answers):
            raise ValueError(f"expected a context, a question and answers, got an empty one in sample {index}")
        if limit is not None and sample.length > limit:
            raise ValueError(
                f"expected samples that fit the model's context of {limit} tokens, got {sample.length} in sample "
                f"{index} of {sample.task!r}, room for the answer included; make them with length={limit}"
            )
    known = vocab_size(model)
    largest = max(max(sample.prompt_ids + sample.target_ids) for sample in samples)
    if largest >= known:
        raise ValueError(
            f"expected token ids below {known}, which this model knows, got {largest}; make the samples with the "
            "model's own tokenizer, or a smaller Vocabulary"
        )


def _groups(samples: Sequence[Sample], limit: int | None) -> list[list[int]]:
    """Return the indices of samples that can run together: all, unless the longest prompt and answer do not fit.

    Samples that fit the context one by one may not with the longest answer of all; then each group has one length of
    answer, and a program of its own.
    """
    rooms = [sample.max_new_tokens for sample in samples]
    if limit is None or max(len(sample.prompt_ids) for sample in samples) + max(rooms) <= limit:
        return [list(range(len(samples)))]
    return [[i for i, other in enumerate(rooms) if other == room] for room in sorted(set(rooms))]


def _parts(samples: Sequence[Sample], query: str) -> list[list[tuple[int, ...]]]:
    """Return what is prefilled and, with ``query="after"``, what is fed after it."""
    if query == "with":
        return [[sample.prompt_ids for sample in samples]]
    return [[sample.context_ids for sample in samples], [sample.question_ids for sample in samples]]


def _batches(items: Sequence[Any], size: int) -> list[list[Any]]:
    """Return batches of one size, so that one program serves all: the last one repeats its last item."""
    size = min(size, len(items))
    last = len(items) - 1
    return [[items[min(i, last)] for i in range(start, start + size)] for start in range(0, len(items), size)]


def _pad(rows: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.zeros((len(rows), width), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    return tokens, np.asarray([len(ids) for ids in rows], np.int32)


def _result(sample: Sample, answer: np.ndarray, tokenizer: Any, stop: Sequence[int]) -> SampleResult:
    generated: list[int] = []
    for token in answer[: sample.max_new_tokens].tolist():
        if token < 0 or token in stop:
            break
        generated.append(token)
    is_text = any(isinstance(entry, str) for entry in sample.answers)
    text = tokenizer.decode(generated) if is_text else ""
    return SampleResult(
        task=sample.task,
        score=score_answers(sample, generated, text),
        exact=tuple(generated[: len(sample.target_ids)]) == sample.target_ids,
        depths=sample.depths,
        generated=tuple(generated),
        text=text,
    )


@functools.partial(jax.jit, static_argnames=("spec", "num_new"))
def _answer_after(model, plan, context_BT, context_B, question_BQ, question_B, *, spec, num_new):
    """Prefill contexts, then decode: questions with forced tokens, answers with sampled ones. Returns ``[B, num_new]``.

    Each sequence begins its answer where its own question ends, and rests once it is complete.
    """
    _, state = prefill(model, context_BT, context_B, plan, spec, jax.random.key(0))
    width = question_BQ.shape[1]

    def step(state, index):
        forced_B = jnp.take(question_BQ, jnp.minimum(index, width - 1), axis=1)
        token, done = jnp.where(index < question_B, forced_B, state.token), index >= question_B + num_new - 1
        state = dataclasses.replace(state, token=token, done=done)
        state, _ = decode_step(model, state, plan)
        return state, state.token

    _, tokens_SB = jax.lax.scan(step, state, jnp.arange(width + num_new - 1))
    places_BA = question_B[:, None] - 1 + jnp.arange(num_new)[None]
    return jnp.take_along_axis(tokens_SB.T, places_BA, axis=1)


@jax.jit
def _forced_choices(model, plan, tokens_BT, lengths_B, prompts_B, positions_BA):
    states_BTD = forward(model, tokens_BT, plan, lengths=lengths_B, prompt_lengths=prompts_B).states
    states_BAD = jnp.take_along_axis(states_BTD, positions_BA[:, :, None], axis=1)
    return jnp.argmax(model.unembed(states_BAD), axis=-1)
