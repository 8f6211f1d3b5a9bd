# make serve | test | lint | bench | load | profile: each makes .venv first and reuses it while the pins stand.
# make test TESTS="FILE OR FOLDER ..." runs a part of the tests, make test-fast all but engines, servers
# and training; both in TEST_PROCESSES processes of a thread each (tests/support/schedule.py shares out).

PYTHON ?= python3.11
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: serve test test-fast lint bench load profile clean

serve: $(STAMP)
	$(BIN)/sluice serve --enforce-eager --port 8000

TEST_PROCESSES ?= 2
TESTS ?=
test: $(STAMP)
	tests/tools/get-promtool.sh
	tests/tools/get-chromium.sh
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n $(TEST_PROCESSES) $(TESTS)

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

$(STAMP): pyproject.toml requirements/cpu.txt requirements/dev.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps -r requirements/cpu.txt -r requirements/dev.txt
	@$(BIN)/python -c "import torch, sys; torch.version.cuda and sys.exit('pip chose a CUDA build of torch: see Set-up in README.md')"
	$(BIN)/pip uninstall --quiet --quiet --yes sluice  # The name before it was vllm-sluice.
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP)

clean:
	rm -rf $(VENV) build
