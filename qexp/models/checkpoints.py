"""Weights from a file into a module: read without running code, matched by name, refused where they don't fit.

What a file is shows in its first bytes, not in its extension. The weights may be the file itself or lie in it under
any key, and their names may carry the prefixes of wrappers (DataParallel, torch.compile, Lightning, FSDP). What names
alone don't match, the module's own load_state_dict decides on, which may have hooks for checkpoints of old.
"""

from __future__ import annotations

import argparse
import difflib
import pathlib
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from qexp.errors import InputError, one_line

# Where several weights in one file fit, the first of these is taken; averaged ones (EMA) come after all others.
_PREFERRED = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "params", "weights")
# Where names with several prefixes fit, as with a student and a teacher, one of these is taken, else it is refused.
_USUAL_PREFIXES = ("model", "net", "network", "backbone", "encoder", "classifier")
# Components of names that wrappers insert anywhere.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# Entries without a meaning for inference: counters of thop and of averaged models, auxiliary heads of Inception nets.
_NEEDLESS = re.compile(
    r"(^|\.)(total_ops|total_params|n_averaged|num_batches_tracked|aux1\..*|aux2\..*|AuxLogits\..*)$"
)
# What get_extra_state() gives is saved under this name; it need not be a tensor.
_EXTRA = "_extra_state"
_QUANTIZED = re.compile(r"(^|\.)(_packed_params(\..*)?|zero_point)$")
_PREPARED = re.compile(r"activation_post_process|fake_quant")
# What training scripts put beside the weights, and what can be read without running anything.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    np.ndarray,
    np.dtype,
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
    (np._core.multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),  # type: ignore[attr-defined]
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),  # type: ignore[attr-defined]
    *(type(np.dtype(code)) for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")),
]
_SAVE_INSTEAD = 'save its weights alone, torch.save(model.state_dict(), "weights.pt")'


def load_checkpoint(module: nn.Module, path: Path) -> str:
    """Fills `module` (float32, on the CPU) with the weights in the file at `path`; says in one line what was taken.

    path: `.pt`, `.pth`, `.ckpt`, `.bin` or `.safetensors`, told apart by content; `~` is expanded.
    Half, bfloat16 and double precision become float32. Missing counters of BatchNorms are fine.
    Raises InputError if the file can't be read without running code in it, or if its weights are not exactly those of
    the module: nothing of the module is then changed.
    """
    path = Path(path).expanduser()
    setting = f"model.checkpoint={path}"
    candidates = list(_candidates(_read(setting, path)))
    if not candidates:
        raise InputError(f"{setting} holds no weights: no mapping of names to tensors; {_SAVE_INSTEAD}.")
    target = {n: value for n, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    fits = [_fit(setting, state, target) for state in sorted(candidates, key=_preference)]
    whole = [fit for fit in fits if fit.complete] or [taken for fit in fits if (taken := _taken(module, fit, target))]
    fit = whole[0] if whole else max(fits, key=lambda fit: len(fit.names))
    _check(setting, fit, target)
    converted = _converted(fit, target)
    broken = [n for n, t in converted.items() if _is_float(t) and not bool(torch.isfinite(t).all())]
    if broken:
        raise InputError(
            f"{setting}: {_count(len(broken), 'tensor')} of it {'hold' if len(broken) > 1 else 'holds'} NaN or infinity"
            f" ({_first(broken)}); the training that wrote it diverged, take an earlier checkpoint."
        )
    error = _load(module, converted, target, strict=fit.by_module)
    if error is not None:
        raise InputError(
            f"{setting} is refused by {type(module).__name__}'s own load_state_dict: {one_line(error)}."
        ) from error
    return _describe(path, fit, [other.state.place for other in whole[1:]])


@dataclass(frozen=True, eq=False)
class _State:
    """Weights in a file, as a mapping of names to tensors somewhere in it.

    place: "state_dict" or "model.ema", say; empty for the file itself. extra: what modules save beside tensors.
    versions: of the modules by path, as state_dict() keeps them for those that load it.
    """

    place: str
    tensors: Mapping[str, Tensor]
    extra: Mapping[str, Any]
    versions: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class _Fit:
    """A match of the weights at one place of a file with the names of a module."""

    state: _State
    names: dict[str, str]  # name in the module -> name in the file
    prefix: str = ""  # what the file's names carry and the module's don't
    added: str = ""  # the reverse
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    extra: dict[str, str] = field(default_factory=dict)  # as names, of what is no tensor
    wrappers: frozenset[str] = frozenset()  # components that are left out of the file's names
    by_module: bool = False  # the module's load_state_dict takes these names, which it may change

    def name(self, key: str) -> str:
        """The module's name of the tensor that the file has under this name."""
        return self.added + _without(self.wrappers, key).removeprefix(self.prefix)

    def take(self, keys: Iterable[str]) -> None:
        """Match the tensors that the file has under these names."""
        for key in keys:
            (self.extra if key in self.state.extra else self.names)[self.name(key)] = key

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen)


# ---- reading ----


def _read(setting: str, path: Path) -> object:
    _check_is_file(setting, path)
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise InputError(f"{setting} can't be opened: {error.strerror}.") from error
    if _is_safetensors(head):
        return _read_safetensors(setting, path)
    what = _other_than_torch(path, head)
    if what:
        raise InputError(f"{setting} {what}.")
    return _read_torch(setting, path)


def _check_is_file(setting: str, path: Path) -> None:
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in {".pt", ".pth", ".ckpt", ".bin", ".safetensors"})
        raise InputError(f"{setting} is a folder; name a file in it{f' ({_first(inside)})' if inside else ''}.")
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        raise InputError(f"{setting} does not exist{f' (did you mean {path.with_name(near[0])}?)' if near else ''}.")
    if not path.is_file():
        raise InputError(f"{setting} is not a regular file.")
    if path.stat().st_size == 0:
        raise InputError(f"{setting} is empty; it was not written or not downloaded to its end.")


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 9 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 100_000_000


def _other_than_torch(path: Path, head: bytes) -> str | None:
    """The kind of file, where its first bytes show that torch.save did not write it; else None."""
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the file itself; fetch it with git lfs pull"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        return "is a web page and not a checkpoint; download the file itself"
    if head.startswith(b"\x93NUMPY"):
        return f"is a NumPy array; {_SAVE_INSTEAD}"
    if head.startswith(b"\x89HDF"):
        return "is an HDF5 file, as Keras writes it; only PyTorch checkpoints are read"
    if head.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")) or (
        head[257:262] == b"ustar"
    ):
        return "is a compressed archive; unpack it first"
    if head.startswith(b"PK"):
        return _other_than_torch_zip(path)
    if head[:1] != b"\x80":  # every pickle of protocol 2 or later starts so
        return "is not a PyTorch checkpoint"
    return None


def _other_than_torch_zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "is damaged: its end is missing, it was not written or not downloaded completely"
    inner = {name.partition("/")[2] for name in names}
    if "data.pkl" not in inner:
        if any(name.endswith(".npy") for name in names):
            return f"is a NumPy archive; {_SAVE_INSTEAD}"
        return "is a ZIP archive and not a checkpoint; unpack it first"
    if "constants.pkl" in inner:
        return f"is a TorchScript archive, a program and not weights; load it with torch.jit.load and {_SAVE_INSTEAD}"
    return None


def _read_safetensors(setting: str, path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except Exception as error:
        raise InputError(f"{setting} is a damaged safetensors file ({one_line(error)}).") from error


def _read_torch(setting: str, path: Path) -> object:
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # it is read, or refused below
            if path.suffix == ".safetensors":
                # torch.load goes by this name: an open file has none.
                with path.open("rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise InputError(f"{setting} {_why_unreadable(path, error)}.") from error


def _why_unreadable(path: Path, error: Exception) -> str:
    text = str(error)
    classes = _unsafe_globals(path) or re.findall(r"GLOBAL ([\w.]+)", text)
    if any(name.startswith("torch.nn.modules.") for name in classes):
        return f"is a whole pickled model, which reading would run code of; {_SAVE_INSTEAD}"
    if classes:
        return f"holds pickled objects besides tensors, which reading would run code of ({_first(classes)});" + (
            f" where you trust it, load it with weights_only=False and {_SAVE_INSTEAD}"
        )
    if "Unsupported operand" in text or "magic number" in text.lower() or "unsupported class" in text.lower():
        return f"is a pickle that torch.save did not write; {_SAVE_INSTEAD}"
    if isinstance(error, EOFError) or "PytorchStreamReader" in text or "unexpected EOF" in text or "storage" in text:
        return "is damaged: it was not written or not downloaded completely"
    return f"can't be read: {one_line(error, 160)}"


def _unsafe_globals(path: Path) -> list[str]:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # legacy files have none to list; the caller falls back to the error's own text
        return []


# ---- finding the weights in what was read ----


def _candidates(value: object, place: str = "", depth: int = 0) -> Iterator[_State]:
    """Every mapping of names to tensors in `value`, down to three levels, with the keys that lead to it."""
    if not isinstance(value, Mapping):
        return
    named = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in value.items() if isinstance(k, str)}
    tensors = {name: item for name, item in named.items() if isinstance(item, Tensor)}
    if tensors:
        extra = {name: item for name, item in named.items() if name.endswith(_EXTRA) and name not in tensors}
        yield _State(place, tensors, extra, getattr(value, "_metadata", {}))
    if depth < 3:
        for key, inner in value.items():
            if isinstance(key, str):
                yield from _candidates(inner, f"{place}.{key}" if place else key, depth + 1)


def _preference(state: _State) -> tuple[bool, bool, int]:
    last = state.place.rpartition(".")[2]
    averaged = bool(re.search("ema|swa|teacher|averag", state.place.lower()))
    return state.place != "", averaged, _PREFERRED.index(last) if last in _PREFERRED else len(_PREFERRED)


def _fit(setting: str, state: _State, target: Mapping[str, Tensor]) -> _Fit:
    keys = [*state.tensors, *state.extra]
    wrappers = _wrappers(keys, target)
    plain = {key: _without(wrappers, key) for key in keys}
    added = ""
    prefix, count = _best_prefix(setting, plain.values(), target)
    # The module may be the wrapper: class Net with the network in self.model, and weights of the network alone.
    shared = _shared_component(target)
    if shared and count < len(target):
        inner = {name.removeprefix(shared): tensor for name, tensor in target.items()}
        inner_prefix, inner_count = _best_prefix(setting, plain.values(), inner)
        if inner_count > count:
            prefix, added = inner_prefix, shared
    fit = _Fit(state, {}, prefix, added, wrappers=wrappers)
    for key, short in plain.items():
        name = fit.name(key)
        if not short.startswith(prefix):
            fit.ignored.append(key)
        elif key in state.extra:
            fit.extra[name] = key
        elif name in target:
            fit.names[name] = key
        else:
            (fit.ignored if _NEEDLESS.search(short) else fit.unexpected).append(key)
    loaded = {_storage(target[name]) for name in fit.names} - {None}
    fit.missing.extend(
        name
        for name, tensor in target.items()
        if name not in fit.names and not name.endswith("num_batches_tracked") and _storage(tensor) not in loaded
    )
    fit.misshapen.extend(name for name, key in fit.names.items() if not _same_shape(state.tensors[key], target[name]))
    return fit


def _taken(module: nn.Module, fit: _Fit, target: Mapping[str, Tensor]) -> _Fit | None:
    """The fit with which the module's own load_state_dict takes these weights and all of them, if there is one: with
    the file's names, or without what wrappers and training scripts put before them. The module is left as it was."""
    if any(is_lazy(tensor) for tensor in target.values()):
        return None
    keys = [*fit.state.tensors, *fit.state.extra]
    needed = [key for key in keys if key not in fit.ignored]
    shared = _shared_component(_without(fit.wrappers, key) for key in needed)
    as_they_are = _Fit(fit.state, {}, by_module=True)
    as_they_are.take(keys)
    others = [
        _Fit(fit.state, {}, prefix, added, ignored=fit.ignored, wrappers=fit.wrappers, by_module=True)
        for prefix, added in dict.fromkeys([(fit.prefix, fit.added), ("", ""), (shared, "")])
    ]
    for other in others:
        other.take(needed)
    before = _values(target)
    for other in (as_they_are, *others):
        if _load(module, _converted(other, target), target, strict=True) is None:
            _put_back(target, before)
            return other
    return None


def _load(module: nn.Module, state: Mapping[str, Any], target: Mapping[str, Tensor], strict: bool) -> Exception | None:
    """Let the module load a state; where it refuses to, why, and the module is as it was. target: its tensors."""
    before = _values(target)
    try:
        left = module.load_state_dict(state, strict=strict)
        # A method of the model's own may be less strict than it is told to be.
        if strict and any(map(bool, left or ())):
            raise RuntimeError(str(left))
    except Exception as error:  # its hooks may raise anything
        _put_back(target, before)
        return error
    return None


def _values(target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in target.items() if not is_lazy(tensor)}


def _put_back(target: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in before.items():
            target[name].copy_(tensor)


def _wrappers(keys: Sequence[str], target: Iterable[str]) -> frozenset[str]:
    """The components of names that wrappers insert, but for those that the module has itself."""
    found = frozenset(_WRAPPERS - {part for name in target for part in name.split(".")})
    return found if len({_without(found, key) for key in keys}) == len(keys) else frozenset()


def _without(wrappers: Collection[str], name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _best_prefix(setting: str, keys: Iterable[str], target: Mapping[str, Tensor]) -> tuple[str, int]:
    """The prefix with which most of the keys are names of the module, and how many."""
    counts: Counter[str] = Counter()
    for key in keys:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in target:
                counts["".join(part + "." for part in parts[:i])] += 1
    if not counts:
        return "", 0
    most = max(counts.values())
    best = [prefix for prefix, count in counts.items() if count == most]
    usual = ["", *(name + "." for name in _USUAL_PREFIXES)]
    for prefix in usual:
        if prefix in best:
            return prefix, most
    if len(best) > 1 and most >= len(target) / 2:
        raise InputError(f"{setting} holds several networks that fit ({_first(best)}); save the one that you mean.")
    return best[0], most


def _shared_component(names: Iterable[str]) -> str:
    firsts = {name.partition(".")[0] for name in names if "." in name} | {"" for name in names if "." not in name}
    return f"{firsts.pop()}." if len(firsts) == 1 and "" not in firsts else ""


def _storage(tensor: Tensor) -> int | None:
    """Identity of a tensor's memory, which is the same for tied weights."""
    return None if is_lazy(tensor) or tensor.numel() == 0 else tensor.data_ptr()


def _same_shape(source: Tensor, target: Tensor) -> bool:
    # Counters of BatchNorms come as [] and as [1].
    return is_lazy(target) or source.shape == target.shape or (source.numel() == target.numel() == 1)


# ---- judging, converting, telling ----


def _check(setting: str, fit: _Fit, target: Mapping[str, Tensor]) -> None:
    of = f"{setting}{f' ({fit.state.place})' if fit.state.place else ''}"
    if any(t.is_quantized for t in fit.state.tensors.values()) or any(map(_QUANTIZED.search, fit.state.tensors)):
        raise InputError(f"{of} holds a model that is quantized already; give the FP32 weights.")
    if any(map(_PREPARED.search, fit.state.tensors)):
        raise InputError(f"{of} holds a model prepared for quantization, with its observers; give the FP32 weights.")
    if fit.missing or fit.unexpected:
        parts = []
        if fit.missing:
            parts.append(
                f"lacks {len(fit.missing)} of the model's {_count(len(target), 'tensor')} ({_first(fit.missing)})"
            )
        if fit.unexpected:
            parts.append(f"has {len(fit.unexpected)} that the model has not ({_first(fit.unexpected)})")
        raise InputError(f"{of} is of another architecture: it {' and '.join(parts)}; choose the model that it is of.")
    if fit.misshapen:
        raise InputError(f"{of} {_misfit(fit, target)}.")
    odd = [
        f"{key} is {str(fit.state.tensors[key].dtype).removeprefix('torch.')}"
        for name, key in fit.names.items()
        if name in target and target[name].is_floating_point() and not fit.state.tensors[key].is_floating_point()
    ]
    if odd or any(t.is_meta or t.is_sparse for t in fit.state.tensors.values()):
        raise InputError(
            f"{of} does not hold plain floating-point weights ({_first(odd) or 'meta or sparse tensors'})."
        )


def _misfit(fit: _Fit, target: Mapping[str, Tensor]) -> str:
    shapes = {
        name: (list(fit.state.tensors[fit.names[name]].shape), list(target[name].shape)) for name in fit.misshapen
    }
    layers = {name.rpartition(".")[0] for name in shapes}
    if len(layers) == 1 and all(len(a) == len(b) and a[1:] == b[1:] and a[0] != b[0] for a, b in shapes.values()):
        got, wanted = next(iter(shapes.values()))
        return (
            f"has {got[0]} outputs in {layers.pop()} where the model has {wanted[0]}; the number of classes must agree"
        )
    listed = [f"{name} is {got} and should be {wanted}" for name, (got, wanted) in shapes.items()]
    return f"does not fit the model: {_count(len(listed), 'tensor')} of another shape ({_first(listed, '; ')})"


def _converted(fit: _Fit, target: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the module is given: float32 tensors by its own names, with what stands beside them in the file."""
    state = fit.state
    given: dict[str, Any] = OrderedDict(
        (name, _convert(state.tensors[key], target.get(name))) for name, key in fit.names.items()
    )
    given.update((name, state.extra[key]) for name, key in fit.extra.items())
    given._metadata = {  # type: ignore[attr-defined]
        fit.name(f"{path}.").rstrip("."): version
        for path, version in state.versions.items()
        if f"{_without(fit.wrappers, path)}.".startswith(fit.prefix)
    }
    return given


def _convert(source: Tensor, target: Tensor | None) -> Tensor:
    source = source.detach()
    if target is not None and not is_lazy(target) and source.numel() == target.numel() == 1:
        source = source.reshape(target.shape)
    if target is None or is_lazy(target):
        return source.float() if source.is_floating_point() else source
    return source.to(torch.float32 if target.is_floating_point() else target.dtype)


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _describe(path: Path, fit: _Fit, others: list[str]) -> str:
    parts = [f"{_count(len(fit.names), 'tensor')}{f' of {fit.state.place}' if fit.state.place else ''} from {path}"]
    kinds = {
        str(t.dtype).removeprefix("torch.")
        for k in fit.names.values()
        if (t := fit.state.tensors[k]).is_floating_point()
    }
    if kinds - {"float32"}:
        parts.append(f"{', '.join(sorted(kinds - {'float32'}))} converted to float32")
    if fit.prefix:
        parts.append(f"prefix {fit.prefix} removed")
    if fit.added:
        parts.append(f"prefix {fit.added} added")
    if fit.ignored:
        parts.append(f"{len(fit.ignored)} ignored ({_first(fit.ignored)})")
    if others:
        parts.append(f"not taken though they fit: {', '.join(other or 'the file itself' for other in others)}")
    return "; ".join(parts)


def _first(names: Iterable[str], separator: str = ", ") -> str:
    names = list(names)
    return separator.join(names[:3]) + (f"{separator}…" if len(names) > 3 else "")


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
