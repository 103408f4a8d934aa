"""The sweepers that Hydra finds under `hydra/sweeper`: `qexp`, whose work is done by qexp/launch/sweep.py, and
`qexp_optuna` (conf/hydra/sweeper/qexp_optuna.yaml), whose work is done by qexp/launch/search.py.

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
    """Hydra's BasicSweeper with `qexp.launch.sweep.run_sweep` in place of its loop over jobs."""

    def sweep(self, arguments: list[str]) -> Any:
        from qexp.launch.sweep import run_sweep

        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        return run_sweep(self.config, self._parse_config(), arguments, loader, self.launcher, self.max_batch_size)


class QexpOptunaSweeper(BasicSweeper):
    """Hydra's BasicSweeper with `qexp.launch.search.run_search` in place of its loop over jobs."""

    def __init__(self, params: dict[str, str] | None, **settings: Any) -> None:
        super().__init__(max_batch_size=None, params=params)
        self.settings = settings

    def sweep(self, arguments: list[str]) -> Any:
        from qexp.launch.search import run_search

        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        return run_search(self.config, self._parse_config(), arguments, loader, self.launcher, self.settings)
