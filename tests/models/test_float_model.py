"""The float model and its targets: what is built, loaded, trained and kept, and what is refused."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import random
import resource
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional

from qexp import quantize
from qexp.config import instantiation, schema
from qexp.config.schema import FlowName
from qexp.data.loading import Data, load_data
from qexp.errors import ConfigError, InputError
from qexp.models import architectures
from qexp.models import float_model as models
from qexp.quantize import FLOWS
from qexp.system import torchvision_import
from tests.helpers import ROOT
from tests.helpers.quantizable import images, spec, trained

CONF = ROOT / "conf"
SHAPE = (3, 32, 32)
BUNDLED = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem != "custom")


def model(name: str, **changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text()), **changes}


def here(name: str, **arguments: Any) -> dict[str, Any]:
    """A user's model: one of the classes below, as model=custom."""
    return {"_target_": f"{__name__}.{name}", "num_classes": None, "checkpoint": None, "weights": None, **arguments}


def fast() -> schema.Train:
    values = yaml.safe_load((CONF / "train" / "fast.yaml").read_text())
    return schema.Train(**{**values, "augment": schema.Augment(**values["augment"]), "device": schema.Device.cpu})


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Data:
    spec = yaml.safe_load((CONF / "dataset" / "digits.yaml").read_text())
    return load_data({**spec, "resize": 8, "image_size": 8}, tmp_path_factory.mktemp("cache"))


# ---- what users bring ----


class Plain(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.conv(x).mean((2, 3)))

    @classmethod
    def make(cls, num_classes: int) -> Plain:
        return cls(num_classes)


Outputs = namedtuple("Outputs", ["logits", "features"])


class Scaled(Plain):
    """The argument is in no weight, and not in how the module prints."""

    def __init__(self, factor: float, num_classes: int) -> None:
        super().__init__(num_classes)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class Pair(Plain):
    def forward(self, x: Tensor) -> Any:
        return Outputs(super().forward(x), x)


class Dictionary(Plain):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x)}


class Segmentation(Plain):
    def forward(self, x: Tensor) -> Any:
        return self.conv(x)


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Rude(Plain):
    """Seeds, halves, and changes every global that it can reach."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        super().__init__()
        self.half()
        self.train()


class NoReturn(Plain):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


class Fails(nn.Module):
    def __init__(self, depth: int = 1) -> None:
        raise ValueError(f"depth must be a\nmultiple of 7, not {depth}")


class Wraps(nn.Module):
    def __init__(self, net: nn.Module, widths: list[int], activation: Any = None) -> None:
        super().__init__()
        assert type(widths) is list
        self.net, self.activation = net, activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def positional(depth: int, /, num_classes: int = 10) -> nn.Module:
    return architectures.tiny(num_classes, width=depth)


def parallel() -> nn.Module:
    return nn.DataParallel(Plain())


def pair_of_things() -> tuple[nn.Module, int]:
    return Plain(), 1


made = Plain()


@pytest.mark.parametrize(("name", "output"), [("Pair", 0), ("Pair", -2), ("Dictionary", "logits")])
@pytest.mark.parametrize("flow", [FlowName.fx, FlowName.pt2e])
def test_logits_among_several_outputs_are_quantized(
    name: str, output: int | str, flow: FlowName, tmp_path: Path
) -> None:
    net = trained(Plain())
    torch.save(net.state_dict(), tmp_path / "net.pt")
    module = models.check_model(here(name, output=output, checkpoint=tmp_path / "net.pt"), 10, SHAPE)
    batch = images(32, seed=1, size=SHAPE[1])
    answers = []
    for one in (net, module):
        prepared = FLOWS[flow].prepare(FLOWS[flow].fuse(one, spec(), batch), spec(), batch)
        quantize.calibrate(prepared, [batch])
        with torch.inference_mode():
            answers.append((one(batch), FLOWS[flow].convert(prepared).module(batch)))
    (fp32, int8), picked = answers
    assert torch.equal(picked[0], fp32)
    assert torch.equal(picked[1], int8)
    assert not torch.equal(fp32, int8)


# ---- networks ----


@pytest.mark.parametrize("name", BUNDLED)
def test_every_bundled_model_builds_fuses_to_the_same_function_and_takes_the_data_s_classes(name: str) -> None:
    module = models.build(model(name), classes=7, seed=0)
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = module(image)
        after = FLOWS[FlowName.eager].fuse(module, spec(), image)(image)
    assert before.shape == (2, 7)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * float(before.abs().max()))


@pytest.mark.parametrize("name", ["tiny", "resnet20", "resnet18"])
def test_our_networks_have_no_shared_relu_and_no_batchnorm_left_after_fusion(name: str) -> None:
    module = models.build(model(name), classes=10, seed=0)
    calls: list[str] = []
    for path, part in module.named_modules():
        if isinstance(part, nn.ReLU):
            part.register_forward_hook(lambda *_, path=path: calls.append(path))
    images = torch.zeros(1, *SHAPE)
    module(images)
    assert len(calls) == len(set(calls)) > 0
    fused = FLOWS[FlowName.eager].fuse(module, spec(), images)
    assert not [part for part in fused.modules() if isinstance(part, nn.BatchNorm2d)]
    assert [part for part in fused.modules() if isinstance(part, FloatFunctional)]


def test_resnet20_has_twenty_layers_and_the_paper_s_size() -> None:
    module = architectures.resnet20()
    layers = [p for n, p in module.named_modules() if isinstance(p, nn.Conv2d | nn.Linear) and "downsample" not in n]
    assert len(layers) == 20
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(0.27e6, rel=0.02)
    assert sum(p.numel() for p in architectures.tiny().parameters()) < 10_000


def test_resnet18_has_the_names_of_torchvision_s_and_a_stem_for_small_images() -> None:
    plain = torchvision_import.torchvision.models.resnet18(num_classes=10)
    assert list(architectures.resnet18(num_classes=10).state_dict()) == list(plain.state_dict())
    small = architectures.resnet18("cifar", 10)
    assert list(small.state_dict()) == list(plain.state_dict())
    sizes: list[tuple[int, ...]] = []
    small.layer1.register_forward_hook(lambda _module, _inputs, output: sizes.append(tuple(output.shape)))
    small(torch.zeros(1, *SHAPE))
    assert sizes == [(1, 64, 32, 32)]
    with pytest.raises(ConfigError, match=r"model\.stem=big: .* imagenet and cifar"):
        models.build(model("resnet18", stem="big"), 10, 0)


def test_the_seed_decides_the_weights() -> None:
    states = [models.build(model("tiny"), 10, seed).state_dict() for seed in (3, 3, 4)]
    assert torch.equal(states[0]["fc.weight"], states[1]["fc.weight"])
    assert not torch.equal(states[0]["fc.weight"], states[2]["fc.weight"])


# ---- user models ----


@pytest.mark.parametrize(
    "spec",
    [
        here("Plain"),
        here("Plain.make"),
        here("positional", depth=4),
        here("parallel"),
        here("Lazy"),
        here("Rude"),
        here("NoReturn"),
        here(
            "Wraps",
            net={"_target_": "qexp.models.architectures.tiny", "num_classes": 10},
            widths=[1, 2],
            activation={"_target_": "torch.nn.Hardtanh", "_partial_": True, "min_val": 0.0},
        ),
    ],
    ids=lambda spec: spec["_target_"].partition(".")[2],
)
def test_a_user_s_model_is_taken_in_eval_mode_float32_on_the_cpu(spec: dict[str, Any]) -> None:
    models.check_model(spec, 10, SHAPE)
    module = models.build(spec, 10, 0)
    assert not any(part.training for part in module.modules())
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert {p.device.type for p in module.parameters()} == {"cpu"}


def test_a_model_s_code_leaves_no_global_changed() -> None:
    def globals_now() -> list[Any]:
        return [
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.get_deterministic_debug_mode(),
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
        ]

    before = globals_now()
    models.build(here("Rude"), 10, 0)
    assert globals_now() == before


def test_a_start_imports_no_compiler_and_leaves_it_whole() -> None:
    code = """
import sys
import qexp.pipeline.run, qexp.models.float_model
qexp.models.float_model.build({spec}, 10, seed=0)
assert not [name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor"))]
from torchvision.ops import roi_align
asks = sys.modules[roi_align.__module__].is_compile_supported
answer = asks("cpu")
from torch._dynamo.utils import is_compile_supported
assert answer == is_compile_supported("cpu")
"""
    code = code.replace("{spec}", repr(model("resnet18")))
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (here("Pair"), "returns Outputs; it must return the logits alone"),
        (here("Dictionary"), r"returns dict; .* or model\.output must say .*: one of the keys logits\."),
        (here("Dictionary", output="scores"), r"output=scores: .* has no such output, give one of the keys logits\."),
        (here("Pair", output=2), r"output=2: .* has no such output, give a position from 0 to 1\."),
        (here("Pair", output="x"), r"output=x: .* has no such output, give a position from 0 to 1\."),
        (here("Plain", output=0), r"output=0: .* has no such output, the logits alone; leave it out\."),
        (here("Segmentation"), r"returns \[2, 4, 30, 30\] for 2 images of 3x32x32; it must return logits of \[2, 10\]"),
        (here("Plain", classes=3), "has 3 outputs, the data set has 10 classes"),
        (here("Fails", depth=5), "fails with ValueError: depth must be a multiple of 7, not 5"),
        (here("pair_of_things"), "makes a tuple; it must make a torch.nn.Module"),
        (model("tiny", num_classes=100), "model.num_classes=100: the data set has 10 classes"),
        (
            {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 1, "kernel_size": 1},
            "can't take images of",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused_in_a_sentence(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        models.check_model(spec, 10, SHAPE)
    assert str(caught.value).startswith("model.")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"_target_": "???"}, r"model\._target_ is not set"),
        ({}, r"model\._target_ is not set"),
        ({"_target_": "resnet18"}, "is not a dotted path"),
        ({"_target_": "models/net.py"}, "is not a dotted path"),
        ({"_target_": "nosuch.Net"}, "there is no module nosuch, neither installed nor in"),
        (
            {"_target_": "qexp.models.architectures.resnet81"},
            r"qexp\.models\.architectures has no resnet81 \(did you mean resnet18",
        ),
        ({"_target_": "qexp.models.architectures"}, "is a module; name a class or a function"),
        ({"_target_": "torch.nn.Module.eval"}, "is a method of an object"),
        (here("made"), "is an object, made already"),
        (
            model("resnet18", stemm="x"),
            r"model\.stemm=x: qexp\.models\.architectures\.resnet18 takes stem, num_classes \(did you mean stem",
        ),
        ({"_target_": "torch.nn.Linear", "in_features": 3}, r"needs model\.out_features; set it"),
        (
            here("Wraps", net={"_target_": "qexp.models.architectures.tiny", "wdith": 1}, widths=[]),
            r"model\.net\.wdith=1: .* width",
        ),
        (model("tiny", checkpoint="a.pt", weights="DEFAULT"), "are both set; leave one out"),
        (model("tiny", weights="DEFAULT"), r"torchvision has no weights for qexp\.models\.architectures\.tiny"),
        (model("resnet50", weights="IMAGENET"), "torchvision has IMAGENET1K_V1, IMAGENET1K_V2"),
        (model("resnet18", weights="IMAGENET1K_V1", stem="cifar"), r"model\.stem=cifar"),
    ],
)
def test_what_the_configuration_shows_to_be_wrong_is_a_config_error(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        models.check_model(spec, 1000 if spec.get("stem") == "cifar" else 10, SHAPE)
    assert "\n" not in str(caught.value)


# ---- targets ----


def test_a_target_in_the_folder_of_the_command_is_found_and_its_own_failures_are_named(tmp_path: Path) -> None:
    (tmp_path / "mymodel.py").write_text("import torch\nfrom blocks import Block\nclass Net(Block): pass\n")
    (tmp_path / "blocks.py").write_text("import torch\nclass Block(torch.nn.Identity): pass\n")
    (tmp_path / "crashes.py").write_text("raise ValueError('no\\nluck')\n")
    (tmp_path / "misses.py").write_text("import nosuchpackage\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "quits.py").write_text("import sys\nsys.exit('usage')\n")
    # As from a console script, which does not have the current folder on its path.
    program = (
        f"import sys; sys.path = [p for p in sys.path if p]; sys.path.insert(0, {str(ROOT)!r})\n"
        "from qexp.config.instantiation import resolve\n"
        "from qexp.errors import InputError\n"
        "print(resolve('model', {'_target_': 'mymodel.Net'})[0].__name__)\n"
        "for name in ('crashes', 'misses', 'broken', 'quits'):\n"
        "    try: resolve('model', {'_target_': name + '.Net'})\n"
        "    except InputError as error: print(error)\n"
    )
    script = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    lines = script.stdout.splitlines()
    assert lines[0] == "Net"
    assert "model._target_=crashes.Net: importing crashes fails with ValueError: no luck." in lines[1]
    assert "ModuleNotFoundError: No module named 'nosuchpackage'" in lines[2]
    assert "SyntaxError" in lines[3]
    assert "SystemExit: usage" in lines[4]
    assert len(lines) == 5


def test_arguments_that_the_caller_supplies_must_be_taken_and_not_given() -> None:
    with pytest.raises(ConfigError, match=r"dataset\._target_=math\.hypot|must take the argument split"):
        instantiation.resolve("dataset", {"_target_": "qexp.models.architectures.tiny"}, supplied={"split"})
    with pytest.raises(ConfigError, match=r"dataset\.split=train: qexp passes split"):
        instantiation.resolve("dataset", {"_target_": "qexp.data.builtin.digits", "split": "train"}, supplied={"split"})
    assert instantiation.resolve("dataset", {"_target_": "qexp.data.builtin.digits"}, supplied={"split"})[1] == {}


def test_functions_that_hide_a_module_of_their_name_and_its_members_are_both_found() -> None:
    package = "torchvision.models.quantization.googlenet"
    assert instantiation.locate("model._target_", package).__name__ == "googlenet"
    assert instantiation.locate("model._target_", f"{package}.QuantizableGoogLeNet").__name__ == "QuantizableGoogLeNet"


def test_torchvision_imports_first_in_a_fresh_process_through_a_target() -> None:
    locating = "locate('model._target_', 'torchvision.models.resnet18')"
    program = f"from qexp.config.instantiation import locate; print({locating}.__name__)"
    script = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert script.stdout.strip() == "resnet18"


# ---- where weights come from ----


def float_model(spec: dict[str, Any], data: Data, folder: Path, seed: int = 0, **train: Any) -> models.FloatModel:
    """The float model of a run with these settings. folder: its `outputs`."""
    settings = {"model": spec, "train": dataclasses.replace(fast(), **train), "seed": seed, "outputs": str(folder)}
    return models.load_or_train(SimpleNamespace(**settings, compute=schema.Compute(threads=1)), data)


def test_a_checkpoint_is_loaded_exactly_and_nothing_is_trained(digits: Data, tmp_path: Path) -> None:
    weights = models.build(model("tiny"), 10, seed=5).state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    loaded = float_model(model("tiny", checkpoint=str(tmp_path / "weights.pt")), digits, tmp_path / "kept")
    assert all(torch.equal(t, weights[name]) for name, t in loaded.module.state_dict().items())
    assert not any(p.requires_grad for p in loaded.module.parameters())
    assert loaded.source == f"38 tensors from {tmp_path / 'weights.pt'}"
    assert not (tmp_path / "kept").exists()


def test_models_of_the_same_weights_and_other_arguments_are_told_apart(digits: Data, tmp_path: Path) -> None:
    def loaded(factor: float) -> models.FloatModel:
        return float_model(here("Scaled", factor=factor, checkpoint=str(tmp_path / "weights.pt")), digits, tmp_path)

    torch.save(models.build(here("Scaled", factor=1.0), 10, seed=0).state_dict(), tmp_path / "weights.pt")
    one, two = loaded(1.0), loaded(2.0)
    image = torch.rand(1, *digits.test.shape)
    assert torch.equal(two.module(image), 2 * one.module(image))
    assert one.digest != two.digest
    assert one.digest == loaded(1.0).digest


def test_a_trained_model_is_kept_and_found_again_by_what_produced_it(digits: Data, tmp_path: Path) -> None:
    first = float_model(model("tiny"), digits, tmp_path)
    again = float_model(model("tiny"), digits, tmp_path)
    assert first.source.startswith("trained 1 epochs on digits")
    assert again.source.startswith("trained before")
    assert first.digest == again.digest
    other_seed = float_model(model("tiny"), digits, tmp_path, seed=1)
    other_training = float_model(model("tiny"), digits, tmp_path, lr=0.01)
    other_model = float_model(model("tiny", width=4), digits, tmp_path)
    other_data = float_model(model("tiny"), dataclasses.replace(digits, mean=(0.5,) * 3), tmp_path)
    digests = {first.digest, other_seed.digest, other_training.digest, other_model.digest, other_data.digest}
    assert len(digests) == len(list(tmp_path.glob("checkpoints/*.pt"))) == 5


def test_a_damaged_kept_model_is_trained_again_and_that_is_said(
    digits: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = float_model(model("tiny"), digits, tmp_path)
    (kept,) = tmp_path.glob("checkpoints/*.pt")
    kept.write_bytes(kept.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        again = float_model(model("tiny"), digits, tmp_path)
    assert again.source.startswith("trained 1 epochs")
    assert again.digest == first.digest
    assert "can't be used, it is trained again" in caplog.text
    assert float_model(model("tiny"), digits, tmp_path).source.startswith("trained before")


def test_a_model_that_cannot_be_kept_is_refused_in_a_sentence_and_one_that_is_there_is_read(
    digits: Data, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"model can't be kept in .*/file/checkpoints \(.*\); free some room, or"):
        float_model(model("tiny"), digits, tmp_path / "file")
    kept = tmp_path / "kept"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"model can't be kept in .*/kept/checkpoints \(.*\); free some room, or"):
            float_model(model("tiny"), digits, kept)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (lock,) = (kept / "checkpoints").iterdir()
    first = float_model(model("tiny"), digits, kept)
    lock.unlink()
    lock.mkdir()  # one that can't be taken, as in a folder that may only be read
    again = float_model(model("tiny"), digits, kept)
    assert again.source.startswith("trained before")
    assert again.digest == first.digest


def test_the_code_of_a_user_s_model_and_of_what_it_imports_is_part_of_its_key(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "usersmodel.py").write_text(
        "from torch import classes, ops\nfrom usersblocks import net\ndef make(num_classes): return net(num_classes)\n"
    )
    blocks = "from qexp.models.architectures import tiny\ndef net(classes): return tiny(classes)\n"
    spec = {"_target_": "usersmodel.make", "num_classes": None}
    sources = []
    for text in (blocks, blocks, blocks + "# another\n"):
        (tmp_path / "usersblocks.py").write_text(text)
        for name in ("usersmodel", "usersblocks"):
            sys.modules.pop(name, None)
        sources.append(float_model(spec, digits, tmp_path / "kept").source.split(" ")[1])
    assert sources == ["1", "before,", "1"]


def _train_in_a_process(data_spec: dict[str, Any], folder: Path, queue: Any) -> None:
    data = load_data(data_spec, folder / "cache")
    found = float_model(model("tiny"), data, folder / "kept", epochs=2)
    queue.put((found.digest, found.source.startswith("trained before")))


def test_of_two_processes_one_trains_and_the_other_waits_and_loads(tmp_path: Path) -> None:
    spec = yaml.safe_load((CONF / "dataset" / "digits.yaml").read_text()) | {"resize": 8, "image_size": 8}
    load_data(spec, tmp_path / "cache")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_train_in_a_process, args=(spec, tmp_path, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=400) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert len({digest for digest, _ in results}) == 1
    assert sorted(before for _, before in results) == [False, True]


def test_pretrained_weights_need_as_many_classes_and_a_file_or_a_network(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = model("resnet18", weights="IMAGENET1K_V1")
    with pytest.raises(InputError, match=r"model\.weights=IMAGENET1K_V1 has 1000 classes, the data set has 10"):
        models.check_model(spec, 10, SHAPE)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(InputError, match=r"model\.weights=IMAGENET1K_V1: https://.* can't be fetched"):
        models.check_model(spec, 1000, SHAPE)
    assert not list(tmp_path.rglob("*.part"))
    state = {name: t + 0.01 for name, t in architectures.resnet18().state_dict().items()}
    torch.save(state, tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    module, source = models._pretrained(spec, 1000, seed=0)
    assert torch.equal(module.state_dict()["fc.bias"], state["fc.bias"])
    assert source == "torchvision's ResNet18_Weights.IMAGENET1K_V1"


@pytest.mark.parametrize(("name", "module"), [("googlenet", "googlenet"), ("mobilenet_v2", "mobilenet_v2")])
def test_pretrained_weights_of_other_builders_are_taken_as_torchvision_does(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    library = torchvision_import.torchvision.models
    arguments = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
    state = getattr(library, module)(num_classes=1000, **arguments).state_dict()
    url = library.get_model_weights(name)["IMAGENET1K_V1"].url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2])
    loaded, _ = models._pretrained(model(name, weights="IMAGENET1K_V1"), 1000, seed=0)
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[key]), key
