# SPDX-License-Identifier: Apache-2.0
"""Which release the devices of a simulated fleet run, as a picture.

It has a ground of its own, so it is the same on light and dark pages, and it is narrow,
so that its words are legible on a phone.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.simulate_fleet import Simulated

WIDTH, HEIGHT = 480, 330
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 48, 64
BLUES = "#0b5a8a", "#3a7aa6", "#164766", "#2a6a97"
BAD = "#c2570c"


def draw(found: "Simulated") -> str:
    """Return the picture as SVG."""
    counters = sorted({counter for day in found.running for counter in day})
    bad = {r.counter for r in found.releases if r.what == "bad"}
    title = f"Which release {found.devices:,} devices run over {found.days} days"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="12" role="img" '
        f'aria-label="{title}">',
        f"<title>{title}</title>",
        "<style>text { fill: #1c2b36 } .small { fill: #47596a } "
        ".on { fill: #fff; font-weight: 600 } .grid { stroke: #dbe3ea }</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#f7f9fb"/>',
        f'<text x="14" y="20" font-weight="600">{title}</text>',
        '<text class="small" x="14" y="36">share of the devices, by release counter; '
        "bad links, weeks asleep</text>",
    ]
    for share in (0, 25, 50, 75, 100):
        y = _y(share / 100)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share}%</text>'
        )
    below = [0.0] * len(found.running)
    labels = []
    for number, counter in enumerate(counters):
        shares = [day.get(counter, 0) / found.devices for day in found.running]
        above = [a + b for a, b in zip(below, shares, strict=True)]
        colour = BAD if counter in bad else BLUES[number % len(BLUES)]
        words = f"release {counter}: at most {max(shares):.1%} of the devices"
        parts.append(
            f'<path fill="{colour}" d="{_area(below, above)}"><title>{words}</title>'
            "</path>"
        )
        widest = max(range(len(shares)), key=shares.__getitem__)
        if shares[widest] > 0.5:
            days = [n for n, share in enumerate(shares) if share > 0.5]
            x = _x(sum(days) / len(days), len(shares))
            y = _y((below[widest] + above[widest]) / 2)
            labels.append(
                f'<text class="on" x="{x:.1f}" y="{y + 4:.1f}" '
                f'text-anchor="middle">{counter}</text>'
            )
        below = above
    parts += labels
    parts += list(_days(found))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _days(found: "Simulated") -> "list[str]":
    count, floor = len(found.running), HEIGHT - BOTTOM
    step = 10 if count > 30 else 2
    parts = [
        f'<text x="{_x(day, count):.1f}" y="{floor + 17}" '
        f'text-anchor="middle">{day}</text>'
        for day in range(0, count, step)
    ]
    parts.append(
        f'<text class="small" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{floor + 33}" '
        'text-anchor="middle">day</text>'
    )
    for release in found.releases:
        x = _x(release.day, count)
        colour = BAD if release.what != "release" else "#47596a"
        parts.append(
            f'<path stroke="{colour}" stroke-width="2" d="M{x:.1f} {floor}v5"/>'
        )
    exposed = found.counts["exposed"] / found.devices
    if exposed:
        parts.append(
            f'<rect x="14" y="{HEIGHT - 22}" width="11" height="11" fill="{BAD}"/>'
            f'<text x="31" y="{HEIGHT - 12}">a bad release, halted and taken back: '
            f"{exposed:.1%} ran it</text>"
        )
    return parts


def _x(day: float, count: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * day / max(1, count - 1)


def _y(share: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)


def _area(below: list[float], above: list[float]) -> str:
    count = len(below)
    up = [f"{_x(n, count):.1f} {_y(share):.1f}" for n, share in enumerate(above)]
    down = [f"{_x(n, count):.1f} {_y(share):.1f}" for n, share in enumerate(below)]
    return "M" + "L".join([*up, *reversed(down)]) + "Z"
