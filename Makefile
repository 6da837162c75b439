# The README's two commands. Each makes its own virtual environment and needs nothing but Python.
PYTHON ?= python3
INSTALL = pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-full-size clean

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

clean:
	rm -rf .venv-demo .venv-test demo
