"""lm-evaluation-harness on a converted model, by the documented script, on a task that is made here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from .conftest import dense_of

ROOT = Path(__file__).parents[2]
QUESTIONS = [
    ("The old man looked at the", [" sea", " of"], 0),
    ("She opened the", [" and", " door"], 1),
    ("It was the end of the", [" day", " was"], 1),  # the answer key is wrong on purpose: not all can be right
]
TASK = """
task: offline
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def test_the_harness_scores_a_converted_model(tiny, tmp_path: Path) -> None:
    """The accuracy and every choice's log-likelihood are those of the dequantized weights in transformers' own layers."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed: pip install lm-eval")
    data, tasks = tmp_path / "questions.jsonl", tmp_path / "tasks"
    keys = ("question", "choices", "answer")
    data.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in QUESTIONS))
    tasks.mkdir()
    (tasks / "offline.yaml").write_text(TASK.format(data=data))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [
            sys.executable, ROOT / "examples" / "harness.py", "--model", "hf", "--model_args",
            f"pretrained={tiny.folder},dtype=float32", "--tasks", "offline", "--include_path", tasks, "--device", "cpu",
            "--output_path", tmp_path / "results", "--log_samples",
        ],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = (tmp_path / "results").rglob("results_*.json")
    (samples,) = (tmp_path / "results").rglob("samples_*.jsonl")
    rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])

    expected = [[log_likelihood(tiny, question, choice) for choice in choices] for question, choices, _ in QUESTIONS]
    found = [[float(response[0]) for response in row["filtered_resps"]] for row in rows]
    assert found == [pytest.approx(row, abs=1e-3) for row in expected]
    right = [row.index(max(row)) == answer for row, (_, _, answer) in zip(expected, QUESTIONS, strict=True)]
    assert json.loads(result.read_text())["results"]["offline"]["acc,none"] == pytest.approx(sum(right) / len(right))


def log_likelihood(tiny, question: str, choice: str) -> float:
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    whole = tokenizer(question + choice)["input_ids"]
    begins = len(tokenizer(question)["input_ids"])
    with torch.no_grad():
        logits = dense_of(tiny)(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    return float(sum(logits[i - 1, whole[i]] for i in range(begins, len(whole))))
