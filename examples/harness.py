"""lm-evaluation-harness on an SpQR checkpoint: its own command line, in a process that knows the format.

pip install lm-eval
python examples/harness.py --model hf --model_args pretrained=./llama-spqr --tasks arc_easy,hellaswag --batch_size 8
"""

from lm_eval.__main__ import cli_evaluate

import spqr_loaders  # noqa: F401  registers the format with transformers

if __name__ == "__main__":
    cli_evaluate()
