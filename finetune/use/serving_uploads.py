"""The images in the body of a request: one image as it is, or several as `multipart/form-data`."""

from __future__ import annotations

import email.parser
import email.policy
from email.message import Message

from finetune.system.limits import MIB, Limit

MOST_BYTES = 20 * MIB  # of a body
MOST_IMAGES = 64  # of a request
HEADER_BYTES = 8192  # of one part of a multipart body
NAME_LETTERS = 255  # of the name of a file
BODY = Limit(MOST_BYTES, "send fewer or smaller images a request")
FORM = "multipart/form-data"
# Types that clients name without looking, besides those of images.
UNNAMED_TYPES = ("application/octet-stream", "application/x-www-form-urlencoded")  # curl's own


class RefusedError(ValueError):
    """A request that is not answered: an HTTP status of 4xx or 503, and why in one line."""

    def __init__(self, status: int, reason: str) -> None:
        """Take both."""
        super().__init__(reason)
        self.status, self.reason = status, reason


def length_of(headers: Message) -> int:
    """The bytes of the body that the headers announce.

    Raises:
        RefusedError: They announce none, or too many, or in a way that two readers could understand differently.
    """
    if headers.get_all("Transfer-Encoding"):
        raise RefusedError(411, "Transfer-Encoding is not read here; send Content-Length")
    given = headers.get_all("Content-Length") or []
    if not given:
        raise RefusedError(411, "Content-Length is missing; send an image as the body")
    text = given[0].strip()
    if len(given) > 1 or not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise RefusedError(400, "Content-Length must be one whole number")
    if int(text) > BODY.most:
        raise RefusedError(413, f"the body has {int(text):,} bytes, and at most {BODY.most:,} are read; {BODY.mend}")
    if not int(text):
        raise RefusedError(400, "the body is empty; send an image")
    return int(text)


def check_type(headers: Message) -> bool:
    """Whether the headers announce several images; a RefusedError for a type that is no image."""
    kind = headers.get_content_type() if headers.get("Content-Type") else UNNAMED_TYPES[0]
    if kind == FORM:
        if not 0 < len(headers.get_boundary() or "") <= 70:  # RFC 2046, section 5.1.1
            raise RefusedError(400, f"{FORM} needs a boundary of 1 to 70 letters")
        return True
    if not kind.startswith("image/") and kind not in UNNAMED_TYPES:
        raise RefusedError(415, f"Content-Type {kind[:100]}: expected an image, such as image/jpeg, or {FORM}")
    return False


def images_in(headers: Message, body: bytes) -> list[tuple[str, bytes]]:
    """(name, bytes) of each image of a body, whatever the bytes are; a RefusedError where there is none."""
    if not check_type(headers):
        return [("image", body)]
    boundary = (headers.get_boundary() or "").encode("latin-1", "replace")
    sections = (b"\r\n" + body).split(b"\r\n--" + boundary, MOST_IMAGES + 2)  # RFC 2046: what is ahead is ignored
    found: list[tuple[str, bytes]] = []
    for section in sections[1:]:
        if section.startswith(b"--"):
            break
        if len(found) == MOST_IMAGES:
            raise RefusedError(413, f"more than {MOST_IMAGES} images; {BODY.mend}")
        head, blank, data = section.partition(b"\r\n\r\n")
        if not blank or len(head) > HEADER_BYTES:
            raise RefusedError(400, f"part {len(found) + 1} of the body has no headers, or too long ones")
        found.append((_name_in(head) or f"image[{len(found)}]", data))
    else:
        raise RefusedError(400, "the body has no end: its last boundary is missing")
    if not found:
        raise RefusedError(400, "the body holds no image")
    return found


def _name_in(head: bytes) -> str:
    """The file name in the headers of a part, without folders; empty if there is none."""
    part = email.parser.BytesHeaderParser(policy=email.policy.compat32).parsebytes(head.lstrip(b"\r\n") + b"\r\n\r\n")
    try:
        given = part.get_filename()
    except (TypeError, ValueError) as error:  # the library stumbles over pieces of a name that fit in no order
        raise RefusedError(400, "the name of a file in the body cannot be read") from error
    name = str(given or "").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return name.replace("\\", "/").rpartition("/")[2][:NAME_LETTERS]
