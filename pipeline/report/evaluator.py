"""Evaluate the compared models: rows of the result tables, and predicted classes."""

import itertools
from dataclasses import dataclass

import torch
from torch.nn.functional import softmax

from pipeline.batches.loader import ImageSet
from pipeline.common.distributed import Rank
from pipeline.common.errors import UsageError
from pipeline.config.paths import TEACHER
from pipeline.config.schema import Config
from pipeline.models.build import NormalizedModel, build_student, parameter_count
from pipeline.models.evaluation import classifiers, multiply_adds, predict, throughput, top_k_accuracy
from pipeline.models.teacher import check_input_size
from pipeline.models.tokens import LayerCosine, TokenCosines
from pipeline.report.comparison import Predictions
from pipeline.report.entries import Entry, load_entry
from pipeline.report.further_sets import open_further_sets
from pipeline.report.tables import Result, SizeResult
from pipeline.shards.index import Index


@dataclass(frozen=True)
class Evaluation:
    """One model on the validation set."""

    results: list[Result]
    """A row per classifier."""
    predictions: dict[str, Predictions]
    """By classifier."""
    tokens: list[LayerCosine]
    """Empty without a trained distillation token."""


def _accepts(teacher: NormalizedModel, size: int) -> bool:
    """Whether a teacher accepts a size; says so if not."""
    try:
        check_input_size(teacher, size, "")
    except UsageError as error:
        print(f"teacher: not evaluated at {size} px: {error.found}")
        return False
    return True


@dataclass
class Evaluator:
    """Evaluates models on the validation set; under torchrun each rank takes its share of the images."""

    config: Config
    val: Index
    device: torch.device

    def __post_init__(self):
        self.labels = torch.from_numpy(self.val.labels())
        self.further = open_further_sets(self.config, self.val)

    def load(self, entry: Entry, size: int | None = None) -> NormalizedModel:
        return load_entry(self.config, entry, self.val.classes, self.device, size)

    def evaluate(self, entry: Entry, model: NormalizedModel) -> Evaluation:
        """Results, predictions and token cosines, from one pass over the images."""
        settings, size = self.config.evaluate, entry.size
        cosines = TokenCosines(model, entry.distilled)
        with cosines.record():
            scores = self._scores(entry, model, size)
        tokens = cosines.gather(len(self.val), self.device)
        macs, speed = multiply_adds(model, size), 0.0
        if Rank.current(self.device).rank == 0:
            speed = throughput(model, size, settings.batch_size, settings.throughput_seconds, entry.precision)
        cost, detail = (parameter_count(model.model), macs, speed), f"{entry.model}, {size} px"
        others = self._further_top1(entry, model, scores)
        rows = [
            Result(entry.name, detail, name, *self._accuracy(each), *cost, others=others[name])
            for name, each in scores.items()
        ]
        return Evaluation(rows, {name: self._predictions(name, each) for name, each in scores.items()}, tokens)

    def size_results(self, entry: Entry) -> list[SizeResult]:
        """A row per size in `evaluate.sizes` and classifier; position embeddings are resized."""
        if entry.name == TEACHER and self.config.teacher.size:
            return []  # it resizes its input to its own size
        rows = []
        for size in self.config.evaluate.sizes:
            model = self.load(entry, size)
            if entry.student or _accepts(model, size):
                scores = self._scores(entry, model, size)
                rows += [SizeResult(entry.name, entry.size, size, name, *self._accuracy(scores[name])) for name in scores]
        return rows

    def check_sizes(self, entries: list[Entry]) -> None:
        """Refuse sizes in `evaluate.sizes` that the students' patches do not cover.

        Raises:
            UsageError: a student does not accept a size.
        """
        students = [(entry.name, entry.student) for entry in entries if entry.student]
        for (name, student), size in itertools.product(students, self.config.evaluate.sizes):
            model = build_student(student, self.config.recipe, len(self.val.classes), size)
            check_input_size(model, size, "correct evaluate.sizes", name)

    def _further_top1(
        self, entry: Entry, model: NormalizedModel, scores: dict[str, torch.Tensor]
    ) -> dict[str, dict[str, float]]:
        """Top-1 on the additional sets, by classifier; `scores` are those of the validation images."""
        real = self.further.real
        found = {name: {"real": real.top1(each)} if real else {} for name, each in scores.items()}
        for key, other in self.further.folders.items():
            for name, each in self._scores(entry, model, entry.size, other.images).items():
                found[name][key] = top_k_accuracy(each, other.labels, 1)
        return found

    def _scores(
        self, entry: Entry, model: NormalizedModel, size: int, images: ImageSet | None = None
    ) -> dict[str, torch.Tensor]:
        """Scores of every classifier for images, those of validation by default."""
        batch, workers = self.config.evaluate.batch_size, self.config.evaluate.workers
        heads = predict(model, images or self.val, size, entry.crop, batch, workers, self.device, entry.precision)
        return classifiers(heads, model.distilled and entry.distilled)

    def _accuracy(self, scores: torch.Tensor) -> tuple[float, float]:
        return top_k_accuracy(scores, self.labels, 1), top_k_accuracy(scores, self.labels, 5)

    def _predictions(self, classifier: str, scores: torch.Tensor) -> Predictions:
        # the scores of `softmax` are a sum of two probabilities, all others are logits
        probabilities = scores / 2 if classifier == "softmax" else softmax(scores, 1)
        confidence, classes = probabilities.max(1).values, scores.argmax(1)
        return Predictions(classes.numpy(), confidence.numpy())
