"""The command line: one file per command, each with ``add(subparsers)`` and a function that runs it.

Tables and progress are drawn with rich. Every error that a user can cause prints one line and ends with status 2;
``--debug`` shows where it was raised.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax

from dyninf import __version__
from dyninf.cli import batch, bench, calibrate, compare, doctor, evaluate, generate, plans, train

COMMANDS = (generate, batch, compare, plans, evaluate, calibrate, bench, train, doctor)
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
USER_ERRORS = (ValueError, NotImplementedError, OSError, jax.errors.JaxRuntimeError)

DESCRIPTION = "Run transformers with fewer layers per token, and see what that saves and costs."
EXAMPLES = """\
examples:
  dyninf generate --prompt "def fibonacci(n):" --show depth
  dyninf compare --plans dense,exit_confidence --quick
  dyninf doctor

"dyninf COMMAND --help" explains a command.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"dyninf: error: {message}; see '{self.prog} --help'", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: the arguments after the program's name; ``None`` takes those of the process.

    Raises:
        SystemExit: for ``--help``, ``--version`` and arguments that cannot be read.
    """
    parser = _build_parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 2
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone; without this the interpreter would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except USER_ERRORS as error:
        if arguments.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"dyninf: error: {message}", file=sys.stderr)
        return 2


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dyninf",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dyninf {__version__}")
    parser.set_defaults(command=None, debug=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for module in COMMANDS:
        command = module.add(subparsers)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.allow_abbrev = False
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
