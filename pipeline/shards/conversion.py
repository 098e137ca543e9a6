"""The form in which shards store an image: unchanged if every reader of shards knows its format, else as a PNG."""

import io

from PIL import Image, features

from pipeline.shards.images import FORMATS, Undecodable, open_image, to_rgb

STORED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Pillow's formats that shards store unchanged, and their extension there."""
FOLDER_FORMATS = (*FORMATS, "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", *(["AVIF"] if features.check("avif") else []))
"""Pillow's formats that a folder's images may have; no others are tried, whatever a file is called."""
NATIVE = dict.fromkeys(("jpg", "jpeg", "jpe", "jfif"), "jpg") | {"png": "png", "webp": "webp"}
EXTENSIONS = {*NATIVE, "bmp", "dib", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2", "j2k"} | (
    {"avif"} if "AVIF" in FOLDER_FORMATS else set()
)
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that turns an image upright, by its EXIF orientation."""


def stored_form(encoded: bytes, max_pixels: int, exif_orientation: bool) -> tuple[str, bytes] | None:
    """Type and bytes of an image in a shard: unchanged if every reader of shards knows its format, else as a PNG.

    None if it does not decode; indexing will report that.
    """
    try:
        with open_image(encoded, max_pixels, FOLDER_FORMATS) as image:
            if image.format not in STORED:
                image.load()  # turns a TIFF upright and drops its orientation tag
            # Pillow decodes a PNG completely to look for a tag that few have
            tagged = exif_orientation and (image.format != "PNG" or b"eXIf" in encoded)
            turn = TURNS.get(image.getexif().get(ORIENTATION, 1)) if tagged else None
            if image.format in STORED and turn is None:
                return STORED[image.format], encoded
            pixels = Image.fromarray(to_rgb(image))
    except Undecodable:
        return None
    buffer = io.BytesIO()
    (pixels if turn is None else pixels.transpose(turn)).save(buffer, "png")
    return "png", buffer.getvalue()
