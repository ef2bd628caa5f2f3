"""Laws of data: any number of workers gives the same images, splits never change, unusual files are read correctly."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import signal
import time
import weakref
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from finetune.config import AugmentConf, DataConf, Recipe, SourceKind
from finetune.core.preprocess import Preprocess
from finetune.data import ImageError, Loader, Source, open_source
from finetune.data.images.decode import read_image
from finetune.data.images.transforms import Light, View, build_transform, fit_square, warp
from finetune.data.loading.batches import BatchKey, BatchMaker, PixelBatch, normalise
from finetune.data.streams import augment_generator, mix, shuffled, view_of
from finetune.system.natural import natural_key

CPU = torch.device("cpu")
SQUARE = Preprocess(16, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), resize="squash")


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source(DataConf(test_fraction=0.3))


def make_loader(source: Source, split: str = "train", **changes: object) -> Loader:
    """A loader of `split`; `augment`, `seed` and DataConf fields as `changes`."""
    augment = changes.pop("augment", AugmentConf(flip=0.3))
    seed = changes.pop("seed", 3)
    conf = DataConf(batch_size=100, **changes)  # type: ignore[arg-type]
    return Loader(source.splits[split], SQUARE, conf=conf, augment=augment, seed=seed, device=CPU)  # type: ignore[arg-type]


def digest(batches: list[tuple[Tensor, Tensor, Tensor]]) -> list[str]:
    """A checksum of each batch, over every bit of it."""
    return [hashlib.sha256(b"".join(part.numpy().tobytes() for part in batch)).hexdigest() for batch in batches]


def epoch_of(loader: Loader, epoch: int, skip: int = 0) -> list[str]:
    return digest(list(loader.epoch(epoch, skip)))


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_any_number_of_workers_gives_the_same_bits(digits: Source) -> None:
    straight = make_loader(digits)
    expected = {(epoch, skip): epoch_of(straight, epoch, skip) for epoch, skip in [(0, 0), (1, 0), (1, 7), (0, 11)]}
    for workers in (1, 2, 4):
        loader = make_loader(digits, workers=workers)
        for (epoch, skip), digests in expected.items():
            assert epoch_of(loader, epoch, skip) == digests
        loader.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_gives_the_tail_and_reads_nothing_before_it(digits: Source, workers: int) -> None:
    loader = make_loader(digits, workers=workers)
    whole = epoch_of(loader, 2)
    assert len(whole) == len(loader) == 11
    for skip in (1, 10, 11, 12):
        assert epoch_of(loader, 2, skip) == whole[skip:]
    loader.close()


def test_skipped_images_are_not_read(tmp_path: Path) -> None:
    source = open_source(folder_conf(make_folder(tmp_path / "root", {"a": 20, "b": 20})))
    split = source.splits["train"]
    order = shuffled(len(split), 3, 0).tolist()
    os.truncate(split.name_of(order[0]), 0)
    conf = DataConf(batch_size=4)
    loader = Loader(split, SQUARE, conf=conf, augment=AugmentConf(), seed=3, device=CPU)
    assert len(list(loader.epoch(0, 1))) == len(loader) - 1
    with pytest.raises(ImageError):
        next(loader.epoch(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_left_alone(digits: Source, workers: int) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    loader = make_loader(digits, workers=workers)
    first = epoch_of(loader, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # type: ignore[index]
    torch.manual_seed(6)
    assert epoch_of(loader, 0) == first
    loader.close()


def test_epochs_show_every_image_once_in_another_order(digits: Source) -> None:
    loader = make_loader(digits)
    orders = []
    for epoch in range(2):
        ids = torch.cat([ids for _, _, ids in loader.epoch(epoch)])
        assert torch.equal(ids.sort().values, torch.arange(loader.num_images))
        orders.append(ids)
    assert not torch.equal(*orders)
    other_seed = torch.cat([ids for _, _, ids in make_loader(digits, seed=4).epoch(0)])
    assert not torch.equal(orders[0], other_seed)


def test_batches_hold_what_they_say(digits: Source) -> None:
    split = digits.splits["train"]
    batches = list(make_loader(digits, augment=AugmentConf(recipe=Recipe.none)).epoch(0))
    assert [len(labels) for _, labels, _ in batches] == [100] * 10 + [79]
    for images, labels, ids in batches:
        assert images.dtype == torch.float32 and images.shape[1:] == (3, 16, 16) and images.is_contiguous()
        assert labels.dtype == ids.dtype == torch.int64
        assert torch.equal(labels, split.labels[ids])
    images, _, ids = batches[-1]
    pixels = fit_square(split.load(int(ids[5])), SQUARE)
    mean, std = (torch.tensor(values)[:, None, None] for values in (SQUARE.mean, SQUARE.std))
    assert torch.equal(images[5], (pixels.float() / 255 - mean) / std)


def test_evaluation_is_in_order_and_always_the_same(digits: Source) -> None:
    loader = make_loader(digits, "val", augment=None)
    batches = list(loader.epoch(0))
    assert torch.equal(torch.cat([ids for _, _, ids in batches]), torch.arange(len(digits.splits["val"])))
    assert epoch_of(loader, 9) == digest(batches)


def test_views_recycle(digits: Source) -> None:
    def shown(views: int, epoch: int, recipe: Recipe = Recipe.light) -> Tensor:
        """The images of an epoch in the order of the split."""
        augment = AugmentConf(recipe=recipe, views=views)
        images, _, ids = (
            torch.cat(part) for part in zip(*make_loader(digits, augment=augment).epoch(epoch), strict=True)
        )
        return images[ids.argsort()]

    assert torch.equal(shown(2, 0), shown(2, 2)) and torch.equal(shown(2, 1), shown(0, 1))
    assert not torch.equal(shown(2, 0), shown(2, 1))
    assert not torch.equal(shown(0, 0), shown(0, 2))
    assert torch.equal(shown(0, 0, Recipe.none), shown(0, 1, Recipe.none))
    assert [view_of(5, AugmentConf(views=k)) for k in (0, 1, 2, 3)] == [5, 0, 1, 2]
    assert view_of(5, None) == view_of(5, AugmentConf(recipe=Recipe.none)) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_left_early_does_not_spoil_the_next(digits: Source, workers: int) -> None:
    expected = epoch_of(make_loader(digits), 1)
    loader = make_loader(digits, workers=workers)
    early = loader.epoch(0)
    next(early)
    assert epoch_of(loader, 1) == expected
    with pytest.raises(AssertionError):
        next(early)
    started = loader.epoch(0)
    next(started)
    loader.close()
    assert not multiprocessing.active_children()  # though `started` is still held
    assert epoch_of(loader, 1) == expected  # new workers
    loader.close()


@pytest.mark.parametrize("augment", [None, AugmentConf(degrees=30)])
def test_an_image_is_the_same_in_any_company(digits: Source, augment: AugmentConf | None) -> None:
    for size in (16, 33, 224):  # warped many at a time, and one at a time
        maker = BatchMaker(
            digits.splits["train"], build_transform(Preprocess(size, SQUARE.mean, SQUARE.std), augment), 0
        )
        samples = list(range(9))
        together = maker[BatchKey(samples, [0] * 9, 4)]
        assert isinstance(together, tuple)
        for sample in samples:
            alone = maker[BatchKey([sample], [0], 4)]
            assert isinstance(alone, tuple) and torch.equal(alone[0][0], together[0][sample])


def test_images_are_normalised_alike_in_batches_of_any_size() -> None:
    """Normalising a few images at a time gives the bits of normalising all at once."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (SQUARE.mean, SQUARE.std))
    for count, size in ((1, 3), (70, 32), (3, 224), (64, 224)):
        generator = torch.Generator().manual_seed(count)
        images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
        ours = normalise(images, mean, std)
        assert torch.equal(ours, images.to(torch.float32).div_(255).sub_(mean).div_(std))


@pytest.mark.parametrize("augment", [None, AugmentConf(), AugmentConf(recipe=Recipe.crop)])
def test_decoded_images_are_held_one_at_a_time(augment: AugmentConf | None) -> None:
    """A batch of large images must not take the memory of all of them."""
    alive: list[weakref.ref[Tensor]] = []

    def load(sample: int) -> Tensor:
        assert all(image() is None for image in alive[:-1])
        image = torch.full((3, 50, 60), sample, dtype=torch.uint8)
        alive.append(weakref.ref(image))
        return image

    split = Mock(load=load, labels=torch.arange(9))
    batch = BatchMaker(split, build_transform(SQUARE, augment), 0)[BatchKey(list(range(9)), [0] * 9, 0)]
    assert isinstance(batch, PixelBatch)
    assert batch.images[:, 0, 5, 5].tolist() == list(range(9)) and len(alive) == 9


def test_repeated_images_get_views_of_their_own(digits: Source) -> None:
    maker = BatchMaker(digits.splits["train"], build_transform(SQUARE, AugmentConf()), 0)
    batch = maker[BatchKey([7, 7, 7], [0, 1, 0], 0)]
    assert isinstance(batch, tuple)
    assert torch.equal(batch[0][0], batch[0][2]) and not torch.equal(batch[0][0], batch[0][1])


def test_what_workers_are_sent_is_small_and_complete(digits: Source) -> None:
    maker = BatchMaker(digits.splits["train"], build_transform(SQUARE, AugmentConf()), 0)
    sent = pickle.dumps(maker)
    assert len(sent) < 200_000
    key = BatchKey([3, 1], [0, 0], 2)
    assert torch.equal(pickle.loads(sent)[key][0], maker[key][0])  # type: ignore[index]


def test_threads_change_nothing(digits: Source) -> None:
    threads = torch.get_num_threads()
    expected = epoch_of(make_loader(digits), 0, 9)
    try:
        torch.set_num_threads(3)
        assert epoch_of(make_loader(digits), 0, 9) == expected
    finally:
        torch.set_num_threads(threads)


def test_workers_outlive_signals_to_the_group(digits: Source) -> None:
    loader = make_loader(digits, workers=2)
    batches = loader.epoch(0)
    first = next(batches)
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    time.sleep(0.1)
    assert digest([first, *batches]) == epoch_of(make_loader(digits), 0)
    assert epoch_of(loader, 1) == epoch_of(make_loader(digits), 1)
    loader.close()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_cuda_gets_the_same_batches(digits: Source, workers: int) -> None:
    conf = DataConf(batch_size=100, workers=workers)
    cuda = torch.device("cuda")
    loader = Loader(digits.splits["train"], SQUARE, conf=conf, augment=AugmentConf(), seed=3, device=cuda)
    here = make_loader(digits, augment=AugmentConf()).epoch(1)
    for (images, labels, ids), expected in zip(loader.epoch(1), here, strict=True):
        assert images.device.type == labels.device.type == "cuda" and ids.device == CPU
        torch.testing.assert_close(images.cpu(), expected[0], rtol=0, atol=1e-6)
        assert torch.equal(labels.cpu(), expected[1]) and torch.equal(ids, expected[2])
    loader.close()


# --- streams ---------------------------------------------------------------------------------------------------------


def test_streams_never_move() -> None:
    """Goldens: another number here means that no earlier run can be repeated or resumed."""
    assert mix("augment", 0, 1, 2, 3) == 8063157172182830683
    assert mix("split", 0, "a/1.jpg") != mix("split", 1, "a/1.jpg")
    assert shuffled(10, 0, 0).tolist() == [4, 5, 2, 3, 8, 0, 6, 1, 9, 7]
    assert torch.randint(0, 1000, (3,), generator=augment_generator(0, 0, 0, 0)).tolist() == [533, 889, 370]
    assert len({mix("order", seed, epoch) for seed in range(30) for epoch in range(30)}) == 900


# --- splits ----------------------------------------------------------------------------------------------------------


def test_digits_split_is_stratified_complete_and_never_moves(digits: Source) -> None:
    assert digits.classes == tuple("0123456789")
    assert {name: len(split) for name, split in digits.splits.items()} == {"train": 1079, "val": 179, "test": 539}
    names = [split.name_of(i) for split in digits.splits.values() for i in range(len(split))]
    assert sorted(names, key=natural_key) == [f"digits[{i}]" for i in range(1797)]
    whole = sum(split.labels.bincount(minlength=10) for split in digits.splits.values())
    for name, share in {"train": 0.6, "val": 0.1, "test": 0.3}.items():
        assert ((digits.splits[name].labels.bincount(minlength=10) - whole * share).abs() <= 1).all()
    assert hashlib.sha256(" ".join(names).encode()).hexdigest()[:16] == "9820ca4f82c51d00"
    again = open_source(DataConf(test_fraction=0.3))
    assert all(torch.equal(again.splits[name].labels, digits.splits[name].labels) for name in digits.splits)
    other = open_source(DataConf(test_fraction=0.3, split_seed=1)).splits["test"]
    assert {other.name_of(i) for i in range(len(other))} != set(names[-539:])


def test_digits_are_white_on_black(digits: Source) -> None:
    from sklearn.datasets import load_digits

    split = digits.splits["val"]
    image, row = split.load(4), int(split.name_of(4)[7:-1])
    assert image.dtype == torch.uint8 and image.shape == (3, 8, 8)
    expected = np.floor(load_digits().images[row] * 255 / 16 + 0.5)
    assert (image.numpy() == expected).all() and image.max() == 255 and image[:, :, 0].max() == 0


def make_folder(root: Path, classes: dict[str, int]) -> Path:
    """One folder for each class with the given number of small images, no two of them equal."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (9, 7), (i * 7 % 256, *zlib.crc32(name.encode()).to_bytes(4, "big")[:2])).save(
                root / name / f"{i}.png"
            )
    return root


def folder_conf(root: Path | str, **changes: object) -> DataConf:
    return DataConf(source=SourceKind.folder, root=str(root), **changes)  # type: ignore[arg-type]


def names_of(source: Source, root: Path) -> dict[str, set[str]]:
    return {
        name: {os.path.relpath(split.name_of(i), root) for i in range(len(split))}
        for name, split in source.splits.items()
    }


def test_folder_classes_come_in_natural_order_without_hidden_ones(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {"2": 3, "10": 4, "1": 20, "b": 3, "A": 3, ".ipynb_checkpoints": 3, "@eaDir": 3})
    (root / "10" / "deep" / "er").mkdir(parents=True)
    (root / "1" / "0.png").rename(root / "10" / "deep" / "er" / "x y.PNG")
    (root / "1" / "notes.txt").write_text("no image")
    (root / "1" / ".hidden.png").write_text("no image")
    (root / "1" / "link.png").symlink_to(root / "1" / "2.png")
    (root / "1" / "loop").symlink_to(root / "1")
    source = open_source(folder_conf(root))
    assert source.classes == ("1", "2", "10", "A", "b")
    found = names_of(source, root)
    assert sum(map(len, found.values())) == len(set().union(*found.values())) == 20 + 3 + 5 + 3 + 3
    assert "10/deep/er/x y.PNG" in set().union(*found.values())
    assert "1 .txt" in source.description and str(root) in source.description
    counts = {name: split.labels.bincount(minlength=5).tolist() for name, split in source.splits.items()}
    assert counts == {"train": [16, 1, 3, 1, 1], "val": [2, 1, 1, 1, 1], "test": [2, 1, 1, 1, 1]}
    split = source.splits["train"]
    assert all(Path(split.name_of(i)).relative_to(root).parts[0] == source.classes[split.labels[i]] for i in range(22))


def test_a_split_does_not_depend_on_where_the_folder_lies_nor_much_on_what_is_added(tmp_path: Path) -> None:
    classes = {"a": 40, "b": 30}
    here, there = make_folder(tmp_path / "here", classes), make_folder(tmp_path / "there", classes)
    before = names_of(open_source(folder_conf(here)), here)
    assert before == names_of(open_source(folder_conf(there)), there)
    Image.new("L", (4, 4)).save(here / "a" / "new.png")
    after = names_of(open_source(folder_conf(here)), here)
    assert sum(len(before[name] - after[name]) for name in before) <= 2


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_folder(tmp_path / "my photos (2)", {"a": 3, "b": 3})
    source = open_source(folder_conf("~/my photos (2)"))
    assert source.splits["train"].load(0).shape == (3, 7, 9)


def test_given_splits_are_kept(tmp_path: Path) -> None:
    for split, count in {"train": 20, "validation": 4, "test": 5}.items():
        make_folder(tmp_path / split, {"cat": count, "dog": count})
    source = open_source(folder_conf(tmp_path))
    assert source.classes == ("cat", "dog")
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 40, "val": 8, "test": 10}
    assert "validation/cat/1.png" in names_of(source, tmp_path)["val"]
    (tmp_path / "test").rename(tmp_path.parent / f"{tmp_path.name}_test")
    source = open_source(folder_conf(tmp_path))
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 40, "val": 8, "test": 0}
    assert source.description.endswith("48 images in 2 classes; 40 train, 8 val, 0 test")


def test_layout_errors_say_what_is_there_and_what_is_expected(tmp_path: Path) -> None:
    def refused(root: Path, *words: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error) as caught:
            open_source(folder_conf(root))
        message = str(caught.value)
        assert all(word in message for word in words) and "\n" not in message, message

    make_folder(tmp_path / "photos", {"a": 3, "b": 3})
    refused(tmp_path / "photoz", "photoz", "did you mean 'photos'", "ROOT/cat", error=FileNotFoundError)
    refused(tmp_path / "photos" / "a" / "0.png", "is not a folder", "ROOT/cat")
    (tmp_path / "bare").mkdir()
    refused(tmp_path / "bare", "no class folders", "found nothing")
    refused(tmp_path / "photos" / "a", "no class folders", "3 images", "ROOT/cat")
    refused(make_folder(tmp_path / "one", {"a": 5}), "only one class", "a")
    refused(make_folder(tmp_path / "few", {"a": 5, "b": 2, "c": 1}), "train, val, test", "b (2), c (1)")
    (make_folder(tmp_path / "empty", {"a": 5, "b": 0}) / "b" / "x.heic").touch()
    refused(tmp_path / "empty", "b [found only 1 .heic]", ".jpg")
    for split, names in {"train": "abc", "val": "bc", "test": "abcd"}.items():
        make_folder(tmp_path / "maps" / split, dict.fromkeys(names, 3))
    refused(tmp_path / "maps", "test has d, which train has not (train has a, b, c; test has a, b, c, d)")
    make_folder(tmp_path / "maps", {"other": 3})
    refused(tmp_path / "maps", "other beside train, val, test")
    make_folder(tmp_path / "no_train", {"val/a": 3, "val/b": 3, "test/a": 3, "test/b": 3})
    refused(tmp_path / "no_train", "val and test but no train")
    make_folder(tmp_path / "twice", {"train/a": 3, "val/a": 3, "valid/a": 3})
    refused(tmp_path / "twice", "val and valid both mean val")
    railway = open_source(folder_conf(make_folder(tmp_path / "railway", {"train": 5, "bus": 5})))
    assert railway.classes == ("bus", "train")
    with pytest.raises(ValueError, match=r"data\.source=digitz: .*did you mean 'digits'"):
        open_source(DataConf(source="digitz"))  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_named_in_one_line(tmp_path: Path, workers: int) -> None:
    root = make_folder(tmp_path, {"a": 10, "b": 10})
    split = open_source(folder_conf(root)).splits["train"]
    Path(split.name_of(3)).write_bytes(Path(split.name_of(3)).read_bytes()[:40])
    conf = folder_conf(root, workers=workers, batch_size=2)
    loader = Loader(split, SQUARE, conf=conf, augment=None, seed=0, device=CPU)
    with pytest.raises(ImageError) as caught:
        list(loader.epoch(0))
    assert caught.value.path == split.name_of(3)
    assert str(caught.value).startswith(split.name_of(3)) and "\n" not in str(caught.value)
    loader.close()


# --- files -----------------------------------------------------------------------------------------------------------


def save(path: Path, image: Image.Image, **options: object) -> Tensor:
    image.save(path, **options)
    return read_image(str(path))


def colour(image: Tensor, y: int = 0, x: int = 0) -> list[int]:
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    return [int(value) for value in image[:, y, x]]


def test_modes_are_read_right(tmp_path: Path) -> None:
    assert colour(save(tmp_path / "1.png", Image.new("1", (2, 2), 1))) == [255, 255, 255]
    assert colour(save(tmp_path / "l.png", Image.new("L", (2, 2), 77))) == [77, 77, 77]
    assert colour(save(tmp_path / "rgb.bmp", Image.new("RGB", (2, 2), (1, 2, 3)))) == [1, 2, 3]
    assert colour(save(tmp_path / "la.png", Image.new("LA", (2, 2), (0, 0)))) == [255, 255, 255]
    assert colour(save(tmp_path / "rgba.png", Image.new("RGBA", (2, 2), (255, 0, 0, 0)))) == [255, 255, 255]
    assert colour(save(tmp_path / "rgba.webp", Image.new("RGBA", (2, 2), (9, 9, 9, 255)), lossless=True)) == [9, 9, 9]
    half = colour(save(tmp_path / "half.png", Image.new("RGBA", (2, 2), (255, 0, 0, 128))))
    assert half[0] == 255 and 126 <= half[1] == half[2] <= 128
    assert (
        colour(save(tmp_path / "keyed.png", Image.new("RGB", (2, 2), (5, 6, 7)), transparency=(5, 6, 7))) == [255] * 3
    )
    cyan = colour(save(tmp_path / "cmyk.jpg", Image.new("CMYK", (8, 8), (255, 0, 0, 0)), quality=100))
    assert cyan[0] < 5 and min(cyan[1:]) > 250
    assert read_image(str(tmp_path / "l.png")).shape == (3, 2, 2)


def test_palettes(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 0)
    pixels = save(tmp_path / "p.png", image)
    assert colour(pixels) == [10, 20, 30] and colour(pixels, 0, 1) == [40, 50, 60]
    pixels = save(tmp_path / "clear.png", image, transparency=bytes([0, 255]))
    assert colour(pixels) == [255, 255, 255] and colour(pixels, 0, 1) == [40, 50, 60]
    frames = [Image.new("RGB", (3, 2), "red"), Image.new("RGB", (3, 2), "blue")]
    assert colour(save(tmp_path / "moving.gif", frames[0], save_all=True, append_images=frames[1:])) == [255, 0, 0]


def test_more_than_8_bits_are_scaled(tmp_path: Path) -> None:
    ramp = np.array([[0, 128, 129, 257, 32896, 65535]], dtype=np.uint16)
    expected = [0, 0, 1, 1, 128, 255]
    for name in ("16.png", "16.tiff"):
        assert save(tmp_path / name, Image.fromarray(ramp))[0, 0].tolist() == expected
    pgm = tmp_path / "16.pgm"
    pgm.write_bytes(b"P5 6 1 65535\n" + ramp.byteswap().tobytes())
    assert read_image(str(pgm))[2, 0].tolist() == expected
    unit = save(tmp_path / "unit.tiff", Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)))
    assert unit[1, 0].tolist() == [0, 128, 255]
    for name, values in {"f.tiff": np.float32([[0, 300]]), "nan.tiff": np.float32([[0, np.nan]])}.items():
        with pytest.raises(ImageError, match="expected 0 to 1"):
            save(tmp_path / name, Image.fromarray(values))
    with pytest.raises(ImageError, match="expected 0 to 65535"):
        save(tmp_path / "i.tiff", Image.fromarray(np.int32([[0, 70000]])))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    upright = torch.arange(6, dtype=torch.uint8).reshape(2, 3) * 40
    stored = {1: upright, 3: upright.rot90(2), 6: upright.rot90(1), 8: upright.rot90(-1), 2: upright.flip(1)}
    stored |= {4: upright.flip(0), 5: upright.T, 7: upright.rot90(2).T}
    for ending in ("png", "tiff", "webp"):
        for orientation, pixels in stored.items():
            exif = Image.Exif()
            exif[0x0112] = orientation
            options = {"lossless": True} if ending == "webp" else {}
            image = Image.fromarray(pixels.contiguous().numpy()).convert("RGB")
            assert torch.equal(save(tmp_path / f"{orientation}.{ending}", image, exif=exif, **options)[0], upright)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    cases = {"empty.jpg": b"", "text.png": b"hello, I am no image", "cut.jpg": b""}
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    cases["cut.jpg"] = (tmp_path / "whole.jpg").read_bytes()[:900]
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "folder.png").mkdir()
    reasons = {"empty.jpg": "empty", "text.png": "not an image", "cut.jpg": "truncated", "broken.png": "broken link"}
    for name, reason in {**reasons, "folder.png": "a folder"}.items():
        with pytest.raises(ImageError, match=reason) as caught:
            read_image(str(tmp_path / name))
        assert caught.value.path == str(tmp_path / name) and str(caught.value).startswith(caught.value.path)
        assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


# --- transforms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_every_size_ends_as_the_square(resize: str, interpolation: str) -> None:
    preprocess = Preprocess(24, (0, 0, 0), (1, 1, 1), interpolation, resize, crop_fraction=0.9)
    for height, width in [(1, 1), (24, 24), (7, 30), (301, 40), (20, 20_000), (1, 3_000)]:
        image = fit_square(torch.full((3, height, width), 200, dtype=torch.uint8), preprocess)
        assert image.dtype == torch.uint8 and image.shape == (3, 24, 24)
        assert image[:, 11:13, 11:13].amax(dim=(1, 2)).tolist() == [200] * 3  # the middle is never a border
        assert (image.min() == 0) == (resize == "pad" and height != width)


def test_crop_is_what_upstream_does() -> None:
    """timm and open_clip resize and crop PIL images: the same geometry, pixels within rounding."""
    from torchvision import transforms

    pixels = torch.nn.functional.interpolate(torch.rand(1, 3, 20, 14), size=(90, 61), mode="bicubic")[0]
    pixels = (pixels.clamp(0, 1) * 255).to(torch.uint8)
    mode = transforms.InterpolationMode.BICUBIC
    upstream = transforms.Compose([transforms.Resize(35, mode), transforms.CenterCrop(32), transforms.PILToTensor()])
    expected = upstream(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    ours = fit_square(pixels, Preprocess(32, (0, 0, 0), (1, 1, 1), crop_fraction=0.9))
    assert (ours.int() - expected.int()).abs().max() <= 1


def test_warp_moves_as_it_says() -> None:
    image = torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    image[:, :, [0, -1]] = image[:, :, :, [0, -1]] = 9
    still = View(angle=0.0, scale=1.0, right=0.0, down=0.0, mirror=1.0)
    assert torch.equal(warp(image, [still]), image)
    assert torch.equal(warp(image, [still._replace(mirror=-1.0)]), image.flip(3))
    moved = warp(image, [still._replace(right=2 / 8, down=-1 / 8)])
    assert torch.equal(moved[:, :, :15, 2:], image[:, :, 1:, :14])
    assert (moved[:, :, :, :2] == 9).all() and (moved[:, :, 15] == 9).all()  # the border's colour comes in
    quarter = warp(image, [still._replace(angle=torch.pi / 2)])
    assert (quarter.int() - image.rot90(-1, (2, 3)).int()).abs().max() <= 1  # clockwise on the screen
    blob = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    blob[:, :, 6:10, 6:10] = 255
    assert warp(blob, [still._replace(scale=1.5)]).float().mean() > 1.5 * blob.float().mean()
    both = warp(torch.cat([image, blob]), [still, still._replace(scale=1.5)])
    assert torch.equal(both[0], image[0]) and torch.equal(both[1:], warp(blob, [still._replace(scale=1.5)]))


def test_light_stays_within_its_limits() -> None:
    light = Light(degrees=10, translate=0.08, zoom=0.1, flip=0.25)
    views = [light.draw(augment_generator(0, 0, sample, 0)) for sample in range(2000)]
    angle, scale, right, down, mirror = torch.tensor(views, dtype=torch.float64).T
    for values, limit in [(angle, np.pi / 18), (scale - 1, 0.1), (right, 0.16), (down, 0.16)]:
        assert values.abs().max() <= limit and values.abs().max() > 0.98 * limit and values.mean().abs() < 0.06 * limit
    assert 0.21 < (mirror < 0).double().mean() < 0.29
    nothing = Light(0, 0, 0, 0).draw(augment_generator(0, 0, 0, 0))
    assert nothing == View(0.0, 1.0, 0.0, 0.0, 1.0)


def test_natural_order() -> None:
    names = ["b", "a10", "a2", "A1", "10", "9", "a", "Ä", "1.10", "1.9"]
    assert sorted(names, key=natural_key) == ["1.9", "1.10", "9", "10", "a", "A1", "a2", "a10", "b", "Ä"]
    folders = [str(i) for i in range(1, 121)]
    assert sorted(sorted(folders), key=natural_key) == folders
