"""``dpu-edge``: the device's command line."""

from pathlib import Path
from typing import Any

import click

from edge_runtime import cli_agent, cli_infer, cli_proof
from edge_runtime.command import (
    CONTEXT,
    EXIT_CODE_HELP,
    Group,
    emit,
    json_option,
    progress,
    shared,
)
from edge_runtime.errors import DpuError, VerificationError

_file = click.Path(exists=True, dir_okay=False, path_type=Path)


_settings = CONTEXT | {"show_default": True}


@click.group(cls=Group, context_settings=_settings, epilog=EXIT_CODE_HELP)
@click.version_option(package_name="dpu-edge")
@click.option(
    "--store",
    expose_value=False,
    callback=shared,
    envvar="DPU_STORE",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="The device's directory (or set DPU_STORE).",
)
def main() -> None:
    """Keep a model on this device up to date, and run it."""


@main.command()
@click.argument("bundle", type=_file)
@click.option(
    "--trust",
    "keys",
    metavar="KEY.pem",
    multiple=True,
    type=_file,
    help="Accept only what this key signed (repeatable).",
)
@click.option(
    "--threshold",
    type=click.IntRange(1),
    default=1,
    help="How many of the trusted keys must sign.",
)
@click.option(
    "--trust-on-first-use",
    "carried",
    is_flag=True,
    help="Trust the keys that the bundle itself carries.",
)
@json_option
@click.pass_obj
def init(
    root: Path,
    bundle: Path,
    *,
    keys: tuple[Path, ...],
    threshold: int,
    carried: bool,
    as_json: bool,
) -> None:
    """Install a model from a bundle into an empty store."""
    from edge_runtime.bundle import carried_trust
    from edge_runtime.device import Device
    from edge_runtime.signing import trust_keys

    if carried and keys:
        raise click.UsageError("give --trust KEY.pem or --trust-on-first-use, not both")
    trust = (
        carried_trust(bundle, threshold)
        if carried
        else trust_keys({str(key): key.read_bytes() for key in keys}, threshold)
    )
    status = Device.install(root, bundle, trust=trust).status()
    emit(
        status,
        as_json=as_json,
        text=f"installed round {status['round']} in {status['store']}\n"
        f"  fingerprint   {status['fingerprint']}\n"
        f"  trusted keys  {_keys(status)}",
    )


def _keys(status: dict[str, Any]) -> str:
    """Name whom a device trusts, in words."""
    keys, needed = status["trusted_keys"], status["signatures_needed"]
    if not keys:
        return "none: patches need no signature (install with --trust KEY.pem)"
    return ", ".join(keys) + (f" ({needed} of them must sign)" if needed > 1 else "")


@main.command()
@click.argument("patches", metavar="PATCH...", nargs=-1, required=True, type=_file)
@click.option(
    "--force", is_flag=True, help="Try a release again that failed its trial."
)
@json_option
@click.pass_obj
def apply(root: Path, patches: tuple[Path, ...], *, force: bool, as_json: bool) -> None:
    """Apply patches, in the order given. A patch that is refused changes nothing.

    It ends at the first patch that is refused; those before it stay applied.
    """
    from edge_runtime.device import Device

    device = Device.open(root)
    results: list[dict[str, Any]] = []
    for patch in patches:
        try:
            result = device.update(patch, force=force)
        except (DpuError, OSError) as err:
            if isinstance(err, DpuError):
                err.args = (f"{patch.name}: {err}",)
            vars(err)["patches"] = results  # told with --json: these stay applied
            raise
        slot = device.store.state.active_slot
        results.append({"patch": str(patch), "result": result, "round": slot.round})
        if not as_json:
            progress(f"{patch.name}: {result}, now at round {slot.round}")
    if as_json:
        emit({"patches": results} | device.status(), as_json=True, text="")


@main.command()
@json_option
@click.pass_obj
def status(root: Path, *, as_json: bool) -> None:
    """Show what is installed and how it got here."""
    from edge_runtime.device import Device
    from edge_runtime.report import read_status, status_lines

    record = Device.open(root).status()
    agent = read_status(root)
    record |= {"agent": agent} if agent else {}
    kept, reach = (
        ", ".join(map(str, record[key])) for key in ("kept_rounds", "reachable_rounds")
    )
    lines = [
        f"round          {record['round']}",
        f"fingerprint    {record['fingerprint']}",
        f"model          {record['model']}",
        f"weights        {record['weights']} ({record['weights_bytes']} bytes)",
        f"release floor  {record['release_floor']}",
        f"kept rounds    {kept}",
        f"within reach   {reach or 'none'}",
        *(["pinned         updates are held back"] if record["pinned"] else []),
        f"trusted keys   {_keys(record)}",
        *(f"skipped        {target}" for target in record["skipped"]),
        *status_lines(agent),
        "history",
        *(
            f"  {e['at']}  {e['event']:<11}  round {e['round']}  {e['target'][:12]}"
            + (f"  {e['reason']}" if e["reason"] else "")
            for e in record["history"]
        ),
    ]
    emit(record, as_json=as_json, text="\n".join(lines))


@main.command()
@click.option(
    "--expect",
    metavar="SHA256|FILE",
    help="Compare with this fingerprint, or with that of a weight file.",
)
@json_option
@click.pass_obj
def verify(root: Path, expect: str | None, *, as_json: bool) -> None:
    """Check by SHA-256 that the weights on disk are the right ones."""
    from edge_runtime.device import Device

    device = Device.open(root)
    fingerprint = device.verify()
    if expect is not None:
        _compare(fingerprint, expect)
    emit(
        {"fingerprint": fingerprint, "round": device.store.state.active_slot.round},
        as_json=as_json,
        text=f"{fingerprint}  round {device.store.state.active_slot.round}  verified",
    )


def _compare(fingerprint: str, expect: str) -> None:
    from edge_runtime.weights import fingerprint_file

    wanted = fingerprint_file(expect) if Path(expect).is_file() else expect.lower()
    if len(wanted) != 64:
        raise click.BadParameter(
            f"{expect!r} is neither a weight file nor a SHA-256 in 64 hex digits",
            param_hint="--expect",
        )
    if wanted != fingerprint:
        raise VerificationError(
            f"this device runs {fingerprint}, expected {wanted}",
            expected=wanted,
            actual=fingerprint,
        )


@main.command()
@click.option(
    "--to",
    "round_",
    metavar="ROUND",
    type=int,
    help="A round that 'status' calls within reach.  [default: the one before]",
)
@json_option
@click.pass_obj
def rollback(root: Path, round_: int | None, *, as_json: bool) -> None:
    """Go back to earlier weights. Newer releases stay welcome, older ones do not."""
    from edge_runtime.device import Device

    device = Device.open(root)
    slot = device.rollback(round_)
    emit(
        device.status(),
        as_json=as_json,
        text=f"rolled back to round {slot.round} ({slot.target[:12]})",
    )


@main.command()
@click.option("--off", is_flag=True, help="Allow updates again.")
@json_option
@click.pass_obj
def pin(root: Path, *, off: bool, as_json: bool) -> None:
    """Hold updates back, or allow them again. A rollback works all the same."""
    from edge_runtime.device import Device

    device = Device.open(root)
    device.pin(held=not off)
    text = "updates are allowed" if off else "pinned: updates are held back"
    emit(device.status(), as_json=as_json, text=text)


for _command in (
    *(cli_infer.infer, cli_infer.bench),
    *(cli_agent.agent, cli_agent.service),
    *(cli_proof.proof, cli_proof.device_key),
):
    main.add_command(_command)
