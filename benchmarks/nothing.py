"""Hydra's own time for the jobs of a sweep: qexp's configuration is composed for each, and nothing is done.

python -m benchmarks.nothing -m calib.seed=range(50)
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from qexp.config.composition import CONF

# Hydra's own sweeper, and none of qexp's callbacks and log handlers.
PLAIN = ("hydra/sweeper=basic", "hydra/job_logging=default", "hydra/hydra_logging=default", "~hydra.callbacks.door")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def nothing(composed: DictConfig) -> None:
    print("#", flush=True)


if __name__ == "__main__":
    sys.argv += PLAIN
    nothing()
