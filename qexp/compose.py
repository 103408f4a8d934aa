"""What Hydra needs to know before it can compose a configuration: where conf/ is, the schema, the resolvers.

Importing it registers them, in whichever process a launcher runs a job.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from qexp.config import Config

_HERE = Path(__file__).resolve().parent
# Inside the package in a wheel, beside it in a checkout.
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"


def by_engine(engine: str, choices: dict[str, Any], otherwise: Any) -> Any:
    """`choices` at `engine`, for settings whose default depends on it."""
    return choices.get(str(engine), otherwise)


OmegaConf.register_new_resolver("qexp.by_engine", by_engine, replace=True)
# Two runs that start in the same second must not share a folder.
OmegaConf.register_new_resolver("qexp.hex", lambda: secrets.token_hex(2), use_cache=True, replace=True)
ConfigStore.instance().store(name="schema", node=Config)
