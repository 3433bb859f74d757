# SPDX-License-Identifier: Apache-2.0
"""Made-up fleets in a database, of any size and condition; the same seed, the same."""

import hashlib
import random

from packager.fleet.database import DAY_S, Row, add_reports

NOW = 1_796_169_600  # 2026-12-02
WEEK = 7 * DAY_S
TROUBLES = [
    ("refused", "the trial failed: outputs differ by 0.{n} from the golden ones"),
    ("refused", "accuracy 0.{n}, at least 0.90 is asked for"),
    ("rolled back", "by hand: board {n} answers too slowly"),
    ("blocked", "needs {n} bytes, there are 1024: no space left on /var/lib/dpu"),
    ("cut off", "the trial ended by signal 9"),
]


def target(round_):
    """Return the fingerprint of a round's weights."""
    return hashlib.sha256(b"%d" % round_).hexdigest()


def add_release(connection, counter, round_, at, *, patch=9_400, full=620_000):
    with connection:
        row = (counter, counter, round_, target(round_), at, patch, full, 0)
        connection.execute("INSERT INTO release VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)


def row(device, n, at, round_, **also):
    fields = {
        "device": device,
        "n": n,
        "at": at,
        "received": at + 60,
        "head_version": round_,
        "counter": round_,
        "round": round_,
        "target": target(round_),
        "outcome": "applied",
        "reason": "",
        "proved": True,
        "running": target(round_),
        "running_round": round_,
        "running_counter": round_,
        "key_id": f"{abs(hash(device)) % (1 << 64):016x}",
        "name": "digits",
        "runtime": "0.5.0",
        "month_bytes": 31_337,
    }
    return Row(**fields | also)


def fill(
    connection,
    devices,
    *,
    rounds=5,
    failing=0.002,
    silent=0.01,
    claimed=0.002,
    groups=("", "lab", "roof"),
    seed=3,
    now=NOW,
):
    """Fill a database with a fleet of some condition; a release a week."""
    rng = random.Random(seed)
    for round_ in range(1, rounds + 1):
        add_release(connection, round_, round_, now - (rounds - round_) * WEEK - DAY_S)

    def reports():
        for number in range(devices):
            device, group = f"board{number}", groups[number % len(groups)]
            proved = rng.random() >= claimed
            # A silent device ends some weeks ago, whatever it ran then.
            end = now - rng.randrange(4, 40) * DAY_S if rng.random() < silent else now
            for round_ in range(1, rounds + 1):
                came = now - (rounds - round_) * WEEK - DAY_S
                at = came + int(rng.expovariate(1 / (0.4 * DAY_S)))
                if at >= end:
                    continue
                also = {"proved": proved, "group": group}
                if round_ == rounds and rng.random() < failing:
                    outcome, reason = TROUBLES[rng.randrange(len(TROUBLES))]
                    also |= {
                        "outcome": outcome,
                        "reason": reason.format(n=rng.randrange(100, 999)),
                        "running": target(round_ - 1),
                        "running_round": round_ - 1,
                        "running_counter": round_ - 1,
                    }
                yield row(device, round_, at, round_, **also)

    add_reports(connection, reports(), now=now)
