#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module image_store: see DOCUMENTATION."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_store
short_description: Keep a host's content-addressed store of microVM images
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Registers bundles that M(agentfleet.metal.rootfs_image) built and that were copied to the host, and points names
    to digests.
  - Every file is verified against its SHA-256 before the image appears in the store; names are switched atomically.
    A failure leaves the store as it was.
  - Call it first without O(incoming) and transfer only what is returned in RV(missing), so that no host gets
    the same bytes twice.
extends_documentation_fragment: agentfleet.metal.attributes
options:
  images:
    description: The images that names of this host shall point to.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the image.
        type: str
        required: true
      digest:
        description:
          - SHA-256 of the image, as RV(agentfleet.metal.rootfs_image#module:images[].image_digest).
          - May be empty in check mode, when the builder has not built the image yet.
        type: str
        required: true
  incoming:
    description:
      - Directory of the host where bundles were copied to as C(agentfleet-DIGEST.tar.zst). Missing images are registered from
        there and their bundles removed.
    type: path
"""

EXAMPLES = r"""
- name: Point the name to the image if the host has it
  agentfleet.metal.image_store:
    images: "{{ built.store }}"
  register: store

- name: Send what is missing
  ansible.builtin.copy:
    src: "{{ item.bundle }}"
    dest: /var/tmp/agentfleet-{{ item.image_digest }}.tar.zst
    mode: "0600"
  loop: "{{ built.images | selectattr('name', 'in', store.missing) }}"

- name: Register it
  agentfleet.metal.image_store:
    images: "{{ built.store }}"
    incoming: /var/tmp
  when: store.missing | length > 0
"""

RETURN = r"""
plan:
  description: The steps.
  returned: always
  type: list
  elements: dict
missing:
  description: Names of wanted images whose digest the store does not hold.
  returned: always
  type: list
  elements: str
images:
  description: All images in the store.
  returned: always
  type: list
  elements: dict
  contains:
    digest:
      description: SHA-256 of the image.
      type: str
    names:
      description: Names that point to it.
      type: list
      elements: str
    size_bytes:
      description: Size of the image.
      type: int
    kernel_release:
      description: Release of its kernel.
      type: str
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge
from ansible_collections.agentfleet.metal.plugins.module_utils._store import Store

ARGUMENTS = {
    "images": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "name": {"type": "str", "required": True},
            "digest": {"type": "str", "required": True},
        },
    },
    "incoming": {"type": "path"},
}


def build(params: dict, host: Host) -> Store:
    """The resource of one call; raises Refused for bad options."""
    return Store(host, params)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    converge(module, lambda: build(module.params, Host()))


if __name__ == "__main__":
    main()
