"""Laws of the check: unreadable files are named before training, others stay as they are, nothing is read twice."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from finetune.__main__ import main
from finetune.config import AugmentConf, DataConf, OnError, SourceKind
from finetune.config.words.configuration import compose
from finetune.core.preprocess import Preprocess
from finetune.data import ImageError, Loader, SkippedList, Source, check_at_start, open_source
from finetune.data.caches.entries import cache_folder
from finetune.data.checks import examine as examine_module
from finetune.data.checks.contact_sheet import CAPTION, GAP, pixels_of_input, write_contact_sheet
from finetune.data.checks.examine import examine, find_duplicates
from finetune.data.checks.known_images import RECORD, KnownImages
from finetune.data.images.decode import decode, read_header, read_image
from finetune.data.sources.stores import FileStore

SQUARE = Preprocess(16, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), resize="squash")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten small noisy images of each of two classes."""
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.random.default_rng([ord(name), i]).integers(0, 255, (8, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def folder_conf(root: Path, **changes: object) -> DataConf:
    return DataConf(source=SourceKind.folder, root=str(root), **changes)  # type: ignore[arg-type]


def look(conf: DataConf, budget_s: float = 1e9):  # type: ignore[no-untyped-def]
    source = open_source(conf)
    return source, examine(source, KnownImages(conf.cache_dir, source.location), budget_s=budget_s)


# --- the check --------------------------------------------------------------------------------------------------------


def test_every_image_is_examined(root: Path) -> None:
    _, report = look(folder_conf(root))
    assert report.coverage == "20 images checked: 20 decoded" and report.unreadable == []
    for records in report.records.values():
        assert (records["width"] == 9).all() and (records["height"] == 8).all() and (records["first"] != 0).all()


def test_a_second_check_reads_no_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "a" / "0.png").write_bytes(b"no image")
    _, first = look(folder_conf(root))
    read, names = FileStore.read, []

    def noted(store: FileStore, row: int) -> bytes:
        names.append(store.name_of(row))
        return read(store, row)

    monkeypatch.setattr(FileStore, "read", noted)
    monkeypatch.setattr(FileStore, "header", lambda *_: pytest.fail("read"))
    _, second = look(folder_conf(root))
    assert second.remembered == 19 and second.unreadable == first.unreadable and len(second.unreadable) == 1
    assert "19 decoded, 1 unreadable (19 of them known from an earlier look)" in second.coverage
    assert names == [str(root / "a" / "0.png")]  # only the file that could not be read
    for name, records in first.records.items():
        assert (records == second.records[name]).all()


def test_unreadable_images_are_decoded_again_first_and_stay_unreadable_without_time(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Perhaps Pillow was too old or the memory too small: the file has not changed, and may be readable now."""
    read, name = FileStore.read, str(root / "b" / "3.png")

    def failing(store: FileStore, row: int) -> bytes:
        if store.name_of(row) == name:
            raise ImageError(name, "it cannot be decoded") from MemoryError()
        return read(store, row)

    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "read", failing)
        assert [bad.name for bad in look(folder_conf(root))[1].unreadable] == [name]
    (again,) = look(folder_conf(root), budget_s=0)[1].unreadable
    assert again.reason == "it cannot be decoded"
    (root / "b" / "4.png").write_bytes((root / "b" / "4.png").read_bytes()[:60])  # its header is whole
    assert [bad.name for bad in look(folder_conf(root))[1].unreadable] == [str(root / "b" / "4.png")]
    clock = iter([0.0])
    with monkeypatch.context() as patch:  # from the second reading of the clock on there is time for headers only
        patch.setattr(examine_module.time, "monotonic", lambda: next(clock, 1.2))
        assert len(look(folder_conf(root), budget_s=1)[1].unreadable) == 1
    (root / "b" / "4.png").unlink()
    Image.new("RGB", (9, 8)).save(root / "b" / "4.png")
    assert look(folder_conf(root))[1].unreadable == [] and look(folder_conf(root), budget_s=0)[1].unreadable == []


def test_a_changed_file_is_examined_again(root: Path) -> None:
    assert look(folder_conf(root))[1].unreadable == []
    os.truncate(root / "a" / "3.png", 60)
    _, report = look(folder_conf(root))
    assert [bad.name for bad in report.unreadable] == [str(root / "a" / "3.png")] and report.remembered == 19


def test_the_check_ends_with_its_budget_and_continues_next_time(root: Path) -> None:
    (root / "a" / "0.png").unlink()
    (root / "a" / "0.png").symlink_to("nowhere")
    _, report = look(folder_conf(root), budget_s=0)
    assert "19 only found to be there, 1 unreadable" in report.coverage  # a missing file is found without any budget
    assert look(folder_conf(root))[1].coverage == "20 images checked: 19 decoded, 1 unreadable"


def _save_part(cache: str, start: int) -> None:
    records = np.zeros(50, RECORD)
    records["key"], records["depth"] = np.arange(start, start + 50), 3
    KnownImages(cache, "here").save(records, {start: f"reason {start}"})


def test_two_processes_remember_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_save_part, args=(str(tmp_path), 1 + 50 * i)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    known = KnownImages(str(tmp_path), "here")
    assert known.records["key"].tolist() == list(range(1, 201)) and len(known.reasons) == 4


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 torn", b"no archive"])
def test_a_damaged_memory_costs_only_a_second_check(root: Path, own_cache: Path, damage: bytes) -> None:
    look(folder_conf(root))
    (path,) = (cache_folder(None) / "checks").glob("*.npz")
    path.write_bytes(damage)
    assert look(folder_conf(root))[1].remembered == 0
    assert look(folder_conf(root))[1].remembered == 20


def test_a_cache_that_cannot_be_written_stops_nothing(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert look(folder_conf(root, cache_dir=str(tmp_path / "file")))[1].unreadable == []


def test_where_caches_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder(None) == Path("/home/x/.cache/finetune-cache")
    assert cache_folder("~/y") == Path("/home/x/y/finetune-cache")


def test_duplicates_are_found_where_they_harm(root: Path) -> None:
    for name in ("train", "val", "test"):  # given splits, which no cut keeps apart
        for label in "ab":
            (root / name / label).mkdir(parents=True)
    for path in sorted(root.glob("[ab]/*.png")):
        split = {"8": "val", "9": "test"}.get(path.stem, "train")
        path.rename(root / split / path.parent.name / path.name)
    (root / "a").rmdir(), (root / "b").rmdir()
    at = {path.relative_to(root).as_posix(): path for path in root.glob("*/*/*.png")}
    at["test/a/9.png"].write_bytes(at["train/a/0.png"].read_bytes())  # leak
    at["train/b/0.png"].write_bytes(at["train/a/1.png"].read_bytes())  # two labels
    at["train/b/1.png"].write_bytes(at["train/b/2.png"].read_bytes())  # within a class of a split: no harm
    source, report = look(folder_conf(root))
    groups = [{source.splits[split].name_of(i) for split, i in group} for group in find_duplicates(source, report)]
    assert len(groups) == 2
    for pair in (("train/a/0.png", "test/a/9.png"), ("train/a/1.png", "train/b/0.png")):
        assert {str(at[name]) for name in pair} in groups


def test_digits_hold_no_duplicates_and_are_read_quickly() -> None:
    source, report = look(DataConf())
    assert list(find_duplicates(source, report)) == [] and "1,797 decoded" in report.coverage


# --- stop or skip ----------------------------------------------------------------------------------------------------


def test_stop_lists_everything(root: Path, tmp_path: Path) -> None:
    for i in range(10):
        (root / "b" / f"bad\n{i}.jpg").touch()
    for i in range(5):
        (root / "a" / f"bad{i}.jpg").write_text("x")
    conf = folder_conf(root)
    with pytest.raises(ValueError, match=r"15 images cannot be read: .*; and 5 more\. The list: ") as caught:
        check_at_start(open_source(conf), conf, tmp_path)
    assert "data.on_error=skip" in str(caught.value)
    lines = (tmp_path / "unreadable.txt").read_text().splitlines()
    assert len(lines) == 15 and all("bad" in line and ("empty" in line or "not an image" in line) for line in lines)


def test_skip_trains_without_them_and_lists_them(root: Path, tmp_path: Path) -> None:
    (root / "b" / "bad.jpg").touch()
    conf = folder_conf(root, on_error=OnError.skip)
    source = open_source(conf)
    checked = check_at_start(source, conf, tmp_path)
    assert sum(map(len, checked.splits.values())) == 20
    names = {split.name_of(i) for split in checked.splits.values() for i in range(len(split))}
    assert str(root / "b" / "bad.jpg") not in names
    (row,) = map(json.loads, (tmp_path / "skipped.txt").read_text().splitlines())
    assert (
        row["name"] == str(root / "b" / "bad.jpg") and row["reason"] == "the file is empty" and row["when"] == "start"
    )


def test_a_continued_run_leaves_out_what_it_began_without(root: Path, tmp_path: Path) -> None:
    conf = folder_conf(root, on_error=OnError.skip)
    (root / "b" / "0.png").write_bytes(b"")
    before = check_at_start(open_source(conf), conf, tmp_path)
    (root / "b" / "0.png").write_bytes((root / "b" / "1.png").read_bytes())  # repaired
    (root / "a" / "0.png").write_bytes(b"")  # went bad
    after = check_at_start(open_source(conf), conf, tmp_path)
    for name, split in before.splits.items():
        assert torch.equal(split.rows, after.splits[name].rows)
    (root / "a" / "00.png").write_bytes((root / "a" / "1.png").read_bytes())
    (root / "b" / "0.png").unlink()
    with pytest.raises(ValueError, match="the data has changed since this run was started"):
        check_at_start(open_source(conf), conf, tmp_path)


def rows_of(source: Source) -> dict[str, list[int]]:
    return {name: split.rows.tolist() for name, split in source.splits.items()}


def test_the_policy_may_change_when_a_run_is_continued_and_its_images_do_not(root: Path, tmp_path: Path) -> None:
    stop, skip = folder_conf(root), folder_conf(root, on_error=OnError.skip)
    for name in ("stop", "skip", "new"):
        (tmp_path / name).mkdir()
    whole = rows_of(check_at_start(open_source(stop), stop, tmp_path / "stop"))
    (root / "b" / "0.png").write_bytes(b"")  # went bad since
    with pytest.raises(ValueError, match="1 image cannot be read"):
        check_at_start(open_source(stop), stop, tmp_path / "stop")
    # A run that began with all images keeps all of them: its batches leave out the unreadable one.
    assert rows_of(check_at_start(open_source(skip), skip, tmp_path / "stop")) == whole
    fewer = rows_of(check_at_start(open_source(skip), skip, tmp_path / "skip"))
    assert fewer != whole
    # A run that began without an image continues without it; another unreadable image stops the run.
    assert rows_of(check_at_start(open_source(stop), stop, tmp_path / "skip")) == fewer
    (root / "a" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 image cannot be read: .*a.0\.png"):
        check_at_start(open_source(stop), stop, tmp_path / "skip")
    # A run that was refused at its first start has not begun, so the new setting decides.
    with pytest.raises(ValueError, match="2 images cannot be read"):
        check_at_start(open_source(stop), stop, tmp_path / "new")
    assert sum(map(len, rows_of(check_at_start(open_source(skip), skip, tmp_path / "new")).values())) == 18


def test_a_class_that_cannot_be_read_at_all_stops_the_run(root: Path, tmp_path: Path) -> None:
    for file in (root / "b").iterdir():
        file.write_bytes(b"")
    conf = folder_conf(root, on_error=OnError.skip)
    with pytest.raises(ValueError, match=r"no training image of class b|no image of the"):
        check_at_start(open_source(conf), conf, tmp_path)


def make_loader(source: Source, tmp_path: Path, **changes: object) -> Loader:
    conf = DataConf(batch_size=4, on_error=OnError.skip, **changes)  # type: ignore[arg-type]
    skipped = SkippedList(tmp_path).add
    split, device = source.splits["train"], torch.device("cpu")
    return Loader(split, SQUARE, conf=conf, augment=AugmentConf(), seed=3, device=device, on_skip=skipped)


def shown(loader: Loader, epoch: int, skip: int = 0) -> list[dict[int, str]]:
    """For each batch a mapping from id to a digest of label and pixels."""
    found = []
    for images, labels, ids in loader.epoch(epoch, skip):
        rows = zip(images, labels, ids.tolist(), strict=True)
        found.append({i: hashlib.sha256(x.numpy().tobytes() + bytes([int(y)])).hexdigest() for x, y, i in rows})
    loader.close()
    return found


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_file_that_goes_bad_later_is_left_out_and_nothing_else_changes(root: Path, tmp_path: Path) -> None:
    source = open_source(folder_conf(root))
    good = shown(make_loader(source, tmp_path, workers="0"), 2)
    bad = 5
    Path(source.splits["train"].name_of(bad)).write_bytes(b"")
    expected = [{i: digest for i, digest in batch.items() if i != bad} for batch in good]
    for workers in ("0", "1", "4"):
        assert shown(make_loader(source, tmp_path, workers=workers), 2) == expected
        assert shown(make_loader(source, tmp_path, workers=workers), 2, skip=2) == expected[2:]
    rows = [json.loads(line) for line in (tmp_path / "skipped.txt").read_text().splitlines()]
    assert {row["name"] for row in rows} == {source.splits["train"].name_of(bad)} and rows[0]["when"] == "later"
    stopping = folder_conf(root, batch_size=4, workers="0")
    loader = Loader(source.splits["train"], SQUARE, conf=stopping, augment=None, seed=0, device=torch.device("cpu"))
    with pytest.raises(ImageError, match="the file is empty"):
        list(loader.epoch(0))


def test_a_batch_of_which_nothing_is_left_ends_the_run(root: Path, tmp_path: Path) -> None:
    source = open_source(folder_conf(root))
    for file in root.rglob("*.png"):
        file.unlink()
    with pytest.raises(ImageError, match="no such file"):
        shown(make_loader(source, tmp_path, workers="0"), 0)


# --- the command -----------------------------------------------------------------------------------------------------


def test_check_data_as_a_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "b" / "bad.jpg").touch()
    command = ["check", "data=folder", f"data.root={root}", f"hydra.run.dir={tmp_path / 'out'}", "model=vit"]
    assert main(command) == 1
    output = capsys.readouterr().out
    for words in (
        "21 images in 2 classes",
        "20 decoded, 1 unreadable",
        "width: 9 to 9 pixels",
        "20 RGB",
        "the file is empty",
    ):
        assert words in output
    assert sorted(os.listdir(tmp_path / "out")) == [".finetune.json", "contact_sheet.png", "data.txt", "unreadable.txt"]
    assert main([*command, "data.on_error=skip"]) == 0
    assert main([*command, "data.rot=x", "data.shots=-1"]) == 1
    errors = capsys.readouterr().err
    assert "did you mean 'data.root'" in errors and "data.shots=-1" in errors


def test_the_command_encodes_no_prompts(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.models.build.zeroshot_weight", lambda *_, **__: pytest.fail("encoded"))
    words = [f"data.root={root}", f"hydra.run.dir={tmp_path / 'out'}", "model=clip", "model.head=zeroshot"]
    assert main(["check", "data=folder", *words]) == 0
    assert (tmp_path / "out" / "contact_sheet.png").exists()


@pytest.mark.parametrize("words", [[], ["data.batch_size=fit"]])
def test_the_contact_sheet_shows_what_the_model_sees(root: Path, tmp_path: Path, words: list[str]) -> None:
    conf = compose(["data=folder", f"data.root={root}", "data.workers=0", *words])
    source = open_source(conf.data)
    big = Preprocess(128, SQUARE.mean, SQUARE.std)
    write_contact_sheet(tmp_path / "sheet.png", source, big, data=conf.data, augment=conf.augment, seed=conf.seed)
    sheet = read_image(str(tmp_path / "sheet.png"))
    split, device = source.splits["train"], torch.device("cpu")
    data = dataclasses.replace(conf.data, batch_size=conf.data.batch_size or 48)
    loader = Loader(split, big, conf=data, augment=conf.augment, seed=conf.seed, device=device)
    images, _, _ = next(loader.epoch(0))
    for number in (0, 1, 9):
        y, x = GAP + number // 8 * (128 + CAPTION + GAP), GAP + number % 8 * (128 + GAP)
        assert torch.equal(sheet[:, y : y + 128, x : x + 128], pixels_of_input(images[number], big))


# --- odd files -------------------------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header gives this size and which holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_have_a_limit_and_large_images_none(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 60_000))
    for read in (read_image, read_header):
        with pytest.raises(ImageError, match=r"more than 178,956,970 pixels: a decompression bomb\?"):
            read(str(tmp_path / "bomb.png"))
    Image.new("L", (10_000, 9_500), 7).save(tmp_path / "large.png")  # Pillow warns of it
    assert read_image(str(tmp_path / "large.png")).shape == (3, 9_500, 10_000)
    Image.new("RGB", (20_000, 20), "red").save(tmp_path / "long.png")
    assert read_image(str(tmp_path / "long.png")).shape == (3, 20, 20_000)


def test_names_are_only_names(tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("RGB", (4, 3), "blue").save(image, "PNG")
    names = [b"x" * 250 + b".png", "日本 ü.png".encode(), b"\xff\xfe\n.png", b"really a png.jpg"]
    for name in names:
        path = os.fsencode(tmp_path) + b"/" + name
        with open(path, "wb") as file:
            file.write(image.getvalue())
        assert read_image(os.fsdecode(path)).shape == (3, 3, 4)
    with pytest.raises(ImageError, match="null byte"):
        read_image("a\0b.jpg")


def test_no_other_program_is_started(tmp_path: Path) -> None:
    """Pillow would hand PostScript to Ghostscript."""
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(ImageError, match="not an image"):
        read_image(str(tmp_path / "a.jpg"))


def jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def noise(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 17, 3), dtype=np.uint8)
    return Image.fromarray(np.kron(pixels, np.ones((5, 5, 1), dtype=np.uint8))).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 98}, {"quality": 5}])
@pytest.mark.parametrize("orientation", [0, 1, 3, 6, 8])
def test_jpegs_are_what_pillow_makes_of_them(mode: str, options: dict[str, object], orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    data = jpeg(noise(mode), exif=exif, **options)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert (decode(data, "x").permute(1, 2, 0).numpy() == expected).all()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_is_an_error_whatever_others_have_set(
    share: float, progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = jpeg(noise(), progressive=progressive)
    with pytest.raises(ImageError):
        decode(data[: int(len(data) * share)], "x")
    assert decode(data + b"more", "x").shape == (3, 60, 85)


def test_palettes_with_transparency_and_frames(tmp_path: Path) -> None:
    frames = [Image.new("RGBA", (5, 4), color) for color in ((255, 0, 0, 255), (0, 255, 0, 255))]
    frames[0].putpixel((0, 0), (0, 0, 0, 0))
    for name in ("a.gif", "a.webp", "a.png"):
        options = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        pixels: Tensor = read_image(str(tmp_path / name))
        assert pixels[:, 0, 0].tolist() == [255, 255, 255] and pixels[:, 2, 2].tolist() == [255, 0, 0], name
