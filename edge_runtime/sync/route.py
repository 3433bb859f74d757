# SPDX-License-Identifier: Apache-2.0
"""The cheapest way to a release over a graph of patches. No I/O."""

import heapq
from collections.abc import Collection, Iterable

from edge_runtime.sync.head import Way

# Of a request and its answer, beside the file: a plain HTTP header each way.
REQUEST_BYTES = 350


def cheapest(
    starts: Collection[str], target: str, ways: Iterable[Way]
) -> tuple[Way, ...] | None:
    """Find the patches with the fewest bytes that lead to a release.

    Bytes come first here, unlike in :func:`edge_runtime.agent.plan.find_chain`, whose
    files lie on the disk already. Of equal ones the way with fewer patches is taken.

    A device that has the weights already, active or kept, needs a patch that releases
    them again, whichever it is: without one it would stay at what is active, and below
    the counter of the release.

    Args:
        starts: First 12 hexadecimal digits of the weights that the device can begin at.
        target: The same of the release.
        ways: What there is to be had.

    Returns:
        What to fetch, in the order of application, one at least; None if nothing leads
        there.
    """
    if target in starts:
        again = [way for way in ways if way.target == target]
        return (min(again, key=lambda way: way.size),) if again else None
    onward: dict[str, list[Way]] = {}
    for way in ways:
        onward.setdefault(way.parent, []).append(way)
    waiting: list[tuple[int, int, int, str, tuple[Way, ...]]] = []
    for number, start in enumerate(sorted(starts)):
        waiting.append((0, 0, number, start, ()))
    done, pushed = set[str](), len(waiting)
    while waiting:
        cost, count, _, at, route = heapq.heappop(waiting)
        if at == target:
            return route
        if at in done:
            continue
        done.add(at)
        for way in onward.get(at, ()):
            pushed += 1  # ties never compare routes
            total = cost + way.size + REQUEST_BYTES
            step = (total, count + 1, pushed, way.target, (*route, way))
            heapq.heappush(waiting, step)
    return None
