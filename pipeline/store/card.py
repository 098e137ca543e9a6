"""The card of a published store, in Markdown. It does not change when views are added: those are in the manifest."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tabulate import tabulate

from pipeline.store.kinds import KINDS

if TYPE_CHECKING:
    from pipeline.store.publication import Publication

CARD = """\
# Teacher predictions for offline distillation

What a teacher predicts for augmented views of {samples:,} training images, so that students can be distilled without
running it. Every sample and every view is checked on use: other images or another augmentation are refused.

{facts}

## Use

With `pipeline prepare` done for the same images, this downloads the predictions and checks them:

```bash
pipeline store fetch LOCATION
```

Or configure it, and `dvc repro` runs without a teacher:

```yaml
{section}
```

LOCATION is where this folder is: a path, or a URL that fsspec knows. The recipe must be the one below; `views` may be
at most the number in `manifest.json`, and `kind` may also be `argmax`.

## Recipe of the views

{recipe}

## Teacher

```json
{teacher}
```

## Files

`manifest.json` identifies the store and has a SHA-256 of every other file. `samples.npy` lists the samples (key, size,
label, CRC-32C) shard by shard. A file in `packs` is a tar of `.npy` arrays with the predictions for one block of views
of some shards: `000000/argmax.npy` is uint16 (views, samples) of shard 0.
"""
TITLE = CARD.partition("\n")[0].encode()


def describe(publication: Publication) -> str:
    """The card as Markdown."""
    samples = sum(shard.samples for shard in publication.shards)
    recipe = publication.recipe_settings
    facts = {
        "teacher": publication.teacher.get("model", "see below"),
        **_accuracy(publication),
        "images": f"{samples:,} in {len(publication.shards):,} shards, {len(publication.classes):,} classes",
        "views": f"{recipe['size']} x {recipe['size']} pixels, in blocks of {recipe['block']}",
        "kept for each view": f"`{publication.kind}`, {KINDS[publication.kind].kept}",
        "computed in": publication.precision,
        "store": publication.fingerprint,
        "written with": ", ".join(f"{name} {version}" for name, version in sorted(publication.versions.items())),
    }
    section = ["teacher_logits:", "  fetch: LOCATION", f"  kind: {publication.kind}"]
    if publication.kind == "sampled" and publication.sampling:
        drawn, tau = publication.sampling["samples"], publication.sampling["tau"]
        facts["drawn classes"] = f"{drawn} per view, at temperature {tau:g}"
        section += [f"  samples: {drawn}", f"  sample_tau: {tau}"]
    return CARD.format(
        samples=samples,
        facts=_table(facts, ["", ""]),
        section="\n".join(section),
        recipe=_table({f"`{key}`": json.dumps(value) for key, value in recipe.items()}, ["setting", "value"]),
        teacher=json.dumps(publication.teacher, indent=1, sort_keys=True),
    )


def _accuracy(publication: Publication) -> dict[str, str]:
    metrics = publication.teacher_metrics
    if "top1" not in metrics:
        return {}
    top5 = f", top-5 {metrics['top5']:.2%}" if "top5" in metrics else ""
    return {"its accuracy": f"top-1 {metrics['top1']:.2%}{top5} on the publisher's validation images"}


def _table(rows: dict[str, str], headers: list[str]) -> str:
    escaped = [[key, value.replace("|", "\\|")] for key, value in rows.items()]
    return tabulate(escaped, headers, tablefmt="github", disable_numparse=True)
