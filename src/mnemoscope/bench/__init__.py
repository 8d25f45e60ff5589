"""The bench: frozen lists of prompts, one choice on tune, one judge. ``mnemoscope.arena`` runs every method on it."""
