# SPDX-License-Identifier: Apache-2.0
"""``dpu-edge``: the device's command line."""

import signal
from collections.abc import Iterator
from contextlib import suppress
from errno import ENAMETOOLONG
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.cli import agent as cli_agent
from edge_runtime.cli import doctor as cli_doctor
from edge_runtime.cli import infer as cli_infer
from edge_runtime.cli import repair as cli_repair
from edge_runtime.cli import service as cli_service
from edge_runtime.cli import sync as cli_sync
from edge_runtime.cli import trust as cli_trust
from edge_runtime.cli.network import (
    BundleOrChannel,
    bundle_file,
    network_options,
    newcomer,
)
from edge_runtime.commandline import (
    CONTEXT,
    Answer,
    Group,
    emit,
    json_option,
    on_device,
    progress,
    say,
    shared,
)
from edge_runtime.errors import DpuError, VerificationError, add_details, prefix_errors
from edge_runtime.exit_codes import EXIT_CODE_HELP
from edge_runtime.formats.json_record import MAX_SHOWN, is_digest
from edge_runtime.formats.kinds import Kind, refuse_others
from edge_runtime.formats.model_folder import round_number
from edge_runtime.parameters import FileOf, trust_options
from edge_runtime.text import printable

if TYPE_CHECKING:
    from edge_runtime.update.device import Device

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
    # Ignored, as some supervisors leave it, it hides how hooks and trials end.
    with suppress(ValueError):  # only the main thread may set it
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@main.command()
@click.argument("bundle", metavar="BUNDLE|URL", type=BundleOrChannel())
@trust_options(
    "Accept only what this key signed (repeatable), or what a key list says."
)
@click.option(
    "--trust-on-first-use",
    "carried",
    is_flag=True,
    help="Trust the keys that the bundle itself carries.",
)
@network_options
@json_option
@click.pass_obj
def init(
    root: Path,
    /,
    bundle: Path | str,
    *,
    keys: tuple[Path, ...],
    threshold: int,
    carried: bool,
    channel: str,
    as_json: bool,
    **network: str,
) -> None:
    """Install a model into an empty store: from a bundle, or from a channel.

    A URL, or the folder of a channel, is the model's own, as dpu-fleet publishes it.
    What is cut goes on when the same command is given again.
    """
    from edge_runtime import Device, Store
    from edge_runtime.formats.signing import FirstUse
    from edge_runtime.trust import first_root

    if carried and keys:
        raise click.UsageError(
            "give --trust KEY.pub.pem or --trust-on-first-use, not both"
        )
    trust = FirstUse(threshold) if carried else cli_trust.read_trust(keys, threshold)
    if isinstance(bundle, str):
        Store(root).insist_free()  # before anything is fetched
    given = bundle_file(bundle, root, channel, newcomer(trust), **network)
    with given as (path, _, lists):
        if lists:  # each follows the one before it, and the first what was given
            trust = first_root(lists[-1])
        status = Device.install(root, path, trust=trust).status()
    emit(
        status,
        as_json=as_json,
        text=f"installed round {status['round']} in {printable(status['store'])}\n"
        f"  fingerprint   {status['fingerprint']}\n"
        f"  trusted keys  {_keys(status)}",
    )


def _keys(status: dict[str, Any]) -> str:
    """Name whom a device trusts, in words."""
    keys, needed = status["trusted_keys"], status["signatures_needed"]
    if not keys:
        return "none: patches need no signature (install with --trust KEY.pub.pem)"
    text = ", ".join(keys) + (f" ({needed} of them must sign)" if needed > 1 else "")
    if listed := status["key_list"]:
        verb = "EXPIRED" if listed["expired"] else "expires"
        text += f"; key list {listed['version']} {verb} {listed['expires']}"
    return text


def _blocked(event: dict[str, Any] | None) -> Iterator[str]:
    if event:
        yield (
            f"blocked by this device: round {event['round']} ({event['target'][:12]}), "
            f"{printable(event['reason'])}; the agent tries again by itself, 'dpu-edge "
            "apply FILE --force' at once"
        )


@main.command()
@click.argument(
    "patches", metavar="PATCH...", nargs=-1, required=True, type=FileOf(Kind.PATCH)
)
@click.option(
    "--force",
    is_flag=True,
    help="Try a release again that failed its trial, or take one whose counter is far "
    "ahead.",
)
@json_option
@click.pass_obj
def apply(root: Path, patches: tuple[Path, ...], *, force: bool, as_json: bool) -> None:
    """Apply patches, in the order given. A patch that is refused changes nothing.

    It ends at the first patch that is refused; those before it stay applied.
    """
    from edge_runtime.update.device import Device

    device = Device.open(root)
    results: list[dict[str, Any]] = []
    for patch in patches:
        try:
            with prefix_errors(patch.name):
                result = device.update(patch, force=force)
        except (DpuError, OSError) as err:
            add_details(err, patches=results)  # these stay applied
            raise
        slot = device.store.state.active_slot
        results.append({"patch": str(patch), "result": result, "round": slot.round})
        if not as_json:
            name = printable(patch.name)
            progress(f"{name}: {result}, now at round {slot.round}")
    if as_json:
        emit({"patches": results} | device.status(), as_json=True, text="")


@main.command()
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="The agent's folder.  [default: where the agent looked last]",
)
@on_device
def status(device: "Device", folder: Path | None) -> Answer:
    """Show what is installed, what is newest, and what is missing."""
    from edge_runtime.agent.status import read_status, status_lines
    from edge_runtime.sync.story import read_known, story_lines, tell

    record = device.status()
    agent = read_status(device.store.root)
    record |= {"agent": agent} if agent else {}
    if folder is None and agent.get("folder"):
        folder = Path(agent["folder"])
    story = record["fleet"] = tell(device.store, agent, read_known(folder))
    kept, reach = (
        ", ".join(map(str, record[key])) for key in ("kept_rounds", "reachable_rounds")
    )
    lines = [
        story["summary"],
        f"round          {record['round']}",
        f"fingerprint    {record['fingerprint']}",
        f"model          {record['model']}",
        f"trained in     {device.store.run or 'a run without an id'}",
        f"weights        {printable(record['weights'])} "
        f"({record['weights_bytes']} bytes)",
        f"release floor  {record['release_floor']}",
        f"kept rounds    {kept}",
        f"within reach   {reach or 'none'}",
        *(["pinned         updates are held back"] if record["pinned"] else []),
        f"trusted keys   {_keys(record)}",
        *(f"skipped        {target}" for target in record["skipped"]),
        *_blocked(record["blocked"]),
        *story_lines(story),
        *status_lines(agent),
        "history",
        *(
            f"  {printable(e['at'])}  {printable(e['event']):<11}  "
            f"round {e['round']}  {printable(e['target'][:12])}"
            + (f"  {printable(e['reason'])}" if e["reason"] else "")
            for e in record["history"]
        ),
    ]
    return record, "\n".join(lines)


@main.command()
@click.option(
    "--expect",
    metavar="SHA256|FILE",
    help="Compare with this fingerprint, or with that of a weight file.",
)
@on_device
def verify(device: "Device", expect: str | None) -> Answer:
    """Check by SHA-256 that the weights on disk are the right ones."""
    wanted = _fingerprint(expect) if expect is not None else None
    found, number = device.verify(), device.store.state.active_slot.round
    if wanted is not None and wanted != found:
        raise VerificationError(
            f"this device runs {found}, expected {wanted}",
            expected=wanted,
            actual=found,
        )
    record = {"fingerprint": found, "round": number}
    return record, f"{found}  round {number}  verified"


def _fingerprint(expect: str) -> str:
    """Return a fingerprint that was given, or that of a weight file."""
    from edge_runtime import fingerprint_file

    if is_digest(expect.lower()):
        return expect.lower()
    try:
        refuse_others(Path(expect), [Kind.WEIGHTS])
        is_file = Path(expect).is_file()
    except OSError as err:
        if err.errno != ENAMETOOLONG:  # of such a name there is no file
            raise
        is_file = False
    if not is_file:
        raise click.BadParameter(
            f"{expect[:MAX_SHOWN]!r} is neither a weight file nor a SHA-256 in 64 hex "
            "digits",
            param_hint="--expect",
        )
    return fingerprint_file(expect)


@main.command()
@click.option(
    "--to",
    metavar="ROUND",
    help="A round that 'status' calls within reach, such as round_01 or 1.  [default: "
    "the one before]",
)
@on_device
def rollback(device: "Device", to: str | None) -> Answer:
    """Go back to earlier weights. Newer releases stay welcome, older ones do not."""
    try:
        number = round_number(to) if to is not None else None
    except ValueError as err:
        reach = device.store.state.reach_words
        raise click.BadParameter(
            f"{err}; rounds within reach: {reach}", param_hint="--to"
        ) from err
    slot = device.rollback(number)
    return device.status(), f"rolled back to round {slot.round} ({slot.target[:12]})"


@main.command()
@click.option("--off", is_flag=True, help="Allow updates again.")
@on_device
def pin(device: "Device", *, off: bool) -> Answer:
    """Hold updates back, or allow them again. A rollback works all the same."""
    device.pin(held=not off)
    text = "updates are allowed" if off else "pinned: updates are held back"
    return device.status(), text


@main.command()
@click.option("--nonce", required=True, help="What the server asks with.")
@click.option("--tensors", is_flag=True, help="Give the SHA-256 of each tensor too.")
@click.option("--json", is_flag=True, expose_value=False, help="Errors as JSON too.")
@click.pass_obj
def proof(root: Path, *, nonce: str, tensors: bool) -> None:
    """Prove to the server which weights are on this disk and in live predictors.

    The proof is one JSON object on standard output, signed if this device has a key
    ('dpu-edge device-key'); 'dpu-patch check-proof' on the server judges it.
    """
    from edge_runtime import Store
    from edge_runtime.live.proof import make_proof
    from edge_runtime.store.contents import KEY_NAME

    if not nonce:
        raise click.BadParameter("the nonce is empty", param_hint="--nonce")
    print(make_proof(Store.open(root), nonce, tensors=tensors).decode())
    if not (root / KEY_NAME).exists():
        say("not signed: make a key with 'dpu-edge device-key'")


@main.command("device-key")
@on_device
def device_key(device: "Device") -> Answer:
    """Print the public half of this device's key, which is created on first use.

    The server keeps it and checks proofs with it. The private half stays in
    STORE/device.key; a card that is copied copies it too.
    """
    from edge_runtime.formats.signing import key_id
    from edge_runtime.live import proof as proofs
    from edge_runtime.live.shared import public_key
    from edge_runtime.store.contents import KEY_NAME

    key, path = proofs.device_key(device.store), device.store.root / KEY_NAME
    name, text = key_id(public_key(key)), proofs.encode_public(key).decode()
    say(f"key {name}; its private half is in {path}")
    record = {"key_id": name, "public": text.strip(), "private_file": str(path)}
    return record, text.strip()


for _command in (
    *(cli_infer.infer, cli_infer.bench),
    *(cli_agent.agent, cli_service.service, cli_sync.sync),
    *(cli_doctor.doctor, cli_repair.repair, cli_trust.trust),
):
    main.add_command(_command)
for _command in (cli_trust.show, cli_trust.add):
    cli_trust.trust.add_command(_command)
