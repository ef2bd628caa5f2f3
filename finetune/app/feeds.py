"""The batches of a run's splits: loaders, the frozen layers behind them, and the caches of their activations."""

import logging
from collections.abc import Callable

from finetune.app.build import Run
from finetune.config import OnError, Precision, PrefixCache, PrefixConf
from finetune.config.fields import changed
from finetune.core.device import environment
from finetune.core.layers import LayeredModel
from finetune.data import Loader
from finetune.data.caches.entries import cache_folder
from finetune.data.streams import num_views
from finetune.prefix.cache import ActivationCache
from finetune.prefix.feed import Feed
from finetune.prefix.frozen import FrozenPrefix
from finetune.prefix.identity import prefix_digest, split_digest
from finetune.prefix.measuring import Measured, measure
from finetune.prefix.planning import CachePlanner, is_read_once, why_not_cacheable
from finetune.prefix.sweep_memory import sweep_memory
from finetune.system.errors import UserError

logger = logging.getLogger("finetune")


class Feeds:
    """Makes the feeds of a run; its model is already frozen."""

    def __init__(self, run: Run, check: Callable[[], None]) -> None:
        """Measure the frozen layers, if there are any; activations are computed later.

        `check` is called between batches while a cache is filled; an exception from it ends the filling.

        Raises:
            UserError: `prefix.cache` or `prefix.dtype` would be ignored.
        """
        model = run.model
        _refuse_ignored(model, run.conf.prefix)
        if model.num_frozen and not model.is_chain:
            logger.info("the frozen layers run with every batch: %s is no plain chain", type(model.net).__name__)
        self._run, self._check = run, check
        self._val = run.loader("val", train=False) if run.source.has("val") else None
        self._prefix: FrozenPrefix | None = None
        self._planner: CachePlanner | None = None
        if model.boundary:
            size = run.conf.data.batch_size
            self._prefix = FrozenPrefix(model, batch_size=size, autocast=run.autocast(), dtype=run.dtype)
            self._measured = self._measure(self._prefix)
            self._prefix.stored_as = self._measured.dtype
        else:
            sweep_memory().drop_all_but(())  # activations of earlier jobs would only take memory from this one

    def train_and_val(self) -> tuple[Feed, Feed | None]:
        """The feeds of training and validation; logs where their activations are cached, and computes validation's.

        The second is None without validation images.

        Raises:
            UserError: The place that `prefix.cache` names is too small.
            OSError: The disk that `prefix.cache` names cannot be written.
        """
        train, val = self._run.loader("train", train=True), self._val
        if self._prefix is None:
            return self._feed(train, "train"), None if val is None else self._feed(val, "val")
        plans = {} if val is None else {"val": self._plan(val, "val")}
        plans = {"train": self._plan(train, "train"), **plans}
        measured, dtype = self._measured, str(self._measured.dtype).removeprefix("torch.")
        text = "frozen layers 0 to %d: %.3g ms and %.1f kB an image, as %s at the boundary"
        logger.info(text, self._run.model.boundary - 1, 1000 * measured.seconds, measured.bytes / 1000, dtype)
        for split, (cache, why) in plans.items():
            how = "computed in every epoch" if cache is None else f"computed once, cached ({cache.kind})"
            logger.info("  %s: %s: %s", split, how, why)
        train_feed = self._feed(train, "train", plans["train"][0])
        if val is None:
            return train_feed, None
        val_feed = self._feed(val, "val", plans["val"][0])
        val_feed.fill(0)
        return train_feed, val_feed

    def test(self) -> Feed | None:
        """The feed of the test split; None without test images."""
        if not self._run.source.has("test"):
            return None
        loader = self._run.loader("test", train=False)
        if self._prefix is None:
            return self._feed(loader, "test")
        try:
            cache, why = self._plan(loader, "test")
        except UserError as error:  # too little room must not fail a run that has trained to its end
            cache, why = None, str(error)
        logger.debug("frozen layers on test: %s", why)
        return self._feed(loader, "test", cache)

    def _measure(self, prefix: FrozenPrefix) -> Measured:
        """Measure the frozen layers, once in a sweep, and make the planner where activations may be cached."""
        run, conf, memory = self._run, self._run.conf.prefix, sweep_memory()
        split = "train" if self._val is None else "val"
        images = self._val or run.loader(split, train=False)
        if conf.cache == PrefixCache.none:
            return measure(prefix, images, conf.dtype, run.dtype)
        layers = prefix_digest(run.model, run.model_conf, computing(run))
        name = f"{layers}-{conf.dtype}-{run.split_digest(split)}"
        if name not in memory.measured:
            memory.measured[name] = measure(prefix, images, conf.dtype, run.dtype)
        measured = memory.measured[name]
        folder = cache_folder(run.conf.data.cache_dir) / "activations"
        layers += f"-{str(measured.dtype).removeprefix('torch.')}"  # the precision changes the numbers, too
        self._planner = CachePlanner(conf, measured, layers, memory, run.device, folder)
        return measured

    def _plan(self, loader: Loader, split: str) -> tuple[ActivationCache | None, str]:
        """A split's cache, if it has one, and the reason: how often this run reads each of its activations."""
        conf, is_train, has_zeroshot = self._run.conf, split == "train", self._run.built.has_zeroshot
        fresh = why_not_cacheable(conf.augment, conf.data.epoch_images) if is_train else None
        if fresh is not None or self._planner is None:
            return None, fresh or "prefix.cache=none"
        passes = conf.train.epochs * (2.0 if conf.train.ema else 1.0) + has_zeroshot
        if split != "val":
            passes = conf.train.epochs / num_views(conf.augment) if is_train else 1.0 + has_zeroshot
        if is_read_once(conf.prefix.cache, passes):  # before the digest, for which every file is looked at
            return None, "each activation would be read only once"
        showings = loader.most_showings()
        assert showings is not None, "see why_not_cacheable"
        augment = conf.augment if is_train and conf.augment.recipe != "none" else None
        skip = conf.data.on_error == OnError.skip
        digest = split_digest(loader.split, showings, self._run.built.preprocess, augment, conf.seed, skip=skip)
        views = min(num_views(conf.augment), conf.train.epochs) if is_train else 1
        return self._planner.plan(split, digest, slots=int(showings.sum()), views=views)

    def _feed(self, loader: Loader, split: str, cache: ActivationCache | None = None) -> Feed:
        mixer = self._run.mixer() if split == "train" else None
        device, prefix, check = self._run.device, self._prefix, self._check
        return Feed(loader, title=split, device=device, prefix=prefix, cache=cache, mixer=mixer, check=check)


def computing(run: Run) -> dict[str, str]:
    """How a run computes its frozen layers, in words: everything that changes the last bits of activations."""
    conf = run.conf
    return {
        **environment(run.device),
        "dtype": str(run.dtype),
        "tf32": str(conf.precision == Precision.tf32),
        "deterministic": str(conf.deterministic),
        "batch size": str(conf.data.batch_size),
        **{name: str(value) for name, value in run.built.changes.items()},
    }


def _refuse_ignored(model: LayeredModel, conf: PrefixConf) -> None:
    """Raises UserError where a setting of the prefix would be ignored, since no frozen layers run apart."""
    name, why = type(model.net).__name__, "the parameters that optim.freeze names leave the stem something to learn"
    if model.num_frozen:
        whole = f"{name} is no plain chain of layers and runs only whole"
        why = f"{whole}, so its frozen layers cannot run apart; take a model that is (finetune describe)"
    for key, value in changed(conf, "cache", "dtype", "max_gib").items():
        if not model.boundary and value != PrefixCache.none:
            raise UserError(f"prefix.{key}={value} would be ignored: {why}; leave it out")
