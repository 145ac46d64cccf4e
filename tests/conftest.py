"Differences to the official implementation, as the golden tests find them, in one table at the end of a run."
import pytest

FOUND = {}  # (case, quantity) -> largest relative difference


@pytest.fixture(scope="session")
def found(): return FOUND


def pytest_terminal_summary(terminalreporter):
    if not FOUND: return
    quantities = list(dict.fromkeys(quantity for _, quantity in FOUND))
    terminalreporter.section("largest difference to the official implementation, relative to its largest value")
    width = max(len(case) for case, _ in FOUND)
    for case in dict.fromkeys(case for case, _ in FOUND):
        row = [f"{quantity} {FOUND[case, quantity]:.0e}" for quantity in quantities if (case, quantity) in FOUND]
        terminalreporter.write_line(f"{case:{width}}  " + ", ".join(row))
