"""``dyninf plans``: list the named plans, what each changes, and what its policies do."""

import argparse
from typing import Any

from rich.table import Table

from dyninf import describe
from dyninf.cli.common import check_positive, table_console
from dyninf.cli.plan_options import fields, policies, shown
from dyninf.configs.plans import plans
from dyninf.kv import KeepAll, ReadAll
from dyninf.sparsity import Dense

EXAMPLES = """\
examples:
  dyninf plans
  dyninf plans --layers 32
"""


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "plans",
        help="list the named plans",
        description="List the named plans for a model of some depth, and the fields that --set can change.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--layers", type=int, default=16, help="layers of the model (default: 16)")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Print the plans and, below them, the policies they are made of."""
    check_positive(layers=arguments.layers)
    table = Table(title=f"Plans for a model of {arguments.layers} layers", title_justify="left", show_lines=True)
    table.add_column("plan", no_wrap=True)
    table.add_column("what it changes", overflow="fold")
    table.add_column("fields for --set", overflow="fold")
    summaries: dict[str, str] = {}
    for name, plan in plans(arguments.layers).items():
        changeable = " ".join(f"{path}={shown(value)}" for path, value in fields(plan).items())
        table.add_row(name, describe(plan), changeable)
        held = [*policies(plan.depth)]
        for policy, identity in ((plan.sparsity, Dense()), (plan.evict, KeepAll()), (plan.select, ReadAll())):
            held += [] if policy == identity else policies(policy)
        summaries |= {type(policy).__name__: _first_line(policy) for policy in held}
    legend = Table(title="Policies", title_justify="left")
    legend.add_column("policy", no_wrap=True)
    legend.add_column("what it does")
    for policy, summary in summaries.items():
        legend.add_row(policy, summary)
    console = table_console()
    console.print(table)
    console.print(legend)
    return 0


def _first_line(policy: Any) -> str:
    line = (type(policy).__doc__ or "").strip().splitlines()[0]
    return line.replace(":func:", "").replace("``", "`")
