"""Access to the Hugging Face hub, with and without a network."""

import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants


def look_for_network() -> None:
    """Switch to the hub's cache if there is no network: its client would try for a minute."""
    if constants.HF_HUB_OFFLINE or getproxies():
        return
    address = urlsplit(constants.ENDPOINT)
    port = address.port or {"http": 80}.get(address.scheme, 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=2).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # `datasets` reads it when it is imported


def not_found() -> str:
    """The part of a message that says where a name was not found, and what to do."""
    if not constants.HF_HUB_OFFLINE:
        return "the hub does not have it"
    return "offline it is not in the hub's cache: name a path, or go online once"
