"""Which layers learn, and how the layers run: settled once, before the optimizer is built."""

from finetune.config import ClassTokenOnly, OptimConf, TrainConf
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
    freeze(model, optim.fix_layer)


def freeze(model: LayeredModel, fix_layer: int) -> None:
    """Freeze the layers with id <= `fix_layer`, and let all layers above learn; -1 freezes nothing.

    Freeze first, then build the optimizer, then wrap (compile, DDP): the optimizer must hold the same parameters
    when a run is resumed, and a wrapper changes the names of parameters. A `fix_layer` that leaves nothing to learn, or
    is below -1, is a UserError.
    """
    head = len(model.layers) - 1
    if not -1 <= fix_layer < head:
        mistake = "freezes everything" if fix_layer >= head else "is out of range"
        layers = f"{type(model.net).__name__} has layers 0 (stem) to {head} (head)"
        mend = f"use -1 (nothing frozen) to {head - 1} (only the head learns)"
        raise UserError(f"optim.fix_layer={fix_layer} {mistake}: {layers}, so {mend}")
    model.num_frozen = fix_layer + 1
    for name, parameter in model.net.named_parameters():
        parameter.requires_grad_(model.layer_ids[name] > fix_layer)
    model.train(model.training)  # puts the newly frozen layers into eval mode
