"""Every check that needs nothing but the configuration. Neither torch nor mlflow is imported."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from qexp.config import image_settings
from qexp.config.identity import LABELS, exact, flat
from qexp.config.schema import (
    KERNEL_BITS,
    MOST_BITS,
    ActivationObserver,
    Config,
    Engine,
    ExportCommand,
    ExportFormat,
    FlowName,
    LogModel,
    Observer,
    Placement,
    Report,
    ReportCommand,
    ReportObjective,
    RuntimeName,
    Scheme,
    Target,
)
from qexp.errors import ConfigError
from qexp.metrics import Metric
from qexp.records import Precision
from qexp.system import credentials

# What a number that may be null must be.
NULLS = {
    "calib.batches": "a positive number, or null for all of the training images",
    "job.timeout": "a positive number of seconds, or null for no limit",
}
OBJECTIVES = (Metric.accuracy_int8, Metric.accuracy_delta, Metric.latency_int8, Metric.speedup, Metric.size_int8)


def check(config: Config, swept: Collection[str] = ()) -> None:
    """Raise ConfigError for what can't work whatever the inputs are.

    swept: the settings that vary in the sweep that this is a job of; where `observer` does, a parameter that only
    some of the observers have is ignored by the others instead of refused.
    """
    _check_ranges(config)
    _check_qconfig(config)
    if "observer" not in swept:
        _check_observer(config.observer)
    _check_entropy(config)
    _check_credentials(config)
    _check_mappings(config)
    check_report(config.report)
    if config.racing:
        _check_racing(config, swept)
    image_settings.check(config.dataset)


def _check_ranges(config: Config) -> None:
    calib, train, latency = config.calib, config.train, config.latency
    positive = {
        "calib.batches": calib.batches,
        "calib.batch_size": calib.batch_size,
        "train.epochs": train.epochs,
        "train.batch_size": train.batch_size,
        "train.lr": train.lr,
        "evaluate.batch_size": config.evaluate.batch_size,
        "compute.threads": config.compute.threads,
        "job.at_a_time": config.job.at_a_time,
        "saturation.emulated_images": config.saturation.emulated_images,
        "job.timeout": config.job.timeout,
        "tracking.timeout": config.tracking.timeout,
        "cache.max_gb": config.cache.max_gb,
        "observer.bins": config.observer.bins,
        "latency.seconds": latency.seconds,
        "latency.block_ms": latency.block_ms,
        "latency.min_blocks": latency.min_blocks,
    }
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{name}={value}: must be {NULLS.get(name, 'positive')}.")
    counts: dict[str, float] = {
        "saturation.exact_images": config.saturation.exact_images,
        "per_layer.images": config.per_layer.images,
        "tracking.patience": config.tracking.patience,
    }
    for name, count in counts.items():
        if count < 0:
            raise ConfigError(f"{name}={count}: must be 0 or more.")
    if config.observer.averaging_constant is not None and not 0 < config.observer.averaging_constant <= 1:
        raise ConfigError(f"observer.averaging_constant={config.observer.averaging_constant}: must be in (0, 1].")
    if config.observer.percentile is not None and not 50 < config.observer.percentile <= 100:
        raise ConfigError(f"observer.percentile={config.observer.percentile}: must be over 50 and at most 100.")
    for name, values in (("latency.threads", latency.threads), ("latency.batch_sizes", latency.batch_sizes)):
        if not values or any(value < 1 for value in values):
            raise ConfigError(f"{name}={values}: must be a list of positive numbers, such as [1] or [1,2].")
    for name, least in (("warmup_calls", latency.warmup_calls), ("warmup_seconds", latency.warmup_seconds)):
        if not least >= 0:
            raise ConfigError(f"latency.{name}={least}: must not be negative.")
    _check_served(config)
    if latency.processes < 0:
        raise ConfigError(f"latency.processes={latency.processes}: must be 0 (in the running process) or more.")
    if latency.reuse not in (True, False, "auto"):
        raise ConfigError(f"latency.reuse={latency.reuse}: must be auto (true in a sweep), true or false.")
    _check_runtimes(config)
    for name, seed in (("seed", config.seed), ("calib.seed", calib.seed), ("train.seed", train.seed)):
        if not 0 <= seed < 2**32:
            raise ConfigError(f"{name}={seed}: must be in 0..{2**32 - 1}.")


def _check_served(config: Config) -> None:
    """Raise ConfigError where the model can't be logged as one that MLflow serves, or registered."""
    name = config.tracking.registered_model
    if config.tracking.log_model is not LogModel.flavor:
        if name is not None:
            raise ConfigError(
                f"tracking.registered_model={name}: only a model that MLflow serves is registered; add "
                "tracking.log_model=flavor."
            )
        return
    if not any(runtime.served for runtime in config.runtimes):
        raise ConfigError(
            f"tracking.log_model=flavor logs the INT8 model as an ONNX file, which runtimes={_listed(config.runtimes)} "
            f"has no use for; add {_either(name for name in RuntimeName if name.served)} (pip install "
            "'qexp[onnxruntime]'), or use tracking.log_model=artifact."
        )
    if "calib" in config.flow.ignores:  # ranges are computed as the model runs, for which there is no ONNX file
        raise ConfigError(
            f"tracking.log_model=flavor logs the INT8 model as an ONNX file, which flow={config.flow} can't make; use "
            "another flow, or tracking.log_model=artifact."
        )
    if name is not None and (not name.strip() or set("/:") & set(name)):
        raise ConfigError(f"tracking.registered_model={name}: must be a name without / and :, or null for none.")


def _check_runtimes(config: Config) -> None:
    listed = _listed(config.runtimes)
    if not config.runtimes or len(set(config.runtimes)) < len(config.runtimes):
        raise ConfigError(f"runtimes={listed}: must be one or more of {', '.join(RuntimeName)}, each once.")
    if not any(runtime.int8 for runtime in config.runtimes):
        others = _either(runtime for runtime in RuntimeName if runtime.int8)
        raise ConfigError(f"runtimes={listed}: INT8 runs in none of these; add {others}.")
    symmetric = [runtime for runtime in config.runtimes if runtime.symmetric]
    if symmetric and config.qconfig.weight.scheme is Scheme.asymmetric:
        raise ConfigError(
            f"runtimes={listed}: {symmetric[0]} takes symmetric weights only, got qconfig.weight.scheme=asymmetric; "
            "take it out, or use qconfig.weight.scheme=symmetric."
        )


def _check_simulated(config: Config) -> None:
    """Raise ConfigError unless kernels execute what they hold, and more bits are simulated."""
    listed = _listed(config.runtimes)
    if config.qconfig.simulated:
        if kernels := [runtime for runtime in config.runtimes if not runtime.simulates]:
            raise ConfigError(
                f"{_wide(config)}: {kernels[0]} of runtimes={listed} holds no more than {KERNEL_BITS} bits; use "
                f"runtimes=auto, which simulates more in float, or at most {KERNEL_BITS}."
            )
    elif any(runtime.simulates for runtime in config.runtimes):
        raise ConfigError(
            f"runtimes={listed}: simulated is for more bits than kernels hold, {KERNEL_BITS + 1} to {MOST_BITS} in "
            "qconfig.weight.bits or qconfig.activation.bits; use runtimes=auto for fewer."
        )


def _wide(config: Config) -> str:
    """The settings that ask for more bits than kernels hold, as they are typed."""
    sides = {"weight": config.qconfig.weight.bits, "activation": config.qconfig.activation.bits}
    return " ".join(f"qconfig.{name}.bits={bits}" for name, bits in sides.items() if bits > KERNEL_BITS)


def _listed(runtimes: Iterable[RuntimeName]) -> str:
    return f"[{','.join(runtimes)}]"


def _either(runtimes: Iterable[str]) -> str:
    return " or ".join(runtimes)


def _check_qconfig(config: Config) -> None:
    qconfig, engine = config.qconfig, config.engine
    for name, bits in (("weight", qconfig.weight.bits), ("activation", qconfig.activation.bits)):
        if not 2 <= bits <= MOST_BITS:
            raise ConfigError(
                f"qconfig.{name}.bits={bits}: must be in 2..{MOST_BITS}; INT8 kernels hold no more than {KERNEL_BITS}, "
                "and more are simulated in float."
            )
    _check_simulated(config)
    flow = config.flow
    if qconfig.simulated and "calib" in flow.ignores:
        raise ConfigError(
            f"{_wide(config)}: more than {KERNEL_BITS} bits are simulated with ranges of a calibration, and "
            f"flow={flow} computes them as the model runs; use another flow, or at most {KERNEL_BITS} bits."
        )
    if "qconfig.placement" not in flow.ignores and qconfig.placement not in (Placement.auto, *flow.placements):
        others = _either(f"flow={one}" for one in FlowName if qconfig.placement in one.placements)
        raise ConfigError(
            f"qconfig.placement={qconfig.placement}: flow={flow} quantizes as qconfig.placement="
            f"{flow.placements[0]} says, since torch's INT8 layers return INT8; use {others}."
        )
    ignored = "engine" in flow.ignores
    if not ignored and engine is Engine.onednn and qconfig.weight.scheme is Scheme.asymmetric:
        raise ConfigError(
            "engine=onednn takes symmetric weights only, got qconfig.weight.scheme=asymmetric; "
            "use engine=x86, fbgemm or qnnpack, or qconfig.weight.scheme=symmetric."
        )


def _check_racing(config: Config, swept: Collection[str]) -> None:
    """Raise ConfigError where a race would stop by another figure than the report goes by."""
    others = {
        f"report.objective={config.report.objective}": config.report.objective is not ReportObjective.fastest,
        f"evaluate.select_share={config.evaluate.select_share:g}": config.evaluate.select_share > 0,
        f"target={config.target}": config.target is not Target.native and "target" not in config.flow.ignores,
        f"flow={config.flow}": "calib" in config.flow.ignores,
        "calib.seed swept over": "calib.seed" in swept,
    }
    reasons = {
        "report": "what can't be shown to be accurate enough and fastest is stopped, and that is not what is asked for",
        "evaluate": "images set aside choose the winner, and only it is tested",
        "target": "settings are stopped by their accuracy on this CPU",
        "flow": "its ranges are those of a whole batch, so images can't be taken in a random order",
        "calib": "seeds are judged by their mean, and runs are stopped one by one",
    }
    for setting, refused in others.items():
        if refused:
            reason = reasons[setting.partition(".")[0].partition("=")[0]]
            raise ConfigError(f"racing=true with {setting}: {reason}; leave one of the two out.")


def _check_observer(observer: Observer) -> None:
    has = observer.name.parameters
    for parameter in sorted({name for one in ActivationObserver for name in one.parameters}):
        value = getattr(observer, parameter)
        if value is not None and parameter not in has:
            owners = [f"observer={one}" for one in ActivationObserver if parameter in one.parameters]
            raise ConfigError(
                f"observer.{parameter}={value}: observer={observer.name} has no such parameter, "
                f"{' and '.join(owners)} {'does' if len(owners) == 1 else 'do'}."
            )
        if value is None and parameter in has:
            raise ConfigError(f"observer.{parameter}=null: observer={observer.name} needs a value.")


def _check_entropy(config: Config) -> None:
    levels = 2**config.qconfig.activation.bits
    bins = config.observer.bins
    if config.observer.name is ActivationObserver.entropy and bins is not None and bins < levels:
        raise ConfigError(
            f"observer.bins={bins}: observer=entropy needs at least as many bins as the grid has steps, {levels} with "
            f"qconfig.activation.bits={config.qconfig.activation.bits}; 2048 leave it a choice."
        )


def _check_credentials(config: Config) -> None:
    for name, value in flat(exact(config)).items():
        if isinstance(value, str) and credentials.MASK in value and name not in LABELS:
            raise ConfigError(
                f"{name}={value}: {credentials.MASK} stands for a credential, which qexp writes down nowhere; give it "
                "in full."
            )


def _check_mappings(config: Config) -> None:
    for name, mapping in (("model", config.model), ("dataset", config.dataset)):
        if not isinstance(mapping.get("_target_"), str) or not mapping["_target_"]:
            raise ConfigError(f"{name}._target_={mapping.get('_target_')}: must be the dotted name of a callable.")
    if config.model.get("checkpoint") and config.model.get("weights"):
        given = f"model.checkpoint={config.model['checkpoint']} and model.weights={config.model['weights']}"
        raise ConfigError(f"{given}: give one of them.")
    margin = config.dataset.get("margin")
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 < margin < 1:
        raise ConfigError(f"dataset.margin={margin}: must be an accuracy loss in (0, 1), such as 0.005.")
    if config.objective not in OBJECTIVES:
        raise ConfigError(f"objective={config.objective}: must be one of {', '.join(OBJECTIVES)}.")
    if not 0 <= config.evaluate.select_share < 1:
        raise ConfigError(
            f"evaluate.select_share={config.evaluate.select_share}: must be a share of the evaluation images in "
            "[0, 1), such as 0.3; 0 sets none aside."
        )


def check_report(report: Report) -> None:
    """Raise ConfigError where a setting of the report can't work."""
    if report.runtime is not None and report.runtime.simulates:
        raise ConfigError(
            f"report.runtime={report.runtime}: is a simulation in float, which a report never recommends."
        )
    if report.margin is not None and not 0 < report.margin < 1:
        raise ConfigError(f"report.margin={report.margin}: must be an accuracy loss in (0, 1), such as 0.005.")
    for name in ("max_ms", "batch_size", "threads"):
        value = getattr(report, name)
        if value is not None and value <= 0:
            raise ConfigError(f"report.{name}={value}: must be positive.")
    accurate = report.objective is ReportObjective.accurate
    if accurate and report.max_ms is None:
        raise ConfigError(
            "report.objective=accurate: needs report.max_ms, the highest latency in ms, such as report.max_ms=2."
        )
    if report.max_ms is not None and not accurate:
        raise ConfigError(
            f"report.max_ms={report.max_ms}: has an effect with report.objective=accurate only, and this is "
            f"report.objective={report.objective}."
        )
    if report.export and not report.auto:
        raise ConfigError(
            "report.export=true: exports what the report recommends, and report.auto=false makes none; leave one out."
        )


def check_report_command(command: ReportCommand) -> None:
    """Raise ConfigError for settings of `python -m qexp.report` that can't work whatever runs there are."""
    check_report(command.report)
    ways = {"sweep": command.sweep, "study": command.study, "filter": command.filter, "compare": command.compare}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: a report is of one of them; give one of {', '.join(ways)}, or none.")
    if command.compare is not None and len(set(command.compare)) != 2:
        raise ConfigError(
            f"compare={','.join(command.compare)}: must be the ids of two runs, as in compare=RUN_A,RUN_B."
        )
    if command.compare is not None and command.report.export:
        raise ConfigError("report.export=true: a comparison recommends nothing; leave out compare, or report.export.")
    if not command.tracking.timeout > 0:
        raise ConfigError(f"tracking.timeout={command.tracking.timeout}: must be positive.")


def check_export_command(command: ExportCommand) -> None:
    """Raise ConfigError for settings of `python -m qexp.export` that can't work whatever the run is."""
    if not command.run_id:
        raise ConfigError("run_id has no value: give the id of a run in MLflow, as in run_id=ID.")
    if command.batch_size < 1:
        raise ConfigError(f"batch_size={command.batch_size}: must be positive.")
    if command.precision is Precision.fp32 and not command.format.float_too:
        allowed = ", ".join(f"format={one}" for one in ExportFormat if one.float_too)
        raise ConfigError(f"format={command.format} with precision=fp32: must be one of {allowed}.")
    if not command.tracking.timeout > 0:
        raise ConfigError(f"tracking.timeout={command.tracking.timeout}: must be positive.")
