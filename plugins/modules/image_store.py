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
  - Registers images that M(agentfleet.metal.rootfs_image) built and whose files were copied to the host, and points names
    to digests.
  - Every file is verified against its SHA-256 before the image appears in the store; names are switched atomically.
    A failure leaves the store as it was.
  - Files are stored by content, so that images share their kernel. Call it first without O(incoming) and transfer only
    what is returned in RV(blobs), so that no host gets the same bytes twice. An image that is made of another one which
    the host has is sent as the difference to it.
extends_documentation_fragment: agentfleet.metal.attributes
options:
  state:
    description:
      - V(present) registers images and points names to them.
      - V(absent) removes the names of O(images). The images themselves go with O(gc) once nobody uses them.
    type: str
    choices: [present, absent]
    default: present
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
          - SHA-256 of the image, as RV(agentfleet.metal.rootfs_image#module:images[].image_digest). Needed with
            O(state=present).
          - May be empty in check mode, when the builder has not built the image yet.
        type: str
      files:
        description: Its files, as RV(agentfleet.metal.rootfs_image#module:store) has them. Not needed for images that are there.
        type: dict
        default: {}
      deltas:
        description: Images to which the builder has the difference, as RV(agentfleet.metal.rootfs_image#module:store) has them.
        type: list
        elements: str
        default: []
  incoming:
    description:
      - Directory of the host where the files named in RV(blobs) were copied to, each with C(agentfleet-) before its name.
        Missing images are registered from there and their files removed.
    type: path
  verify:
    description:
      - Hash all images of the store again. A damaged file of an image in O(images) counts as missing, so that sending it
        repairs the image; any other damage is an error that names image and file.
    type: bool
    default: false
  gc:
    description:
      - Remove images that nobody uses, with the files that no other image has. An image is in use while a name points to it,
        the definition of a microVM or a snapshot mentions it, or a process has it open or mapped.
    type: bool
    default: false
  keep:
    description: How many of the unused images O(gc) keeps, the latest that arrived.
    type: int
    default: 0
  keep_seconds:
    description: Unused images that arrived within this time are kept by O(gc).
    type: int
    default: 0
"""

EXAMPLES = r"""
- name: Point the name to the image if the host has it
  agentfleet.metal.image_store:
    images: "{{ built.store }}"
  register: store

- name: Send what is missing
  ansible.builtin.copy:
    src: "{{ built.blobs }}/{{ item }}"
    dest: /var/tmp/agentfleet-{{ item }}
    mode: "0600"
  loop: "{{ store.blobs }}"

- name: Register it
  agentfleet.metal.image_store:
    images: "{{ built.store }}"
    incoming: /var/tmp
  when: store.missing | length > 0

- name: Remove what no microVM and no name uses, but for the last two
  agentfleet.metal.image_store:
    gc: true
    keep: 2

- name: Look for damaged images
  agentfleet.metal.image_store:
    verify: true
"""

RETURN = r"""
plan:
  description: The steps.
  returned: always
  type: list
  elements: dict
missing:
  description: Names of wanted images that the store does not hold, or holds damaged.
  returned: always
  type: list
  elements: str
blobs:
  description: File names, in the builder's directory of blobs, of what must be sent for the missing images.
  returned: always
  type: list
  elements: str
damaged:
  description: With O(verify), the damaged files.
  returned: always
  type: list
  elements: dict
  contains:
    digest:
      description: SHA-256 of the image.
      type: str
    file:
      description: Name of its file.
      type: str
    expected:
      description: SHA-256 that the file should have.
      type: str
    found:
      description: SHA-256 that it has. Empty when it cannot be read.
      type: str
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
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "images": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "name": {"type": "str", "required": True},
            "digest": {"type": "str"},
            "files": {"type": "dict", "default": {}},
            "deltas": {"type": "list", "elements": "str", "default": []},
        },
    },
    "incoming": {"type": "path"},
    "verify": {"type": "bool", "default": False},
    "gc": {"type": "bool", "default": False},
    "keep": {"type": "int", "default": 0},
    "keep_seconds": {"type": "int", "default": 0},
}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    converge(module, lambda: Store(Host(), module.params))


if __name__ == "__main__":
    main()
