"""`python -m finetune` and the `finetune` command: turns errors into messages and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from finetune.errors import FinetuneError, Problem, StoppedError, UserError

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 for a failed run, 2 for a user's mistake, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        from finetune.cli import app

        try:
            app(args=[word for word in given if word != "--debug"], prog_name="finetune")
        finally:
            sys.stdout.flush()  # here, where a full disk behind it can still be told
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except FinetuneError as error:
        if debug:
            raise
        if speaks(error):
            print(error.on_command_line(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 1
    except OSError as error:
        if debug:
            raise
        what = f"cannot be read or written: {error.strerror or error}"
        hint = "check its permissions and the space on its disk, then run the same command again"
        print(Problem(str(error.filename or "the output"), what, hint), file=sys.stderr)
        _leave_stdout()
        return 1
    except Exception as error:
        if debug:
            raise
        what = f"{type(error).__name__}: {error}"
        print(Problem("unexpected", what, "run again with --debug for the traceback"), file=sys.stderr)
        return 1
    return 0


def _leave_stdout() -> None:
    """Let what a full disk did not take not be tried once more, with a traceback, as Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def speaks(error: FinetuneError) -> bool:
    """Whether this process prints an error. Every process of a machine meets the same mistake; the first prints it."""
    return not isinstance(error, UserError | StoppedError) or os.environ.get("LOCAL_RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
