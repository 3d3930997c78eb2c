"""Tests that need a program which pip does not install."""

from __future__ import annotations

import re
import shutil
from collections import Counter

import pytest

_REASON = re.compile(r"needs the program (\S+): (.+)")


def needs_program(program: str, command: str) -> pytest.MarkDecorator:
    """Mark a test that is skipped where `program` is missing; `command` installs the program."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs the program {program}: {command}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the missing programs, the number of tests that were skipped for each, and the command that installs it."""
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])]  # (file, line, reason)
    missing = Counter(match.groups() for match in map(_REASON.search, reasons) if match)
    if missing:
        terminalreporter.section("tests skipped because a program is missing")
    for (program, command), number in sorted(missing.items()):
        terminalreporter.line(f"{program}: {number} skipped; install it by: {command}")
