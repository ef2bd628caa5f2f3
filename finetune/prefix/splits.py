"""What a run's splits are fed by: loaders, and the frozen layers ahead of the loop, computed or kept as it pays."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from finetune.app.build import Run
from finetune.config import OnError, Precision, PrefixCache
from finetune.config.fields import changed
from finetune.core.device import environment
from finetune.data import Loader
from finetune.data.cache_dir import cache_folder
from finetune.data.streams import num_views
from finetune.prefix import (
    Feed,
    FrozenPrefix,
    Keep,
    Need,
    choose,
    is_roomy,
    measure,
    prefix_digest,
    split_digest,
    why_not_in_training,
)
from finetune.prefix.choice import READ_ONCE, Measured, read_once
from finetune.prefix.shelf import Shelf, is_shared, open_shelf
from finetune.system.errors import UserError

logger = logging.getLogger("finetune")

IN_MEMORY = (PrefixCache.device, PrefixCache.ram)
MEASURED = "measured"  # on the shelf


@dataclass
class _Kept:
    """Of one run: what its frozen layers are known by, and what they cost."""

    digest: str
    measured: Measured
    shelf: Shelf


class Feeding:
    """Feeds for the splits of a run.

    Attributes:
        first_layer: Id of the first layer that the loop runs on what they give.
    """

    def __init__(self, run: Run, check: Callable[[], None]) -> None:
        """Settle what the frozen layers are; nothing is kept yet.

        Args:
            run: The run's; its model is frozen as it will train.
            check: Called between batches of a long pass; what it raises ends the pass.

        Raises:
            ValueError: `prefix.cache` or `prefix.dtype` would be ignored, or does not fit.
        """
        conf, model = run.conf, run.model
        if model.num_frozen and not model.is_chain:
            _refuse_ignored(run)
            logger.info("the frozen layers run with every batch: %s is no plain chain", type(model.net).__name__)
        self.first_layer = model.boundary
        self._parts = run
        self._check = check
        self._val = run.loader("val", train=False)
        self._prefix: FrozenPrefix | None = None
        self._kept: _Kept | None = None
        self._settled: list[Keep] = []  # where the splits so far go
        if self.first_layer:
            self._prefix = FrozenPrefix(
                model, batch_size=conf.data.batch_size, autocast=run.autocast(), dtype=run.dtype
            )
            self._kept = self._settle(self._prefix)
        else:
            open_shelf().keep()  # what earlier runs of a sweep left is of no use here, and in the way

    def splits(self) -> tuple[Feed, Feed]:
        """Training and validation; where layers are frozen, what is kept of them is said here."""
        run, conf = self._parts, self._parts.conf
        train, val = run.loader("train", train=True), self._val
        if self._kept is None:
            return self._feed(train, "train", None), self._feed(val, "val", None)
        passes = float(conf.train.epochs) * (2 if conf.train.ema else 1) + run.built.has_zeroshot
        val_keep, val_why = self._keep(val, "val", passes)
        fresh = why_not_in_training(conf)
        if fresh is None:
            keep, why = self._keep(train, "train", conf.train.epochs / num_views(conf.augment))
        else:
            keep, why = None, fresh
        self._say(keep, why, val_keep, val_why)
        feeds = self._feed(train, "train", keep), self._feed(val, "val", val_keep)
        if val_keep is not None:
            feeds[1].prepare(0)  # its first batch was measured: not computed a second time
        assert self._prefix is not None
        self._prefix.forget()
        return feeds

    def test(self) -> Feed:
        """The test split, scored once, or twice where there is a zero-shot model."""
        loader = self._parts.loader("test", train=False)
        if self._kept is None:
            return self._feed(loader, "test", None)
        try:
            keep, why = self._keep(loader, "test", 1.0 + self._parts.built.has_zeroshot)
        except ValueError as error:  # no room: no reason to fail now, when all the training is done
            keep, why = None, str(error)
        logger.debug("frozen layers on test: %s", why)
        return self._feed(loader, "test", keep)

    def _settle(self, prefix: FrozenPrefix) -> _Kept:
        run, conf = self._parts, self._parts.conf
        shelf = open_shelf()
        if conf.prefix.cache == PrefixCache.none:
            return _Kept("", measure(prefix, self._val, conf.prefix.dtype, run.dtype), shelf)
        layers = prefix_digest(run.model, run.model_conf, computing(run))
        # A sweep measures once: a batch takes a CPU seconds.
        name = f"{MEASURED}-{layers}-{conf.prefix.dtype}-{run.fingerprint('val')}"
        measured = shelf.get(name)
        if measured is None:
            measured = measure(prefix, self._val, conf.prefix.dtype, run.dtype)
            shelf.put(name, measured, 0)
        prefix.kept_as = measured.dtype
        digest = f"{layers}-{str(measured.dtype).removeprefix('torch.')}"
        # A device is for training: there, what other layers gave does not stay. In memory it goes where room is short.
        shelf.keep(MEASURED, f"{PrefixCache.ram}-", f"{PrefixCache.device}-{digest}")
        return _Kept(digest, measured, shelf)

    def _keep(self, loader: Loader, split: str, passes: float) -> tuple[Keep | None, str]:
        """Where a split's activations go, beside those of the splits before, or None; and why."""
        run, kept = self._parts, self._kept
        assert kept is not None
        conf = run.conf
        if conf.prefix.cache == PrefixCache.none:
            return None, "prefix.cache=none"
        if read_once(conf, passes, shared=is_shared()):  # before the name, which takes a look at every file
            return None, READ_ONCE
        places = self._places(loader, split)
        beside = {kind: [keep for keep in self._settled if keep.kind == kind] for kind in places}
        names = [f"{kind}-{keep.name}" for kind in IN_MEMORY for keep in [places[kind], *self._settled]]
        need = Need(
            split=split,
            views=places[PrefixCache.ram].views,
            passes=passes,
            missing={kind: sum(keep.missing for keep in [place, *beside[kind]]) for kind, place in places.items()},
            total={kind: sum(keep.total for keep in [place, *beside[kind]]) for kind, place in places.items()},
            spare={kind: kept.shelf.spare(f"{kind}-", *names) for kind in IN_MEMORY},
        )
        kind, why = choose(conf, kept.measured, need, run.device, places[PrefixCache.disk].folder, shared=is_shared())
        if kind == PrefixCache.none:
            return None, why
        if kind in IN_MEMORY and not is_roomy(kind, kept.measured, need, run.device):
            kept.shelf.keep(MEASURED, *names)
        self._settled.append(places[kind])
        return places[kind], why

    def _places(self, loader: Loader, split: str) -> dict[PrefixCache, Keep]:
        """Everywhere that a split's activations could go."""
        run, kept = self._parts, self._kept
        assert kept is not None
        conf, is_train = run.conf, split == "train"
        most = loader.most_showings()
        assert most is not None, "see why_not_in_training"
        augment = conf.augment if is_train and conf.augment.recipe != "none" else None
        skip = conf.data.on_error == OnError.skip
        digest = split_digest(loader.split, most, run.built.preprocess, augment, conf.seed, skip=skip)
        return {
            kind: Keep(
                kind,
                f"{kept.digest}-{digest}",
                images=int(most.sum()),
                views=min(num_views(conf.augment), conf.train.epochs) if is_train else 1,
                shelf=kept.shelf,
                device=run.device,
                folder=cache_folder(conf.data.cache_dir) / "activations",
                is_asked=conf.prefix.cache != PrefixCache.auto and split != "test",
            )
            for kind in (*IN_MEMORY, PrefixCache.disk)
        }

    def _feed(self, loader: Loader, split: str, keep: Keep | None) -> Feed:
        return Feed(
            loader,
            title=split,
            device=self._parts.device,
            prefix=self._prefix,
            keep=keep,
            mixer=self._parts.mixer() if split == "train" else None,
            check=self._check,
        )

    def _say(self, keep: Keep | None, why: str, val_keep: Keep | None, val_why: str) -> None:
        assert self._prefix is not None and self._kept is not None
        measured = self._kept.measured
        logger.info(
            "frozen layers 0 to %d: %.3g ms and %.1f kB an image, as %s at the boundary",
            self.first_layer - 1,
            1000 * measured.seconds,
            measured.bytes / 1000,
            str(measured.dtype).removeprefix("torch."),
        )
        for split, place, reason in (("train", keep, why), ("val", val_keep, val_why)):
            where = "computed every time" if place is None else f"computed once, kept ({place.kind})"
            logger.info("  %s: %s: %s", split, where, reason)


def computing(run: Run) -> dict[str, str]:
    """How a run computes its frozen layers, in words: whatever of it changes their last bits."""
    conf = run.conf
    return {
        **environment(run.device),
        "dtype": str(run.dtype),
        "tf32": str(conf.precision == Precision.tf32),
        "deterministic": str(conf.deterministic),
        "batch size": str(conf.data.batch_size),
    }


def _refuse_ignored(run: Run) -> None:
    """Settings of a prefix that a model without slices has not."""
    prefix, name = run.conf.prefix, type(run.model.net).__name__
    for key, value in changed(prefix, "cache", "dtype", "max_gib").items():
        if value != PrefixCache.none:
            raise UserError(
                f"prefix.{key}={value} would be ignored: {name} is no plain chain of layers and runs only whole, so its"
                f" frozen layers cannot run apart; leave it out, or take a model that is (finetune describe)"
            )
