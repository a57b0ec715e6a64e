# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report as filters, so that it is made on the controller without a task for each host."""

from __future__ import annotations

DOCUMENTATION = r"""
name: report
short_description: Make the report of a run
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Makes one document of the facts, microVMs and KV-cache pools of all hosts, following C(docs/report.schema.json).
positional: run
options:
  _input:
    description:
      - Host name to a dictionary of C(metal) (the facts), C(microvms) (C(instances) of
        M(agentfleet.metal.microvm_info)), C(pools) and C(engine_version) (of M(agentfleet.metal.kvcache_pool_info)).
    type: dict
    required: true
  run:
    description: The C(time) and C(ansible_version) of the run.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Write the report
  ansible.builtin.copy:
    content: "{{ hosts | agentfleet.metal.report(run) | to_nice_json }}"
    dest: report.json
"""

RETURN = r"""
_value:
  description: The document.
  type: dict
"""

import json
import re
from pathlib import Path

from ansible_collections.agentfleet.metal.plugins.module_utils._report import report, summary
from ansible_collections.agentfleet.metal.plugins.module_utils._report_html import page


def collection_version():
    """This collection's version: of an installed one from its manifest, of a working tree from galaxy.yml."""
    root = Path(__file__).resolve().parents[2]
    manifest = root / "MANIFEST.json"
    if manifest.exists():
        return json.loads(manifest.read_text(encoding="utf-8"))["collection_info"]["version"]
    return re.search(r"^version: (\S+)", (root / "galaxy.yml").read_text(encoding="utf-8"), re.M)[1]


def make(hosts, run):
    """The report with this collection's version in it."""
    return report(hosts, {**run, "collection_version": collection_version()})


class FilterModule:
    """The filters of the report."""

    def filters(self):
        """Filters by name."""
        return {"report": make, "report_html": page, "report_summary": summary}
