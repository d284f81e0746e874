"""Access to the Hugging Face hub, with and without a network."""

import os
import re
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, try_to_load_from_cache

from .errors import UserError
from .presets import local_path

REPOSITORY = "[^./~][^/]*(/[^/]+)?"
"""The form of a name on the hub."""


def require_model(name: str) -> None:
    """Refuse a model that neither this machine nor, without a network, the hub can give.

    It takes a second, as transformers is not imported.

    Raises:
        UserError: there is no such directory, no network, and nothing in the hub's cache.
    """
    if local_path(name).exists() or not re.fullmatch(REPOSITORY, name):
        return  # `loading` says what is wrong, if anything is
    look_for_network()
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a name that the hub allows
        cached = None
    if constants.HF_HUB_OFFLINE and not isinstance(cached, str):
        raise UserError(f"model {name}: no such directory, and {not_found()}")


def look_for_network() -> None:
    """Switch to the hub's cache if there is no network: its client would try for a minute."""
    if constants.HF_HUB_OFFLINE or getproxies():
        return
    address = urlsplit(constants.ENDPOINT)
    port = address.port or {"http": 80}.get(address.scheme, 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=1).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # `datasets` reads it when it is imported


def not_found() -> str:
    """The part of a message that says where a name was not found, and what to do."""
    if not constants.HF_HUB_OFFLINE:
        return "it could not be loaded from the hub"
    return "offline it is not in the hub's cache: give a path, or connect to the network once"
