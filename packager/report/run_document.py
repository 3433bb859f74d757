# SPDX-License-Identifier: Apache-2.0
"""A run's rounds as a document: how good, bytes, where the changes were."""

from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate

from edge_runtime.formats.model_folder import SHARES
from packager.report.curves import Series, column_chart, line_chart
from packager.report.document import Document, Section, Table
from packager.report.frontier import frontier_chart, frontier_rows
from packager.report.patch_document import link_section
from packager.report.records import OtherRound, OtherRun, RoundEntry, RunRecord
from packager.report.svg import heat_map
from packager.report.words import natural, percent, short_bytes, spaced, times

DENSE = "dense part"
ROUNDS = "round"
# What the bytes of a round are the size of.
SOURCES = {
    "patch file": "its patch file",
    "packed now": "a patch packed for this report",
    "weight file": "its weight file",
    "nothing": "nothing to send",
    "not packable": "cannot be packed",
}


def run_document(record: RunRecord) -> Document:
    """Return the report of a run, from :func:`run_record`."""
    sections = [
        _metric(record),
        _frontier(record),
        _bytes(record),
        _cumulative(record),
        _shares(record),
        _overlap(record),
        link_section(record["links"], "median patch"),
    ]
    facts = [
        ("model", record["model"]),
        (
            "rounds",
            f"{len(record['rounds'])}, {record['patches']} of them sent a patch",
        ),
        ("method", _method(record["rounds"][-1])),
    ]
    if others := ", ".join(other["path"] for other in record["beside"]):
        facts.append(("compared with", others))
    kept = [section for section in sections if section is not None]
    return Document(f"Run {record['run']}", _figures(record), facts, kept)


def _method(entry: RoundEntry) -> str:
    if not entry.get("method"):
        return "not stated"
    ratio = entry.get("ratio")
    return f"{entry['method']}" + (f", ratio {ratio:g}" if ratio else "")


def _figures(record: RunRecord) -> list[tuple[str, str]]:
    rounds, sent = record["rounds"], record["bytes"]
    full = record["full_bytes"] * record["patches"]
    figures = [(short_bytes(sent), f"sent in {record['patches']} patches")]
    if sent:
        figures.append((times(full / sent, 0), "smaller than full weights"))
    name = rounds[-1]["metric"]
    known = [e["test_metric"] for e in rounds if e["test_metric"] is not None]
    if known:
        figures.append((_value(known[-1], name, 1), f"test {name}, last round"))
    for other in _comparable(record):
        if (last := other["rounds"][-1]["test_metric"]) is not None:
            figures.append((_value(last, name, 1), f"test {name} of {other['run']}"))
    return figures


def _comparable(record: RunRecord) -> list[OtherRun]:
    """Return the runs beside this one that are measured by the same metric."""
    name = record["rounds"][-1]["metric"]
    return [o for o in record["beside"] if o["rounds"][-1]["metric"] == name]


def _label(entry: OtherRound) -> str:
    if entry["outcome"] == "kept_base":
        return "no update"
    return "began anew" if entry.get("reinitialised") else "updated"


def _metric(record: RunRecord) -> Section | None:
    lines, name, others = [], record["rounds"][-1]["metric"], _comparable(record)
    factor = 100 if name in SHARES else 1
    runs: list[tuple[str, Sequence[OtherRound], int]]
    runs = [(record["run"], record["rounds"], 1)]
    runs += [(o["run"], o["rounds"], 2 + n) for n, o in enumerate(others[:3])]
    for run, rounds, colour in runs:
        for dashed in (False, True):
            known = list(_measured(rounds, validation=dashed))
            if known:
                points = [(e["round"], factor * value) for e, value in known]
                marks = ["" if dashed else _symbol(e) for e, _ in known]
                words = f"{run}, {'validation' if dashed else 'test'}"
                lines.append(Series(words, points, colour, dashed, marks))
    if not lines:
        return None
    beside = {
        other["run"]: {e["round"]: e["test_metric"] for e in other["rounds"]}
        for other in others
    }
    rows = [
        [
            str(e["round"]),
            spaced(e["samples"]) if e["samples"] is not None else "-",
            _label(e),
            _value(e["val_metric"], name),
            _value(e["test_metric"], name),
            *(_value(known.get(e["round"]), name) for known in beside.values()),
        ]
        for e in record["rounds"]
    ]
    columns = [ROUNDS, "samples", "<outcome", "validation", "test"]
    columns += [f"test, {run}" for run in beside]
    title = name[0].upper() + name[1:]
    picture = line_chart(
        f"{title} by round",
        lines,
        axes=(ROUNDS, name),
        form=lambda y: f"{y:.3g} %" if name in SHARES else f"{y:.4g}",
    )
    lower = record["rounds"][-1]["better"] == "lower"
    caption = ("Lower is better. " if lower else "") + (
        "Solid: test samples; dashed: validation samples. A ring is a round without an "
        "update: it got no better, and nothing was sent. A diamond is a round that "
        "began anew from the init weights."
    )
    legend = [(colour, run) for run, _, colour in runs]
    table = Table(columns, rows)
    return Section(title, "", table, picture, caption, legend)


def _frontier(record: RunRecord) -> Section | None:
    points, name = record["frontier"], record["rounds"][-1]["metric"]
    if not points:
        return None
    factor = 100 if name in SHARES else 1
    unit = f"points of {name}" if name in SHARES else name
    columns = ["run", "runs", unit, "bytes behind the first", "first", "all"]
    drawn = [point for point in points if point["bytes"]]
    title = f"{unit[0].upper()}{unit[1:]} by bytes"
    return Section(
        title,
        "Beside full updating of the same seed, the mean over all common rounds.",
        Table(columns, list(frontier_rows(points, factor))),
        frontier_chart(title, drawn, unit=unit, factor=factor) if drawn else "",
        "Further up is better, further left is less to send. The dashed line joins the "
        "runs that no other beats in both; bars are standard errors over seeds.",
    )


def _measured(
    rounds: Sequence[OtherRound], *, validation: bool
) -> Iterator[tuple[OtherRound, float]]:
    """Yield each round whose metric is known, with it."""
    for entry in rounds:
        value = entry["val_metric"] if validation else entry["test_metric"]
        if value is not None:
            yield entry, value


def _symbol(entry: OtherRound) -> str:
    return {"no update": "ring", "began anew": "diamond"}.get(_label(entry), "dot")


def _value(value: float | None, metric: str, *digits: int) -> str:
    if value is None:
        return "-"
    return percent(value, 1, *digits) if metric in SHARES else f"{value:.5g}"


def _bytes(record: RunRecord) -> Section:
    rounds, full = record["rounds"], record["full_bytes"]
    rows = []
    for e in rounds:
        size, so_far, tensors = e["bytes"], e["cumulative_bytes"], e["tensors"]
        sparse = [t for t in tensors if not t["dense"]]
        rows.append(
            [
                str(e["round"]),
                spaced(size) if size is not None else "-",
                spaced(so_far) if so_far is not None else "-",
                percent(size, full) if size is not None else "-",
                spaced(sum(t["changed"] for t in sparse)) if tensors else "-",
                spaced(sum(t["changed"] for t in tensors if t["dense"]))
                if tensors
                else "-",
                SOURCES.get(e["bytes_from"], e["bytes_from"]),
            ]
        )
    columns = [
        ROUNDS,
        "bytes",
        "so far",
        "of the weights",
        "weights changed",
        DENSE,
        "<size of",
    ]
    text = (
        "What one device downloads; lower is better. The first round's patch is part "
        "of the bundle that the device is installed from. The dense part is all biases "
        "and normalisation values."
    )
    picture = column_chart(
        "Bytes of each round's patch",
        [(e["round"], e["bytes"] or 0) for e in rounds],
        axes=(ROUNDS, "bytes"),
        form=short_bytes,
    )
    return Section("Bytes per round", text, Table(columns, rows), picture)


def _cumulative(record: RunRecord) -> Section | None:
    rounds, full = record["rounds"], record["full_bytes"]
    points = [
        (e["round"], e["cumulative_bytes"]) for e in rounds if e["cumulative_bytes"]
    ]
    if not points:
        return None
    lines = [Series(record["run"], points, 1)]
    for number, other in enumerate(record["beside"][:3]):
        known = [(e["round"], e["cumulative_bytes"]) for e in other["rounds"]]
        if known := [(x, y) for x, y in known if y]:
            lines.append(Series(other["run"], known, 2 + number))
    sent = accumulate(full * (e["outcome"] != "kept_base") for e in rounds)
    each = [(e["round"], y) for e, y in zip(rounds, sent, strict=True) if y]
    if not any(line.points == each for line in lines):
        lines.append(Series("full weights instead", each, 5, dashed=True))
    by_round: dict[float, int] = dict(each)
    rows = []
    for line in lines:
        last, size = line.points[-1]
        smaller = f"{by_round[last] / size:.1f}" if last in by_round else "-"
        rows.append([line.name, short_bytes(size), smaller])
    picture = line_chart(
        "Bytes sent so far, logarithmic",
        lines,
        axes=(ROUNDS, "bytes so far"),
        form=short_bytes,
        log=True,
    )
    columns = ["", "after the last round", "times smaller than full weights"]
    legend = [(line.colour, line.name) for line in lines]
    text = (
        "A round that trained every weight is counted with its whole weight file, "
        "which would have to be sent. A round without an update sends nothing in any "
        "case."
    )
    table = Table(columns, rows)
    caption = "Each step up is ten times as much."
    return Section("Bytes so far", text, table, picture, caption, legend)


def _shares(record: RunRecord) -> Section | None:
    sent = [e for e in record["rounds"] if e["tensors"]]
    if not sent:
        return None
    # What trains freely in one round may be frozen, and so selectable, in another.
    free = {t["name"] for e in sent for t in e["tensors"] if t["dense"]}
    known = [{name: (c, n) for name, c, n in _layers(e, free)} for e in sent]
    names = sorted({name for shares in known for name in shares}, key=_layer_order)
    grid = [(name, [_ratio(shares.get(name)) for shares in known]) for name in names]
    columns = [str(e["round"]) for e in sent]
    picture = heat_map(
        "Share of changed weights by layer and round",
        grid,
        columns=columns,
        form=_percent,
        corner=ROUNDS,
    )
    rows = [[name, *(_percent(v) for v in values)] for name, values in grid]
    text = (
        "Share of each layer's weights that a round changes. The dense part is every "
        "bias and normalisation value together."
    )
    table = Table(["layer", *columns], rows)
    caption = "A column is a round; the stronger the colour, the larger the share."
    return Section("What changes, layer by layer", text, table, picture, caption)


def _layers(entry: RoundEntry, free: Collection[str]) -> Iterator[tuple[str, int, int]]:
    """Yield name, changed and all elements of the selectable tensors, then the rest."""
    dense = [t for t in entry["tensors"] if t["name"] in free]
    for tensor in entry["tensors"]:
        if tensor["name"] not in free:
            yield tensor["name"], tensor["changed"], tensor["size"]
    if dense:
        yield DENSE, sum(t["changed"] for t in dense), sum(t["size"] for t in dense)


def _layer_order(name: str) -> tuple[bool, list[tuple[int, str]]]:
    return name == DENSE, natural(name)


def _ratio(counts: tuple[int, int] | None) -> float | None:
    return counts[0] / max(counts[1], 1) if counts else None


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    value = 100 * share
    if 0 < value < 0.01:
        return "<0.01 %"
    return "0" if not value else f"{value:.0f} %" if value >= 9.95 else f"{value:.2g} %"


def _overlap(record: RunRecord) -> Section | None:
    rounds: Sequence[int] = record["overlap"]["rounds"]
    if len(rounds) < 2:
        return None
    shares = record["overlap"]["shares"]
    chance = record["overlap"]["by_chance"]
    names = [str(number) for number in rounds]
    # A selection overlaps with itself; showing that would drown the rest.
    grid = [
        (f"round {a}", [None if i == j else shares[i][j] for j in range(len(rounds))])
        for i, a in enumerate(rounds)
    ]
    picture = heat_map(
        "Selected weights that two rounds have in common",
        grid,
        columns=names,
        form=_percent,
        corner=ROUNDS,
        log=False,
    )
    rows = [[name, *(_percent(value) for value in values)] for name, values in grid]
    pairs = [chance[i][j] for i in range(len(rounds)) for j in range(i)]
    text = (
        "How many of the weights that one round selected another round selected too, "
        "as a share of the smaller of the two selections. Choosing at random would "
        f"give {_percent(sum(pairs) / len(pairs))}."
    )
    table = Table(["", *names], rows)
    return Section("Weights that are selected again", text, table, picture)
