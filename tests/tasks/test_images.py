from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autocompress.errors import ConfigError
from autocompress.tasks import images
from autocompress.tasks.images import ImageSet, Preprocess, list_images, read_images
from tests.tasks.conftest import MakeFolder, pack

EXACT = Preprocess(crop=32)


@pytest.fixture
def folder(cifar_folder: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(cifar_folder, tmp_path / "images"))


def equal(first: ImageSet, second: ImageSet) -> bool:
    return first.classes == second.classes and all(
        np.array_equal(a, b)
        for split in first.splits
        for a, b in zip(first.splits[split], second.splits[split], strict=True)
    )


def test_every_image_arrives_under_its_class(cifar_folder: Path) -> None:
    found = read_images(cifar_folder, EXACT)
    assert found.classes == tuple(f"class{i}" for i in range(10))
    assert {split: (p.shape, p.dtype) for split, (p, _) in found.splits.items()} == {
        "train": ((80, 3, 32, 32), np.uint8),
        "test": ((20, 3, 32, 32), np.uint8),
    }
    assert found.splits["train"][1].tolist() == [i // 8 for i in range(80)]
    expected = np.asarray(Image.open(cifar_folder / "test" / "class3" / "0001.jpg")).transpose(2, 0, 1)
    assert np.array_equal(found.splits["test"][0][7], expected)


def test_a_tar_gives_what_its_folder_gives(cifar_folder: Path, cifar_tar: Path) -> None:
    assert equal(read_images(cifar_tar, EXACT), read_images(cifar_folder, EXACT))


@pytest.mark.parametrize("suffix", ["gz", "xz"])
def test_a_compressed_tar_with_a_leading_folder_in_another_order(
    cifar_folder: Path, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"cifar.tar.{suffix}"
    with tarfile.open(path, f"w:{suffix}") as archive:  # type: ignore[call-overload]
        for file in sorted(cifar_folder.rglob("*.jpg"), reverse=True):
            archive.add(file, Path("./cifar") / file.relative_to(cifar_folder))
    assert equal(read_images(path, EXACT), read_images(cifar_folder, EXACT))


def test_decoding_happens_once(cifar_tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_images(cifar_tar, EXACT)
    monkeypatch.setattr(images, "_decode_tar", None)
    assert equal(read_images(cifar_tar, EXACT), first)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "index", "pickle"])
def test_a_damaged_cache_is_decoded_again(cifar_tar: Path, cache: Path, damage: str) -> None:
    first = read_images(cifar_tar, EXACT)
    array, index = next(cache.glob("*-train-images.npy")), next(cache.glob("*.json"))
    content = bytearray(array.read_bytes())
    match damage:
        case "truncate":
            array.write_bytes(content[:-100])
        case "flip":
            content[-1] ^= 1
            array.write_bytes(content)
        case "remove":
            array.unlink()
        case "index":
            index.write_text('{"splits": []}')
        case "pickle":
            np.save(array, np.array([{}], dtype=object), allow_pickle=True)
    assert equal(read_images(cifar_tar, EXACT), first)
    assert array.stat().st_size == len(content)


def test_changed_data_are_decoded_again(folder: Path) -> None:
    before = read_images(folder, EXACT)
    file = folder / "train" / "class0" / "0000.jpg"
    shutil.copy(folder / "test" / "class9" / "0000.jpg", file)
    after = read_images(folder, EXACT)
    assert not equal(before, after)
    assert np.array_equal(after.splits["train"][0][0], after.splits["test"][0][18])


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    cifar_tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be cached"):
        assert len(read_images(cifar_tar, EXACT).splits["train"][0]) == 80


def test_files_that_are_no_images_are_passed_over(folder: Path, cifar_folder: Path) -> None:
    (folder / "train" / "class0" / "Thumbs.db").write_bytes(b"x")
    (folder / "train" / "class0" / "._0000.jpg").write_bytes(b"x")
    (folder / "notes").mkdir()
    assert equal(read_images(folder, EXACT), read_images(cifar_folder, EXACT))


def test_grey_images_become_rgb(folder: Path) -> None:
    grey = np.arange(32 * 32, dtype=np.uint8).reshape(32, 32)
    Image.fromarray(grey).save(folder / "test" / "class0" / "0000.jpg", quality=95)
    pixels = read_images(folder, EXACT).splits["test"][0][0]
    assert np.array_equal(pixels[0], pixels[2])


def test_resize_and_crop_are_torchvisions() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    reference = transforms.Compose([transforms.Resize(40), transforms.CenterCrop(33)])
    generator = np.random.default_rng(0)
    for shape in ((50, 71, 3), (71, 50, 3), (30, 31, 3), (40, 40, 3)):
        image = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, "png")
        got = Preprocess(crop=33, resize=40)(buffer, "image")
        assert np.array_equal(got, np.asarray(reference(image)).transpose(2, 0, 1))


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent do not exist\. Check task\.data"):
        read_images(tmp_path / "absent", EXACT)
    with pytest.raises(ConfigError, match="does not exist"):
        list_images(tmp_path / "absent")


@pytest.mark.parametrize("tarred", [True, False])
def test_empty_data_show_the_layout(tmp_path: Path, tarred: bool) -> None:
    path = tmp_path / "images"
    path.mkdir()
    if tarred:
        path = tmp_path / "empty.tar"
        pack(tmp_path / "images", path)
    with pytest.raises(ConfigError, match=r"hold no images\. Expected train/<class>/<image>"):
        read_images(path, EXACT)


@pytest.mark.parametrize(("removed", "left"), [("train", "test"), ("test", "train")])
def test_a_missing_split_is_told(folder: Path, removed: str, left: str) -> None:
    shutil.rmtree(folder / removed)
    with pytest.raises(ConfigError, match=f"hold only {left}"):
        read_images(folder, EXACT)


@pytest.mark.parametrize("tarred", [True, False])
def test_a_class_without_images_is_named(folder: Path, tmp_path: Path, tarred: bool) -> None:
    for file in (folder / "train" / "class4").iterdir():
        file.unlink()
    path = folder
    if tarred:
        path = tmp_path / "data.tar"
        pack(folder, path)
    with pytest.raises(ConfigError, match="class 'class4' has no images in train"):
        read_images(path, EXACT)


def test_a_class_that_only_test_has_is_named(folder: Path) -> None:
    (folder / "test" / "class0").rename(folder / "test" / "other")
    with pytest.raises(ConfigError, match="class 'other' is in test but not in train"):
        read_images(folder, EXACT)


@pytest.mark.parametrize("tarred", [True, False])
@pytest.mark.parametrize("content", [b"", b"no image at all", None])
def test_an_unreadable_image_is_named(folder: Path, tmp_path: Path, tarred: bool, content: bytes | None) -> None:
    file = folder / "train" / "class2" / "0003.jpg"
    file.write_bytes(file.read_bytes()[:300] if content is None else content)
    path = folder
    if tarred:
        path = tmp_path / "data.tar"
        pack(folder, path)
    with pytest.raises(ConfigError, match=r"Image .*class2/0003\.jpg cannot be read"):
        read_images(path, EXACT)


def test_an_image_of_another_size_is_named(make_folder: MakeFolder) -> None:
    with pytest.raises(ConfigError, match=r"class0/0000\.jpg is 28x28 pixels; this task needs 32x32"):
        read_images(make_folder(classes=1, train=1, test=1, side=28), EXACT)


@pytest.mark.parametrize("where", ["first header", "header", "between", "pixels"])
def test_a_truncated_tar_is_told(cifar_tar: Path, tmp_path: Path, where: str) -> None:
    with tarfile.open(cifar_tar) as archive:
        member = archive.getmember("train/class9/0007.jpg")
    cut = {
        "first header": 100,
        "header": member.offset + 100,
        "between": member.offset,
        "pixels": member.offset_data + 100,
    }
    (tmp_path / "cut.tar").write_bytes(cifar_tar.read_bytes()[: cut[where]])
    with pytest.raises(ConfigError, match="not a whole tar archive"):
        read_images(tmp_path / "cut.tar", EXACT)


def test_a_file_of_another_kind_is_told(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"PK\x03\x04" * 1000)
    with pytest.raises(ConfigError, match="not a whole tar archive"):
        read_images(tmp_path / "data.zip", EXACT)
