"""The sweeper that Hydra finds under `hydra/sweeper: qexp`; what it does lives in qexp/launch/sweep.py.

Hydra imports every plugin at each start, so nothing heavy is imported here. It does so without an entry in
sys.modules, which a dataclass with postponed annotations needs: hence no `from __future__ import annotations`.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore


@dataclass
class QexpSweeperConf:
    _target_: str = "hydra_plugins.qexp_sweeper.QexpSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="qexp", node=QexpSweeperConf, provider="qexp")


class QexpSweeper(BasicSweeper):
    """Checks every job before the first starts, and owns the parent run, the table, the signals and the exit status."""

    def sweep(self, arguments: list[str]) -> Any:
        from qexp.launch.sweep import own

        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        return own(self.config, self._parse_config(), arguments, loader, self.launcher, self.max_batch_size)
