# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: host_settled
short_description: Tell in one call whether a host is as several modules would leave it
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Makes the plans of several modules of this collection on the host and tells which are not empty.
  - The roles P(agentfleet.metal.kernel#role), P(agentfleet.metal.cxl#role) and P(agentfleet.metal.vfio#role) call their modules
    only where something is to be done, so that a run that changes nothing costs one call instead of one for each module.
  - A module that would refuse, fail or warn counts as not settled, so that it speaks for itself when it is called.
extends_documentation_fragment: agentfleet.metal.attributes.info
options:
  resources:
    description:
      - The options of each module, by the module's name. V(kernel_tunables), V(kernel_cmdline), V(cxl_region), V(dax_device),
        V(memory_tiering), V(sriov_vfs) and V(vfio_bind) are known.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: See whether anything is to be done
  agentfleet.metal.host_settled:
    resources:
      kernel_cmdline:
        parameters: {intel_iommu: "on"}
      cxl_region:
        regions:
          - {type: ram, memdevs: ["0x1", "0x2"]}
  register: state
"""

RETURN = r"""
settled:
  description: Whether every module's plan is empty, no reboot is due, and none has anything to warn of.
  returned: success
  type: bool
pending:
  description: The modules for which that is not so.
  returned: success
  type: list
  elements: str
  sample: [vfio_bind]
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused, converge
from ansible_collections.agentfleet.metal.plugins.module_utils._settled import RESOURCES, Settled


def complete(name: str, options: t.Any) -> dict[str, t.Any]:
    """A module's options as Ansible would hand them to it; raises Refused."""
    option = f"resources.{name}"
    if name not in RESOURCES:
        raise Refused(option, options, "not a module that can be asked", f"Use some of {', '.join(RESOURCES)}")
    if not isinstance(options, dict):
        raise Refused(option, options, "not a dictionary of options", f"See ansible-doc agentfleet.metal.{name}")
    checked = ArgumentSpecValidator(RESOURCES[name][0]).validate(options)
    if checked.error_messages:
        problem = "; ".join(checked.error_messages)
        raise Refused(option, options, problem, f"See ansible-doc agentfleet.metal.{name}")
    return checked.validated_parameters


def build(params: dict[str, t.Any], host: Host) -> Settled:
    """The resource of these parameters; raises Refused."""
    return Settled(host, {name: complete(name, options) for name, options in params["resources"].items()})


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={"resources": {"type": "dict", "required": True}},
        supports_check_mode=True,
    )
    converge(module, lambda: build(module.params, Host()))


if __name__ == "__main__":
    main()
