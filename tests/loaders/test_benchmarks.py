"""What the benchmarks of loaders compute of what they measure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

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


def test_tokens_a_second(generate):
    """The prompt at 1 s, four tokens in 2 s, and four more in half a second."""
    times = [1.0, 2.0, 2.5, 2.75, 3.0, 3.1, 3.2, 3.4, 3.5]
    assert generate.rates(times) == {"tokens_per_s": 8.0, "begin_s": 2.0, "all_tokens_per_s": 3.2}


@pytest.mark.parametrize("way", ["recorded", "transformers", "eager"])
def test_every_token_arrives(generate, tiny, monkeypatch, way):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    generator, randint = torch.Generator, torch.randint
    monkeypatch.setattr(torch, "Generator", lambda _: generator())  # the prompt on the CPU
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: randint(0, 4000, (1, 16), generator=kwargs["generator"]))
    model = AutoModelForCausalLM.from_pretrained(tiny.folder)
    model.generation_config.eos_token_id = None
    run = generate.generation(model, 9, way)
    for _ in range(2):
        times = run()
        assert len(times) == 1 + 9
        assert times == sorted(times)
