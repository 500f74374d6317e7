"""Figures of several models from one run of the original."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from spqr_converters.evaluation import evaluate, evaluate_all
from spqr_format.errors import SpqrError


class Table:
    """Logits of the next token from a table by token; counts its runs."""

    def __init__(self, seed: int, vocabulary: int = 20) -> None:
        self.device = torch.device("cpu")
        self.logits = torch.randn(20, vocabulary, generator=torch.Generator().manual_seed(seed))
        self.runs = 0

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        self.runs += 1
        return SimpleNamespace(logits=self.logits[input_ids])


def test_the_original_runs_once_for_all_models() -> None:
    windows = torch.randint(0, 20, (6, 9), generator=torch.Generator().manual_seed(0))
    original, models = Table(0), [Table(1), Table(2), Table(3)]
    together = evaluate_all(models, windows, reference=original, batch=2)
    assert [original.runs, *(model.runs for model in models)] == [3, 3, 3, 3]
    assert together == [evaluate(model, windows, reference=original, batch=2) for model in models]
    p, q = (table.logits.double().softmax(-1)[windows[:, :-1]] for table in (original, models[1]))
    assert together[1].kl is not None
    assert together[1].kl.mean == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))


def test_a_model_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(SpqrError, match="E508"):
        evaluate_all([Table(1, 24)], torch.zeros(2, 4, dtype=torch.int64), reference=Table(0))
