"""The float model: built from the configuration, with weights that are loaded, downloaded, or trained once and saved.

A network with random weights is never returned: weights come from exactly one of `model.checkpoint`, `model.weights`
(torchvision's pretrained ones) and training.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from qexp.config import code_digest, schema
from qexp.config.instantiation import locate, resolve, takes
from qexp.config.schema import Config
from qexp.data.loading import Data
from qexp.errors import ConfigError, InputError, QexpError, one_line
from qexp.models.checkpoints import load_checkpoint
from qexp.models.class_names import derives_from
from qexp.models.training import choose_device, train
from qexp.models.unwrap import unwrap
from qexp.system import file_lock, machine_lock
from qexp.system.cache import digest_of
from qexp.system.download import download
from qexp.system.steps import step
from qexp.system.torchvision_import import torchvision

log = logging.getLogger(__name__)

_SCRIPT = "torch.jit._script.ScriptModule"
SOURCES = frozenset({"checkpoint", "weights"})
RESERVED = SOURCES | {"output"}  # keys of `model` that are not arguments of its target


@dataclass(frozen=True, eq=False)
class FloatModel:
    """A network with weights: in eval mode, float32, on the CPU, without gradients.

    digest: SHA-256 of its weights, its structure and the code of its classes; source: where the weights are from.
    """

    module: nn.Module
    digest: str
    source: str


class Logits(nn.Module):
    """The logits among the outputs of a network.

    output: their position in a tuple or list, or their key in a mapping.
    """

    def __init__(self, net: nn.Module, output: int | str) -> None:
        super().__init__()
        self.net, self.output = net, output

    def forward(self, images: Tensor) -> Any:
        return self.net(images)[self.output]

    def extra_repr(self) -> str:
        return f"output={self.output!r}"


@step("float model")
def load_or_train(config: Config, data: Data) -> FloatModel:
    """The float model of a run, from a checkpoint, from torchvision's weights, or trained once and saved in
    `outputs`/checkpoints.

    Raises ConfigError or InputError where it can't be loaded or built, RunError where training fails.
    """
    model, seed = config.model, config.seed
    _check_one_source(model)
    classes = len(data.classes)
    shape = data.train.shape
    if model.get("weights") is not None:
        module, source = _pretrained(model, classes, seed)
    else:
        module = build(model, classes, seed)
        _materialise(module, shape, seed)
        if model.get("checkpoint") is not None:
            source = load_checkpoint(_network(module), Path(model["checkpoint"]))
        else:
            source = _trained(module, config, data)
    _check_forward(module, str(model["_target_"]), classes, shape)
    module.requires_grad_(False)
    log.info("float model: %s", source)
    return FloatModel(module, _digest(module, model), source)


def check_model(model: Mapping[str, Any], data_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Builds the model, loads its checkpoint if it has one, and runs it once on zeros; trains nothing.

    image_shape: channels, height, width. Returns the module for further checks; without a checkpoint or weights, its
    own are random. Raises ConfigError or InputError in one sentence.
    """
    _check_one_source(model)
    if model.get("weights") is not None:
        module, _ = _pretrained(model, data_classes, seed=0)
    else:
        module = build(model, data_classes, seed=0)
        _materialise(module, image_shape, seed=0)
        if model.get("checkpoint") is not None:
            load_checkpoint(_network(module), Path(model["checkpoint"]))
    _check_forward(module, str(model["_target_"]), data_classes, image_shape)
    return module


def with_statistics(module: nn.Module, images: Tensor) -> None:
    """Give every BatchNorm of an untrained model, in place, the statistics of these images, float32 [n, 3, H, W].

    Without them the signal fades from layer to layer, and what a layer computes does not show in the logits.
    """
    norms = {m: m.momentum for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)}
    try:
        for norm in norms:
            norm.train()
            norm.momentum = 0.97  # not 1: a channel that is the same for all would be multiplied by 300
        with _isolated(0), torch.no_grad():
            module(images)
    except Exception as error:  # the model may be one that takes no such images in training
        log.debug("its BatchNorms stay as they were made: %s", one_line(error))
    finally:
        for norm, momentum in norms.items():
            norm.eval()
            norm.momentum = momentum


def build(model: Mapping[str, Any], classes: int, seed: int) -> nn.Module:
    """The network that `model` describes, with random weights drawn from `seed`: eval mode, float32, on the CPU.

    `num_classes: null` becomes `classes` where the target takes it. Random states, threads and torch's defaults are
    left as they were, whatever the target's code does to them.
    """
    return _build(model, classes, seed, {})


def _build(model: Mapping[str, Any], classes: int, seed: int, more: Mapping[str, Any]) -> nn.Module:
    path = model.get("_target_")
    with _isolated(seed):
        target = locate("model._target_", path)
        spec = {**_with_classes(model, target, classes), **more}
        target, arguments = resolve("model", spec, reserved=RESERVED - set(more))
        try:
            with machine_lock.released():  # it may download, and is anybody's code
                made = target(**arguments)
        except QexpError:
            raise
        except Exception as error:
            raise InputError(f"model._target_={path} fails with {one_line(error)}.") from error
    module = unwrap(made)
    if not isinstance(module, nn.Module):
        raise InputError(f"model._target_={path} makes a {type(module).__name__}; it must make a torch.nn.Module.")
    if derives_from(module, _SCRIPT):
        raise InputError(f"model._target_={path} makes a TorchScript module, which can't be quantized; use its source.")
    if any(p.is_meta for p in module.parameters()):
        raise InputError(f"model._target_={path} makes its weights on the meta device, without values; leave that out.")
    module.to("cpu").float()
    module.eval()  # its result is not used: some classes override train() without returning self
    output = model.get("output")
    return module if output is None else Logits(module, output).eval()


def _network(module: nn.Module) -> nn.Module:
    """The network itself, whose names a checkpoint has."""
    return module.net if isinstance(module, Logits) else module


def _with_classes(model: Mapping[str, Any], target: Callable[..., Any], classes: int) -> dict[str, Any]:
    spec = dict(model)
    if "num_classes" not in spec:
        return spec
    asked = spec["num_classes"]
    if asked is None:
        if takes(target, "num_classes"):
            spec["num_classes"] = classes
        else:
            del spec["num_classes"]
    elif asked != classes:
        raise InputError(
            f"model.num_classes={asked}: the data set has {classes} classes; they must agree (null takes its number)."
        )
    return spec


@contextlib.contextmanager
def _isolated(seed: int) -> Iterator[None]:
    """Seeds every generator that a model's code may draw from; afterwards all of torch's globals are as they were."""
    threads, dtype, device = torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device()
    deterministic = torch.get_deterministic_debug_mode()
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_default_dtype(dtype)
            if torch.get_default_device() != device:
                torch.set_default_device(device)
            if torch.get_deterministic_debug_mode() != deterministic:
                torch.use_deterministic_algorithms(deterministic > 0, warn_only=deterministic == 1)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)


# ---- what it must do ----


def _materialise(module: nn.Module, shape: tuple[int, ...], seed: int) -> None:
    """Lazy modules learn their shapes from a first image."""
    if any(is_lazy(p) for p in [*module.parameters(), *module.buffers()]):
        with _isolated(seed), torch.no_grad():
            module(torch.zeros(2, *shape))


def _check_forward(module: nn.Module, path: str, classes: int, shape: tuple[int, ...]) -> None:
    size = "x".join(map(str, shape))
    try:
        with _isolated(0), torch.no_grad():
            output = _network(module)(torch.zeros(2, *shape))
    except Exception as error:
        raise InputError(f"model._target_={path} can't take images of {size}: {one_line(error)}.") from error
    if isinstance(module, Logits):
        output = _picked(output, module.output, path)
    if not isinstance(output, Tensor):
        raise InputError(
            f"model._target_={path} returns {type(output).__name__}; it must return the logits alone, a tensor of"
            f" [N, classes], or model.output must say which of its outputs they are: {_outputs(output)}."
        )
    if output.ndim == 2 and output.shape[0] == 2 and output.shape[1] != classes:
        raise InputError(
            f"model._target_={path} has {output.shape[1]} outputs, the data set has {classes} classes; they must agree."
        )
    if output.shape != (2, classes):
        raise InputError(
            f"model._target_={path} returns {list(output.shape)} for 2 images of {size};"
            f" it must return logits of [2, {classes}]."
        )


def _picked(outputs: Any, output: int | str, path: str) -> Any:
    """The output of that position or key. Raises InputError if there is none."""
    try:
        if isinstance(outputs, Tensor):
            raise TypeError
        return outputs[output]
    except (LookupError, TypeError) as error:
        known = "the logits alone; leave it out" if isinstance(outputs, Tensor) else f"give {_outputs(outputs)}"
        raise InputError(f"model.output={output}: model._target_={path} has no such output, {known}.") from error


def _outputs(outputs: Any) -> str:
    """The positions or keys of a network's outputs, in words."""
    if isinstance(outputs, Mapping):
        return "one of the keys " + ", ".join(map(str, outputs))
    if isinstance(outputs, tuple | list):
        return f"a position from 0 to {len(outputs) - 1}"
    return "a position, or a key"


def _check_one_source(model: Mapping[str, Any]) -> None:
    if model.get("checkpoint") is not None and model.get("weights") is not None:
        raise ConfigError(
            f"model.checkpoint={model['checkpoint']} and model.weights={model['weights']} are both set; leave one out."
        )


# ---- torchvision's pretrained weights ----


def _pretrained(model: Mapping[str, Any], classes: int, seed: int) -> tuple[nn.Module, str]:
    name, path = str(model["weights"]), str(model.get("_target_"))
    setting = f"model.weights={name}"
    target = locate("model._target_", model.get("_target_"))
    builder = str(getattr(target, "__name__", ""))
    home = str(getattr(target, "__module__", ""))
    if (
        not home.startswith(("torchvision.models.", "qexp.models.architectures"))
        or builder not in torchvision.models.list_models()
    ):
        raise ConfigError(f"{setting}: torchvision has no weights for {path}; give a file as model.checkpoint.")
    if model.get("stem", "imagenet") != "imagenet":
        raise ConfigError(f"{setting}: torchvision has none for model.stem={model['stem']}; use model.stem=imagenet.")
    legal = torchvision.models.get_model_weights(builder)
    short = name.rpartition(".")[2]
    if short not in legal.__members__:
        raise ConfigError(f"{setting}: for {path} torchvision has {', '.join(legal.__members__)}.")
    weights = legal[short]
    trained_for = len(weights.meta["categories"])
    if trained_for != classes:
        raise InputError(
            f"{setting} has {trained_for} classes, the data set has {classes}; they must agree"
            " (train a model by leaving model.weights out, or give yours as model.checkpoint)."
        )
    with machine_lock.released():
        _download(setting, weights.url)
    spec = dict(model)
    # torchvision builds GoogLeNet with its auxiliary heads, loads them and removes them, and refuses to be told so.
    if spec.get("aux_logits") is False:
        del spec["aux_logits"]
    return _build(spec, classes, seed, {"weights": short}), f"torchvision's {weights}"


def _download(setting: str, url: str) -> None:
    """Into torch.hub's folder, where torchvision finds it; torchvision's own download can wait without end."""
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        return
    expected = re.search(r"-([0-9a-f]{8,})\.", name)  # torchvision's files carry the head of their SHA-256
    try:
        download(url, path, lambda file: expected is None or digest_of(file).startswith(expected[1]))
    except OSError as error:
        raise InputError(
            f"{setting}: {url} can't be fetched ({one_line(error)}); put the file into {path.parent} by hand,"
            " or give one as model.checkpoint."
        ) from error


# ---- trained once, and saved ----


def _trained(module: nn.Module, config: Config, data: Data) -> str:
    """Give the module trained weights, in place. Returns where they are from, for `FloatModel.source`."""
    model, settings, checkpoints = config.model, config.train, Path(config.outputs) / "checkpoints"
    if settings.epochs < 1:
        raise ConfigError(f"train.epochs={settings.epochs} would leave the model untrained; give 1 or more.")
    key = _training_key(model, settings, data, config.seed)
    name = re.sub(r"\W+", "_", str(model["_target_"]).rpartition(".")[2])
    kept = checkpoints / f"{name}-{data.name}-{key[:16]}.pt"
    before = f"trained before, kept in {kept}"
    with contextlib.suppress(InputError):  # without the lock, for a folder in which nothing can be written
        load_checkpoint(module, kept)
        return before
    with _held(kept.with_suffix(".lock")):
        if kept.exists():
            try:
                load_checkpoint(module, kept)
                return before
            except InputError as error:
                log.warning("the kept model can't be used, it is trained again: %s", error)
        train(module, settings, data, config.compute.threads)
        part = kept.with_suffix(f".{os.getpid()}.part")
        try:
            torch.save(module.state_dict(), part)
            part.replace(kept)
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError where the disk is full
            raise _unwritable(checkpoints, one_line(error)) from error
        finally:
            part.unlink(missing_ok=True)
    return f"trained {settings.epochs} epochs on {data.name}, kept in {kept}"


def _unwritable(folder: Path, reason: str) -> InputError:
    return InputError(f"the trained model can't be kept in {folder} ({reason}); free some room, or set outputs.")


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """One process trains a model, others wait for it: flock, which a killed process lets go."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = file_lock.acquire(path, "trains this model")
    except OSError as error:
        raise _unwritable(path.parent, error.strerror or str(error)) from error
    with held:
        yield


def _training_key(model: Mapping[str, Any], settings: schema.Train, data: Data, seed: int) -> str:
    """SHA-256 of everything that a trained model depends on but the number of threads, which changes only rounding."""
    parts = {
        "model": _made_with(model),
        "train": {**asdict(settings), "device": choose_device(settings.device).type},
        "data": [data.train.digest, data.classes, data.mean, data.std],
        "seed": seed,
        "code": [_code("model._target_", model), Path(inspect.getfile(train)).read_text()],
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _made_with(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model's `_target_`, arguments and output, without where its weights are from."""
    made = {key: value for key, value in model.items() if key not in SOURCES}
    if made.get("output") is None:
        made.pop("output", None)
    return made


def _digest(module: nn.Module, model: Mapping[str, Any]) -> str:
    """SHA-256 of the weights, the structure, the arguments (its forward may read one) and the code."""
    digest = hashlib.sha256()
    digest.update(repr(module).encode())
    digest.update(json.dumps(_made_with(model), sort_keys=True, default=str).encode())
    digest.update(json.dumps(_code("model._target_", model), sort_keys=True).encode())
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _code(setting: str, model: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 by module name of the code that makes the model, and of what that imports of its own project.

    Own means: of the same package, or not installed. So a user's mymodel.py counts with the blocks.py beside it, and
    torch doesn't.
    """
    target = locate(setting, model.get("_target_"))
    first = sys.modules.get(str(getattr(target, "__module__", "")))
    package = str(getattr(first, "__name__", "")).partition(".")[0]
    found: dict[str, str] = {}
    todo = [first] if first is not None and package != "torch" else []  # torch's version counts already
    while todo:
        module = todo.pop()
        file = Path(getattr(module, "__file__", None) or "")
        # torch.ops has a file that doesn't exist.
        if module.__name__ in found or file.suffix != ".py" or not file.is_file() or not _is_own(module, package):
            continue
        found[module.__name__] = hashlib.sha256(file.read_bytes()).hexdigest()
        todo.extend(_referenced(module))
    return found


def _referenced(module: ModuleType) -> list[ModuleType]:
    named = [v if isinstance(v, ModuleType) else getattr(v, "__module__", None) for v in vars(module).values()]
    modules = [value if isinstance(value, ModuleType) else sys.modules.get(value) for value in named if value
               if isinstance(value, ModuleType | str)]  # fmt: skip
    return [m for m in modules if m is not None]


def _is_own(module: ModuleType, package: str) -> bool:
    return module.__name__.partition(".")[0] == package or not code_digest.installed(Path(str(module.__file__)))
