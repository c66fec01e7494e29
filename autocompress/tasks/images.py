"""Image files with a folder per class, in a directory or a tar, as 8-bit arrays. Owns decoding and its cache.

Layout: ``<split>/<class>/<image>``, with split ``train``, ``test`` or ``val``. Classes are numbered alphabetically.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from typing_extensions import TypedDict

from autocompress.documents import RAW, plain_name, validated
from autocompress.environment import cache_directory
from autocompress.errors import ConfigError
from autocompress.files import read_json
from autocompress.tasks.cache import store
from autocompress.tasks.progress import Bar

Pixels = npt.NDArray[np.uint8]
Classes = npt.NDArray[np.int64]

SPLITS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
_LAYOUT = "Expected train/<class>/<image> and test/<class>/<image> (or val/)."
_DECODING = "decoding images (once)"
_CACHE_VERSION = 1  # raised when decoded arrays change
_DAMAGED_TAR: tuple[type[Exception], ...] = (tarfile.TarError, *RAW, zlib.error, lzma.LZMAError)
_UNREADABLE: tuple[type[Exception], ...] = (ConfigError, zipfile.BadZipFile, *RAW)
# Members that say something of the next one.
_HEADERS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
)  # fmt: skip
_MOST_HEADER = 2**20
# Bytes of one image in a tar, and of all of its content unpacked: a share of the archive's own, beside what is free.
_MOST_IMAGE, _FREE, _MOST_EXPANSION = 64 * 2**20, 2**30, 20


@dataclass(frozen=True)
class Preprocess:
    """How an image file becomes pixels.

    Attributes:
        crop: Side of the central square kept, in pixels.
        resize: Length of the shorter side before the crop; None requires images of exactly `crop` x `crop`.
        resample: PIL resampling filter.
    """

    crop: int
    resize: int | None = None
    resample: int = int(Image.Resampling.BILINEAR)

    def __call__(self, file: IO[bytes] | Path, name: str) -> Pixels:
        """Return RGB pixels ``(3, crop, crop)``; `name` is used in errors.

        Raises:
            ConfigError: The image cannot be read or has the wrong size.
        """
        try:
            with Image.open(file) as opened:
                image: Image.Image = opened.convert("RGB")
        except UnidentifiedImageError as error:
            raise ConfigError(f"Image {name} cannot be read: it is no image. Replace or remove it.") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ConfigError(f"Image {name} cannot be read: {error}. Replace or remove it.") from error
        if self.resize is not None:
            scale = self.resize / min(image.size)
            width, height = (max(self.resize, int(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling(self.resample))
            left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
            image = image.crop((left, top, left + self.crop, top + self.crop))
        elif image.size != (self.crop, self.crop):
            raise ConfigError(
                f"Image {name} is {image.size[0]}x{image.size[1]} pixels; this task needs {self.crop}x{self.crop}."
            )
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


class _Index(TypedDict):
    """What the cache says of one data set."""

    classes: list[str]
    splits: dict[str, dict[str, int]]


@dataclass(frozen=True)
class ImageSet:
    """Decoded images: per split the pixels ``(N, 3, H, W)`` and class numbers ``(N,)``; and the class names."""

    splits: dict[str, tuple[Pixels, Classes]]
    classes: tuple[str, ...]


def read_images(path: Path, preprocess: Preprocess) -> ImageSet:
    """Return every image under a directory or in a tar, decoded once and then taken from the cache directory.

    Raises:
        ConfigError: The path is missing, empty or damaged, a class has no images, or an image cannot be read.
    """
    if not path.exists():
        raise ConfigError(f"Data {path} do not exist. Check task.data.")
    key = _key(path, preprocess)
    cached = _load(key)
    if cached is not None:
        return cached
    found = _decode_tar(path, preprocess) if path.is_file() else _decode_folder(path, preprocess)
    images = _arrange(found, path)
    _store(key, images)
    return images


def list_images(path: Path) -> tuple[dict[str, list[tuple[Path, int]]], tuple[str, ...]]:
    """Return per split the image files with their class numbers, sorted, and the class names; reads no image.

    Raises:
        ConfigError: The directory is missing or empty, a class has no images, or splits have different classes.
    """
    if not path.is_dir():
        raise ConfigError(f"Data folder {path} does not exist. Check task.data.")
    found: dict[str, dict[str, list[Path]]] = {}
    for folder in sorted(item for item in path.iterdir() if item.is_dir() and item.name in SPLITS):
        per_class = found.setdefault(SPLITS[folder.name], {})
        for group in sorted(item for item in folder.iterdir() if item.is_dir() and not item.name.startswith(".")):
            per_class[group.name] = sorted(item for item in group.iterdir() if _is_image(item.name))
    classes = _check({split: {c: len(files) for c, files in groups.items()} for split, groups in found.items()}, path)
    return {
        split: [(file, classes.index(name)) for name, files in sorted(groups.items()) for file in files]
        for split, groups in found.items()
    }, classes


def has_classes(path: Path) -> bool:
    """Return whether a path is laid out with a folder per class; of a file, a tar perhaps, that is assumed."""
    if not path.is_dir():
        return True
    splits = [item for item in path.iterdir() if item.is_dir() and item.name in SPLITS]
    return any(item.is_dir() and not item.name.startswith(".") for split in splits for item in split.iterdir())


def list_unlabelled(path: Path) -> dict[str, list[Path]]:
    """Return the image files under a directory by split, sorted; reads no image.

    Those under ``train``, ``test`` and ``val`` are what they say; without these folders all are for training.

    Raises:
        ConfigError: The directory is missing or holds no images for training.
    """
    if not path.is_dir():
        raise ConfigError(f"Data folder {path} does not exist. Check task.data.")
    splits: dict[str, list[Path]] = {}
    for folder in sorted(item for item in path.iterdir() if item.is_dir() and item.name in SPLITS):
        splits.setdefault(SPLITS[folder.name], []).extend(_images_under(folder))
    splits = splits or {"train": _images_under(path)}
    if not splits.get("train"):
        raise ConfigError(f"Data {path} hold no images to train with. Put some there, or in {path / 'train'}.")
    return splits


def _images_under(folder: Path) -> list[Path]:
    return sorted(item for item in folder.rglob("*") if item.is_file() and _is_image(item.name))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def _check(counts: dict[str, dict[str, int]], path: Path) -> tuple[str, ...]:
    """Return the class names of ``{split: {class: number of images}}``."""
    if not any(counts.values()):
        raise ConfigError(f"Data {path} hold no images. {_LAYOUT}")
    if not counts.get("train") or not (counts.get("test") or counts.get("val")):
        raise ConfigError(f"Data {path} hold only {', '.join(sorted(s for s in counts if counts[s]))}. {_LAYOUT}")
    classes = tuple(sorted(counts["train"]))
    for split, groups in counts.items():
        for name, number in groups.items():
            if number == 0:
                raise ConfigError(
                    f"Data {path}: class {name!r} has no images in {split}. Add some or remove the folder."
                )
            if name not in classes:
                raise ConfigError(f"Data {path}: class {name!r} is in {split} but not in train. {_LAYOUT}")
    return classes


# One decoded image: split, class name, file name, pixels; without pixels it says that the class folder is there.
_Found = tuple[str, str, str, Pixels | None]


def _decode_folder(path: Path, preprocess: Preprocess) -> Iterator[_Found]:
    files, classes = list_images(path)
    with Bar(_DECODING, sum(len(items) for items in files.values())) as bar:
        for split, items in files.items():
            for file, target in items:
                yield split, classes[target], file.name, preprocess(file, str(file))
                bar.advance(1)


class _Member(tarfile.TarInfo):
    """A member whose own header is bounded: `tarfile` reads names and attributes whole, however long they are."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _HEADERS and not 0 <= self.size <= _MOST_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        found: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return found


def _decode_tar(path: Path, preprocess: Preprocess) -> Iterator[_Found]:
    try:
        with tarfile.open(path, tarinfo=_Member) as archive, Bar(_DECODING, path.stat().st_size) as bar:
            position = 0
            most = _FREE + _MOST_EXPANSION * path.stat().st_size
            for member in archive:
                # Before anything of it is unpacked: the next header lies behind all of its bytes.
                if not 0 <= member.size <= most - member.offset_data:
                    raise ConfigError(
                        f"Data {path} unpack to more than {most} bytes, {_MOST_EXPANSION} times their own and "
                        f"{_FREE}: {member.name!r} has {member.size}. Unpack it yourself, and point task.data at it."
                    )
                parts = PurePosixPath(member.name).parts
                if member.isdir() and len(parts) >= 2 and parts[-2] in SPLITS:
                    yield SPLITS[parts[-2]], parts[-1], "", None
                if not (member.isfile() and len(parts) >= 3 and parts[-3] in SPLITS and _is_image(parts[-1])):
                    continue
                if member.size > _MOST_IMAGE:
                    raise ConfigError(
                        f"Data {path}: image {member.name!r} has {member.size} bytes; at most {_MOST_IMAGE} are read."
                    )
                content = archive.extractfile(member)
                data = b"" if content is None else content.read()
                name = f"{path}:{member.name}"
                yield SPLITS[parts[-3]], parts[-2], parts[-1], preprocess(io.BytesIO(data), name)
                bar.advance(member.offset_data - position)
                position = member.offset_data
            # A cut inside a header looks like the end to `tarfile`; a whole archive ends with blocks of zeros.
            if not _is_end(cast(IO[bytes], archive.fileobj), archive.offset):
                raise tarfile.ReadError("it ends without the mark of its end")
    except _DAMAGED_TAR as error:
        raise ConfigError(
            f"Data {path} are not a whole tar archive: {error}. Copy it again, or point task.data at a folder."
        ) from error


def _is_end(file: IO[bytes], offset: int) -> bool:
    file.seek(offset)
    return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _arrange(found: Iterable[_Found], path: Path) -> ImageSet:
    images: dict[str, list[tuple[str, str, Pixels]]] = {}
    counts: dict[str, dict[str, int]] = {}
    for split, name, file, pixels in found:
        groups = counts.setdefault(split, {})
        groups[name] = groups.get(name, 0) + (pixels is not None)
        if pixels is not None:
            images.setdefault(split, []).append((name, file, pixels))
    classes = _check(counts, path)
    arranged: dict[str, tuple[Pixels, Classes]] = {}
    for split in list(images):
        items = sorted(images.pop(split), key=lambda item: item[:2])  # by class and file, whatever the disk's order
        targets = np.array([classes.index(name) for name, _, _ in items], dtype=np.int64)
        arranged[split] = np.stack([pixels for _, _, pixels in items]), targets
    return ImageSet(arranged, classes)


def _key(path: Path, preprocess: Preprocess) -> str:
    """Name this path, its size and its time of change; of a folder, those of every file in it."""
    digest = hashlib.sha256(json.dumps([_CACHE_VERSION, str(path.resolve()), asdict(preprocess)]).encode())
    for item in sorted(path.rglob("*")) if path.is_dir() else (path,):
        status = item.stat()
        digest.update(f"{item.relative_to(path)}:{status.st_size}:{status.st_mtime_ns};".encode())
    return digest.hexdigest()[:16]


def _store(key: str, images: ImageSet) -> None:
    index: dict[str, Any] = {"classes": list(images.classes), "splits": {}}
    for split, arrays in images.splits.items():
        for kind, array in (("images", arrays[0]), ("classes", arrays[1])):
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            index["splits"].setdefault(split, {})[kind] = zlib.crc32(np.ascontiguousarray(array).data)
            if not store(_file(key, split, kind), buffer.getvalue()):
                return
    # Written last: the arrays count only once the index with their checksums is there.
    store(f"{key}.json", json.dumps(index).encode())


def _load(key: str) -> ImageSet | None:
    """Return the cached images, or None where they are absent or damaged."""
    folder = cache_directory()
    try:
        index = validated(_Index, read_json(folder / f"{key}.json"), key)
        splits: dict[str, tuple[Pixels, Classes]] = {}
        for split, checksums in index["splits"].items():
            plain_name(split)
            arrays = []
            for kind in ("images", "classes"):
                # Copy on write: pages are shared and read lazily, yet torch gets a writable array.
                array = np.load(folder / _file(key, split, kind), mmap_mode="c", allow_pickle=False)
                if zlib.crc32(np.ascontiguousarray(array).data) != checksums[kind]:
                    return None
                arrays.append(array)
            splits[split] = (arrays[0], arrays[1])
        return ImageSet(splits, tuple(index["classes"]))
    except _UNREADABLE:
        return None


def _file(key: str, split: str, kind: str) -> str:
    return f"{key}-{split}-{kind}.npy"
