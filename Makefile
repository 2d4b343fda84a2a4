PYTHON ?= python3
BIN = .venv/bin
READY = .venv/ready

.PHONY: help train test soak lint study study-quick

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /: /' | awk -F': ' '{printf "make %-12s %s\n", $$1, $$2}'

# The demonstration: 64x64 crops of photographs that ship with scikit-image, minutes on 2 CPU cores. After a stop it
# goes on; once it is finished it starts anew.
train: $(READY)  ## train on photographs that ship with a dependency (set up on first use)
	$(BIN)/python vqvae.py --recipe recommended-photos --dataset photos --hidden-size 64 --batch-size 32 --num-epochs 9 \
	    --output-folder make-train $$([ -e models/make-train/results.json ] && echo --overwrite || echo --resume)

study: $(READY)  ## every question of RESULTS.md: make study DATA=folder PHOTOS=folder; days, goes on where it stopped
	PYTHON=$(BIN)/python ./study/study.sh $(DATA) $(PHOTOS)

study-quick: $(READY)  ## the same in small on the photographs, under 20 minutes on 2 CPU cores
	PYTHON=$(BIN)/python ./study/study.sh --quick

test: $(READY)  ## run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

soak: $(READY)  ## kill each training script 50 times at random moments, and resume it
	SOAK_KILLS=50 $(BIN)/python -m pytest tests/test_soak.py

lint: $(READY)  ## check the style
	$(BIN)/ruff check .

$(READY): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements-dev.txt
	@touch $@
