"""What the headers of a tar file say: POSIX.1-1988 ustar, POSIX.1-2001 pax and GNU long names."""

from collections.abc import Iterator
from posixpath import dirname, join, normpath

from ssd.data.shards import Shard
from ssd.errors import UserError

BLOCK = 512
HARD_LINK, SYMBOLIC_LINK = b"1", b"2"
LINKS = (HARD_LINK, SYMBOLIC_LINK)
PACKED = (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")  # gzip, bzip2, xz, zstandard


def members(shard: Shard) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every regular file of a tar (POSIX.1-1988 ustar, POSIX.1-2001 pax, GNU long names).

    A link to a file that comes before it has that file's place, and other links are passed over. A shard that ends in the
    middle of a file is an error of its own: what is cut off would never be seen.
    """
    path, length = shard.name, shard.size
    place, long_name, long_target = 0, None, None
    files: dict[str, tuple[int, int]] = {}
    while place < length:
        header = shard.read(place, BLOCK)
        if len(header) < BLOCK and place:
            raise UserError(f"'{path}' is cut short in the header at byte {place}. Fetch it again.")
        header = header.ljust(BLOCK, b"\0")
        if not header.strip(b"\0"):
            return
        size = tar_number(header[124:136])
        if size is None or checksum(header) != tar_number(header[148:156]):
            if place == 0 and header.startswith(PACKED):
                raise UserError(f"'{path}' is compressed. Unpack it to a plain .tar: pictures are compressed already.")
            what = "is not a tar file" if place == 0 else f"is damaged at byte {place}"
            raise UserError(f"'{path}' {what}. Fetch or write it again.")
        offset, kind = place + BLOCK, header[156:157]
        if kind in LINKS:
            size = 0  # a hard link may repeat that of its file, which is not here
        if offset + size > length:
            raise UserError(f"'{path}' is cut short: {length} bytes, {offset + size} expected. Fetch it again.")
        if kind == b"L":
            long_name = shard.read(offset, size).rstrip(b"\0").decode("utf-8", "replace")
        elif kind == b"K":
            long_target = shard.read(offset, size).rstrip(b"\0").decode("utf-8", "replace")
        elif kind == b"x":
            records = shard.read(offset, size)
            long_name = pax_value(records, b"path") or long_name
            long_target = pax_value(records, b"linkpath") or long_target
        else:
            name = long_name or ustar_name(header)
            if kind in (b"0", b"\0"):
                files[normpath(name)] = (offset, size)
                yield name, offset, size
            elif kind in LINKS:
                target = long_target or header[157:257].split(b"\0")[0].decode("utf-8", "replace")
                found = files.get(normpath(target if kind == HARD_LINK else join(dirname(name), target)))
                if found is not None:
                    files[normpath(name)] = found
                    yield name, *found
            long_name = long_target = None
        place = offset + -(-size // BLOCK) * BLOCK


def tar_number(field: bytes) -> int | None:
    """Octal digits, or base 256 with the first bit set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.strip(b" \0")
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        return None


def checksum(header: bytes) -> int:
    """Sum of the bytes with the field of the sum itself as spaces."""
    return sum(header) - sum(header[148:156]) + 8 * 32


def ustar_name(header: bytes) -> str:
    name, prefix = header[:100].split(b"\0")[0], b""
    if header[257:262] == b"ustar" and header[257:265] != b"ustar  \0":
        prefix = header[345:500].split(b"\0")[0]
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "replace")


def pax_value(records: bytes, wanted: bytes) -> str | None:
    """The record `wanted` of a pax header: "length key=value\\n", again and again."""
    while records:
        length, _, _ = records.partition(b" ")
        if not length.isdigit() or not int(length):
            return None
        record = records[: int(length)]
        key, _, value = record.partition(b" ")[2].partition(b"=")
        if key == wanted:
            return value.rstrip(b"\n").decode("utf-8", "replace")
        records = records[int(length) :]
    return None
