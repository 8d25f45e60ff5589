"""The playground: pages and a JSON API over what the library does; nothing is computed here."""

from mnemoscope.web.app import build_app, check_reachable, serve

__all__ = ["build_app", "check_reachable", "serve"]
