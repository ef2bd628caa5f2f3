"""The members of a tar file, read without belief in what its headers claim."""

import os
import tarfile
from collections.abc import Iterator
from typing import IO, cast

from finetune.system.reading import DamagedError, open_regular
from finetune.system.seals import SealedFile, SealedStream

HEADER_BYTES = 2**16  # of an extended header: a path has 4 KiB at most, and nothing else of it is used


class _Headers:
    """The file as `tarfile` sees it, which reads headers only: none may claim more than `HEADER_BYTES`."""

    def __init__(self, file: IO[bytes]) -> None:
        self.tell, self.seek, self._file = file.tell, file.seek, file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {size:,} bytes, and at most {HEADER_BYTES:,} are read")
        return self._file.read(size)


def tar_members(path: str, sealed: SealedFile | None = None) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """Every regular file in a whole, uncompressed tar archive, in order; and the open archive, to read its bytes from.

    The `size` bytes at `offset_data` of each lie within the archive. Of a `sealed` one, the file at `path`, every byte
    that is read is compared with its checksum.

    Raises:
        DamagedError: A checksum differs.
        tarfile.ReadError: The archive is damaged, breaks off, or holds files of which it stores parts only.
        OSError: It cannot be opened, or is no regular file.
    """
    with open_regular(path) if sealed is None else cast(IO[bytes], SealedStream(sealed)) as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        end = -1  # of the last member's header, so that no header leads back
        try:
            with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
                while (member := tar.next()) is not None:
                    tar.members = []  # else memory grows with the archive
                    if member.offset_data <= end or not 0 <= member.size <= length:
                        raise tarfile.ReadError(f"{member.name[:200]} claims {member.size:,} bytes")
                    end = member.offset_data
                    if member.issparse():
                        raise tarfile.ReadError(
                            f"{member.name[:200]} is stored without its zeros: pack without --sparse"
                        )
                    if member.offset_data + member.size > length:
                        raise tarfile.ReadError(f"it breaks off within {member.name[:200]}")
                    if member.isfile():
                        yield member, file
                # A tar reader stops at a block of zeros, or at damage.
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"it breaks off at byte {tar.offset:,}")
                # Zeros may be damage, with images behind them.
                while sealed is not None and file.read(2**20):
                    pass
        except DamagedError:
            raise
        except (tarfile.TarError, OSError) as error:
            raise tarfile.ReadError(str(error)) from error
        except (ValueError, LookupError, ArithmeticError, RecursionError, TypeError) as error:  # of damaged headers
            raise tarfile.ReadError(f"a header is damaged ({type(error).__name__})") from error
