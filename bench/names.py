"""Names that a command line lists."""

import argparse
from collections.abc import Iterable


def names_among(parser: argparse.ArgumentParser, option: str, text: str | None, known: Iterable[str]) -> list[str]:
    """Return the names that commas separate, without a text all that there are; end with an error if one is not."""
    known = list(known)
    names = known if text is None else text.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"expected {option} among {', '.join(known)}, got {', '.join(unknown)}")
    return names
