"""What transformers' configuration says of a network that shapes do not show: activation, norms, heads.

A network with another activation has the same tensors and gives other outputs.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from torch import nn

from finetune.models.upstream.tables import Table
from finetune.models.upstream.transformers_tables import DINOV2
from finetune.system.errors import UserError

# transformers' words for the activations that finetune can put into a network.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}


class Part(TypedDict, total=False):
    """One tower in a `config.json` of transformers, or the only one."""

    hidden_act: str
    layer_norm_eps: float
    num_attention_heads: int
    rope_theta: float


class NetworkConfig(Part, total=False):
    """What a `config.json` of transformers says of a network."""

    vision_config: Part | None
    text_config: Part | None


@dataclass(frozen=True)
class Network:
    """Where a network differs from the one that its library builds by the same name."""

    activation: str = ""  # gelu, gelu_tanh or quick_gelu; empty: the library's own
    norm_eps: float = 0.0  # of every LayerNorm; 0: the library's own

    def __str__(self) -> str:
        """In words, for the line about the model."""
        words = [self.activation] * bool(self.activation) + [f"norms with epsilon {self.norm_eps:g}"] * (
            self.norm_eps > 0
        )
        return ", ".join(words)

    def as_dict(self) -> dict[str, str | float]:
        """The changes that there are, as the metadata of weights hold them."""
        return {name: value for name, value in asdict(self).items() if value}

    def put_into(self, net: nn.Module) -> None:
        """Change the network in place."""
        for name, module in list(net.named_modules()):
            if self.norm_eps and isinstance(module, nn.LayerNorm):
                module.eps = self.norm_eps
            elif self.activation and activation_of(module) not in ("", self.activation):
                net.set_submodule(name, _make(self.activation))


def activation_of(module: nn.Module) -> str:
    """The word for a module that is an activation function of a transformer; empty for any other module."""
    from timm.layers import activations

    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if isinstance(module, activations.GELU):
        return "gelu"
    if isinstance(module, activations.GELUTanh):
        return "gelu_tanh"
    return {"QuickGELU": "quick_gelu", "SiLU": "silu"}.get(type(module).__name__, "")


def _make(activation: str) -> nn.Module:
    from open_clip.transformer import QuickGELU

    return QuickGELU() if activation == "quick_gelu" else nn.GELU("tanh" if activation == "gelu_tanh" else "none")


def fit_network(net: nn.Module, config: NetworkConfig, table: Table, place: Path) -> Network:
    """Change activation and norms of `net` in place as the configuration in the file `place` says.

    `net` has both towers of a CLIP, or the image tower alone. Returns the changes of the image tower.

    Raises:
        UserError: The configuration does not fit the network, and cannot be made to.
    """
    text = dict(net.named_children()).get("text") or (net if "transformer" in dict(net.named_children()) else None)
    if (part := config.get("text_config")) and text is not None:
        outside = [child for name, child in net.named_children() if name != "visual"] if text is net else [text]
        for child in outside:
            _fit(child, part, table, place)
    visual = dict(net.named_children()).get("visual", net)
    return _fit(visual, config.get("vision_config") or config, table, place)


def _fit(net: nn.Module, config: Part, table: Table, place: Path) -> Network:
    """Change a tower as the configuration in `place` says, and return the changes."""
    heads = {vars(module)["num_heads"] for module in net.modules() if "num_heads" in vars(module)}
    wanted = config.get("num_attention_heads")
    if wanted is not None and heads - {wanted}:
        raise UserError(f"{place} has {wanted} attention heads and this model has {max(heads)}; check model.name")
    theta: Any = config.get("rope_theta")
    temperatures = {vars(module)["temperature"] for module in net.modules() if "temperature" in vars(module)}
    if theta is not None and temperatures - {theta, None}:
        raise UserError(f"{place} has rope_theta {theta:g} and this model has another; check model.name")
    word = config.get("hidden_act", table.activation)
    if word not in ACTIVATIONS:
        raise UserError(f"{place}: hidden_act={word} is none of the activations {', '.join(ACTIVATIONS)}")
    own, activation = {kind for module in net.modules() if (kind := activation_of(module))}, ACTIVATIONS[word]
    # DINOv2's gated layers have SiLU whatever the configuration says, and other layers cannot be made gated.
    if table in DINOV2 and own == {"silu"}:
        activation = "silu"
    if own and (activation == "silu") != (own == {"silu"}):
        raise UserError(f"{place} has hidden_act={word} and this model has {', '.join(sorted(own))}; check model.name")
    activation = "" if own <= {activation} else activation
    eps = config.get("layer_norm_eps", table.norm_eps)
    has_own = all(module.eps == eps for module in net.modules() if isinstance(module, nn.LayerNorm))
    network = Network(activation, 0.0 if has_own or not table.norm_eps else eps)
    network.put_into(net)
    return network
