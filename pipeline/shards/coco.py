"""Annotations in COCO's format (images, annotations, categories) with one label per image, such as iNaturalist's."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

LISTS = ("images", "annotations", "categories")


def coco_rows(path: Path) -> list[dict[str, Any]]:
    """`file_name` and `label` of each image of a file like iNaturalist's train2018.json.

    Labels are the names of the categories, or category1 for id 1 and so on unless each has a name of its own.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not in this format, two entries have the same id, or an image has not exactly one annotation.
    """
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in LISTS):
        raise ValueError(f"not a JSON object with the lists {', '.join(LISTS)}")
    try:
        return _rows(*(content[name] for name in LISTS))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"an entry without its id, file_name, image_id or category_id: {error}") from error


def _rows(images: list[dict], annotations: list[dict], categories: list[dict]) -> list[dict[str, Any]]:
    files = {image["id"]: image["file_name"] for image in images}
    names = {category.get("name") for category in categories} - {None, ""}
    named = len(names) == len(categories)
    labels = {each["id"]: each["name"] if named else f"category{each['id']}" for each in categories}
    if len(files) < len(images) or len(labels) < len(categories):
        raise ValueError(f"two {'images' if len(files) < len(images) else 'categories'} with the same id")
    found = [(annotation["image_id"], annotation["category_id"]) for annotation in annotations]
    counts = Counter(image for image, _ in found)
    for image in {**files, **counts}:
        if image not in files or counts[image] != 1:
            raise ValueError(f"image {image!r} ({files.get(image, 'not in images')}) has {counts[image]} annotations, not one")
    if unknown := [category for _, category in found if category not in labels]:
        raise ValueError(f"category_id {unknown[0]!r}, which is not in categories")
    return [{"file_name": files[image], "label": labels[category]} for image, category in found]
