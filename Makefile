# make quickstart   set up, train the default model by REINFORCE in its chat format, and compare it with the untouched one;
#                   ROWS="base sft reinforce ppo_clip" has the other trainers too, SEED=43 another seed
# make reproduce    all seven rows of results/, two more seeds of SFT, REINFORCE and PPO-Clip, and the report of them, in
#                   some hours on two CPU cores; rows that results/ holds are not made again: RESULTS=DIR makes them elsewhere;
#                   HUMANEVAL_PLUS=FILE adds stricter tests
# make test         set up and run the tests
# make lint         check style and types; `make format` applies the fixes
# The first two compute on the GPU if there is one; DEVICE=cpu insists on the CPU.
# All can be repeated: finished stages are skipped, and an interrupted stage resumes from its last checkpoint.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
ifndef DEVICE
DEVICE := $(if $(filter GPU,$(shell nvidia-smi -L 2>/dev/null)),gpu,cpu)
endif
LAUNCH := $(BIN)/accelerate launch --config_file accelerate_configs/$(if $(filter cpu,$(DEVICE)),cpu,single_gpu).yaml
CHAT_RECIPES := recipes/qwen2.5-coder-0.5b
RECIPES := $(CHAT_RECIPES)/completion
SEED := 42
QUICK := runs/quickstart$(if $(filter-out 42,$(SEED)),_seed$(SEED))
ROWS := base reinforce
RUNS := runs/reproduce
RESULTS := results
RL_ROWS := reinforce_alpha0.01 reinforce_alpha0.03 ppo_alpha0.01_bs8 ppo_alpha0.03_bs8
SEED_ROWS := $(foreach seed,43 44,sft_seed$(seed) reinforce_alpha0.01_seed$(seed) ppo_alpha0.01_bs8_seed$(seed))
ALL_ROWS := base sft $(RL_ROWS) dpo $(SEED_ROWS)
SAMPLED := --num_generations 10 --temperature 0.2 --per_device_eval_batch_size $(if $(filter cpu,$(DEVICE)),110,330)
HUMANEVAL_PLUS :=

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart reproduce test lint format install
.SECONDARY:

quickstart: $(ROWS:%=$(QUICK)/results/%/metrics.json)
	@$(BIN)/python recipes/evaluate.py --compare $(ROWS:%=$(QUICK)/results/%) --picture $(QUICK)/gain.png
	@echo "Picture: $(QUICK)/gain.png"
	@echo "Adapters: $(patsubst %,$(QUICK)/%,$(filter-out base,$(ROWS)))"
	@echo "Answers side by side: $(BIN)/python recipes/compare.py $(patsubst %,$(QUICK)/results/%,$(firstword $(ROWS)) $(lastword $(ROWS)))"

reproduce: $(ALL_ROWS:%=$(RESULTS)/%/metrics.json) $(ALL_ROWS:%=$(RESULTS)/%/sampled/metrics.json)
	@$(BIN)/python recipes/evaluate.py --compare $(ALL_ROWS:%=$(RESULTS)/%)
	@$(BIN)/python recipes/report.py $(RESULTS)

test: install
	$(BIN)/python -m pytest -q tests/sandbox
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --ignore tests/sandbox --ignore tests/gpu tests
	$(if $(filter cpu,$(DEVICE)),,$(BIN)/python -m pytest -q tests/gpu)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: .venv/installed

.venv/installed: requirements.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "On Debian: apt-get install python3-venv"; exit 1; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

# quickstart: an evaluation needs the adapter it evaluates; the base needs none
QUICK_EVALUATE = $(LAUNCH) recipes/evaluate.py --config $(CHAT_RECIPES)/evaluate.yaml --num_generations 8 --temperature 0.8 \
	--top_p 0.95 --per_device_eval_batch_size 132 --seed $(SEED) --output_dir $(@D)

$(QUICK)/results/base/metrics.json: | install
	$(QUICK_EVALUATE)

$(QUICK)/results/%/metrics.json: $(QUICK)/%/adapter_model.safetensors | install
	$(QUICK_EVALUATE) --model_name_or_path $(<D)

$(QUICK)/%/adapter_model.safetensors: | install
	$(LAUNCH) recipes/$*.py --config $(CHAT_RECIPES)/$*.yaml --seed $(SEED) --output_dir $(@D)

# reproduce: each row greedily, and ten samples a task beside it
EVALUATE = $(LAUNCH) recipes/evaluate.py --config $(RECIPES)/evaluate.yaml \
	$(if $(HUMANEVAL_PLUS),--extra_tests $(HUMANEVAL_PLUS)) --output_dir $(@D)

$(RESULTS)/base/metrics.json: | install
	$(EVALUATE)

$(RESULTS)/base/sampled/metrics.json: | $(RESULTS)/base/metrics.json install
	$(EVALUATE) $(SAMPLED)

# A result stands once it is there: an adapter that is trained again, for another row, does not make it anew
$(RESULTS)/%/metrics.json: | $(RUNS)/%/adapter_model.safetensors install
	$(EVALUATE) --model_name_or_path $(RUNS)/$*

# After the greedy evaluation, which wants its folder for itself
$(RESULTS)/%/sampled/metrics.json: | $(RUNS)/%/adapter_model.safetensors $(RESULTS)/%/metrics.json install
	$(EVALUATE) --model_name_or_path $(RUNS)/$* $(SAMPLED)

# ROW_seed43 is the recipe of ROW with another seed, from the SFT policy of that seed
row = $(word 1,$(subst _seed, ,$(notdir $(@D))))
seed = $(word 2,$(subst _seed, ,$(notdir $(@D))))
TRAIN = --config $(RECIPES)/$(row).yaml $(if $(seed),--seed $(seed)) --output_dir $(@D)
.SECONDEXPANSION:

$(patsubst %,$(RUNS)/%/adapter_model.safetensors,sft $(filter sft_%,$(SEED_ROWS))): | install
	$(LAUNCH) recipes/sft.py $(TRAIN)

$(RUNS)/reinforce_%/adapter_model.safetensors: $(RUNS)/sft$$(if $$(seed),_seed$$(seed))/adapter_model.safetensors | install
	$(LAUNCH) recipes/reinforce.py $(TRAIN) --adapter_name_or_path $(<D)

$(RUNS)/ppo_%/adapter_model.safetensors: $(RUNS)/sft$$(if $$(seed),_seed$$(seed))/adapter_model.safetensors | install
	$(LAUNCH) recipes/ppo_clip.py $(TRAIN) --adapter_name_or_path $(<D)

$(RUNS)/preferences/pairs.jsonl: $(RUNS)/sft/adapter_model.safetensors | install
	$(LAUNCH) recipes/preferences.py --config $(RECIPES)/preferences.yaml --adapter_name_or_path $(<D) --output_dir $(@D)

$(RUNS)/dpo/adapter_model.safetensors: $(RUNS)/sft/adapter_model.safetensors $(RUNS)/preferences/pairs.jsonl | install
	$(LAUNCH) recipes/dpo.py --config $(RECIPES)/dpo.yaml --adapter_name_or_path $(<D) \
		--preferences $(RUNS)/preferences --output_dir $(@D)
