"""Functions that run one layer of a network: `run(net, h)` takes activations and returns activations.

They take the network as an argument and hold only names, so that a copied or unpickled model runs its own modules.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from finetune.core.layers import Layer

Run = Callable[[Any, Tensor], Tensor]


def class_name(module: nn.Module) -> str:
    """The full name of a module's class: `timm.models.eva.Eva`."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def through(*paths: str) -> Run:
    """A function that passes activations through these modules or methods of the network, one after another."""
    return partial(_through, paths=tuple(tuple(path.split(".")) for path in paths))


def _through(net: Any, h: Tensor, *, paths: tuple[tuple[str, ...], ...]) -> Tensor:
    for path in paths:
        part = net
        for name in path:
            part = getattr(part, name)
        h = part(h)
    return h


def in_blocks(path: str, count: int) -> list[Run]:
    """A function for each of `count` blocks; `path` holds `{}` in the place of the index."""
    return [through(path.format(index)) for index in range(count)]


def in_residual_stages(net: Any) -> list[Run]:
    """A function for each block of a ResNet's four stages, `layer1` to `layer4`."""
    stages = (net.layer1, net.layer2, net.layer3, net.layer4)
    return [run for number, stage in enumerate(stages, 1) for run in in_blocks(f"layer{number}.{{}}", len(stage))]


def inside(child: str, run: Run) -> Run:
    """`run` of a child module as a function of the module that holds the child."""
    return partial(_inside, child=child, run=run)


def _inside(net: Any, h: Tensor, *, child: str, run: Run) -> Tensor:
    return run(net.get_submodule(child), h)


def layers_inside(child: str, layers: Sequence[Layer]) -> Iterator[Layer]:
    """The layers of a child module as layers of the module that holds the child."""
    for layer in layers:
        yield Layer(
            layer.name,
            tuple(f"{child}.{name}" for name in layer.owns),
            layer.run and inside(child, layer.run),
            {f"{child}.{name}": steps for name, steps in layer.timm_steps.items()},
            layer.run_class_token and inside(child, layer.run_class_token),
        )


def with_runs(layers: Sequence[Layer], runs: Sequence[Run]) -> list[Layer]:
    """The same layers, each with the function that runs it."""
    return [dataclasses.replace(layer, run=run) for layer, run in zip(layers, runs, strict=True)]
