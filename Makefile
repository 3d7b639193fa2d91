# Two commands: `make train` and `make test`. `make help` lists all.
#   make train RECIPE=recipes/tiny.toml MODEL=DIR DATA=SOURCE ARGS="--steps 20 --group 4"
#   make test PYTHON=python3 VENV=        # use that Python as it is, install nothing

PYTHON ?= python3
VENV ?= .venv
RECIPE ?= recipes/tiny.toml
GPUS ?= 1
ifeq ($(VENV),)
  PY := $(PYTHON)
  READY :=
else
  PY := $(VENV)/bin/python
  READY := $(VENV)/ready
endif
# A run that is asked to stop finishes its step and saves; torchrun would wait for that 30 s only.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT ?= 600
RUN := $(PY) $(if $(filter-out 1,$(GPUS)),-m torch.distributed.run --nproc_per_node=$(GPUS))

ROWS = $(if $(DATA),--data "$(DATA)") $(if $(IMAGES),--images "$(IMAGES)")
SOURCES = $(if $(MODEL),--model "$(MODEL)") $(ROWS)

.PHONY: help train sft distill eval test test-all bench tiny tiny_boxes tiny_forms controls paper vlmr1 field pictures clean .venv
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z0-9_.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

train: $(READY)  ## train by RECIPE, of one stage or several (default recipes/tiny.toml); ARGS="--key value"
	$(RUN) run.py $(RECIPE) $(SOURCES) $(ARGS)

sft: RECIPE = recipes/sft_clevr_r1.toml
sft: $(READY)  ## supervised fine-tuning by RECIPE (default recipes/sft_clevr_r1.toml)
	$(RUN) sft.py $(RECIPE) $(SOURCES) $(ARGS)

distill: $(READY)  ## a set to learn, by the teacher MODEL: STEP=describe, query, sample, bridge, formal, caption, rewrite, judge, letters, verify or pack
	$(PY) distill.py $(STEP) $(if $(MODEL),--teacher "$(MODEL)") $(ROWS) $(ARGS)

eval: $(READY)  ## evaluate MODEL (default: the newest run) on DATA (default: world:A), IMAGES=folder
	$(RUN) evaluate.py $(SOURCES) $(ARGS)

# Where pytest-xdist is there, tests run in a process for each core, of one thread each; those of a file
# stay together, for what they share. ARGS="-n 0": all in one process.
CORES := --numprocesses=auto --maxprocesses=4 --dist=loadfile
BESIDE = $(if $(shell $(PY) -c "import xdist" 2>&1),,$(CORES))
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest $(BESIDE)

test: $(READY)  ## style and the whole test suite, on the CPU
	$(if $(VENV),$(PY) -m ruff check .)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(READY)  ## the slow tests too
	$(if $(VENV),$(PY) -m ruff check .)
	$(PYTEST) $(ARGS)

bench: $(READY) $(if $(PEERS),.venv-peers/ready)  ## a step's seconds beside a naive twin's; PEERS=1: beside TRL's too (.venv-peers)
	$(PY) bench.py $(if $(PEERS),--peers true) $(ARGS)

.venv-peers/ready: bench/requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

tiny: $(READY)  ## build the tiny checkpoint anew, from nothing, into tiny/ (about 35 minutes)
	$(PY) tiny.py --out tiny --replace

tiny_boxes: $(READY)  ## build the second one, which points at things, into tiny_boxes/ (about 35 minutes)
	$(PY) tiny_boxes.py --out tiny_boxes --replace

tiny_forms: $(READY)  ## build the third one, which answers one question in four forms, into tiny_forms/ (about 6 minutes)
	$(PY) tiny_forms.py --out tiny_forms --replace

controls: $(READY)  ## the control runs of README's picture: more flawed SFT, clean SFT, format only
	$(PY) controls.py $(ARGS)

paper: $(READY)  ## R1-V's claims in miniature: SFT on answers, on thoughts, and GRPO (14 minutes a seed)
	$(PY) paper.py $(ARGS)

vlmr1: $(READY)  ## VLM-R1's claims in miniature: boxes by GRPO and by SFT, detection with and without a penalty
	$(PY) vlmr1.py $(ARGS)

field: $(READY)  ## eight systems in miniature, from one start: what each changes against plain GRPO
	$(PY) field.py $(ARGS)

pictures: $(READY)  ## README's pictures, from the world and from bench/controls.json
	$(PY) world.py --sheet docs/worlds.png
	$(PY) controls.py --plot_only
	$(PY) paper.py --plot_only
	$(PY) vlmr1.py --plot_only
	$(PY) field.py --plot_only

.venv: $(READY)  ## only install
$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:  ## remove runs and cached pictures (not .venv)
	rm -rf runs .cache .pytest_cache .ruff_cache
