"""Who may talk to a Ray that we start. Ray reads these variables when it is imported, so this comes first."""

from __future__ import annotations

import os
import secrets


def choose(address: str | None) -> None:
    """For a Ray of our own (no address): a secret handed down by the environment and written nowhere, unless the user
    has chosen otherwise. For a cluster that exists, its own settings hold."""
    if address is not None:
        return
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
