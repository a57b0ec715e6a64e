# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report as filters, so that it is made on the controller without a task for each host."""

from __future__ import annotations

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
