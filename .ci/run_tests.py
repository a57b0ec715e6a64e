# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""`make test`: checks that need no host beside the molecule scenarios (arguments); nothing may be left behind.

A scenario's tasks run one after the other on an emulated CPU, so that two fill two cores: when the checks are done, a second
scenario runs beside the first. Not so on a machine whose checks took long: there, two labs make emulated hosts so slow that
systemd's own limits are over. The last line counts the tests that really ran (unit tests and those that look at the lab's hosts).
A step that fails without a failed test of its own counts as one failure.

A machine can be several times slower than another one of its kind. What would then begin so late that the run could not
end within its time, scenarios and tests of hosts, is left out, which is said and counted as skipped; and a run that has not
ended by then is ended, with its log's closing line, instead of being cut off by whoever called it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import typing as t
import uuid
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build/test"
UNITS = ROOT / "build/ansible-test/units/ansible_collections/agentfleet/metal/tests/output/junit"
MARK = f"AGENTFLEET_TEST_RUN={uuid.uuid4()}"  # in the environment of all that is started, however it daemonizes
SECONDS_TO_END = 20.0
# Until the last scenario and the last test of hosts begin, and until the run ends. Where all take 2600 s, the last scenario
# begins after about 1700 s; on a slow machine one test may take twenty minutes.
LAST_SCENARIO_SECONDS = 3100
LAST_TEST_SECONDS = 3400
SECONDS_IN_ALL = 4800
QUICK_CHECKS_SECONDS = 900  # beside a scenario; a machine that needs longer has one lab at a time
LABS = ROOT / "build/molecule"
FIRST_PORT = 2322
LINES_OF_ONE = 8  # of a failure, said once more at the end
WIDTH = 240
SIGNS = ("fatal: ", "failed: [", "[ERROR]", "CRITICAL", "FAILED", "Error: ")  # of a line that tells why a step failed
SAID: dict[str, deque[str]] = {}  # step -> its last lines with such a sign
OMITTED: list[str] = []  # scenarios that would have begun too late


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


def remaining() -> dict[int, str]:
    """Processes of this run that do not end by themselves within a moment; they are killed."""
    deadline = time.monotonic() + SECONDS_TO_END
    while marked_processes() and time.monotonic() < deadline:
        time.sleep(0.5)
    processes = marked_processes()
    send(signal.SIGKILL, processes)
    return processes


def send(sign: signal.Signals, processes: dict[int, str]) -> None:
    """A signal to processes, of which some may have ended meanwhile."""
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, sign)


def left_behind(before: set[str]) -> list[str]:
    """What this run left on the machine, after a moment to end by itself; its processes are ended."""
    processes = remaining()
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


def scenario(name: str, port: int, latest: float) -> bool:
    """One molecule scenario on a lab of its own; molecule passes one without tests, which is a failure here.

    :param latest: of time.monotonic(); one that would begin later is left out
    """
    if time.monotonic() > latest:
        OMITTED.append(name)
        return True
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


def left_out(report: Path) -> list[str]:
    """The skipped tests of a JUnit report with their reasons."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    skipped = [(case.get("name"), skip.get("message", "")) for case in cases for skip in case.iter("skipped")]
    return [f"SKIPPED {report.stem}: {name}: {reason[:WIDTH]}" for name, reason in skipped]


def on_interrupt(then: t.Any) -> None:
    """What an interrupt, the request to end and the end of the time do."""
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(sign, then)


def main(scenarios: list[str]) -> int:
    """Run all; 0 when everything passed and nothing was left behind."""
    on_interrupt(signal.default_int_handler)
    signal.alarm(SECONDS_IN_ALL)
    start, before = time.monotonic(), kernel_objects()
    subprocess.run(["rm", "-rf", str(OUT), str(UNITS)], check=True)
    OUT.mkdir(parents=True)
    latest = str(time.time() + LAST_TEST_SECONDS)
    os.environ.update([MARK.split("=")], ANSIBLE_FORCE_COLOR="0", NO_COLOR="1", AGENTFLEET_TESTS_BEGIN_BEFORE=latest)
    problems = []
    turns = iter(enumerate(scenarios))

    def one_after_the_other() -> None:
        for number, name in turns:  # of all who ask, each gets the next one
            if not scenario(name, FIRST_PORT + 10 * number, start + LAST_SCENARIO_SECONDS):
                problems.append(name)

    def checks() -> None:
        if not run("checks", "make", "-k", "lint", "sanity", "units-sandboxed", "contract", "build"):
            problems.append("checks")
        if time.monotonic() - start < QUICK_CHECKS_SECONDS:
            one_after_the_other()

    with ThreadPoolExecutor() as pool:
        lanes = [pool.submit(checks), pool.submit(one_after_the_other)]
        try:
            for lane in lanes:
                lane.result()
        except KeyboardInterrupt:
            on_interrupt(signal.SIG_IGN)  # whoever interrupts sends more than one
            problems.append("interrupted" if signal.alarm(0) else f"not ended within {SECONDS_IN_ALL} s")
            deque(turns, maxlen=0)  # nobody gets a further one
            send(signal.SIGINT, marked_processes())
            remaining()
    on_interrupt(signal.SIG_IGN)
    for lab in sorted(LABS.glob("*/")):
        run("lab down", "molecule", "destroy", "-s", lab.name)
    problems += [f"left behind: {thing}" for thing in left_behind(before)]

    reports = [*UNITS.glob("*.xml"), *OUT.glob("*.xml")]
    total = counts(*reports)
    total["failed"] = max(total["failed"], len(problems))
    total["skipped"] += len(OMITTED)
    for report in reports:
        for line in left_out(report) + reasons(report):
            print(line)
    for problem in problems:
        print(f"FAILED {problem}")
        if not (OUT / f"{problem}.xml").exists():
            for line in SAID.get(problem, ()):
                print(f"  {line[:WIDTH].rstrip()}")
    for name in OMITTED:
        print(f"SKIPPED {name}: {LAST_SCENARIO_SECONDS} s had passed before its turn: make molecule SCENARIO={name}")
    words = ", ".join(f"{number} {word}" for word, number in total.items() if number or word != "skipped")
    seconds = int(time.monotonic() - start)
    summary = f"==== {words} in {seconds}s ({seconds // 60} min {seconds % 60} s) ===="
    (OUT / "summary").write_text(summary + "\n")
    print(summary, flush=True)
    return 1 if total["failed"] or not total["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
