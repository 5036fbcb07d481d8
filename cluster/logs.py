"""Where our processes log: to stderr, which Ray brings to the terminal of whoever started the service."""

from __future__ import annotations

import logging
import sys

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
OURS = ("arriero", "cluster", "router", "experts")


def configure_logging() -> None:
    """For one process, at its start. Ours from INFO on, of everybody else's what is a warning."""
    # Not sys.stderr: in a replica that may be Serve's own log file.
    logging.basicConfig(stream=sys.__stderr__, level=logging.WARNING, format=FORMAT)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)
