# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""`make test`: checks that need no host and the molecule scenarios (arguments), two at a time; nothing may be left behind.

A scenario's tasks run one after the other on an emulated CPU, so that two fill two cores. The last line counts the
tests that really ran (unit tests and those that look at the lab's hosts). A step that fails without a failed test of
its own counts as one failure.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build/test"
UNITS = ROOT / "build/ansible-test/units/ansible_collections/agentfleet/metal/tests/output/junit"
MARK = f"AGENTFLEET_TEST_RUN={uuid.uuid4()}"  # in the environment of all that is started, however it daemonizes
SECONDS_TO_END = 20.0
AT_ONCE = 2
LABS = ROOT / "build/molecule"
FIRST_PORT = 2322
LINES_OF_ONE = 8  # of a failure, said once more at the end
WIDTH = 240
SIGNS = ("fatal: ", "failed: [", "[ERROR]", "CRITICAL", "FAILED", "Error: ")  # of a line that tells why a step failed
SAID: dict[str, deque[str]] = {}  # step -> its last lines with such a sign


def marked_processes() -> dict[int, str]:
    """Processes of this run other than this one: pid -> command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if MARK.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            pass  # gone, or another user's
    return found


def kernel_objects() -> set[str]:
    """Mounts, loop devices in use and tap devices of this machine."""
    mounts = {f"mount {line.split()[4]}" for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    loops = {f"loop device {path.parent.parent.name}" for path in Path("/sys/block").glob("loop*/loop/backing_file")}
    taps = {f"tap device {path.parent.name}" for path in Path("/sys/class/net").glob("*/tun_flags")}
    return mounts | loops | taps


def left_behind(before: set[str]) -> list[str]:
    """What this run left on the machine, after a moment to end by itself; its processes are ended."""
    deadline = time.monotonic() + SECONDS_TO_END
    while marked_processes() and time.monotonic() < deadline:
        time.sleep(0.5)
    processes = marked_processes()
    for pid in processes:
        os.kill(pid, signal.SIGKILL)
    return [f"process {pid}: {line}" for pid, line in processes.items()] + sorted(kernel_objects() - before)


def run(name: str, *command: str, **environment: str) -> bool:
    """One step with its output (each line says whose it is), its time and whether it passed."""
    print(f"== {name}", flush=True)
    start = time.monotonic()
    told = SAID[name] = deque(maxlen=LINES_OF_ONE)
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace",
    ) as step:  # fmt: skip
        assert step.stdout
        for line in step.stdout:
            print(f"{name} | {line}", end="", flush=True)
            if any(sign in line for sign in SIGNS):
                told.append(line)
    passed = step.returncode == 0
    print(f"== {name}: {'passed' if passed else 'FAILED'} after {time.monotonic() - start:.0f} s", flush=True)
    return passed


def scenario(name: str, port: int) -> bool:
    """One molecule scenario on a lab of its own; molecule passes one without tests, which is a failure here."""
    passed = run(name, "molecule", "test", "-s", name, AGENTFLEET_LAB_PORT=str(port))
    return passed and (OUT / f"{name}.xml").exists()


def counts(*reports: Path) -> dict[str, int]:
    """The sum of the JUnit reports' passed, failed and skipped tests."""
    total = {"passed": 0, "failed": 0, "skipped": 0}
    for report in reports:
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            skipped = int(suite.get("skipped", 0))
            total["failed"] += failed
            total["skipped"] += skipped
            total["passed"] += int(suite.get("tests", 0)) - failed - skipped
    return total


def reasons(report: Path) -> list[str]:
    """What the failed tests of a JUnit report say, briefly: a log that is cut off keeps its end."""
    found = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        for failure in [*case.iter("failure"), *case.iter("error")]:
            lines = (failure.text or failure.get("message", "")).splitlines()
            said = [line for line in lines if line.startswith("E ")] or lines[-LINES_OF_ONE:]
            found += [f"{report.stem}: {case.get('name')}", *(f"  {line[:WIDTH]}" for line in said[:LINES_OF_ONE])]
    return found


def main(scenarios: list[str]) -> int:
    """Run all; 0 when everything passed and nothing was left behind."""
    start, before = time.monotonic(), kernel_objects()
    subprocess.run(["rm", "-rf", str(OUT), str(UNITS)], check=True)
    OUT.mkdir(parents=True)
    os.environ.update([MARK.split("=")], ANSIBLE_FORCE_COLOR="0", NO_COLOR="1")
    problems = []
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        steps = {
            "checks": pool.submit(run, "checks", "make", "-k", "lint", "sanity", "units-sandboxed", "contract", "build")
        }
        for number, name in enumerate(scenarios):
            steps[name] = pool.submit(scenario, name, FIRST_PORT + 10 * number)
        try:
            problems += [name for name, step in steps.items() if not step.result()]
        except KeyboardInterrupt:
            problems.append("interrupted")
            pool.shutdown(wait=False, cancel_futures=True)
            for pid in marked_processes():
                os.kill(pid, signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for lab in sorted(LABS.glob("*/")):
        run("lab down", "molecule", "destroy", "-s", lab.name)
    problems += [f"left behind: {thing}" for thing in left_behind(before)]

    reports = [*UNITS.glob("*.xml"), *OUT.glob("*.xml")]
    total = counts(*reports)
    total["failed"] = max(total["failed"], len(problems))
    for report in reports:
        for line in reasons(report):
            print(line)
    for problem in problems:
        print(f"FAILED {problem}")
        if not (OUT / f"{problem}.xml").exists():
            for line in SAID.get(problem, ()):
                print(f"  {line[:WIDTH].rstrip()}")
    words = ", ".join(f"{number} {word}" for word, number in total.items() if number or word != "skipped")
    seconds = int(time.monotonic() - start)
    summary = f"==== {words} in {seconds}s ({seconds // 60} min {seconds % 60} s) ===="
    (OUT / "summary").write_text(summary + "\n")
    print(summary, flush=True)
    return 1 if total["failed"] or not total["passed"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
