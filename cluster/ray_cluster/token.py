"""Ray's token: `ray start` asks for one as soon as the machine has one, so every client must offer what it has."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

MODE: Final = "RAY_AUTH_MODE"


REMEDY: Final = (
    "copy the cluster's ~/.ray/auth_token here, or set RAY_AUTH_TOKEN (`ray get-auth-token` prints it on the head)"
)


def offer_token(environ: MutableMapping[str, str] | None = None, home: Path | None = None) -> None:
    """Let Ray's clients in this process send a token that lies ready; call it before Ray is imported.

    A mode that somebody chose is left alone. A cluster that asks for no token ignores it.
    """
    variables = os.environ if environ is None else environ
    file = Path(variables.get("RAY_AUTH_TOKEN_PATH") or (home or Path.home()) / ".ray" / "auth_token")
    if MODE not in variables and (variables.get("RAY_AUTH_TOKEN") or file.is_file()):
        variables[MODE] = "token"
