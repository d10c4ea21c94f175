"""Compares two results of one suite: fails where a test that passes in the first does not in the second.

python tools/compare_junit.py FIRST.xml SECOND.xml
"""

import sys
from collections import Counter
from xml.etree import ElementTree


def outcomes(path: str) -> dict[str, str]:
    """What came of every test, by its name."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        tags = {child.tag for child in case} & {"failure", "error", "skipped"}
        found[f"{case.get('classname')}::{case.get('name')}"] = min(tags) if tags else "passed"
    return found


def main(first: str, second: str) -> int:
    before, after = outcomes(first), outcomes(second)
    for name, of in ((first, before), (second, after)):
        print(f"{name}: " + ", ".join(f"{n} {what}" for what, n in sorted(Counter(of.values()).items())))
    passed = [name for name, what in before.items() if what == "passed"]
    lost = {name: after.get(name, "not run") for name in passed if after.get(name) != "passed"}
    for name, what in sorted(lost.items()):
        print(f"{what}: {name}")
    print(f"{len(passed)} tests pass in the first, {len(passed) - len(lost)} of them in the second")
    return bool(lost) or not passed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
