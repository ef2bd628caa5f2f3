"""Other people's training code at its best flags, for `bench.py`: timm's pieces, and transformers' Trainer.

timm is a dependency anyway; the arm `transformers` needs what is none: `pip install transformers accelerate`.
"""

from __future__ import annotations

import math
import time
from importlib import metadata
from typing import Any

import torch
from bench_arms import Flags, Outcome, half
from bench_task import CLASSES, Order, Pictures, Task, first_model, freeze_and_group, linear
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from finetune.config import DataConf, SourceKind
from finetune.data import open_source
from finetune.data.split import Split


def with_timm(task: Task, flags: Flags) -> Outcome:
    """`create_loader`, `create_optimizer_v2` and the steps of timm's `train.py` (1.0.31), which is no library function.

    timm's loader shuffles by itself; here its data set is told our order, through memory that its workers share.
    """
    from timm import utils
    from timm.data import create_loader
    from timm.optim import create_optimizer_v2

    device, preprocess = torch.device(task.device), task.preprocess()
    on_gpu = device.type == "cuda"
    net = first_model(task)
    groups = freeze_and_group(net, task, merged=True)
    optimizer = create_optimizer_v2(groups, opt="adamw", lr=task.lr, fused=True)
    scheduler = linear(optimizer, task.epochs)
    splits = open_source(DataConf(source=SourceKind.folder, root=str(task.root))).splits
    loaders = {}
    for name, train in (("train", True), ("val", False)):
        ordered = _Ordered(splits[name], task, train=train, same_pixels=flags.same_pixels)
        loaders[name] = create_loader(
            ordered,
            input_size=(3, preprocess.size, preprocess.size),
            batch_size=task.batch_size,
            is_training=False,  # neither shuffled nor augmented: both are in the data set
            interpolation=preprocess.interpolation,
            mean=preprocess.mean,
            std=preprocess.std,
            crop_pct=preprocess.crop_fraction,
            num_workers=flags.workers,
            pin_memory=on_gpu,
            device=device,
            use_prefetcher=on_gpu and ordered.is_timms,
            persistent_workers=flags.workers > 0,
        )
    forward: Any = torch.compile(net) if flags.compiled else net
    loss_fn = nn.CrossEntropyLoss().to(device)
    losses: list[float] = []
    for epoch in range(task.epochs):
        loaders["train"].dataset.set_epoch(epoch)
        losses += _timm_epoch(forward, net, loaders["train"], optimizer, loss_fn, task)
        _timm_validate(forward, net, loaders["val"], loss_fn, task, utils)
        scheduler.step()
    path = flags.folder / "last.pt"
    torch.save(net.state_dict(), path)
    return Outcome(losses, path)


def _timm_epoch(
    forward: Any,
    net: nn.Module,
    loader: DataLoader[Any],
    optimizer: torch.optim.Optimizer,
    loss_fn: nn.Module,
    task: Task,
) -> list[float]:
    """`train_one_epoch` of timm's train.py without what is off by default (accumulation, EMA, mixup, clipping)."""
    from timm import utils

    losses_m, update_time_m, data_time_m = utils.AverageMeter(), utils.AverageMeter(), utils.AverageMeter()
    net.train()
    losses = []
    update_start = data_start = time.time()
    optimizer.zero_grad()
    for images, target in loader:
        images, target = images.to(task.device), target.to(task.device)
        data_time_m.update(time.time() - data_start)
        with half(task):
            output = forward(images)
            loss = loss_fn(output, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        losses_m.update(losses[-1], images.size(0))
        optimizer.zero_grad()
        update_time_m.update(time.time() - update_start)
        update_start = data_start = time.time()
    return losses


def _timm_validate(
    forward: Any, net: nn.Module, loader: DataLoader[Any], loss_fn: nn.Module, task: Task, utils: Any
) -> None:
    """`validate` of timm's train.py."""
    losses_m, top1_m, top5_m = utils.AverageMeter(), utils.AverageMeter(), utils.AverageMeter()
    net.eval()
    with torch.inference_mode():
        for images, target in loader:
            images, target = images.to(task.device), target.to(task.device)
            with half(task):
                output = forward(images)
                loss = loss_fn(output, target)
            acc1, acc5 = utils.accuracy(output, target, topk=(1, 5))
            losses_m.update(loss.item(), images.size(0))
            top1_m.update(acc1.item(), output.size(0))
            top5_m.update(acc5.item(), output.size(0))


class _Ordered(Dataset[Any]):
    """Image i of the epoch: the order lies in shared memory, so workers that live on see the next one, too."""

    def __init__(self, split: Split, task: Task, *, train: bool, same_pixels: bool) -> None:
        self.pictures = Pictures(split, task, task.preprocess(), train=train, same_pixels=same_pixels)
        self.is_timms = self.pictures.is_plain and not same_pixels  # timm's own transform, which create_loader sets
        self.order = Order(split, task, train=train)
        self.keys = torch.tensor(list(self.order)).share_memory_()
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.pictures)

    def set_epoch(self, epoch: int) -> None:
        self.order.epoch = epoch
        self.keys.copy_(torch.tensor(list(self.order)))

    def __getitem__(self, place: int) -> tuple[Any, int]:
        index, view = self.keys[place].tolist()
        if not self.is_timms:
            return self.pictures[index, view]
        with Image.open(self.pictures.files[index]) as image:
            return self.transform(image.convert("RGB")), self.pictures.labels[index]


def with_transformers(task: Task, flags: Flags) -> Outcome:
    """`Trainer` on `ViTForImageClassification`: bf16, fused AdamW, evaluation every epoch."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    splits = open_source(DataConf(source=SourceKind.folder, root=str(task.root))).splits
    net, groups = _as_transformers(task)
    data = {
        name: _Dicts(splits[name], task, train=name == "train", same_pixels=flags.same_pixels)
        for name in ("train", "val")
    }
    optimizer = torch.optim.AdamW(groups, lr=task.lr, fused=True)
    losses: list[Tensor] = []

    class Told(Trainer):  # type: ignore[misc]
        """Our order in the place of its own shuffle, and its losses on record."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return data["train"].order

        def compute_loss(self, *given: Any, **named: Any) -> Any:
            outcome = super().compute_loss(*given, **named)
            loss = outcome[0] if isinstance(outcome, tuple) else outcome
            if self.model.training:
                losses.append(loss.detach())
            return outcome

    class Epochs(TrainerCallback):  # type: ignore[misc]
        """Tells the order which epoch comes."""

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            data["train"].order.epoch = round(state.epoch or 0)

    arguments = TrainingArguments(
        output_dir=str(flags.folder), num_train_epochs=task.epochs, per_device_train_batch_size=task.batch_size,
        per_device_eval_batch_size=task.batch_size, max_grad_norm=0.0, bf16=task.precision == "bf16",
        use_cpu=task.device == "cpu", eval_strategy="epoch", save_strategy="no", logging_strategy="epoch",
        dataloader_num_workers=flags.workers, dataloader_persistent_workers=flags.workers > 0, report_to=[],
        dataloader_pin_memory=task.device == "cuda", torch_compile=flags.compiled, seed=task.seed, disable_tqdm=True,
        logging_nan_inf_filter=False, remove_unused_columns=False,
    )  # fmt: skip
    batches = math.ceil(len(data["train"]) / task.batch_size)
    # Trainer steps its schedule after every step; ours changes once an epoch.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step // batches / task.epochs)
    trainer = Told(
        net, arguments, train_dataset=data["train"], eval_dataset=data["val"], callbacks=[Epochs()],
        optimizers=(optimizer, scheduler),
    )  # fmt: skip
    trainer.remove_callback(_printer())
    trainer.train()
    trainer.save_model(str(flags.folder))
    path = flags.folder / "as_timm.pt"
    torch.save(_to_timm(net, first_model(task)), path)  # a second file, for the comparison; charged to this arm
    return Outcome(torch.stack(losses).tolist(), path)


def _printer() -> Any:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


class _Dicts(Dataset[dict[str, Any]]):
    """Images as Trainer wants them, by (index, view) from our sampler, or in turn."""

    def __init__(self, split: Split, task: Task, *, train: bool, same_pixels: bool) -> None:
        self.pictures = Pictures(split, task, task.preprocess(), train=train, same_pixels=same_pixels)
        self.order = Order(split, task, train=train)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        image, label = self.pictures[key if isinstance(key, tuple) else (key, 0)]
        return {"pixel_values": image, "labels": label}


def _as_transformers(task: Task) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The same network with the same first weights, and its groups."""
    from transformers import ViTConfig, ViTForImageClassification

    timms: Any = first_model(task)
    config = ViTConfig(
        hidden_size=timms.embed_dim, num_hidden_layers=len(timms.blocks), image_size=task.preprocess().size,
        num_attention_heads=timms.blocks[0].attn.num_heads, intermediate_size=timms.blocks[0].mlp.fc1.out_features,
        patch_size=timms.patch_embed.patch_size[0], layer_norm_eps=timms.blocks[0].norm1.eps, num_labels=CLASSES,
    )  # fmt: skip
    net = ViTForImageClassification(config).to(task.device)
    places = _places(net, timms)
    with torch.no_grad():
        for mine, theirs in places:
            mine.copy_(theirs)
    groups = freeze_and_group(timms, task, merged=True)
    mine_of: dict[int, list[Tensor]] = {}
    for name, parameter in timms.named_parameters():
        mine_of[id(parameter)] = [mine for mine, theirs in places if _is_within(theirs, parameter)]
        for mine in mine_of[id(parameter)]:
            mine.requires_grad_(parameter.requires_grad)
        assert mine_of[id(parameter)], name
    return net, [{**group, "params": [m for p in group["params"] for m in mine_of[id(p)]]} for group in groups]


def _places(net: nn.Module, timms: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Every parameter of transformers' network with the one of timm's, or the third of it, that it is."""
    mine = dict(net.named_parameters())
    theirs = dict(timms.named_parameters())
    names = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    inside = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    found = []
    for name, parameter in theirs.items():
        stem, _, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
        layer = ""
        if stem.startswith("blocks."):
            _, number, stem = stem.split(".", 2)
            layer = f"vit.layers.{number}."
        if stem == "attn.qkv":
            for letter, third in zip("qkv", parameter.chunk(3), strict=True):
                found.append((mine.pop(f"{layer}attention.{letter}_proj.{kind}"), third))
            continue
        known = inside if layer else names
        if stem not in known:
            raise ValueError(f"transformers' ViT has no {name}")
        place = f"{layer}{known[stem]}"
        found.append((mine.pop(f"{place}.{kind}" if kind else place), parameter))
    if mine:
        raise ValueError(f"transformers names a ViT's parameters otherwise than version 5 does: {', '.join(mine)}")
    return found


def _is_within(piece: Tensor, parameter: Tensor) -> bool:
    return piece.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()


@torch.no_grad()
def _to_timm(net: nn.Module, timms: nn.Module) -> dict[str, Tensor]:
    for mine, theirs in _places(net, timms):
        theirs.copy_(mine)
    return timms.state_dict()


ARMS = {"timm": with_timm, "transformers": with_transformers}
PACKAGES = {"timm": {"timm": 1}, "transformers": {"transformers": 5, "accelerate": 1}}  # and the least major version


def missing(rival: str) -> str:
    """Which package an arm lacks here, and what to do; empty: none."""
    for package, least in PACKAGES[rival].items():
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            return f"{package} is not installed: pip install {' '.join(PACKAGES[rival])}"
        if int(found.split(".")[0]) < least:
            return f"it needs {package} {least} or newer, and this is {found}"
    return ""


def unsuited(rival: str, task: Task) -> str:
    """Why an arm cannot train the task's model; empty: it can. Its packages must be there."""
    if rival == "transformers":
        try:
            _as_transformers(task)
        except ValueError as error:
            return str(error)
    return ""
