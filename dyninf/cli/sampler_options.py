"""How tokens are drawn, on the command line."""

import argparse
import dataclasses

import dyninf


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--temperature``, ``--top-k``, ``--top-p``, ``--min-p`` and ``--seed``."""
    parser.add_argument("--temperature", type=float, help="draw tokens; below 1 sharper, above 1 flatter, 0 greedy")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the most probable tokens that make up P")
    parser.add_argument("--min-p", type=float, metavar="P", help="draw tokens at least P times as probable as the best")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same tokens (default: 0)")


def with_sampler(plan: dyninf.Plan, arguments: argparse.Namespace) -> dyninf.Plan:
    """Return the plan with the sampler that the options ask for; its own where they ask for none.

    Raises:
        ValueError: for a temperature below 0.
    """
    filters = []
    if arguments.temperature is not None and not arguments.temperature >= 0:
        raise ValueError(f"expected --temperature of at least 0 (greedy), got {arguments.temperature}")
    if arguments.temperature:
        filters.append(dyninf.Temperature(temperature=arguments.temperature))
    if arguments.top_k is not None:
        filters.append(dyninf.TopK(k=arguments.top_k))
    if arguments.top_p is not None:
        filters.append(dyninf.TopP(p=arguments.top_p))
    if arguments.min_p is not None:
        filters.append(dyninf.MinP(p=arguments.min_p))
    if arguments.temperature == 0:
        return dataclasses.replace(plan, sampler=dyninf.Greedy())
    return dataclasses.replace(plan, sampler=dyninf.chain(*filters)) if filters else plan
