"""What the benchmarks of loaders compute of what they measure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

from .conftest import IDS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def generate(monkeypatch):
    for folder in ("kernels/benchmarks", "loaders/benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    monkeypatch.delitem(sys.modules, "generate", raising=False)
    import generate

    return generate


def test_what_a_token_costs(generate):
    """Two tokens: kernels that overlap, one within another, a pause of 3 us and one of 200."""
    found = [(10.0, 14.0, "b"), (0.0, 4.0, "a"), (2.0, 7.0, "b"), (3.0, 5.0, "c"), (214.0, 215.0, "a")]
    assert generate.by_token(found, 2, most=2) == [
        ("b", 1.0, 4.5), ("a", 1.0, 2.5), ("all kernels and copies", 2.5, 8.0),
        ("pauses above 5 us, for the host", 0.5, 100.0), ("pauses between kernels", 0.5, 1.5),
    ]  # fmt: skip


def test_looking_later_makes_the_same_tokens(generate, tiny, monkeypatch):
    class Event:  # the CPU has none
        def __init__(self, **_):
            made.append(self)

        def record(self):
            """Nothing is queued here."""

        synchronize = record

    made = []
    monkeypatch.setattr(torch, "Event", Event)
    model = AutoModelForCausalLM.from_pretrained(tiny.folder)
    kwargs = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS, past_key_values=StaticCache(model.config, max_cache_len=20), **kwargs)
    assert not made
    with generate.deferred():
        later = model.generate(IDS, past_key_values=StaticCache(model.config, max_cache_len=20), **kwargs)
    assert made
    assert torch.equal(later, expected)
    made.clear()
    model.generate(IDS, **kwargs)
    assert not made
