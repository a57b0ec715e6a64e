# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A chart of stacked bars as SVG, for documents with a light or a dark background."""

from __future__ import annotations

import typing as t
from xml.sax.saxutils import escape

COLORS = ("#3b6ea8", "#e0a030", "#7a5195", "#5b8c5a", "#b0413e")
WIDTH, LABELS, BAR, GAP, TOP = 860, 300, 26, 16, 70


def bars(title: str, unit: str, rows: t.Mapping[str, t.Mapping[str, float]]) -> str:
    """One bar for each row, stacked by its parts, with the sum behind it.

    :param rows: label to part to value; all rows have the same parts
    """
    parts = list(next(iter(rows.values())))
    largest = max(sum(row.values()) for row in rows.values()) or 1.0
    scale = (WIDTH - LABELS - 90) / largest
    height = TOP + len(rows) * (BAR + GAP)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" font-family="sans-serif"'
        f' font-size="13"><title>{escape(title)}</title>',
        "<style>text{fill:#24292f}@media(prefers-color-scheme:dark){text{fill:#e6edf3}}</style>",
        f'<text x="0" y="18" font-size="16" font-weight="bold">{escape(title)} ({escape(unit)})</text>',
    ]
    x = 0.0
    for part, color in zip(parts, COLORS):
        out.append(f'<rect x="{x:.0f}" y="32" width="12" height="12" fill="{color}"/>')
        out.append(f'<text x="{x + 17:.0f}" y="43">{escape(part)}</text>')
        x += 45 + 7.2 * len(part)
    for number, (label, row) in enumerate(rows.items()):
        y = TOP + number * (BAR + GAP)
        out.append(f'<text x="0" y="{y + 18}">{escape(label)}</text>')
        x = float(LABELS)
        for part, color in zip(parts, COLORS):
            width = row[part] * scale
            out.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{color}">'
                f"<title>{escape(part)}: {row[part]:.1f} {escape(unit)}</title></rect>"
            )
            x += width
        out.append(f'<text x="{x + 8:.1f}" y="{y + 18}">{sum(row.values()):.0f}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"
