"""Picture files of any format: listed, opened and decoded, with errors in one line."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from deqzoo.errors import UserError, one_line
from deqzoo.files import visible_files

HEIC = (".heic", ".heif")


def register_heic(path: str | os.PathLike[str]) -> None:
    """Let Pillow read the format of iPhones, which another package decodes.

    Raises:
        UserError: that package is missing.
    """
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise UserError(
            f"{path} is a HEIC picture: pip install pillow-heif to read it, or save it as JPEG"
        ) from error
    register_heif_opener()


def picture_files(source: str | os.PathLike[str]) -> list[Path]:
    """The file itself, or all pictures of a folder in the order of their names, no hidden ones.

    Raises:
        UserError: an address, or a folder without pictures.
    """
    if "://" in str(source):
        raise UserError(f"{source} is an address: fetch the picture first and name its file")
    path = Path(source).expanduser()
    if not path.is_dir():
        return [path]
    suffixes = {*Image.registered_extensions(), *HEIC} - {".pdf", ".mpg", ".mpeg"}
    files = [file for file in visible_files(path) if file.suffix.lower() in suffixes]
    if not files:
        raise UserError(f"folder {path} holds no pictures")
    return files


def read_picture(path: str | os.PathLike[str], most_pixels: int | None = None) -> Image.Image:
    """Open and decode a picture file, or standard input ("-").

    Args:
        path: of the file.
        most_pixels: a picture with more is not decoded.

    Raises:
        UserError: no file, no picture, a damaged one, or one with too many pixels.
    """
    if str(path) == "-":
        return decode_picture(sys.stdin.buffer.read(), "standard input")
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder; name picture files")
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if path.suffix.lower() in HEIC:
        register_heic(path)
    return decode_picture(content, str(path), most_pixels)


def decode_picture(content: bytes, name: str, most_pixels: int | None = None) -> Image.Image:
    """A picture from the bytes of its file.

    Raises:
        UserError: no bytes, no picture, a damaged one, or one with more than `most_pixels`; the
            message says `name`.
    """
    if not content:
        raise UserError(f"{name} is empty")
    try:
        with Image.open(io.BytesIO(content)) as picture:
            width, height = picture.size
            if most_pixels is not None and width * height > most_pixels:
                raise UserError(
                    f"{name} has {width} × {height} pixels; {most_pixels // 10**6} million are "
                    "allowed"
                )
            picture.load()
            return picture
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is no picture that can be read") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large to decode safely: {error}") from error
    except Exception as error:  # decoders of damaged files fail in arbitrary ways
        reason = one_line(error)
        raise UserError(f"cannot read {name}: {reason}") from error
