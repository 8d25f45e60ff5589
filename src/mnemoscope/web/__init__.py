"""The playground: pages and a JSON API over one opened run; imports FastAPI only in ``app``, ``api`` and ``runs``."""
