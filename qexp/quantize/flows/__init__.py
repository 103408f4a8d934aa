"""The flows that quantize a model, a file each, and `FLOWS`, which finds them by name."""

from __future__ import annotations

from qexp.config import schema
from qexp.quantize.flow import Flow
from qexp.quantize.flows.dynamic import DynamicFlow
from qexp.quantize.flows.eager import EagerFlow
from qexp.quantize.flows.fx import FxFlow
from qexp.quantize.flows.pt2e import Pt2eFlow

FLOWS: dict[schema.FlowName, Flow] = {flow.name: flow for flow in (EagerFlow(), FxFlow(), Pt2eFlow(), DynamicFlow())}
