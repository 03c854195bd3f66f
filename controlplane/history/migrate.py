"""The missing migrations. Importing Alembic takes a fifth of a controller's start: only where something is missing."""

from __future__ import annotations

import importlib.resources

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection

from controlplane.contract.errors import ConfigError


def migrate(connection: Connection) -> None:
    """Run them in the caller's transaction. Raises ConfigError when the database belongs to a newer release."""
    config = Config()
    config.set_main_option("script_location", str(importlib.resources.files("migrations")).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise ConfigError(
            f"the history database does not fit this release: {error}; "
            "upgrade kevlarflow, or set database_url to another database"
        ) from error
