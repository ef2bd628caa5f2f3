"""Which layers learn, and how the layers run: settled once, before the optimizer is built."""

from collections.abc import Collection

from finetune.config import ClassTokenOnly, OptimConf, TrainConf
from finetune.core.globs import matched
from finetune.core.layers import LayeredModel
from finetune.system.errors import UserError


def set_up_layers(model: LayeredModel, optim: OptimConf, *, train: TrainConf) -> None:
    """Freeze layers, switch gradient checkpointing, and choose how the last block runs. Call before the optimizer.

    `train.class_token_only` only affects models whose last block has a shorter way to the class token. A
    `train.recompute` that would be ignored is a UserError.
    """
    if train.recompute and not model.is_chain:
        why = f"{type(model.net).__name__} is no plain chain of layers and runs only whole"
        mend = "leave it out, and take a smaller data.batch_size with train.accumulate"
        raise UserError(f"train.recompute=true would be ignored: {why}; {mend}")
    model.recompute = train.recompute
    has_shorter_run = any(layer.run_class_token is not None for layer in model.layers)
    model.class_token_only = train.class_token_only == ClassTokenOnly.auto and has_shorter_run
    freeze(model, optim.fix_layer, optim.freeze)


def freeze(model: LayeredModel, fix_layer: int, globs: Collection[str] = ()) -> None:
    """Freeze the layers with id <= `fix_layer` (-1: none), and all parameters whose names match one of `globs`.

    A layer of which nothing learns counts as frozen. The layers below the lowest one that learns anything run apart.
    A module whose parameters are all frozen is in eval mode, as a frozen layer is: its BatchNorm statistics stay.

    Freeze first, then build the optimizer, then wrap (compile, DDP): the optimizer must hold the same parameters
    when a run is resumed, and a wrapper changes the names of parameters.

    Raises:
        UserError: Nothing is left to learn, `fix_layer` is below -1, or a glob matches no parameter, or none but
            those that `fix_layer` freezes.
    """
    head = len(model.layers) - 1
    if not -1 <= fix_layer < head:
        mistake = "freezes everything" if fix_layer >= head else "is out of range"
        layers = f"{type(model.net).__name__} has layers 0 (stem) to {head} (head)"
        mend = f"use -1 (nothing frozen) to {head - 1} (only the head learns)"
        raise UserError(f"optim.fix_layer={fix_layer} {mistake}: {layers}, so {mend}")
    parameters = dict(model.net.named_parameters())
    named = matched(globs, list(parameters), "optim.freeze")
    for glob in globs:
        if all(model.layer_ids[name] <= fix_layer for name in matched([glob], list(parameters), "optim.freeze")):
            why = f"optim.fix_layer={fix_layer} freezes all parameters that it matches"
            raise UserError(f"optim.freeze: '{glob}' would be ignored: {why}; leave it out")
    for name, parameter in parameters.items():
        parameter.requires_grad_(model.layer_ids[name] > fix_layer and name not in named)
    learning = {model.layer_ids[name] for name, parameter in parameters.items() if parameter.requires_grad}
    if not learning:
        raise UserError(f"optim.freeze={[*globs]} leaves nothing to learn: name fewer parameters")
    model.num_frozen = min(learning) if named else fix_layer + 1
    model.frozen_modules = _frozen_modules(model, learning) if named else frozenset()
    model.train(model.training)  # puts the newly frozen layers into eval mode


def _frozen_modules(model: LayeredModel, learning: Collection[int]) -> frozenset[str]:
    """What the layers above the prefix own of which nothing learns, and all modules whose parameters are all frozen."""
    with_parameters = {model.layer_ids[name] for name, _ in model.net.named_parameters()}
    owned = [name for index in with_parameters - {*learning} for name in model.layers[index].owns]
    for path, module in model.net.named_modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            owned.append(path)
    return frozenset(owned)
