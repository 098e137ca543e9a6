"""Who answers while a student trains: nobody, the store, or the teacher itself."""

from dataclasses import dataclass

import torch

from pipeline.answers import decode_logits
from pipeline.groups import Groups
from pipeline.loader import send, stored_answers
from pipeline.models import Answering
from pipeline.store import Store


@dataclass(frozen=True)
class Answer:
    """What the teacher said about each slot: int64 (N,), and float32 logits (N, classes) or None."""

    argmax: torch.Tensor
    logits: torch.Tensor | None


class NoTeacher:
    def __call__(self, groups: Groups, pictures: torch.Tensor) -> None:
        return None


@dataclass
class StoredTeacher:
    """Answers out of the store: the teacher itself is never in the loop."""

    store: Store
    kind: str

    def __call__(self, groups: Groups, pictures: torch.Tensor) -> Answer:
        argmax, payload = stored_answers(self.store, groups, self.kind)
        logits = None
        if payload is not None:  # decoded there: as stored it is a quarter or half of the bytes
            logits = decode_logits(self.kind, send(payload, pictures.device), self.store.classes)
        return Answer(send(argmax, pictures.device), logits)


@dataclass
class OnlineTeacher:
    """The teacher in the loop over the same groups: the proof of the store, and its baseline."""

    teacher: Answering

    def __call__(self, groups: Groups, pictures: torch.Tensor) -> Answer:
        logits = self.teacher.logits(pictures, groups.labels.shape[1])
        return Answer(logits.argmax(1), logits)
