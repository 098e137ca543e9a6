"""Read the members of an untrusted tar in order, in one pass and in little memory.

Formats: POSIX (ustar, pax) and GNU, uncompressed, as `tar` and Python's tarfile write them. What no honest writer
of images produces is refused rather than interpreted: sparse files, negative sizes, endless headers.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
CHUNK = 1 << 20  # bytes read at a time of a member that is skipped
MAX_HEADER = 1 << 16  # bytes of a long name or of pax records
MAX_HEADERS = 8  # of those per member
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
FILES, WITHOUT_DATA = b"\x000\x37", b"123456"


class InvalidTar(ValueError):
    """Not a complete tar of a supported format; the message says where and why."""


@dataclass(frozen=True)
class Member:
    """A regular file in a tar."""

    name: str
    """Bytes that are not UTF-8 appear as \\xNN."""
    offset: int
    size: int


class Tar:
    """Iterates over the regular files; each may be `read` until the next one is requested.

    Attributes:
        bytes: the file's size.
        sha256: of what has been read so far; of the complete file after the iteration.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self.bytes = file.seek(0, 2)
        file.seek(0)
        start = file.read(max(map(len, COMPRESSED)))
        file.seek(0)
        for magic, name in COMPRESSED.items():
            if start.startswith(magic):
                raise InvalidTar(f"a tar compressed with {name}; only uncompressed ones allow random access")
        self._position = 0
        self._end_of_member = 0
        self.sha256 = hashlib.sha256()

    def __iter__(self) -> Iterator[Member]:
        """
        Raises:
            InvalidTar: a damaged or unsupported header; the file is truncated; data after its end.
        """
        name, size, headers = b"", None, 0
        while True:
            self._skip(self._end_of_member)
            at, header = self._position, self._take(BLOCK)
            if not any(header):
                return self._end(at)
            kind, length = header[156:157], _size(header, at)
            if kind in b"xgLK" and headers < MAX_HEADERS and length <= MAX_HEADER:
                headers += 1
                text = self._take(length)
                self._skip(self._position + -length % BLOCK)
                self._end_of_member = self._position
                if kind == b"L":
                    name = text.partition(b"\0")[0]
                elif kind in b"xg":
                    name, size = _pax(text, kind, at, name, size)
                continue
            if kind in b"xgLK":
                raise InvalidTar(f"headers at byte {at}: {headers + 1} in a row, {length} bytes")
            if kind == b"S":
                raise InvalidTar(f"a sparse file at byte {at}")
            name = name or _name(header)
            if b"\0" in name:
                raise InvalidTar(f"a name with a NUL at byte {at}: {name!r}")
            if kind == b"\0" and name.endswith(b"/"):
                kind = b"5"  # a folder, in formats older than its type
            length = 0 if kind in WITHOUT_DATA else length if size is None else size
            if length > self.bytes - self._position:
                raise InvalidTar(f"truncated: the member at byte {at} has {length} bytes, the file {self.bytes}")
            self._end_of_member = self._position + length + -length % BLOCK
            if kind in FILES:
                yield Member(name.decode("utf-8", "backslashreplace"), self._position, length)
            name, size, headers = b"", None, 0

    def read(self, size: int) -> bytes:
        """The first `size` bytes of the current member."""
        return self._take(size)

    def _take(self, count: int) -> bytes:
        if count > self.bytes - self._position:
            raise InvalidTar(f"truncated after byte {self.bytes}: a tar ends with 1,024 zero bytes")
        data = self._file.read(count)
        if len(data) != count:
            raise InvalidTar(f"truncated after byte {self._position + len(data)}")
        self._position += count
        self.sha256.update(data)
        return data

    def _skip(self, position: int) -> None:
        while self._position < position:
            self._take(min(CHUNK, position - self._position))

    def _end(self, at: int) -> None:
        """Check the end: two blocks of zeros, then more of them up to a multiple of the writer's record size."""
        if self.bytes - at < 2 * BLOCK:
            raise InvalidTar(f"truncated after byte {self.bytes}: a tar ends with 1,024 zero bytes")
        while self._position < self.bytes:
            if any(self._take(min(CHUNK, self.bytes - self._position))):
                raise InvalidTar(f"damaged after byte {at}: a tar ends with zero bytes only")


def _size(header: bytes, at: int) -> int:
    """The size in a header, after verifying the header's checksum."""
    # some old writers summed signed bytes
    blank = header[:148] + b" " * 8 + header[156:]
    checksum = _octal(header[148:156], at)
    if checksum not in (sum(blank), sum(byte - 256 * (byte > 127) for byte in blank)):
        raise InvalidTar(f"missing or damaged header at byte {at}")
    field = header[124:136]
    if field[0] == 0x80:  # GNU's binary number; 0xff starts a negative one
        return int.from_bytes(field[1:], "big")
    return _octal(field, at)


def _octal(field: bytes, at: int) -> int:
    digits = re.fullmatch(rb"[ ]*([0-7]*)[ \0]*(?:\0.*)?", field, re.DOTALL)
    if digits is None:
        raise InvalidTar(f"no number in the header at byte {at}: {field!r}")
    return int(digits[1] or b"0", 8)


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax(text: bytes, kind: bytes, at: int, name: bytes, size: int | None) -> tuple[bytes, int | None]:
    """Name and size updated from pax records (`LENGTH KEY=VALUE\\n`)."""
    while text.strip(b"\0"):
        head = re.match(rb"([0-9]{1,6}) ([^=]+)=", text)
        length = int(head[1]) if head else 0
        if head is None or not head.end() < length <= len(text) or text[length - 1 : length] != b"\n":
            raise InvalidTar(f"damaged pax records at byte {at}")
        key, value, text = head[2], text[head.end() : length - 1], text[length:]
        if key.startswith(b"GNU.sparse") or (kind == b"g" and key in (b"path", b"size")):
            raise InvalidTar(f"pax record {key.decode(errors='replace')!r} at byte {at}: not supported")
        if key == b"path":
            name = value
        elif key == b"size":
            if not re.fullmatch(rb"[0-9]{1,18}", value):
                raise InvalidTar(f"an invalid pax size at byte {at}: {value!r}")
            size = int(value)
    return name, size
