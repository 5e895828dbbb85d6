# make demo    the main job on the music in demo/, on a CPU, some minutes
# make test    all tests
# make setup   .venv from requirements.txt (both of the above do it when needed)
PYTHON ?= python3
PY = .venv/bin/python
SMALL = --width 0.25 --batch-size 48 --max-steps 150 --lr 1e-3

.PHONY: demo test setup clean

setup: .venv/ready

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

demo: setup
	$(PY) prepare.py --data demo
	$(PY) pretrain.py --data demo $(SMALL) --save-every 25 --probe-every 25 --out runs/demo
	$(PY) training/journal.py runs/demo
	$(PY) evaluate.py --ckpt runs/demo/encoder.pt --random
	$(PY) transfer.py --results runs/demo/evaluate-demo.json --plots runs/demo/plots
	$(PY) transfer.py --ckpt this-demo=runs/demo/encoder.pt shipped=demo/encoder.pt --data demo --random \
	  --out runs/demo/shipped.json
	$(PY) -m library index demo/audio --library runs/demo/library.clmr
	$(PY) -m library similar demo/audio/marino-theme-1.ogg --n 5 --library runs/demo/library.clmr
	@echo
	@echo "What this shows: every stage works on real music. What it cannot show: how good the"
	@echo "method is. 37 test excerpts put some 16 points of chance around each accuracy, and a class"
	@echo "is one game's soundtrack as much as one author. The shipped encoder (demo/MODEL_CARD.md)"
	@echo "saw more music, some of these authors' among it, without labels."
	@echo "Files: runs/demo/encoder.pt encoder.ts tagger.ts curves.png plots/ evaluate-demo.json"
	@echo "Next:  $(PY) -m library index YOUR-MUSIC"
	@echo "       $(PY) prepare.py --data folder --root YOUR-MUSIC --name mine"

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal tests

clean:
	rm -rf data/demo runs/demo
