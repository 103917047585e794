# make quickstart   set up, train and evaluate the default model on two CPU cores, print one table
# make test         set up and run the tests
# Both can be run again: what is done is not done twice, and an interrupted stage goes on from its last checkpoint.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
LAUNCH := $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml
RECIPES := recipes/qwen2.5-coder-0.5b
RUNS := runs/quickstart
RESULTS := $(RUNS)/results
ROWS := base sft reinforce ppo_clip

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test install
.SECONDARY:

quickstart: $(ROWS:%=$(RESULTS)/%/metrics.json)
	@$(BIN)/python recipes/evaluate.py --compare $(ROWS:%=$(RESULTS)/%)
	@echo "The adapters: $(RUNS)/sft $(RUNS)/reinforce $(RUNS)/ppo_clip"

test: install
	$(BIN)/python -m pytest -q

install: .venv/installed

.venv/installed: requirements.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "On Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

# An evaluation needs the adapter it evaluates; the base needs none
$(RESULTS)/base/metrics.json: | install
	$(LAUNCH) recipes/evaluate.py --config $(RECIPES)/evaluate.yaml --output_dir $(@D)

$(RESULTS)/%/metrics.json: $(RUNS)/%/adapter_model.safetensors | install
	$(LAUNCH) recipes/evaluate.py --config $(RECIPES)/evaluate.yaml --model_name_or_path $(<D) --output_dir $(@D)

$(RUNS)/sft/adapter_model.safetensors: | install
	$(LAUNCH) recipes/sft.py --config $(RECIPES)/sft.yaml --output_dir $(@D)

$(RUNS)/reinforce/adapter_model.safetensors: $(RUNS)/sft/adapter_model.safetensors | install
	$(LAUNCH) recipes/reinforce.py --config $(RECIPES)/reinforce.yaml --adapter_name_or_path $(<D) --output_dir $(@D) \
		--max_steps 12

$(RUNS)/ppo_clip/adapter_model.safetensors: $(RUNS)/sft/adapter_model.safetensors | install
	$(LAUNCH) recipes/ppo_clip.py --config $(RECIPES)/ppo_clip.yaml --adapter_name_or_path $(<D) --output_dir $(@D) \
		--max_steps 24
