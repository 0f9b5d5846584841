"""tests/check_failures.py finds what it is there to find."""

import importlib.util
import pathlib

PATH = pathlib.Path(__file__).parents[1] / "check_failures.py"
SPEC = importlib.util.spec_from_file_location("check_failures", PATH)
check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check)

TABLE = "".join(f"| {n} | failure | expected | `Suite.Case` |\n" for n in range(1, check.ROWS + 1))


def test_names_come_from_all_kinds_of_sources():
    known = check.tests_of(PATH.parent)
    assert known >= {"KillTest.WhoeverIsLeftGoesOnAndNothingStaysBehind", "HostileHeaderTest.IsRefused",
                     "python.damage", "deploy.drain", "fuzz_corpus_stream"}  # fmt: skip


def test_a_good_table_has_no_problems():
    assert check.problems(TABLE, {"Suite.Case"}) == []


def test_a_test_that_is_gone_is_named():
    assert "row 7: there is no test Suite.Case" in check.problems(TABLE, {"Suite.Other"})


def test_a_row_without_a_test_and_a_missing_row_are_found():
    table = TABLE.replace("| 3 | failure | expected | `Suite.Case` |", "| 3 | failure | `Suite.Case` | none |")
    assert check.problems(table, {"Suite.Case"}) == ["row 3 names no test"]
    assert "rows are not" in check.problems(TABLE.replace("| 9 |", "| 8 |"), {"Suite.Case"})[0]
