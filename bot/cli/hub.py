"""`moerge hub`: serve the embedded Hub."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from merge.errors import DestinationError, UsageError

if TYPE_CHECKING:
    from bot.hub.access import Token
    from bot.hub.oidc import Publisher

HELP = "serve a local Hub that the Hugging Face client can publish to and download from"

_EPILOG = """\
A token is written NAME:RIGHTS[=SCOPE,...]:TOKEN, where RIGHTS is admin, write or read, and SCOPE lists namespaces
and repositories (the namespace NAME by default): acme:write:hf_secret, ci:read=acme/gated-model:hf_other.
Tokens to keep are listed in DIR/tokens.json, which is made with one admin token on the first start.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="port, 0 for a free one (default: 8080)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="folder of the Hub (default: ~/.local/share/moerge/hub)"
    )
    parser.add_argument("--token", action="append", default=[], metavar="TOKEN", help="one more token, for this run")
    parser.add_argument(
        "--publisher",
        action="append",
        default=[],
        metavar="OWNER/NAME=GITHUB_OWNER/REPO[@WORKFLOW.yml]",
        help="trust the GitHub Actions jobs of a repository to write to OWNER/NAME",
    )
    parser.add_argument("--jwks", type=Path, metavar="FILE", help="public keys that check the signature of such jobs")
    parser.add_argument(
        "--jobs", action="store_true", help="run Jobs, as processes of this machine without a container around them"
    )
    parser.add_argument("--log", action="store_true", help="print every request")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; 0 then. Raises UsageError or DestinationError."""
    try:
        from bot.hub import server
        from bot.hub.store import StoreError
    except ModuleNotFoundError as error:
        raise UsageError(f"moerge hub needs {error.name}: install it with `pip install 'moerge[hub]'`.") from error
    root = args.root or _default_root()
    tokens, publishers = _options(args)
    try:
        hub = server.prepare(
            root,
            host=args.host,
            port=args.port,
            tokens=tokens,
            publishers=publishers,
            jwks=args.jwks,
            access_log=args.log,
            jobs=args.jobs,
        )
    except StoreError as error:
        raise DestinationError(f"{error}") from error
    except ValueError as error:
        raise UsageError(f"{error}.") from error
    except (OSError, OverflowError) as error:
        raise DestinationError(f"Cannot serve a Hub on {args.host}:{args.port} from {root}: {error}") from error
    print(f"Hub at {hub.endpoint}, kept in {root}")
    try:
        token = hub.token()
    except LookupError:  # its user has taken the admin out of tokens.json
        token = "..."  # noqa: S105
    print(f"  export HF_ENDPOINT={hub.endpoint} HF_TOKEN={token} HF_HUB_DISABLE_XET=1")
    if publishers and args.jwks is None:
        print("  Trusted publishers: without --jwks the claims of their tokens are checked, the signatures are not.")
    print("Stop it with Ctrl-C.", flush=True)
    # uvicorn takes both signals, ends what is in flight, and then raises them once more for the handlers from before.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        hub.serve()
    return 0


def _options(args: argparse.Namespace) -> tuple[list[Token], list[Publisher]]:
    from bot.hub import access, oidc

    try:
        return [access.parse(each) for each in args.token], [oidc.parse(each) for each in args.publisher]
    except ValueError as error:
        raise UsageError(f"{error}.") from error


def _default_root() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "moerge" / "hub"
