#!/usr/bin/env python3
"""Every row of tests/failures.md names tests, and each of them exists in the sources.

usage: check_failures.py [SOURCE_DIR]
"""
import pathlib
import re
import sys

ROWS = 50
GOOGLE_TEST = re.compile(r"^(?:TYPED_)?TEST(?:_F|_P)?\(\s*(\w+),\s*(\w+)\)", re.MULTILINE)
FUZZ_TARGET = re.compile(r"^headstart_fuzz\((\w+) ", re.MULTILINE)


def tests_of(root):
    """The names of all tests below `root`, as the table spells them."""
    names = set()
    for path in root.rglob("*_test.cc"):
        names |= {".".join(match) for match in GOOGLE_TEST.findall(path.read_text())}
    names |= {"fuzz_corpus_" + kind for kind in FUZZ_TARGET.findall((root / "fuzz/CMakeLists.txt").read_text())}
    for folder in ("python", "deploy"):
        names |= {f"{folder}.{path.stem.removeprefix('test_')}" for path in (root / folder).glob("test_*.py")}
    return names


def problems(table, known):
    """What is wrong with the table's text, given the names that exist."""
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", table, re.MULTILINE)
    found = [f"rows are not 1 to {ROWS}"] if [int(n) for n, _ in rows] != list(range(1, ROWS + 1)) else []
    for number, row in rows:
        tests = row.rsplit("|", 1)[1]
        names = re.findall(r"`(\w+\.\w+|fuzz_corpus_\w+)`", tests)
        if not names:
            found.append(f"row {number} names no test")
        found += [f"row {number}: there is no test {name}" for name in names if name not in known]
    return found


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parents[1]) / "tests"
    found = problems((root / "failures.md").read_text(), tests_of(root))
    print("\n".join(found) or f"{ROWS} rows, every test exists")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
