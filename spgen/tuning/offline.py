"""Ranking configurations for a processor that is not there: compiled for it, and judged by the cost model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from spgen.autotune.experience import Experience
from spgen.autotune.model import Prediction
from spgen.autotune.ranking import ranked
from spgen.autotune.search import EFFORTS, favourites
from spgen.autotune.work import Resources
from spgen.autotune.workloads import Case
from spgen.ir.config import Config
from spgen.target import Target
from spgen.tuned import records_of
from spgen.tuning.compilers import Compilers
from spgen.tuning.subject import Subject


@dataclass(frozen=True)
class Ranked:
    """One configuration: what its kernel takes and how long it should take, or why it does not compile."""

    config: Config
    prediction: Prediction
    resources: Resources | None = None
    fault: str = ""


def rank(
    case: Case, target: Target, effort: str, compilers: Compilers, said: Callable[[str, int, int], None]
) -> list[Ranked]:
    """The default and the model's favourites, compiled for `target`; the fastest predicted first, faults last.

    The prediction of what compiled is made from the registers, shared memory and spills of the binary itself.
    """
    known = Experience((record for one in records_of(target) for record in one), target)
    subject = Subject(case, target, torch.device("cpu"), experience=known)
    chosen = favourites(subject.default, ranked(subject.expected(subject.space)), EFFORTS[effort].favourites)
    requests = {replace(subject.request, config=config): config for config in chosen}
    found = []
    for done, (request, result) in enumerate(compilers.compile(list(requests)), 1):
        config = requests[request]
        if isinstance(result, Resources):
            found.append(Ranked(config, subject.predicted(config, result), result))
        else:
            found.append(Ranked(config, subject.predicted(config), fault=result))
        said(str(config), done, len(requests))
    return sorted(found, key=lambda one: (bool(one.fault), one.prediction.seconds))
