"""The layers of any image network: `timm_layers`, `open_clip_layers`, `torchvision_layers`.

In each list every parameter belongs to one layer; another kind of network, or a parameter that no rule names, is a
UserError. A network whose class is in `CHAINS` also runs layer by layer. To add a family, write its functions in a
module of this package and add its line to `CHAINS`; `tests/models` then asks for a small network and tests that one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, runtime_checkable

from torch import nn

from finetune.core.layers import Layer, LayeredModel
from finetune.core.weight_decay import POSITION_TABLE
from finetune.models.layering import class_token, open_clip_networks, timm_networks, torchvision_networks
from finetune.models.layering.class_token import RunBlock, with_class_token_run
from finetune.models.layering.rules import Rule, ordered_layers
from finetune.models.layering.running import Run, class_name, layers_inside, through, with_runs
from finetune.system.errors import UserError


@dataclass(frozen=True)
class Chain:
    """How the networks of one class run layer by layer."""

    # `runs(net, with_head)` gives the functions of stem, blocks, readout and, `with_head`, head; None where this
    # network of the class is no plain chain.
    runs: Callable[[Any, bool], list[Run] | None]
    # `class_token(net, block)` gives the shorter run of the last block, or None: see `class_token.py`.
    class_token: Callable[[Any, Any], RunBlock | None] | None = None


# Exact classes only: the forward pass of a subclass may be another, so a subclass runs only whole.
CHAINS: dict[str, Chain] = {
    "timm.models.vision_transformer.VisionTransformer": Chain(timm_networks.vision_transformer, class_token.timm_vit),
    "timm.models.deit.VisionTransformerDistilled": Chain(timm_networks.distilled, class_token.timm_distilled),
    "timm.models.eva.Eva": Chain(timm_networks.eva, class_token.timm_eva),
    "timm.models.beit.Beit": Chain(timm_networks.beit),
    "timm.models.convnext.ConvNeXt": Chain(timm_networks.convnext),
    "timm.models.resnet.ResNet": Chain(timm_networks.resnet),
    "open_clip.transformer.VisionTransformer": Chain(open_clip_networks.vision_transformer, class_token.open_clip_vit),
    "open_clip.modified_resnet.ModifiedResNet": Chain(open_clip_networks.modified_resnet),
    "torchvision.models.vision_transformer.VisionTransformer": Chain(
        torchvision_networks.vision_transformer, class_token.torchvision_vit
    ),
    "torchvision.models.resnet.ResNet": Chain(torchvision_networks.resnet),
    "torchvision.models.convnext.ConvNeXt": Chain(torchvision_networks.convnext),
    "torchvision.models.swin_transformer.SwinTransformer": Chain(torchvision_networks.swin),
}


def timm_layers(net: nn.Module) -> list[Layer]:
    """Stem, blocks, readout of a timm network, and head where it has a classifier (`num_classes` above 0)."""
    kinds = _kinds(net)
    layers = ordered_layers(net, timm_networks.rule_of(net, kinds))
    return _with_chain(net, timm_networks.with_timm_steps(net, layers, kinds))


def open_clip_layers(visual: nn.Module) -> list[Layer]:
    """Stem, blocks and readout of the image tower of an open_clip model (`model.visual`): it has no classifier."""
    if "TimmModel" in _kinds(visual):
        return _timm_model_layers(visual)
    wanted = "image tower of open_clip: expected model.visual, a VisionTransformer, ModifiedResNet or TimmModel"
    return _with_chain(visual, ordered_layers(visual, _rule_of(visual, open_clip_networks.RULES, wanted)))


def torchvision_layers(net: nn.Module) -> list[Layer]:
    """Stem, blocks, readout and head of one of torchvision's classification models."""
    rules = torchvision_networks.RULES
    wanted = f"classification model of torchvision that can be cut into layers: expected one of {', '.join(rules)}"
    return _with_chain(net, ordered_layers(net, _rule_of(net, rules, f"{wanted}, or a model of timm")))


def tower_with_head_layers(tower_layers: list[Layer]) -> list[Layer]:
    """The layers of a `TowerWithHead` whose tower has these layers."""
    head = Layer("head", ("head",), None if tower_layers[-1].run is None else through("head"))
    return [*layers_inside("visual", tower_layers), head]


@runtime_checkable
class SparesWeightDecay(Protocol):
    """An upstream module that names its parameters that should get no weight decay."""

    def no_weight_decay(self) -> set[str]:
        """Names or globs, relative to the module."""


def spared_names(net: nn.Module) -> frozenset[str]:
    """The parameters that upstream's network spares from weight decay, by their names in `net`.

    Only the method of the whole network counts, as in timm's optimizers: modules inside it may have methods of their
    own that no optimizer asks. BEiT's authors decay the position tables of its blocks, and timm spares them; here they
    are decayed. torchvision's networks have no such method, and its training script spares their tables.
    """
    modules, names = dict(net.named_modules()), [name for name, _ in net.named_parameters()]
    # It may stand in a `TowerWithHead`, in open_clip's wrapper around timm's networks, or in both.
    networks = {path: modules[path] for path in ("", "visual", "trunk", "visual.trunk") if path in modules}
    globs = {
        f"{path}.{glob}" if path else glob
        for path, network in networks.items()
        if isinstance(network, SparesWeightDecay)
        for glob in network.no_weight_decay()
    }
    spared = {name for name in names if any(fnmatchcase(name, glob) for glob in globs)}
    tables = {name for name in names if name.endswith(POSITION_TABLE)}
    if any("Beit" in _kinds(network) for network in networks.values()):
        return frozenset(spared - tables)
    is_of_torchvision = any(kind.__module__.startswith("torchvision.") for kind in type(net).__mro__)
    return frozenset(spared | tables if is_of_torchvision else spared)


def layered(net: nn.Module, layers: Sequence[Layer]) -> LayeredModel:
    """A `LayeredModel` that spares the parameters that upstream spares, and never trains those that upstream fixes."""
    for module in list(net.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                # Fixed sine position embeddings, for example. As a buffer it keeps its name, and `freeze` never makes
                # it learn.
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
    return LayeredModel(net, layers, no_weight_decay=spared_names(net))


def _kinds(net: nn.Module) -> set[str]:
    """The names of a network's class and of the classes above it: a subclass has the parameter names of its parent."""
    return {kind.__name__ for kind in type(net).__mro__}


def _rule_of(net: nn.Module, rules: Mapping[str, Rule], wanted: str) -> Rule:
    kinds = _kinds(net)
    for kind, rule in rules.items():
        if kind in kinds:
            return rule
    raise UserError(f"{type(net).__name__} is no {wanted}")


def _with_chain(net: nn.Module, layers: list[Layer]) -> list[Layer]:
    """The same layers with the functions that run them, where the network's class is in `CHAINS`."""
    chain = CHAINS.get(class_name(net))
    runs = None if chain is None else chain.runs(net, layers[-1].name == "head")
    if chain is None or runs is None:
        return layers
    layers = with_runs(layers, runs)
    return layers if chain.class_token is None else with_class_token_run(net, layers, chain.class_token)


def _timm_model_layers(visual: Any) -> list[Layer]:
    """The layers of open_clip's wrapper around a timm trunk."""
    # The wrapper's own `head` (pooling, projection) belongs to the readout. So does the trunk's classifier: where the
    # wrapper does not project, the trunk projects with it.
    trunk = timm_layers(visual.trunk)
    end = [layer.name for layer in trunk].index("readout")
    *inner, readout = list(layers_inside("trunk", trunk[: end + 1]))
    owns = tuple(f"trunk.{name}" for layer in trunk[end:] for name in layer.owns)
    layers = [*inner, dataclasses.replace(readout, owns=(*owns, "head"))]
    is_chain = class_name(visual) == "open_clip.timm_model.TimmModel" and trunk[0].run is not None
    if not is_chain:
        return [dataclasses.replace(layer, run=None, run_class_token=None) for layer in layers]
    return with_runs(layers, open_clip_networks.timm_model(trunk))
