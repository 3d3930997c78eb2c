"""Exit codes of the commands (contract), and how an error becomes a message and a code."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from configs.errors import InputError, RunFailedError

UNREACHABLE: tuple[int, ...] = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)
UNREACHABLE += (errno.EISDIR, errno.ENOTDIR, errno.EEXIST)
"""Errors of a path that the user named, and may not or cannot be used."""
FULL = (errno.ENOSPC, errno.EDQUOT)
_OPTION_AT_HOME = re.compile(r"^(--[a-z-]+=)~/")
"""Matches the beginning of `--output=~/runs/a`: shells put the home directory only after a space."""
DONE, BAD_INPUT, FAILED, STOPPED = 0, 2, 3, 75


def run_command(command: Callable[[], None]) -> None:
    """Run a command and exit by its outcome: a foreseen error is one message and an exit code, never a traceback."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(STOPPED))  # until training starts, nothing is to save
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    for stream in (sys.stdout, sys.stderr):  # names of files may hold characters that the terminal has not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.argv = [_OPTION_AT_HOME.sub(lambda part: f"{part[1]}{Path.home()}/", word) for word in sys.argv]
    try:
        command()
    except InputError as error:
        _fail(error, BAD_INPUT)
    except RunFailedError as error:
        _fail(error, FAILED)
    except KeyboardInterrupt:
        sys.exit(STOPPED)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in UNREACHABLE and error.filename is not None:
            _fail(InputError(f"{error.filename2 or error.filename}: {error.strerror}"), BAD_INPUT)
        if isinstance(error, shutil.Error):  # of a folder that is copied: a list of what failed
            _fail(RunFailedError(str(error.args[0][0][-1])), FAILED)
        if isinstance(error, OSError) and error.errno in FULL:
            name = f" ({error.filename})" if error.filename else ""
            _fail(RunFailedError(f"{error.strerror}{name}; free space, and run the same command again"), FAILED)
        if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
            name = error.object[: error.end].split("\n")[-1][-100:]
            _fail(InputError(f"...{name}...: a name of a file that is not UTF-8; rename it"), BAD_INPUT)
        traceback.print_exc()  # a bug of Detour: a report of it needs the traceback
        sys.exit(FAILED)


def _fail(error: Exception, code: int) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)
