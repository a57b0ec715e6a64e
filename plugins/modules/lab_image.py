#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: lab_image
short_description: Build and cache the disk image of lab hosts
version_added: 0.1.0
description:
  - Builds the disk of an emulated bare-metal host, a distribution with its own kernel, GRUB and everything that the roles of this
    collection use, with C(mmdebstrap) and C(mke2fs).
  - Needs no loop device, mount, tap or bridge, and no root where user namespaces with subordinate ids work.
  - The image is cached under the digest of its definition and shared by all labs. It has an SSH key pair and a host key of its own.
  - Runs on the machine that runs the lab, that is, delegated to the controller.
options:
  cache_dir:
    description: Directory of the cached images; created with mode 0700.
    type: path
    default: ~/.cache/agentfleet/lab
  distribution:
    description: The distribution of the image; by default that of this machine where it is Ubuntu, else Debian.
    type: str
    choices: [debian, ubuntu]
  suite:
    description:
      - The suite; by default C(trixie) for Debian and this machine's own for Ubuntu.
      - Its systemd must be 256 or newer for host names and lab addresses to be set (Debian 13, Ubuntu 25.04).
    type: str
  mirror:
    description: URL of the mirror; by default the one of this machine's own apt sources.
    type: str
  keyring:
    description: Keyring that verifies the mirror; by default the distribution's archive keyring.
    type: path
  packages:
    description: Packages besides those that every lab host has.
    type: list
    elements: str
    default: []
  files:
    description: Text files to put in the image, by absolute path; mode 0644, owned by root.
    type: dict
    default: {}
extends_documentation_fragment:
  - agentfleet.metal.attributes
seealso:
  - module: agentfleet.metal.lab_host
author:
  - agentfleet.metal contributors (@agentfleet)
"""

EXAMPLES = r"""
- name: Build the image of lab hosts, or find it in the cache
  agentfleet.metal.lab_image:
    packages: [strace]
  register: lab_image_result
  delegate_to: localhost
"""

RETURN = r"""
image:
  description: The image.
  returned: success
  type: dict
  contains:
    path:
      description: Its directory, as O(agentfleet.metal.lab_host#module:image) takes it.
      type: str
    digest:
      description: SHA-256 of the definition.
      type: str
    suite:
      description: The suite it is made of.
      type: str
    present:
      description: Whether it is in the cache.
      type: bool
plan:
  description: The steps that were carried out, or would be in check mode.
  returned: success
  type: list
  elements: dict
refused:
  description: The option, value, problem and remedy, when the wish is refused.
  returned: failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._lab_image import LabImage
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "cache_dir": {"type": "path", "default": "~/.cache/agentfleet/lab"},
            "distribution": {"type": "str", "choices": ["debian", "ubuntu"]},
            "suite": {"type": "str"},
            "mirror": {"type": "str"},
            "keyring": {"type": "path"},
            "packages": {"type": "list", "elements": "str", "default": []},
            "files": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    converge(module, lambda: LabImage(Host(), module.params))


if __name__ == "__main__":
    main()
