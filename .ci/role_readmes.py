# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write each role's README from its argument specs; with --check only say which are out of date."""

from __future__ import annotations

import json
import re
import sys
import typing as t
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
MARKUP = re.compile(r"\b[A-Z]\(([^()]*)\)")  # O(option), V(value), M(module) and the like


def code(match: re.Match[str]) -> str:
    """Marked-up words as Markdown; of a plugin (name#type) its name, of its option (name#type:option) both."""
    place, _hash, named = match.group(1).partition("#")
    if named and re.fullmatch(r"[\w.]+", place):
        option = named.partition(":")[2]
        return f"`{option}` of `{place}`" if option else f"`{place}`"
    return f"`{match.group(1)}`"


def text(value: str | list[str], separator: str = "\n\n") -> str:
    """A description (a string or a list of paragraphs) as Markdown."""
    paragraphs = [value] if isinstance(value, str) else value
    return separator.join(MARKUP.sub(code, " ".join(paragraph.split())) for paragraph in paragraphs)


def rows(options: dict[str, dict[str, t.Any]], prefix: str = "") -> t.Iterator[str]:
    """A table row for each option, suboptions below their parent with its name before theirs."""
    for name, option in options.items():
        kind = option.get("type", "str")
        if "elements" in option:
            kind += f" of {option['elements']}"
        default = "**required**" if option.get("required") else ""
        if "default" in option:
            default = f"`{json.dumps(option['default'])}`"
        words = text(option["description"], " ")
        if "choices" in option:
            words += f" One of {', '.join(f'`{choice}`' for choice in option['choices'])}."
        yield f"| `{prefix}{name}` | {kind} | {default} | {words.replace('|', chr(92) + '|')} |"
        parent = prefix + name + ("[]" if option.get("elements") == "dict" else "") + "."
        yield from rows(option.get("options", {}), parent)


def render(role: Path) -> str:
    """The README of one role."""
    specs = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]
    parts = [
        "<!-- Generated from meta/argument_specs.yml by `make docs`; do not edit. -->",
        f"# agentfleet.metal.{role.name}",
    ]
    for entry, spec in specs.items():
        if entry != "main":
            parts.append(f"## Entry point `{entry}`")
        parts += [f"**{text(spec['short_description'])}**", text(spec["description"])]
        if spec.get("options"):
            table = ["| variable | type | default | meaning |", "|---|---|---|---|", *rows(spec["options"])]
            parts += [f"{'##' if entry == 'main' else '###'} Variables", "\n".join(table)]
        if "examples" in spec:
            parts += [f"{'##' if entry == 'main' else '###'} Example", f"```yaml\n{spec['examples'].strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Write or check all READMEs; the number of those out of date in check mode."""
    stale = 0
    for spec in sorted(ROOT.glob("roles/*/meta/argument_specs.yml")):
        readme = spec.parent.parent / "README.md"
        wanted = render(readme.parent)
        if readme.exists() and readme.read_text() == wanted:
            continue
        if "--check" in sys.argv:
            print(f"{readme.relative_to(ROOT)} is out of date: run `make docs`", file=sys.stderr)
            stale += 1
        else:
            readme.write_text(wanted)
            print(f"wrote {readme.relative_to(ROOT)}")
    return stale


if __name__ == "__main__":
    sys.exit(main())
