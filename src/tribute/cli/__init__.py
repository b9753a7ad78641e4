"""The command line: argument parsing and printing only, and nothing heavy before it is needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

COMMANDS = {
    "run": "a whole study from a YAML file: train, prune, coalitions, attributions, LDS",
    "plan": "what a study will cost: measured here, before it starts",
    "pilot": "do fine-tuning and retraining agree on a few coalitions? Before the study",
    "data": "check training data before anything expensive (tribute data check)",
    "status": "where a study stands, and its attributions by now; at any moment, also beside run",
    "retry": "make failed evaluations of a study claimable again",
    "reset": "throw away the results of a stage of a study, and of all that depends on it",
    "gc": "list, and delete, what a study or the cache no longer needs",
    "train": "train, retrain or fine-tune a model (main.py)",
    "prune": "prune a trained model (prune.py)",
    "unlearn": "a coalition's model and its behavior, recorded in a store (unlearn.py)",
    "lds": "fit attributions to a store and prove them on retrained models (lds.py)",
    "report": "one HTML page: credit, how sure it is, its proof, cost, payout",
    "verify": "compare a run with its manifest: hashes, attributions, LDS, measurements",
    "export": "write a store as JSON lines, CSV or Parquet (a backup), or a model as a diffusers folder",
    "import": "read JSON lines of the published layout, or a Parquet backup, into a store",
}

_SCRIPTS = {"train": "main.py", "prune": "prune.py", "unlearn": "unlearn.py", "lds": "lds.py"}

_HELP = """usage: tribute COMMAND [--flags]

Credit the contributors of a diffusion model's training data.

commands:
{commands}

  tribute COMMAND --help   flags of a command
  tribute --version        version

Start with:  tribute run examples/digits.yaml
"""


def main(command: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Entry point of `tribute` and, with `command` given, of the published scripts.

    Exits with 0, with 1 for an error that the user can repair, 2 for wrong usage, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    prog = _SCRIPTS.get(command or "", "tribute")
    if command is None:
        if not arguments or arguments[0] in ("-h", "--help"):
            lines = "\n".join(f"  {name:<9}{text}" for name, text in COMMANDS.items())
            print(_HELP.format(commands=lines), end="")
            sys.exit(0 if arguments else 2)
        if arguments[0] == "--version":
            from tribute import __version__

            print(f"tribute {__version__}")
            return
        command, arguments = arguments[0], arguments[1:]
        prog = f"tribute {command}"
    if command not in COMMANDS:
        print(f"tribute: unknown command {command!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    _dispatch(command, arguments, prog)


def _dispatch(command: str, arguments: list[str], prog: str) -> None:
    """Run a command and turn what a user can repair into one clear line."""
    import importlib

    from tribute.cli import signals
    from tribute.errors import TributeError, printable
    from tribute.files import is_disk_full
    from tribute.memory import brief, is_out_of_memory

    try:
        with signals.stop_on_signals():
            module = importlib.import_module(f"tribute.cli.{command}_command")
            importlib.import_module("tribute.cli.console").setup_logging()
            module.run(arguments, prog)
    except TributeError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\n{signals.MESSAGE}", file=sys.stderr)
        sys.exit(signals.EXIT_CODE)
    except BrokenPipeError:  # e.g. `tribute lds ... | head`
        sys.stderr.close()
        sys.exit(141)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: memory does not suffice: {printable(brief(error))}; free the device", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if not is_disk_full(error):
            raise
        where = f" ({printable(str(error.filename))})" if error.filename else ""
        print(f"error: the disk is full{where}; free some space and run the same command again", file=sys.stderr)
        sys.exit(1)
