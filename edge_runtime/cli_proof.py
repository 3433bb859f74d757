"""``dpu-edge proof`` and ``dpu-edge device-key``."""

from pathlib import Path

import click

from edge_runtime.command import emit, json_option, say

_file = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--nonce", required=True, help="What the server asks with.")
@click.option("--tensors", is_flag=True, help="Give the SHA-256 of each tensor too.")
@click.option(
    "--key",
    metavar="KEY.pem",
    type=_file,
    help="Sign with this key.  [default: the store's device.key, if there is one]",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the proof there.  [default: standard output]",
)
@click.option(
    "--json",
    is_flag=True,
    expose_value=False,
    help="Errors as JSON too.",
)
@click.pass_context
def proof(
    context: click.Context,
    *,
    nonce: str,
    tensors: bool,
    key: Path | None,
    output: Path | None,
) -> None:
    """Prove to the server which weights are on this disk and in live predictors.

    The proof is one JSON object; 'dpu-patch check-proof' on the server judges it.
    """
    from edge_runtime.cli import open_device
    from edge_runtime.proof import KEY_NAME, make_proof

    if not nonce:
        raise click.BadParameter("the nonce is empty", param_hint="--nonce")
    store = open_device(context).store
    data = make_proof(store, nonce, tensors=tensors, key=key)
    if not (key or (store.root / KEY_NAME).exists()):
        say("not signed: make a key with 'dpu-edge device-key'")
    if output is None:
        print(data.decode())
        return
    output.write_bytes(data + b"\n")
    say(f"wrote {output}")


@click.command("device-key")
@json_option
@click.pass_context
def device_key(context: click.Context, *, as_json: bool) -> None:
    """Print the public half of this device's key, which is made at first.

    The server keeps it and checks proofs with it. The private half stays in
    STORE/device.key; a card that is copied copies it too.
    """
    from cryptography.hazmat.primitives import serialization as form

    from edge_runtime.cli import open_device
    from edge_runtime.proof import device_key as make_key
    from edge_runtime.proof import public_key, read_key
    from edge_runtime.signing import key_id

    path = make_key(open_device(context).store)
    key = read_key(path)
    pem = key.public_key().public_bytes(
        form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo
    )
    name, text = key_id(public_key(key)), pem.decode().strip()
    record = {"key_id": name, "public": text, "private_file": str(path)}
    emit(record, as_json=as_json, text=text)
    if not as_json:
        say(f"key {name}; its private half is in {path}")
