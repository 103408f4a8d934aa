"""What the tensors of a prepared or converted model are called: by the module, or the operation, that makes them."""

from __future__ import annotations

from torch import fx, nn
from torch.ao.quantization import QuantWrapper

from qexp.quantize.strided import AfterStride

_POST = "activation_post_process"


def public(name: str, module: nn.Module) -> str:
    """A submodule's name in the user's model, without the wrappers that qexp put around models and convolutions."""
    owner, _, last = name.rpartition(".")
    if last == "conv" and isinstance(module.get_submodule(owner), AfterStride):
        name = owner
    return name.removeprefix("module.") if isinstance(module, QuantWrapper) else name


def tensor_names(prepared: nn.Module) -> dict[str, str]:
    """From the name of each observer to that of the tensor it watches."""
    if isinstance(prepared, fx.GraphModule):
        return {
            str(node.target): str(source.target) if source.op == "call_module" else source.name
            for node in prepared.graph.nodes
            if node.op == "call_module" and _POST in str(node.target)
            for source in node.all_input_nodes[:1]
        }
    return {
        name: public(name.removesuffix(f".{_POST}"), prepared)
        for name, _ in prepared.named_modules(remove_duplicate=False)
        if name.endswith(f".{_POST}")
    }


def place(name: str, kind: str) -> str:
    """Where in a model something happened, for a sentence: `module layer1.0 (BasicBlock)`."""
    return f"module {name} ({kind})" if name else f"own forward ({kind})"
