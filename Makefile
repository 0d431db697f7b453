# `make help` lists the targets. Each sets up what it needs (tools/environment.sh says which interpreter it takes).
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test chaos checks docs clean

environment := tools/environment.sh

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r target text; do \
		printf '  make %-12s %s\n' "$$target" "$$text"; done

setup:  ## make .venv with the package in it (nothing to do the second time)
	@$(environment)

quickstart:  ## train a small GPT on the standard library's sources, resume it, and let it write: about 5 minutes
	@$(environment) examples_deepspeed/quickstart.sh

test:  ## run the test suite on the CPU
	@$(environment) tools/test.sh

chaos:  ## kill training runs 200 times, resume each and compare every loss bit for bit: 18 to 27 minutes
	@$(environment) tools/chaos.sh

checks:  ## style, types, floors, shell scripts, generated documents
	@$(environment) --checks tools/checks.sh

docs:  ## write docs/flags.md and the list of flags anew
	@$(environment) tools/checks.sh --write-docs

clean:  ## remove what the quickstart made (not .venv)
	rm -rf quickstart
