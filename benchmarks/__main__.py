"""`make bench`: the accuracy of qexp's figures and its own speed, as ratios that are measured side by side in one run.

`make bench BENCH="calibration order"` runs some of them; A/A takes two hours.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable

import torch

from benchmarks import check, decision, effects, flows, many, peers, racing, runtimes, scale, speed, study, timing, zoo
from qexp.system import machine

BENCHMARKS: dict[str, Callable[[str], None]] = {
    "calibration": speed.calibration,
    "whole_run": speed.whole_run,
    "lock": speed.lock,
    "order": timing.order,
    "study": study.study,
    "many": many.many,
    "scale": scale.scale,
    "check": check.check,
    "decision": decision.recommendations,
    "effects": effects.effects,
    "racing": racing.races,
    "peers": peers.peers,
    "runtimes": runtimes.runtimes,
    "flows": flows.flows,
    "zoo": zoo.zoo,
    "aa": timing.against_itself,
}


def main() -> None:
    names = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"{' '.join(unknown)}: there is no such benchmark; choose among {', '.join(BENCHMARKS)}.")
    here = machine.describe()
    print(f"{here.cpu} ({here.isa}), torch {torch.__version__}, load {here.load}")
    print("ResNet-18 on digits, unless a line says otherwise")
    for name in names:
        with tempfile.TemporaryDirectory() as outputs:
            print(f"\n{name}", flush=True)
            BENCHMARKS[name](outputs)


if __name__ == "__main__":
    main()
