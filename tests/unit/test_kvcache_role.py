# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""In which order hosts bring up and remove their pools, by the conditions of the role and of the playbook."""

from __future__ import annotations

from ansible_collections.agentfleet.metal.tests.unit.role_lab import rendered

ORDER = """
play = load("../../playbooks/teardown.yml")[0]
for tasks, more in ((load("tasks/main.yml"), {}), (play["tasks"], play["vars"])):
    runs = [task for task in tasks if "pools.yml" in task.values() or "agentfleet.metal.kvcache_pool" in task]
    for pools in given["pools"]:
        template = Templar(loader, variables={"kvcache_pools": pools, **more})
        found.append([number for number, task in enumerate(runs) if all(map(template.evaluate_conditional, task["when"]))])
"""


def test_a_master_for_other_hosts_comes_first_and_goes_last() -> None:
    master = {"name": "shared", "master": {"address": "10.0.0.1"}}
    stores = {"name": "shared", "master": {"address": "10.0.0.1", "run": False}}
    pools = [[master], [stores], [{**master, "state": "absent"}], [{**stores, "state": "absent"}], []]
    present, *others = rendered("kvcache", ORDER, pools=pools)
    assert (present, *others[:4]) == ([0], [1], [2], [1], []), "one call for each host"
    assert others[4:] == [[1], [0], [1], [0], []], "of a teardown"
