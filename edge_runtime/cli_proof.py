"""``dpu-edge proof`` and ``dpu-edge device-key``."""

from pathlib import Path

import click

from edge_runtime.command import emit, json_option, say


@click.command()
@click.option("--nonce", required=True, help="What the server asks with.")
@click.option("--tensors", is_flag=True, help="Give the SHA-256 of each tensor too.")
@click.option("--json", is_flag=True, expose_value=False, help="Errors as JSON too.")
@click.pass_obj
def proof(root: Path, *, nonce: str, tensors: bool) -> None:
    """Prove to the server which weights are on this disk and in live predictors.

    The proof is one JSON object on standard output, signed if this device has a key
    ('dpu-edge device-key'); 'dpu-patch check-proof' on the server judges it.
    """
    from edge_runtime.device import Device
    from edge_runtime.proof import KEY_NAME, make_proof

    if not nonce:
        raise click.BadParameter("the nonce is empty", param_hint="--nonce")
    store = Device.open(root).store
    print(make_proof(store, nonce, tensors=tensors).decode())
    if not (store.root / KEY_NAME).exists():
        say("not signed: make a key with 'dpu-edge device-key'")


@click.command("device-key")
@json_option
@click.pass_obj
def device_key(root: Path, *, as_json: bool) -> None:
    """Print the public half of this device's key, which is made at first.

    The server keeps it and checks proofs with it. The private half stays in
    STORE/device.key; a card that is copied copies it too.
    """
    from edge_runtime import proof as proofs
    from edge_runtime.device import Device
    from edge_runtime.signing import key_id

    store = Device.open(root).store
    key = proofs.device_key(store)
    name, text = (
        key_id(proofs.public_key(key)),
        proofs.encode_public(key).decode().strip(),
    )
    path = store.root / proofs.KEY_NAME
    record = {"key_id": name, "public": text, "private_file": str(path)}
    emit(record, as_json=as_json, text=text)
    if not as_json:
        say(f"key {name}; its private half is in {path}")
