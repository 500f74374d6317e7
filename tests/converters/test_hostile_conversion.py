"""Whole conversions of sources in which something is wrong: one code, no time, no memory, and nothing left behind.

Headers and options byte by byte: test_gptq.py, test_awq.py, test_gguf.py. Here the fault lies in one layer of a model that is
fine otherwise, so that it is found after other layers were written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spqr_converters import SolverOptions, convert
from spqr_format.errors import SpqrError

QUICK = SolverOptions(rounds=1, sweeps=0)
LAST = "model.layers.1.self_attn.o_proj"  # not the last one that is converted
Tensors = dict[str, torch.Tensor]


def changed(leaf: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        value = change(tensors.pop(f"{LAST}.{leaf}"))
        if value is not None:
            tensors[f"{LAST}.{leaf}"] = value

    return apply


def put(place: int, number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[place] = number
        return tensor

    return change


FAULTS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "a group below 0": (changed("g_idx", put(3, -1)), "E501"),
    "a group too high": (changed("g_idx", put(47, 3)), "E501"),
    "a group of 2^31 - 1": (changed("g_idx", put(0, 2**31 - 1)), "E501"),
    "g_idx of floats": (changed("g_idx", torch.Tensor.float), "E501"),
    "g_idx too short": (changed("g_idx", lambda t: t[:40].clone()), "E501"),
    "no scales": (changed("scales", lambda t: None), "E501"),
    "no qzeros": (changed("qzeros", lambda t: None), "E501"),
    "no qweight": (changed("qweight", lambda t: None), "E501"),
    "a scale of nan": (changed("scales", put(5, float("nan"))), "E502"),
    "a scale of infinity": (changed("scales", put(0, float("inf"))), "E502"),
    "scales of integers": (changed("scales", lambda t: t.to(torch.int16)), "E501"),
    "a group too many": (changed("scales", lambda t: torch.cat([t, t[:1]])), "E501"),
    "qweight cut": (changed("qweight", lambda t: t[:-1].clone()), "E501"),
    "qweight too wide": (changed("qweight", lambda t: torch.cat([t, t], 1)), "E501"),
    "qweight of another layer": (changed("qweight", lambda t: torch.cat([t, t])), "E501"),
    "qzeros of int64": (changed("qzeros", torch.Tensor.long), "E501"),
    "a dense weight too": (lambda tensors: tensors.update({f"{LAST}.weight": torch.ones(48, 48).half()}), "E501"),
    "a norm of nan": (lambda tensors: tensors.update({"model.norm.weight": torch.full((48,), torch.nan).half()}), "E204"),
    "no layer at all": (lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith(LAST)] and None, "E501"),
}


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_one_code_and_nothing_left_behind(gptq_llama, tmp_path: Path, bounded, fault, lossless) -> None:
    apply, code = FAULTS[fault]
    source = gptq_llama()
    tensors = load_file(source / "model.safetensors")
    apply(tensors)
    save_file(tensors, source / "model.safetensors")
    before = sorted(source.rglob("*"))
    options = {"lossless": True} if lossless else {"solver": QUICK}
    with bounded(), pytest.raises(SpqrError) as caught:
        convert(source, tmp_path / "out", workers=2, **options)
    assert caught.value.code == code, caught.value
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert sorted(source.rglob("*")) == before


CONFIGS: dict[str, bytes] = {
    "not JSON": b"{",
    "an array": b"[]",
    "nested": b"[" * 100_000,
    "no model": b"{}",
    "a model of 2^40": json.dumps({"model_type": "llama", "hidden_size": 2**40, "vocab_size": 2**40}).encode(),
    "layers of text": json.dumps({"model_type": "llama", "num_hidden_layers": "many"}).encode(),
    "10^9 layers": json.dumps({"model_type": "llama", "num_hidden_layers": 10**9}).encode(),
    "another model": json.dumps({"model_type": "nonsense"}).encode(),
    "code": json.dumps({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}).encode(),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_hostile_configs(gptq_llama, tmp_path: Path, bounded, config) -> None:
    source = gptq_llama()
    (source / "evil.py").write_text("raise SystemExit")
    (source / "config.json").write_bytes(CONFIGS[config])
    with bounded(), pytest.raises(SpqrError) as caught:
        convert(source, tmp_path / "out", lossless=True)
    assert caught.value.code in ("E501", "E504"), caught.value
    assert not (tmp_path / "out").exists()
