"""The `aepo` command, also as `python -m aepo`: that of aepo/cli.py, or what can be had of it without the extras."""

from __future__ import annotations

import argparse
import signal
import sys

from aepo.install import COMMANDS, DISTRIBUTION, explain_missing, pip_install
from aepo.interrupt import Interrupt
from aepo.output import guard_output, status_of_output


def main() -> None:
    """Run the command line; what it printed and nobody could read makes an exit code of 0 another one."""
    guard_output()
    try:
        # Ctrl-C from here on, also where a command only imports. What SIGTERM ends there has nothing to put away.
        with Interrupt([signal.SIGINT]) as interrupt, interrupt.allowed():
            _command_line()
    except SystemExit as end:
        sys.exit(end.code or status_of_output())
    except KeyboardInterrupt:
        sys.exit(130)


def _command_line() -> None:
    """Without typer, which two of the extras bring, `doctor` and `--version` remain."""
    try:
        from aepo.cli import main as whole
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "typer":
            sys.exit(_kernels_only(error))
        sys.exit(f"error: aepo/cli.py cannot be loaded ({error}); python -m aepo.doctor says what is wrong here")
    whole()


def _kernels_only(error: ModuleNotFoundError) -> int:
    parser = argparse.ArgumentParser(
        prog="aepo",
        description="Train tool-using language-model agents with AEPO (arXiv 2510.14545) and its relatives.",
        epilog="Only the kernels are installed (import aepo_kernels); the other commands need the extras named above.",
    )
    parser.add_argument("--version", action="store_true", help="Show the version and exit.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="What is present here, what is missing, and the command that gets it.")
    doctor.add_argument("--json", action="store_true", help="For machines.")
    doctor.add_argument("model", metavar="MODEL_DIR", nargs="*", help=f"needs {pip_install('train')}")
    for command, extra in COMMANDS.items():  # whatever its options are, the answer is the same
        commands.add_parser(command, help=f"needs {pip_install(extra)}", add_help=False)
    arguments, rest = parser.parse_known_args()
    if arguments.command in COMMANDS:
        print(f"error: {explain_missing(arguments.command, error)}", file=sys.stderr)
        return 1
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.version:
        import aepo

        print(f"{DISTRIBUTION} {aepo.__version__}")
        return 0
    if arguments.command == "doctor" and arguments.model:
        print(
            f"error: {explain_missing('train', error).replace('aepo train', 'aepo doctor MODEL_DIR')}", file=sys.stderr
        )
        return 1
    if arguments.command == "doctor":
        from aepo.doctor import main as examine

        return examine(arguments.json)
    parser.print_help()
    return 2  # as the whole command line does


if __name__ == "__main__":
    main()
