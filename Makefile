# Needs python3 with venv and pip; everything else is installed into .venv.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.requirements-installed
DENSE := $(VENV)/.requirements-dense-installed
EXTRA := $(VENV)/.requirements-extra-installed
# Every version, of what the requirements need too. Empty: the newest that they allow.
CONSTRAINTS := constraints.txt
# The operators of onedl-mmcv are compiled here, once: 5 to 15 minutes. Without debug symbols it takes half the time and memory.
BUILD := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" MMCV_WITH_OPS=1 MAX_JOBS=$${MAX_JOBS:-2} CFLAGS="-g0 $$CFLAGS" CXXFLAGS="-g0 $$CXXFLAGS"
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check $(addprefix --constraint ,$(CONSTRAINTS))
export PYTHONDONTWRITEBYTECODE := 1

DIGITS := data/digits
DEMO := output/demo
DEMO_MODEL := --model alt_gvt_demo --data-path $(DIGITS) --input-size 32
# Mirrored or mixed digits are not digits, so the augmentations that would make them are off.
DEMO_TRAINING := --epochs 20 --warmup-epochs 0 --lr 4e-3 --hflip 0 --mixup 0 --cutmix 0 --aa "" --color-jitter 0 --reprob 0

# $(call learn,CONFIG,NAME,SCORES): train, score and draw, from inside segmentation/ or detection/
define learn
../$(RUN) train.py $(1) --work-dir ../output/$(2) --seed 0 --no-validate --overwrite && \
../$(RUN) test.py $(1) "$$(cat ../output/$(2)/last_checkpoint)" --work-dir ../output/$(2) --eval $(3) --show-dir ../output/$(2)/images
endef

.DEFAULT_GOAL := help
.PHONY: help install dense extra demo demo-dense web test test-fast test-offline test-matrix faults soak bench lint audit constraints
.NOTPARALLEL: # one pip at a time

help:
	@echo "make demo       install, train a small Twins on handwritten digits, evaluate it, draw what it says (about 3 minutes)"
	@echo "make demo-dense the same for a segmentor and a detector: digits on photographs, scores and images (4 to 7 minutes after make dense and make demo)"
	@echo "make web        after make demo: a local page that shows what its model sees, and the models of make demo-dense if they are there"
	@echo "make test       install, run every test"
	@echo "make test-fast  install, run the everyday tests (5 to 10 minutes, most of them where make dense ran)"
	@echo "make test-offline the same without a network"
	@echo "make test-matrix install other versions of Python and torch that are to be had, run the everyday tests on each (10 minutes each)"
	@echo "make faults     install, kill, fill, damage and deceive runs in every way that tests/faults knows (25 to 40 minutes)"
	@echo "make soak       install, watch the memory, files and threads of a run of 5,000 updates (4 to 6 minutes)"
	@echo "make bench      install, check that ours is no slower than timm's model of the same weights (about 5 minutes)"
	@echo "make dense      install what segmentation and detection need as well (compiles for 5 to 15 minutes)"
	@echo "make extra      install what the optional tools need as well: export, Grad-CAM, the page (about a minute)"
	@echo "make lint       install, check style and the README's tables"
	@echo "make install    only install, into .venv, the versions of constraints.txt"
	@echo "make constraints write constraints.txt again: the newest versions that the requirements allow (10 to 20 minutes)"
	@echo "make audit      look for risky code in ours, and with a network for known vulnerabilities in what is installed"

install: $(INSTALLED)

$(INSTALLED): requirements.txt requirements-dev.txt $(CONSTRAINTS)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) --requirement requirements.txt --requirement requirements-dev.txt
	touch $@

# First what builds, at its pinned versions, then the rest: without isolation, because the build imports the torch that is here.
dense: $(DENSE)

$(DENSE): requirements-dense.txt $(INSTALLED)
	$(PIP) --constraint requirements-dense.txt setuptools wheel ninja psutil
	$(BUILD) $(PIP) --no-build-isolation --requirement requirements.txt --requirement requirements-dense.txt
	touch $@

extra: $(EXTRA)

$(EXTRA): requirements-extra.txt $(INSTALLED)
	$(PIP) --requirement requirements.txt --requirement requirements-extra.txt
	touch $@

demo: install
	$(RUN) -m tools.digits $(DIGITS)
	$(RUN) main.py $(DEMO_MODEL) $(DEMO_TRAINING) --output_dir $(DEMO) --overwrite
	$(RUN) main.py $(DEMO_MODEL) --eval --resume $(DEMO)/checkpoint_best.pth
	$(RUN) -m tools.plot_run $(DEMO) --data-path $(DIGITS) --output $(DEMO)/demo.png
	@echo
	@echo "images and labels    $(DIGITS)/{train,val}/CLASS/*.png"
	@echo "weights              $(DEMO)/checkpoint_best.pth"
	@echo "each epoch's figures $(DEMO)/log.txt"
	@echo "curves, predictions  $(DEMO)/demo.png"
	@echo "next: your own images, in folders train/CLASS and val/CLASS:"
	@echo "  $(RUN) main.py --model alt_gvt_small --data-path FOLDER --batch-size 32 --output_dir output/mine"

demo-dense: dense
	test -f $(DEMO)/checkpoint_best.pth || $(MAKE) demo
	$(RUN) -m tools.scenes --ade segmentation/data/digits --coco detection/data/digits
	cd segmentation && $(call learn,configs/small/fpn_alt_gvt_demo_digits.py,segmentor,mIoU)
	cd detection && $(call learn,configs/small/mask_rcnn_alt_gvt_demo_digits.py,detector,bbox segm --show-score-thr 0.5)
	@echo
	@echo "images with labels   segmentation/data/digits, detection/data/digits"
	@echo "weights              output/segmentor/iter_600.pth, output/detector/iter_300.pth"
	@echo "truth, predictions   output/segmentor/images, output/detector/images"
	@echo "next: your own images, with a copy of one of these configs"

# What make demo-dense leaves, if it ran.
SEGMENTOR = $(wildcard output/segmentor/iter_600.pth)
DETECTOR = $(wildcard output/detector/iter_300.pth)

web: extra
	$(RUN) -m tools.web --weights $(DEMO)/checkpoint_best.pth --examples $(DIGITS)/val \
		$(if $(SEGMENTOR),--segmentor segmentation/configs/small/fpn_alt_gvt_demo_digits.py $(SEGMENTOR)) \
		$(if $(DETECTOR),--detector detection/configs/small/mask_rcnn_alt_gvt_demo_digits.py $(DETECTOR))

# One process a core, and each file's tests in one of them, because they share what its fixtures made.
PYTEST := $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test: dense extra
	$(PYTEST) --durations 30

test-fast: install
	$(PYTEST) -m "not slow"

# gloo needs the loopback interface.
test-offline: install
	unshare --net --map-root-user sh -c 'ip link set lo up && exec $(PYTEST) -m "not slow"'

test-matrix:
	tests/matrix.sh

faults: install
	$(RUN) tests/faults/all.py

soak: install
	$(RUN) tests/faults/soak.py

# A ratio below which ours counts as slower: measurements of equal speeds differ by a few percent. Compiling takes most of
# the time, so that it is the small model that is compiled.
LEAST := 0.95

bench: install
	$(RUN) -m tools.benchmark --models alt_gvt_small pcpvt_small_v0 --tasks inference training --modes eager --dtype float32 bfloat16 \
		--batch-size 4 --repeats 9 --warmup 2 --no-memory --least $(LEAST)
	$(RUN) -m tools.benchmark --models alt_gvt_demo --modes compiled freezing --dtype float32 bfloat16 --batch-size 8 --repeats 25 --no-memory --least $(LEAST)

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m tools.readme_tables --check
	$(RUN) -m tools.ablation --table --check

# The auditors have an environment of their own, so that tests never run with what they need.
# B108: /dev/shm, which is only asked for its size.
AUDIT := .venv-audit
# pip 20.0 has known vulnerabilities: a mirror without them would make pip-audit find none.
ONLINE := import json, urllib.request as web; assert json.load(web.urlopen("https://pypi.org/pypi/pip/20.0/json", timeout=10))["vulnerabilities"]

audit: install
	test -x $(AUDIT)/bin/python || $(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check bandit==1.9.4 pip-audit==2.10.1
	$(AUDIT)/bin/bandit --quiet -ll --skip B108 --recursive *.py dense detection gvt_ops segmentation tools training
	@if $(AUDIT)/bin/python -c '$(ONLINE)' 2>/dev/null; \
		then $(AUDIT)/bin/pip-audit --path $$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
		else echo "pip-audit: skipped, its database cannot be reached"; fi

# In a new environment, which stays for a look.
constraints:
	rm -rf .venv-constraints
	$(MAKE) VENV=.venv-constraints CONSTRAINTS= dense extra
	{ grep '^#' constraints.txt; .venv-constraints/bin/python -m pip freeze --all --exclude pip --exclude torch \
		--exclude torchvision | grep -Ev '^(nvidia|cuda)-'; } > .venv-constraints/constraints.txt
	mv .venv-constraints/constraints.txt constraints.txt
	git diff --stat constraints.txt
