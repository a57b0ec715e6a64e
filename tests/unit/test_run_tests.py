# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""`make test` on a machine that is too slow for it: what it leaves out, and how it ends when its time is over."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RUNNER = Path(__file__).resolve().parents[2] / ".ci/run_tests.py"
REPORT = '<testsuites><testsuite tests="3" failures="0" errors="0" skipped="0"/></testsuites>'
# The runner with directories of the test's own and another limit; its exit code is that of main().
DRIVER = """
import runpy, sys
from pathlib import Path
runner = runpy.run_path({runner!r}, run_name="runner")
base, name, value = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
changed = dict(OUT=base / "out", UNITS=base / "units", LABS=base / "labs", ROOT=base, SECONDS_TO_END=1.0)
runner["main"].__globals__.update(changed, **{{name: value}})
sys.exit(runner["main"](sys.argv[4:]))
"""


def run(
    base: Path, limit: str, seconds: int, make: str, molecule: str, scenarios: tuple[str, ...] = ("one",)
) -> subprocess.CompletedProcess[str]:
    """`make test` of scenarios, where a limit is so many seconds, and where make and molecule are these scripts."""
    (base / "bin").mkdir(exist_ok=True)
    for name, script in (("make", make), ("molecule", molecule)):
        path = base / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return subprocess.run(
        [sys.executable, "-c", DRIVER.format(runner=str(RUNNER)), str(base), limit, str(seconds), *scenarios],
        env={**os.environ, "PATH": f"{base}/bin:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )


def closing(done: subprocess.CompletedProcess[str]) -> str:
    """The closing line without its time."""
    return done.stdout.splitlines()[-1].partition(" in ")[0]


def test_all_that_passes_in_time_is_counted(tmp_path: Path) -> None:
    report = f"echo '{REPORT}' > {tmp_path}/out/one.xml"
    done = run(tmp_path, "LAST_SCENARIO_SECONDS", 60, "echo lint", report)
    assert (done.returncode, closing(done)) == (0, "==== 3 passed, 0 failed"), done.stdout


def test_a_scenario_whose_turn_comes_too_late_is_left_out_and_said(tmp_path: Path) -> None:
    report = f"echo '{REPORT}' > {tmp_path}/out/units.xml"
    done = run(tmp_path, "LAST_SCENARIO_SECONDS", -1, report, f"touch {tmp_path}/begun")
    assert (done.returncode, closing(done)) == (0, "==== 3 passed, 0 failed, 1 skipped"), done.stdout
    assert "SKIPPED one: -1 s had passed" in done.stdout and not (tmp_path / "begun").exists()


def test_two_labs_at_a_time_only_where_the_checks_were_quick(tmp_path: Path) -> None:
    report = f"echo '{REPORT}' > {tmp_path}/out/$3.xml"
    alone = f"mkdir {tmp_path}/lab && sleep 0.5 && rmdir {tmp_path}/lab && {report}"
    done = run(tmp_path, "QUICK_CHECKS_SECONDS", 0, "exit 0", alone, ("one", "two"))
    assert (done.returncode, closing(done)) == (0, "==== 6 passed, 0 failed"), done.stdout
    met = f"touch {tmp_path}/$3; for other in one two; do until [ -e {tmp_path}/$other ]; do sleep 0.1; done; done; {report}"
    done = run(tmp_path, "QUICK_CHECKS_SECONDS", 60, "exit 0", met, ("one", "two"))
    assert (done.returncode, closing(done)) == (0, "==== 6 passed, 0 failed"), done.stdout


def test_a_run_whose_time_is_over_ends_what_it_started_and_fails(tmp_path: Path) -> None:
    mark = f"{tmp_path}/asleep"
    script = f"echo $$ > {mark}; trap '' INT; sleep 300"  # one that an interrupt does not end
    done = run(tmp_path, "SECONDS_IN_ALL", 2, script, "exit 0")
    assert done.returncode == 1 and closing(done).startswith("==== 0 passed, "), done.stdout
    assert "FAILED not ended within 2 s" in done.stdout
    assert not Path(f"/proc/{int(Path(mark).read_text())}").exists()
