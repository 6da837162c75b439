# The README's two commands, and one for SGLang. Each makes its own virtual environment and needs nothing but Python.
PYTHON ?= python3
INSTALL = pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALL_SGLANG = pip install --quiet --disable-pip-version-check --constraint constraints-sglang.txt

.PHONY: demo test test-full-size test-sglang clean

demo: .venv-demo/ready
	.venv-demo/bin/paravae demo --output demo

test: .venv-test/ready
	.venv-test/bin/python -m pytest

test-full-size: .venv-test/ready
	.venv-test/bin/python -m pytest -m slow tests/test_trt_build.py

.venv-demo/ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python -m $(INSTALL) --editable .
	touch $@

.venv-test/ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/python -m $(INSTALL) --editable '.[test]'
	touch $@

# SGLang without its GPU packages; its wheel needs Python 3.11, the torchvision that imports without CUDA has none newer
test-sglang: .venv-sglang/ready
	.venv-sglang/bin/python -m pytest tests/sglang

.venv-sglang/ready: setup.py constraints-sglang.txt requirements-sglang.txt
	$(PYTHON) -m venv .venv-sglang
	.venv-sglang/bin/python -m $(INSTALL_SGLANG) --editable . --requirement requirements-sglang.txt
	.venv-sglang/bin/python -m $(INSTALL_SGLANG) --no-deps sglang torchvision
	touch $@

clean:
	rm -rf .venv-demo .venv-test .venv-sglang demo
