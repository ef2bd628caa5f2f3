"""Fetch files from hubs, with or without a network, and keep the libraries that do it quiet."""

import logging
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import torch

# A slow link connects within this time, and a machine without a network answers soon.
CONNECT_TIMEOUT_S = 3.0


@contextmanager
def quiet_upstream() -> Iterator[None]:
    """Silence the root logger, on which the libraries log. Its first use would also install a handler there."""
    root, handler, level = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(handler)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)
        root.removeHandler(handler)


@contextmanager
def downloads(what: str, *, url: str | None = None) -> Iterator[None]:
    """Surround code that may fetch files: without a network it reads the caches only, and its failure is explained.

    Hub clients retry for a minute before they read their own cache. So one quick connection first finds out whether
    the hub can be reached. `what` names the thing to fetch, for the error: `weights 'openai' of ViT-B-16`. `url` is
    the address of a file for torch hub; None means the Hugging Face hub. A file that is not in the cache and cannot be
    fetched is a FileNotFoundError.
    """
    from huggingface_hub import constants

    before, timeout = constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()
    offline = before and url is None
    host = url or constants.ENDPOINT
    reachable = not offline and _reachable(host)
    if url is not None and not reachable and not _in_torch_hub(url):
        # torch hub would print a line about the download before it fails.
        raise FileNotFoundError(_not_found(what, OSError(), host=host, reachable=False, offline=False))
    constants.HF_HUB_OFFLINE = before if url is not None else not reachable
    socket.setdefaulttimeout(10 * CONNECT_TIMEOUT_S)  # torch hub and timm set no timeout for plain addresses
    try:
        with quiet_upstream():
            yield
    # The errors of the hub client and of urllib are OSErrors.
    except OSError as error:
        raise FileNotFoundError(_not_found(what, error, host=host, reachable=reachable, offline=offline)) from error
    finally:
        constants.HF_HUB_OFFLINE = before
        socket.setdefaulttimeout(timeout)


def _reachable(url: str) -> bool:
    """Whether a connection to the hub, or to the proxy in front of it, can be made."""
    target = urlsplit(url)
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy)
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        socket.create_connection((target.hostname or "", port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _in_torch_hub(url: str) -> bool:
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name).is_file()


def _not_found(what: str, error: OSError, *, host: str, reachable: bool, offline: bool) -> str:
    from huggingface_hub import constants

    if reachable:
        why = f"the download failed ({next(iter(str(error).strip().splitlines()), type(error).__name__)})"
    else:
        why = "HF_HUB_OFFLINE is set" if offline else f"{urlsplit(host).hostname} cannot be reached from here"
    return (
        f"{what}: not in the cache, and {why}. Looked in {constants.HF_HUB_CACHE} (HF_HOME) and {torch.hub.get_dir()}"
        " (TORCH_HOME). Three ways: run once where there is a network; copy that cache folder from such a machine"
        " and set HF_HOME to it; or give a file, model.pretrained=PATH"
    )
