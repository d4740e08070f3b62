"""One line for each package, however many of its files are missing."""

from __future__ import annotations

from envship.sources.faults import SHOWN, Fault, Owner, report

NUMPY = Owner("numpy", "2.0", "conda")


def test_a_package_is_one_line_that_names_some_files_and_counts_the_rest() -> None:
    faults = [Fault(NUMPY, f"lib/{number}.py") for number in range(1000)]
    (line,) = report(faults, SHOWN)
    assert line == (
        "numpy 2.0 (conda): missing: lib/0.py, lib/1.py, lib/10.py and 997 more. "
        "Mend it: conda install --force-reinstall numpy=2.0"
    )
    (line,) = report(faults)
    assert all(f" lib/{number}.py" in line for number in range(1000))


def test_lines_are_sorted_and_say_who_overwrote_what() -> None:
    other = Owner("numpy", "2.1", "pip")
    lines = report([Fault(Owner("z", "1", "pip"), "z.py"), Fault(NUMPY, "b.py", other), Fault(NUMPY, "a.py")])
    assert lines == [
        "numpy 2.0 (conda): overwritten by numpy 2.1 (pip): b.py; missing: a.py. "
        "Mend it: pip uninstall numpy; conda install --force-reinstall numpy=2.0",
        "z 1 (pip): missing: z.py. Mend it: pip install --force-reinstall --no-deps z==1",
    ]


def test_nothing_wrong_is_nothing_said() -> None:
    assert report([]) == []
