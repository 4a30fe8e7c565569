"""Labels that people and models have put on latents at Neuronpedia, one at a time, when asked for.

The only part of the explorer that uses the network; the server has it where the user said so.
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

log = logging.getLogger(__name__)

ADDRESS = "https://www.neuronpedia.org/api/feature/"
TIMEOUT_SECONDS = 4.0
MOST_BYTES = 20_000_000  # an answer also holds the latent's activations
MOST_LETTERS = 500
NOT_FOUND = 404

Fetch = Callable[[str], bytes]


class NeuronpediaLabels:
    """Labels by view and latent, kept in memory once they are known. May be called by threads."""

    def __init__(self, names: Mapping[str, str], *, fetch: Fetch | None = None) -> None:
        """Nothing is fetched yet.

        Args:
            names: view -> `MODEL/SAE`, as `sae.neuronpedia.neuronpedia_id` gives it.
            fetch: address -> answer, raising OSError where there is none; None: over the network.
        """
        self._names = dict(names)
        self._fetch = fetch or _fetch
        self._known: dict[tuple[str, int], str | None] = {}
        self._lock = threading.Lock()

    def __call__(self, view: str, latent: int) -> str | None:
        """The latent's label; None where it has none or Neuronpedia cannot be reached."""
        if view not in self._names:
            return None
        with self._lock:
            if (view, latent) in self._known:
                return self._known[view, latent]
        try:
            label = first_label(self._fetch(f"{ADDRESS}{self._names[view]}/{latent}"))
        except urllib.error.HTTPError as error:
            if error.code != NOT_FOUND:
                return None
            label = None
        except (OSError, http.client.HTTPException) as error:  # offline: the next page asks again
            log.debug("Neuronpedia: %s", error)
            return None
        with self._lock:
            self._known[view, latent] = label
        return label


def first_label(answer: bytes) -> str | None:
    """The first explanation in Neuronpedia's answer for a latent; None where there is none."""
    try:
        found: Any = json.loads(answer)
    except ValueError:
        return None
    explanations = found.get("explanations") if isinstance(found, dict) else None
    for explanation in explanations if isinstance(explanations, list) else []:
        text = explanation.get("description") if isinstance(explanation, dict) else None
        if isinstance(text, str) and text.strip():
            return text.strip()[:MOST_LETTERS]
    return None


class _StayThere(urllib.request.HTTPRedirectHandler):
    """No other address is asked than the one that was named."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """None: a redirection is an error."""
        return


def _fetch(address: str) -> bytes:
    request = urllib.request.Request(address, headers={"User-Agent": "prunelens"})
    opener = urllib.request.build_opener(_StayThere)
    with opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
        return bytes(answer.read(MOST_BYTES))
