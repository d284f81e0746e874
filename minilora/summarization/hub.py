"""The hub, where there is a network and where there is none."""

import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants


def look_for_network() -> None:
    """Without a network the hub's client tries for a minute: then look only into its cache."""
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
    """Where a name was looked for in vain, and what to do."""
    if not constants.HF_HUB_OFFLINE:
        return "the hub does not have it"
    return "offline it is not in the hub's cache: name a path, or go online once"
