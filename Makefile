# Two commands on a fresh machine: make demo, make test. Each makes .venv and installs what it needs, once.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
# rewrite in your shell to point at the real data sets; tests that need them skip with the reason otherwise
export HOLDFAST_DATA ?= $(abspath $(wildcard ../shared/data))

.PHONY: help demo test check bench real tax stories alignguard replay drift refusals results docs demo-docs clean
help: ## what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/'

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade-strategy only-if-needed -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/.installed ## tune small real models offline and show what each method kept (five to eight minutes)
	$(BIN)/holdfast demo

test: check ## lint, types, import rules, then every test
	$(BIN)/python -m pytest -n $${TEST_PROCESSES:-2} --dist worksteal

check: .venv/.installed ## lint, format, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.installed ## every benchmark, then the pages; goes on where it was stopped (three and a half hours, 14 GiB; BENCH=--quick tries it)
	$(BIN)/python benchmarks/run.py $(BENCH)
	$(MAKE) docs

real: .venv/.installed ## stories260K on WikiSQL and GSM8K, plain LoRA against TMKL, three seeds (half an hour; needs HOLDFAST_DATA)
	$(BIN)/python -m studies.real_weights run
	$(BIN)/python -m studies.real_weights page

tax: .venv/.installed ## what learning to refuse costs, at equal refusal: every arm and pipeline, three seeds (about an hour on two cores)
	$(BIN)/python -m studies.alignment_tax run --pipeline sft dpo sft_dpo sft_large
	$(BIN)/python -m studies.alignment_tax cost --pipeline sft sft_large
	$(BIN)/python -m studies.alignment_tax page

stories: .venv/.installed ## stories260K learns to refuse: OGPSA against replay and a weaker adapter, three seeds (needs HOLDFAST_DATA)
	$(BIN)/python -m studies.stories_safety run
	$(BIN)/python -m studies.stories_safety page

alignguard: .venv/.installed ## AlignGuard-LoRA's ablation: every term alone and left out, rivals, controls; three seeds (half an hour)
	$(BIN)/python -m studies.alignguard run
	$(BIN)/python -m studies.alignguard cost
	$(BIN)/python -m studies.alignguard page

replay: .venv/.installed ## what self-replay keeps in the lab at equal learning, and where it stops; three seeds (two hours on two cores)
	$(BIN)/python -m studies.self_replay run
	$(BIN)/python -m studies.self_replay cost
	$(BIN)/python -m studies.self_replay page
	$(BIN)/python -m studies.pool_limits run
	$(BIN)/python -m studies.pool_limits page

drift: .venv/.installed ## what holdfast drift finds where drift was planted, and where there is none (half an hour; needs HOLDFAST_DATA)
	$(BIN)/python -m studies.drift_found run

refusals: .venv/.installed ## how well instruments tell refusals, against people's labels (two minutes; needs HOLDFAST_DATA)
	$(BIN)/python -m studies.refusal_labels run
	$(BIN)/python -m studies.refusal_labels page

results: .venv/.installed ## the papers, combinations, the default and the law at equal learning: run what is missing, write the pages (four hours on two cores; needs HOLDFAST_DATA)
	$(BIN)/python -m studies.results prepare
	$(BIN)/python -m studies.results run
	$(BIN)/python -m studies.results page

docs: .venv/.installed ## write the README's tree and every page of numbers from its ledger
	$(BIN)/python scripts/tree.py
	$(BIN)/python scripts/demo_page.py
	$(BIN)/python scripts/bench_tables.py
	$(BIN)/python -m scripts.speed_page
	$(BIN)/python scripts/memory_page.py

demo-docs: .venv/.installed ## run the demo afresh with three seeds and make its ledger the one that the docs show
	$(BIN)/holdfast demo --fresh --seeds 3 --output runs/demo-docs
	mkdir -p docs/results/demo && cp runs/demo-docs/ledger.jsonl docs/results/demo/ledger.jsonl
	$(MAKE) docs

clean: ## remove the environment and every cache
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
