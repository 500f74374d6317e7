"""Load an SpQR checkpoint through transformers and continue a sentence: python examples/load.py FOLDER [PROMPT]"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import spqr_loaders  # noqa: F401  registers the format with transformers

folder = sys.argv[1]
prompt = sys.argv[2] if len(sys.argv) > 2 else "The old man looked at the sea and"

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(prompt, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
