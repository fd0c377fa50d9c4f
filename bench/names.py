"""The programs that a command line names."""

import argparse
from collections.abc import Iterable


def wanted_names(parser: argparse.ArgumentParser, only: str | None, known: Iterable[str]) -> set[str]:
    """Return the names in ``only``, which commas separate, or all that there are; end with an error if one is not."""
    known = set(known)
    wanted = known if only is None else set(only.split(","))
    if wanted - known:
        parser.error(
            f"expected --only with some of {', '.join(sorted(known))}; got {', '.join(sorted(wanted - known))}"
        )
    return wanted
