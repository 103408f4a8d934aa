"""Checkpoints as people really have them: each kind is loaded exactly, or refused in one sentence."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qexp.errors import InputError
from qexp.models import architectures
from qexp.models.checkpoints import load_checkpoint

State = dict[str, Tensor]


def net(classes: int = 3) -> nn.Module:
    return architectures.tiny(num_classes=classes, width=4).eval()


def weights(classes: int = 3, seed: int = 1) -> State:
    """A state in which every entry differs from a new net's, counters included."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(t.shape, generator=generator) + 0.5 if t.is_floating_point() else torch.tensor(7)
        for name, t in net(classes).state_dict().items()
    }


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(folder: Path, value: Any, name: str = "weights.pt", **options: Any) -> Path:
    torch.save(value, folder / name, **options)
    return folder / name


def assert_loaded(path: Path, expected: State, tolerance: float = 0.0) -> str:
    module = net()
    said = load_checkpoint(module, path)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name].to(tensor.dtype), rtol=tolerance, atol=0, msg=name)
    assert "\n" not in said
    return said


def refusal(path: Path, module: nn.Module | None = None) -> str:
    module = module or net()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_checkpoint(module, path)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} was changed by a checkpoint that was refused"
    message = str(caught.value)
    assert message.startswith(f"model.checkpoint={path}")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "ema", "params", "module", "odd"])
def test_weights_under_any_key_are_found_and_the_key_is_said(tmp_path: Path, key: str) -> None:
    path = saved(tmp_path, {"epoch": 3, key: weights(), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}})
    assert f"of {key} from" in assert_loaded(path, weights())


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "model.",
        "_orig_mod.",
        "net.",
        "backbone.",
        "module._orig_mod.",
        "model.module.",
        "_forward_module.model.",
    ],
)
def test_prefixes_of_wrappers_are_removed(tmp_path: Path, prefix: str) -> None:
    assert_loaded(saved(tmp_path, {"state_dict": prefixed(prefix, weights())}), weights())


def test_a_part_that_was_compiled_or_data_parallel_is_recognised(tmp_path: Path) -> None:
    state = {
        name.replace("blocks.", "blocks._orig_mod.").replace("fc.", "fc.module."): t for name, t in weights().items()
    }
    assert_loaded(saved(tmp_path, state), weights())


def test_a_module_that_wraps_the_network_takes_the_network_s_own_weights(tmp_path: Path) -> None:
    wrapper = nn.Sequential(net())
    assert "prefix 0. added" in load_checkpoint(wrapper, saved(tmp_path, weights()))
    assert torch.equal(wrapper[0].state_dict()["fc.weight"], weights()["fc.weight"])


def test_lightning_s_loss_weights_beside_the_model_are_ignored_and_named(tmp_path: Path) -> None:
    state = {**prefixed("model.", weights()), "criterion.weight": torch.ones(3)}
    said = assert_loaded(saved(tmp_path, {"state_dict": state, "pytorch-lightning_version": "2.0"}), weights())
    assert "1 ignored (criterion.weight)" in said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32_and_that_is_said(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in weights().items()}
    said = assert_loaded(saved(tmp_path, state), weights(), tolerance=0.01)
    assert f"{str(dtype).removeprefix('torch.')} converted to float32" in said


def test_safetensors_and_the_old_format_load_whatever_the_extension(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "misnamed.pt")
    assert_loaded(tmp_path / "misnamed.pt", weights())
    assert_loaded(saved(tmp_path, weights(), "old.safetensors", _use_new_zipfile_serialization=False), weights())


def test_harmless_objects_beside_the_weights_are_read(tmp_path: Path) -> None:
    beside = {"args": argparse.Namespace(data=Path("x")), "best": np.float64(0.9), "rng": np.zeros(3), "n": np.int64(3)}
    assert_loaded(saved(tmp_path, {"state_dict": weights(), **beside}), weights())


def test_needless_entries_are_ignored_and_missing_counters_are_fine(tmp_path: Path) -> None:
    state = {name: t for name, t in weights().items() if not name.endswith("num_batches_tracked")}
    state |= {"total_ops": torch.zeros(1), "fc.total_params": torch.zeros(1), "n_averaged": torch.tensor(5)}
    module = net()
    assert "3 ignored" in load_checkpoint(module, saved(tmp_path, state))
    assert torch.equal(module.state_dict()["fc.weight"], state["fc.weight"])


def test_counters_of_shape_one_and_tied_weights_are_fine(tmp_path: Path) -> None:
    state = {name: t.reshape(1) if t.ndim == 0 else t for name, t in weights().items()}
    assert_loaded(saved(tmp_path, state), weights())
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    load_checkpoint(tied, saved(tmp_path, {k: v for k, v in tied.state_dict().items() if k != "1.weight"}))


def test_plain_weights_are_preferred_to_averaged_ones_and_the_others_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model_ema": weights(seed=2), "model": weights(seed=1)})
    assert "not taken though they fit: model_ema" in assert_loaded(path, weights(seed=1))


def test_a_key_that_does_not_fit_does_not_hide_one_that_does(tmp_path: Path) -> None:
    assert_loaded(saved(tmp_path, {"state_dict": {"x": torch.ones(1)}, "ema": weights()}), weights())


def test_student_and_teacher_of_one_shape_are_ambiguous(tmp_path: Path) -> None:
    state = {**prefixed("student.", weights()), **prefixed("teacher.", weights(seed=2))}
    assert "several networks that fit (student., teacher.)" in refusal(saved(tmp_path, state))


def test_another_number_of_classes_is_refused_with_both_numbers(tmp_path: Path) -> None:
    assert "has 3 outputs in fc where the model has 5" in refusal(saved(tmp_path, weights(3)), net(5))
    assert "has 5 outputs in fc where the model has 3" in refusal(saved(tmp_path, weights(5)), net(3))


def test_another_architecture_is_refused_with_counts_and_first_names(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path, architectures.resnet20(3).state_dict()))
    assert "another architecture" in message
    assert "blocks.2.conv1.weight" in message
    state = weights()
    del state["fc.weight"], state["bn1.running_mean"]
    assert "lacks 2 of the model's 38 tensors (bn1.running_mean, fc.weight)" in refusal(saved(tmp_path, state))


def test_another_stem_is_refused_with_the_shapes(tmp_path: Path) -> None:
    state = weights()
    state["conv1.weight"] = torch.zeros(4, 3, 7, 7)
    assert "conv1.weight is [4, 3, 7, 7] and should be [4, 3, 3, 3]" in refusal(saved(tmp_path, state))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    state = weights()
    state["fc.bias"][1] = value
    assert "NaN or infinity (fc.bias)" in refusal(saved(tmp_path, state))


class Code:
    """Its pickle makes a folder where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        import os

        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_in_it_is_refused_and_the_code_does_not_run(tmp_path: Path, zipped: bool) -> None:
    trap = tmp_path / "ran"
    path = saved(tmp_path, {"state_dict": weights(), "x": Code(trap)}, _use_new_zipfile_serialization=zipped)
    assert "mkdir" in refusal(path)
    assert not trap.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_pickled_model_is_refused_and_told_to_save_its_state_dict(tmp_path: Path, zipped: bool) -> None:
    path = saved(tmp_path, nn.Sequential(nn.Linear(2, 2)), _use_new_zipfile_serialization=zipped)
    assert "a whole pickled model" in (message := refusal(path))
    assert "torch.save(model.state_dict()" in message


def test_torchscript_quantized_and_prepared_models_are_refused(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    assert "TorchScript" in refusal(tmp_path / "script.pt")
    packed = {
        **weights(),
        "fc._packed_params.dtype": torch.qint8,
        "fc.scale": torch.ones(()),
        "fc.zero_point": torch.zeros(()),
    }
    assert "quantized already" in refusal(saved(tmp_path, packed))
    observed = {**weights(), "fc.activation_post_process.min_val": torch.zeros(())}
    assert "prepared for quantization" in refusal(saved(tmp_path, observed))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 44803211\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"\x1f\x8b\x08\x00", "compressed archive"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"PK\x03\x04 and no end", "is damaged"),
        (b"hello", "is not a PyTorch checkpoint"),
        ((50).to_bytes(8, "little") + b'{"a":', "damaged safetensors"),
        (pickle.dumps({"w": [1.0]}), "torch.save did not write"),
    ],
)
def test_a_file_of_another_kind_is_named_for_what_it_is(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    assert said in refusal(tmp_path / "weights.pth")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_checkpoint_is_called_damaged(tmp_path: Path, share: float, zipped: bool) -> None:
    path = saved(tmp_path, weights(), _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "is damaged" in refusal(path)


def test_numpy_files_and_folders_and_missing_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    np.savez(tmp_path / "a.npz", w=np.zeros(3))
    saved(tmp_path, weights(), "best.pt")
    assert "a NumPy array" in refusal(tmp_path / "a.npy")
    assert "a NumPy archive" in refusal(tmp_path / "a.npz")
    assert "is a folder; name a file in it (best.pt)" in refusal(tmp_path)
    assert f"does not exist (did you mean {tmp_path / 'best.pt'}?)" in refusal(tmp_path / "bset.pt")
    assert "does not exist" in refusal(tmp_path / "nowhere" / "x.pt")


@pytest.mark.parametrize("value", [torch.ones(3), [torch.ones(3)], {"epoch": 3}, {}])
def test_a_file_without_named_tensors_holds_no_weights(tmp_path: Path, value: object) -> None:
    assert "holds no weights" in refusal(saved(tmp_path, value))


def test_integers_in_the_place_of_weights_are_refused(tmp_path: Path) -> None:
    state = {**weights(), "fc.weight": torch.ones_like(weights()["fc.weight"], dtype=torch.int8)}
    assert "fc.weight is int8" in refusal(saved(tmp_path, state))


def test_a_tilde_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path, weights())
    load_checkpoint(net(), Path("~/weights.pt"))


# ------------------------------------------------------------------------------ the module's own way of loading


class Renaming(nn.Sequential):
    """Has been rewritten since its checkpoints were made: names, and with version 2 the order of a weight's axes."""

    _version = 2

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
        self.register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if f"{prefix}features.kernel" in state:
            state[f"{prefix}0.weight"] = state.pop(f"{prefix}features.kernel")
            state[f"{prefix}0.bias"] = state.pop(f"{prefix}features.offset")
        if metadata.get("version", 1) < 2:
            state[f"{prefix}2.weight"] = state[f"{prefix}2.weight"].t()


def old_names(state: State) -> State:
    return {
        name.replace("0.weight", "features.kernel").replace("0.bias", "features.offset"): t for name, t in state.items()
    }


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "lit.model."])
def test_a_checkpoint_that_the_module_s_own_hooks_rename_is_taken(tmp_path: Path, prefix: str) -> None:
    source, module = Renaming(), Renaming()
    state = old_names(source.state_dict())
    state["2.weight"] = state["2.weight"].t().contiguous()  # a plain mapping has no version: it is of old
    said = load_checkpoint(module, saved(tmp_path, {"state_dict": prefixed(prefix, state), "epoch": 3}))
    assert "4 tensors of state_dict" in said
    assert all(torch.equal(t, source.state_dict()[name]) for name, t in module.state_dict().items())


def test_a_state_keeps_the_versions_that_hooks_go_by(tmp_path: Path) -> None:
    source, module = Renaming(), Renaming()
    load_checkpoint(module, saved(tmp_path, source.state_dict()))
    assert torch.equal(module[2].weight, source[2].weight)
    wrapped = nn.DataParallel(source)
    load_checkpoint(module, saved(tmp_path, {"state_dict": wrapped.state_dict()}))
    assert torch.equal(module[2].weight, source[2].weight)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weight_norm_of_old_goes_into_the_parametrization_of_today(tmp_path: Path, prefix: str) -> None:
    def layers() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))

    source, module = layers(), layers()
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(source[0])
    nn.utils.parametrizations.weight_norm(module[0])
    assert "0.weight_g" in source.state_dict()
    load_checkpoint(module, saved(tmp_path, prefixed(prefix, dict(source.state_dict()))))
    norm = source[0].weight_v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(module[0].weight, source[0].weight_g * source[0].weight_v / norm)
    assert torch.equal(module[1].weight, source[1].weight)


def test_state_that_is_no_tensor_reaches_the_module(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        seen = 0

        def get_extra_state(self) -> dict[str, int]:
            return {"seen": self.seen}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.seen = state["seen"]

    source, module = Counting(2, 2), Counting(2, 2)
    source.seen = 7
    load_checkpoint(module, saved(tmp_path, source.state_dict()))
    assert module.seen == 7
    load_checkpoint(nn.Sequential(module), saved(tmp_path, prefixed("module.", dict(Counting(2, 2).state_dict()))))
    assert module.seen == 0


def test_a_hook_that_resizes_is_asked_before_a_shape_is_called_wrong(tmp_path: Path) -> None:
    class Position(nn.Module):
        def __init__(self, places: int) -> None:
            super().__init__()
            self.embedding = nn.Parameter(torch.zeros(1, places))

        def _load_from_state_dict(self, state: State, prefix: str, *rest: Any) -> None:
            name = f"{prefix}embedding"
            state[name] = state[name][:, : self.embedding.shape[1]]
            super()._load_from_state_dict(state, prefix, *rest)

    module = Position(4)
    load_checkpoint(module, saved(tmp_path, {"embedding": torch.arange(9.0)[None]}))
    assert module.embedding.tolist() == [[0, 1, 2, 3]]


def test_what_the_module_refuses_is_refused_in_the_words_that_help_and_changes_nothing(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path, prefixed("b.", weights())), Renaming())
    assert "of another architecture: it lacks 3 of the model's 4 tensors (0.bias, 2.weight, 2.bias)" in message

    class Lax(nn.Sequential):
        def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict(state, strict=False)

    assert "of another architecture" in refusal(saved(tmp_path, {"x": torch.ones(2)}), Lax(nn.Linear(2, 2)))

    class Choosy(nn.Linear):
        def _load_from_state_dict(self, state: State, prefix: str, *rest: Any) -> None:
            super()._load_from_state_dict(state, prefix, *rest)
            raise ValueError("made by another trainer")

    message = refusal(saved(tmp_path, nn.Linear(2, 2).state_dict()), Choosy(2, 2))
    assert "refused by Choosy's own load_state_dict: ValueError: made by another trainer" in message
