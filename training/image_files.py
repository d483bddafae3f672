"""Files of a data set: in a folder, in a zip archive, or in archives that lie in a folder. Nothing is unpacked to disk.

    FileTree   what is there: names, folders. It is made once, in the main process.
    StoredFile where one file lies: a path, and for a member of an archive its place in it. It is small and goes into an index.

Reading a `StoredFile` opens the file or the archive, reads the bytes of this member alone and closes it again. No handle is kept, so
worker processes share none, and none of them reads the directory of an archive with 100 000 members.

An archive that lies in a folder has its members where unpacking it there would put them: `root/train2017.zip` with `train2017/1.jpg`
holds `train2017/1.jpg`. Where all members lie at the top of the archive, they are in a folder of the archive's name.
"""

import errno
import hashlib
import io
import os
import struct
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from training.official_files import FileError, decode_segment_ids, open_image, read_class_indices

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
HIDDEN = (".", "__MACOSX")  # beginnings of the names of files and folders that are no data
MOST_NAMED = 3  # files in a message
HEAD_BYTES = 2**16  # enough for the size of most images

LOCAL_HEADER_BYTES = 30  # of a member of a zip archive
LOCAL_HEADER_MAGIC = b"PK\3\4"
ENCRYPTED_FLAG = 1

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_HEADER_BYTES = 26
PNG_DEPTH, PNG_COLOUR = 24, 25  # places of the bits of a sample and of the kind of colour
PNG_WITH_COLOURS = (2, 6)  # red, green, blue, and perhaps opacity
PNG_WITH_PALETTE = 3
EIGHT_BITS = 8
MODES_WITH_NUMBERS = ("1", "L", "P", "I", "I;16", "I;16B")  # of pictures that Pillow has read


@dataclass(frozen=True)
class StoredFile:
    """A file on disk, or a member of a zip archive; it reads like a `Path`.

    Attributes:
        path: of the file, or of the archive.
        member: name in the archive; empty for a file.
        offset: of the member's header in the archive.
        packed_size: bytes in the archive.
        size: bytes after unpacking.
        method: of compression, as zip archives number them.
        crc: check sum of the unpacked bytes.
    """

    path: Path
    member: str = ""
    offset: int = 0
    packed_size: int = 0
    size: int = 0
    method: int = zipfile.ZIP_STORED
    crc: int = 0

    def __str__(self) -> str:
        return f"{self.path}: {self.member}" if self.member else str(self.path)

    @property
    def name(self) -> str:
        """Last part of the name."""
        return PurePosixPath(self.member).name if self.member else self.path.name

    @property
    def stem(self) -> str:
        """Last part of the name without its ending."""
        return PurePosixPath(self.name).stem

    def read_bytes(self) -> bytes:
        """Read all.

        Raises:
            OSError: it is not there, or the archive is damaged.
        """
        if not self.member:
            return self.path.read_bytes()
        data = self._unpack(self.packed_size, 0)
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise OSError(errno.EIO, "the archive is damaged here, or has changed since it was listed", str(self))
        return data

    def head(self, length: int) -> bytes:
        """Read the first bytes, at most `length` of them."""
        if not self.member:
            with self.path.open("rb") as file:
                return file.read(length)
        return self._unpack(min(self.packed_size, length), length)[:length]

    def open(self, mode: str = "rb") -> BinaryIO:
        """Read all, as a file."""
        if mode != "rb":
            raise ValueError(f"{self} can be read as bytes only (mode 'rb'), got the mode {mode!r}.")
        return io.BytesIO(self.read_bytes())

    def to_record(self, root: Path) -> dict[str, Any]:
        """Write it as plain values, the path relative to `root` if it lies there."""
        path = self.path.relative_to(root).as_posix() if self.path.is_relative_to(root) else str(self.path)
        return {
            "path": path,
            "member": self.member,
            "offset": self.offset,
            "packed_size": self.packed_size,
            "size": self.size,
            "method": self.method,
            "crc": self.crc,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], root: Path) -> "StoredFile":
        """Make it of what `to_record` wrote."""
        return cls(**{**record, "path": root / record["path"]})

    def _unpack(self, packed_size: int, length: int) -> bytes:
        """Unpack the first `packed_size` bytes of the archive's, to `length` bytes at most; 0 is all of them."""
        with self.path.open("rb") as archive:
            archive.seek(self.offset)
            header = archive.read(LOCAL_HEADER_BYTES)
            if len(header) < LOCAL_HEADER_BYTES or not header.startswith(LOCAL_HEADER_MAGIC):
                raise OSError(errno.EIO, "the archive is damaged here, or has changed since it was listed", str(self))
            # The header is followed by the name and by further fields, whose lengths end it.
            archive.seek(sum(struct.unpack("<HH", header[-4:])), os.SEEK_CUR)
            packed = archive.read(packed_size)
        if self.method == zipfile.ZIP_STORED:
            return packed
        if self.method != zipfile.ZIP_DEFLATED:
            words = f"method {self.method} of compression cannot be read here; pack it anew, deflated or stored"
            raise OSError(errno.EIO, words, str(self))
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, length)
        except zlib.error as error:
            raise OSError(errno.EIO, f"the archive is damaged here ({error})", str(self)) from None


class FileTree:
    """The names of all files below a folder or in a zip archive, archives in the folder included."""

    def __init__(self, root: Path, files: Mapping[str, StoredFile | None], archives: Collection[Path] = ()) -> None:
        """Take files by name; `None` is a plain file below `root`."""
        self.root = root
        self.archives = sorted(archives)
        self._files = dict(sorted(files.items()))

    @classmethod
    def open(cls, path: str | Path) -> "FileTree":
        """List a folder or a zip archive.

        Raises:
            FileError: there is neither, or an archive cannot be read.
        """
        root = Path(path).expanduser().absolute()
        if root.is_dir():
            return cls._of_folder(root)
        if not root.exists():
            raise FileError(f"{root} is missing. Expected a folder, or a zip archive, with the data set.")
        return cls(root.parent, dict(list_archive(root)), [root])

    @classmethod
    def _of_folder(cls, root: Path) -> "FileTree":
        plain: dict[str, StoredFile | None] = {}
        archived: dict[str, StoredFile | None] = {}
        archives = []
        for path in walk(root):
            name = path.relative_to(root).as_posix()
            if path.suffix.lower() != ".zip":
                plain[name] = None
                continue
            archives.append(path)
            folder = name.rpartition("/")[0]
            members = dict(list_archive(path))
            if members and not any("/" in member for member in members):
                folder = name.removesuffix(path.suffix)
            archived |= {f"{folder}/{member}" if folder else member: file for member, file in members.items()}
        return cls(root, {**archived, **plain}, archives)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __len__(self) -> int:
        return len(self._files)

    @property
    def names(self) -> list[str]:
        """Names of all files, in order, relative to the folder or in the archive, with `/` between their parts."""
        return list(self._files)

    @cached_property
    def folders(self) -> frozenset[str]:
        """Names of all folders that hold files, themselves or below."""
        found = {""}
        for parent in {name.rpartition("/")[0] for name in self._files}:
            folder = parent
            while folder and folder not in found:
                found.add(folder)
                folder = folder.rpartition("/")[0]
        return frozenset(found)

    @cached_property
    def by_folder(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the files that lie in each folder itself."""
        found = defaultdict(list)
        for name in self._files:
            found[name.rpartition("/")[0]].append(name)
        return {folder: tuple(names) for folder, names in found.items()}

    def file(self, name: str) -> StoredFile:
        """Say where a file lies.

        Raises:
            FileError: there is none of this name.
        """
        if name not in self._files:
            raise FileError(f"{self.root / name} is missing.")
        return self._files[name] or StoredFile(self.root / name)

    def locate(self, name: str | Path) -> StoredFile:
        """Find a file by its name here, or by its path anywhere."""
        if PurePosixPath(name).as_posix() in self._files:
            return self.file(PurePosixPath(name).as_posix())
        path = self.root / Path(name).expanduser()
        if not path.is_file():
            raise FileError(f"{path} is missing.")
        return StoredFile(path)

    def below(self, folder: str, suffixes: Collection[str] = ()) -> list[str]:
        """List the files of a folder and its subfolders, all or those with one of some endings (in small letters)."""
        start = f"{folder}/" if folder else ""
        chosen = tuple(suffixes)
        return [
            name
            for name in self._files
            if name.startswith(start) and (not chosen or PurePosixPath(name).suffix.lower() in chosen)
        ]

    def find_folders(self, tail: str) -> list[str]:
        """List the folders whose path is `tail`, or ends with it; those that are nearest to the root."""
        ending = f"/{tail}"
        found = [folder for folder in self.folders if folder == tail or folder.endswith(ending)]
        depth = min((folder.count("/") for folder in found), default=0)
        return sorted(folder for folder in found if folder.count("/") == depth)

    def find_folder(self, *tails: str) -> str | None:
        """Find the folder of the first of some paths, at any depth; `None` if there is none.

        Raises:
            FileError: several folders are equally near to the root.
        """
        for tail in tails:
            found = self.find_folders(tail)
            if len(found) > 1:
                raise FileError(f"{self.root} has several folders {tail}: {name_some(found)}. Name one of them.")
            if found:
                return found[0]
        return None

    def stamp(self, names: Iterable[str]) -> str:
        """Compute a name for the state of some files: it changes with the list, and with the archives.

        Files that lie in folders count by their names alone: looking at 100 000 of them takes too long.
        """
        digest = hashlib.sha256()
        for name in names:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        for archive in self.archives:
            digest.update(describe_state(archive))
        return digest.hexdigest()


class TreeFolder:
    """A folder of a `FileTree`, with what `PanopticFile` asks of a `Path`."""

    def __init__(self, tree: FileTree, folder: str) -> None:
        self.tree = tree
        self.folder = folder

    def __str__(self) -> str:
        return str(self.tree.root / self.folder)

    def __truediv__(self, name: str) -> StoredFile:
        return self.tree.file(f"{self.folder}/{name}" if self.folder else name)

    def __contains__(self, name: str) -> bool:
        return (f"{self.folder}/{name}" if self.folder else name) in self.tree

    def is_dir(self) -> bool:
        """Say whether it holds any file."""
        return self.folder in self.tree.folders


def walk(root: Path) -> Iterator[Path]:
    """List the files below a folder, without hidden ones; links are followed, but no folder is visited twice."""
    visited = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        state = Path(folder).stat()
        if (state.st_dev, state.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((state.st_dev, state.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(HIDDEN))
        yield from (Path(folder, name) for name in files if not name.startswith(HIDDEN))


def list_archive(path: Path) -> Iterator[tuple[str, StoredFile]]:
    """List the files of a zip archive by their names.

    Raises:
        FileError: it is no zip archive, is damaged, or a member is encrypted.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise FileError(f"{path} cannot be read as a zip archive: {error}.") from None
    for entry in entries:
        if entry.is_dir() or any(part.startswith(HIDDEN) for part in entry.filename.split("/")):
            continue
        if entry.flag_bits & ENCRYPTED_FLAG:
            raise FileError(f"{path}: {entry.filename} is encrypted. Pack the data set without a password.")
        yield (
            entry.filename,
            StoredFile(
                path,
                entry.filename,
                entry.header_offset,
                entry.compress_size,
                entry.file_size,
                entry.compress_type,
                entry.CRC,
            ),
        )


def describe_state(path: Path) -> bytes:
    """Write down name, size and time of the last change of a file."""
    try:
        state = path.stat()
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from None
    return f"{path}\0{state.st_size}\0{state.st_mtime_ns}\0".encode("utf-8", "surrogateescape")


def name_some(names: Collection[str]) -> str:
    """Write the first few of some names."""
    first = sorted(names)[:MOST_NAMED]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def read_image(file: StoredFile, what: str) -> Image.Image:
    """Read an image as RGB, the pixels as they are stored: rotation by EXIF is not applied.

    Args:
        file: of the image.
        what: the image is, for messages.

    Raises:
        FileError: it is missing, broken, or has more than 8 bits for each colour.
    """
    try:
        return decode_image(file.read_bytes())
    except FileNotFoundError:
        raise FileError(f"{file}, {what}, is missing.") from None
    except ValueError as error:
        raise FileError(f"{file}, {what}, cannot be used: {error}") from None
    except OSError as error:
        raise FileError(f"{file}, {what}, cannot be read: {error.strerror or error}.") from None


def decode_image(data: bytes) -> Image.Image:
    """Decode an image as RGB, without rotation.

    Raises:
        ValueError: these bytes are no image, or one of more than 8 bits for each colour.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(image)
    except UnidentifiedImageError:
        raise ValueError("it is no image file.") from None
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"it is damaged ({error}).") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Make an image RGB.

    Raises:
        ValueError: it has more than 8 bits for each colour.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"it has pixels of the kind {image.mode}, more than 8 bits for each colour. Convert it to 8 bits, in the way that "
            "suits its values."
        )
    return image if image.mode == "RGB" else image.convert("RGB")


def read_size(file: StoredFile, what: str) -> tuple[int, int]:
    """Read height and width of an image, of whose pixels as few bytes as possible.

    Raises:
        FileError: it is missing, or no image.
    """
    try:
        for data in (file.head(HEAD_BYTES), file.read_bytes()):
            try:
                with Image.open(io.BytesIO(data)) as image:
                    return image.height, image.width
            except (OSError, SyntaxError, ValueError, EOFError):  # perhaps cut off in the middle of its head
                continue
    except FileNotFoundError:
        raise FileError(f"{file}, {what}, is missing.") from None
    except OSError as error:
        raise FileError(f"{file}, {what}, cannot be read: {error.strerror or error}.") from None
    raise FileError(f"{file}, {what}, is no image file.")


def read_ids(file: StoredFile, what: str, *, palette_is_colours: bool = False) -> NDArray[np.int32]:
    """Read a picture that holds a number at each pixel: grey or palette of up to 16 bits, or colours R + 256 G + 65536 B.

    Args:
        file: of the picture.
        what: it belongs to, for messages.
        palette_is_colours: whether the number is what the colour of a palette says, or its place in the palette.

    Returns:
        (H, W), 0 to 2**24 - 1.

    Raises:
        FileError: it is missing, broken, or of another kind.
    """
    header = read_png_header(file, what)
    kind = None if header is None else header[PNG_COLOUR]
    if kind in PNG_WITH_COLOURS:
        picture = open_colours(file, what, header)
    elif kind is None or (kind == PNG_WITH_PALETTE and palette_is_colours):
        picture = open_image(file, what)  # type: ignore[arg-type] - it reads like a path
    else:
        nothing = -1  # no pixel is to be replaced
        return read_class_indices(file, nothing, nothing).astype(np.int32)  # type: ignore[arg-type] - as above
    if picture.mode in ("RGB", "RGBA") or (picture.mode == "P" and palette_is_colours):
        return decode_segment_ids(picture).astype(np.int32)
    if picture.mode not in MODES_WITH_NUMBERS:
        raise FileError(
            f"{file}, {what}, has {picture.mode} pixels. Expected one number a pixel, or colours of 8 bits."
        )
    return np.asarray(picture).astype(np.int32)


def read_channels(file: StoredFile, what: str) -> NDArray[np.uint8]:
    """Read a picture whose red, green and blue are numbers of their own: uint8 (H, W, 3)."""
    return np.asarray(open_colours(file, what, read_png_header(file, what)).convert("RGB"))


def open_colours(file: StoredFile, what: str, header: bytes | None) -> Image.Image:
    """Read a picture of colours of 8 bits."""
    if header is not None and header[PNG_DEPTH] != EIGHT_BITS and header[PNG_COLOUR] in PNG_WITH_COLOURS:
        raise FileError(f"{file}, {what}, has {header[PNG_DEPTH]} bits for each colour. Expected 8.")
    picture = open_image(file, what)  # type: ignore[arg-type] - it reads like a path
    if picture.mode not in ("RGB", "RGBA"):
        raise FileError(f"{file}, {what}, has {picture.mode} pixels. Expected colours of 8 bits.")
    return picture


def read_png_header(file: StoredFile, what: str) -> bytes | None:
    """Read the first bytes of a PNG file; `None` if it is of another kind."""
    try:
        header = file.head(PNG_HEADER_BYTES)
    except FileNotFoundError:
        raise FileError(f"{file}, {what}, is missing.") from None
    except OSError as error:
        raise FileError(f"{file}, {what}, cannot be read: {error.strerror or error}.") from None
    return header if len(header) == PNG_HEADER_BYTES and header.startswith(PNG_SIGNATURE) else None


def require_size(actual: tuple[int, int], expected: tuple[int, int], file: object, what: str) -> None:
    """Refuse a picture whose height and width are not those of what belongs to it.

    Raises:
        FileError: they differ; says so where one is the other turned by 90 degrees.
    """
    if actual == expected:
        return
    turned = (
        " They are turned by 90 degrees: the labels were drawn on the image as EXIF rotates it, but belong to stored pixels. Rotate "
        "the image files for good, and drop their EXIF orientation."
        if actual == expected[::-1]
        else ""
    )
    raise FileError(
        f"{file} has {actual[0]} x {actual[1]} pixels (height x width), but {what} has {expected[0]} x {expected[1]}.{turned}"
    )
