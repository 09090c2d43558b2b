"""``python -m asymconv`` is the command ``asymconv``."""

from asymconv.cli import app

app()
