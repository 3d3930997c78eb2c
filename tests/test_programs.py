from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = "pytester"


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A directory whose tests have the same hook and fixture as ours."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    pytester.makeconftest("from tests.programs import pytest_terminal_summary\nfrom tests.seeds import drawn_seed\n")
    return pytester


def test_what_is_skipped_for_want_of_a_program_is_said_at_the_end(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import pytest
        from tests.programs import needs_program

        missing = needs_program("no-such-program", "apt-get install it's-package")

        @missing
        def test_one(): ...

        @missing
        def test_two(): ...

        @needs_program("sh", "apt-get install dash")
        def test_present(): ...

        @pytest.mark.skip(reason="needs something else")
        def test_other(): ...
        """
    )
    result = project.runpytest_subprocess()
    result.assert_outcomes(passed=1, skipped=3)
    lines = [line for line in result.outlines if "apt-get" in line]
    assert len(lines) == 1
    assert "no-such-program" in lines[0] and "2" in lines[0] and lines[0].endswith("apt-get install it's-package")


def test_nothing_is_said_without_such_a_skip(project: pytest.Pytester) -> None:
    project.makepyfile("def test_one(): ...")
    assert "program" not in project.runpytest_subprocess().stdout.str()


def test_a_drawn_seed_is_printed_and_can_be_set(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    project.makepyfile("def test_one(drawn_seed): assert not drawn_seed, f'was {drawn_seed}'")
    monkeypatch.delenv("DETOUR_TEST_SEED", raising=False)
    printed = [line for line in project.runpytest_subprocess().outlines if "DETOUR_TEST_SEED=" in line]
    assert printed
    monkeypatch.setenv("DETOUR_TEST_SEED", "4711")
    project.runpytest_subprocess().stdout.fnmatch_lines(["*DETOUR_TEST_SEED=4711*"])
