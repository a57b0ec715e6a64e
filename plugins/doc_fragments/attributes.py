# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation shared by all modules."""

from __future__ import annotations


class ModuleDocFragment:
    """``agentfleet.metal.attributes`` (a module that changes state) and ``.info`` (one that only reads)."""

    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    support: full
    description: Predicts every change without making it; the plan is the one that a real run carries out.
  diff_mode:
    support: full
    description: Shows before and after of every planned step.
  idempotent:
    support: full
    description: A second run with the same options plans nothing and changes nothing.
  platform:
    support: full
    platforms: linux
    description: Runs on Linux hosts with Python 3.9 or newer.
"""

    INFO = r"""
options: {}
attributes:
  check_mode:
    support: full
    description: Only reads, so check mode makes no difference.
  diff_mode:
    support: N/A
    description: Changes nothing.
  idempotent:
    support: full
    description: Changes nothing.
  platform:
    support: full
    platforms: linux
    description: Runs on Linux hosts with Python 3.9 or newer.
"""
