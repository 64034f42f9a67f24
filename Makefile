# Procession: make alone lists the targets.

.DEFAULT_GOAL := help
SHELL := /bin/bash

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)
GOBUILD := CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)'
ARCHES  ?= amd64 arm64
FUZZTIME ?= 20s

.PHONY: help
help: ## list the targets
	@printf 'Procession. Targets:\n\n'
	@if [ -t 1 ] && [ -z "$$NO_COLOR" ]; then b=$$'\e[1m' o=$$'\e[0m'; fi; grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | \
		sort | awk -F':.*## ' -v b="$$b" -v o="$$o" '{printf "  %s%-14s%s %s\n", b, $$1, o, $$2}'
	@printf '\nFirst time: as root, "make run" here and "make demo" in a second terminal.\n'

.PHONY: build
build: ## build bin/agent, bin/collector and bin/procession for this machine
	@mkdir -p bin
	$(GOBUILD) -o bin/ ./cmd/...

.PHONY: run
run: build ## start collector and agent on this machine (as root); state in ./.run, Ctrl-C stops
	@hack/run.sh

.PHONY: demo
demo: bin/demo ## do harmless things that raise alerts, and check that each arrived (beside make run)
	@bin/demo --expect .run/alerts.ndjson

.PHONY: latency
latency: bin/demo ## how long alerts take from the kernel to the collector's disk, p50 and p99 of 500 (beside make run)
	@bin/demo --expect .run/alerts.ndjson --wait 60s --measure 500

.PHONY: bin/demo
bin/demo:
	@mkdir -p bin
	@CGO_ENABLED=0 go build -trimpath -o bin/demo ./test/demo

.PHONY: test
test: deps ## run every test with the race detector, on the real kernel when root
	@hack/test.sh

.PHONY: race
race: test ## the same as test: everything runs with the race detector

.PHONY: fuzz
fuzz: ## run each fuzz target for FUZZTIME (default 20s)
	@hack/fuzz.sh $(FUZZTIME)

.PHONY: difftest
difftest: ## hold the rule engine against CEL: a million pairs of rules and events, with missing facts
	go test ./internal/policy/match -run 'Agrees?WithCEL' -count=1 -v -pairs 1000000 -seed $${SEED:-$$RANDOM} -timeout 30m

.PHONY: lint
lint: ## gofmt, vet, staticcheck, shell syntax
	@hack/lint.sh

.PHONY: cluster-up
cluster-up: deps-e2e ## start a real one-node Kubernetes on this machine, as root (the first time builds it)
	@go run ./test/e2e/clusterctl up

.PHONY: cluster-down
cluster-down: ## stop it and take back what it did to the machine
	@go run ./test/e2e/clusterctl down

.PHONY: e2e
e2e: deps-e2e ## everything on a real cluster, as root: install, attack, break, upgrade, uninstall (E2EFLAGS="-run ...")
	@hack/e2e.sh

.PHONY: deps-e2e
deps-e2e: ## install what the test cluster needs from Debian
	@hack/deps-e2e.sh

.PHONY: vmtest
vmtest: ## run the capture tests on Debian's kernels in emulation (KERNELS="5.10-amd64 ..."; DOCS=1 as with bench), as root
	@hack/vmtest.sh $(KERNELS)
	@$(if $(DOCS),hack/section.sh docs/capture.md kernels bin/kernels.md)

.PHONY: bench
bench: build ## the agent beside its peers on the same load, as root (BENCHFLAGS=--help explains; DOCS=1: into docs/capture.md)
	@go run ./test/bench -markdown bin/bench.md $(BENCHFLAGS)
	@$(if $(DOCS),hack/section.sh docs/capture.md bench bin/bench.md)

.PHONY: bench-delivery
bench-delivery: build ## what delivery costs: 5,000 agents, alerts/s beside a bare loop, 10,000 hostile connections; as root, 6 minutes (DELIVERYFLAGS=-help explains)
	@go run ./test/delivery $(DELIVERYFLAGS)

.PHONY: proof
proof: build ## what is promised of the agent, measured: every exec told rightly, memory, idle CPU; as root (DOCS=1 as with bench)
	@rm -f bin/proof.md; go run ./test/bench -proof -markdown bin/proof.md $(PROOFFLAGS); status=$$?; \
		$(if $(DOCS),hack/section.sh docs/capture.md proof bin/proof.md &&) exit $$status

.PHONY: storm
storm: ## floods of forks, vforks and threads, 30 s each (PROCESSION_FLOOD), from the kernel to a collector, as root; figures in bin/storm.md (DOCS=1 as with bench)
	@mkdir -p bin; rm -f bin/storm.md
	PROCESSION_NO_SKIP=1 PROCESSION_FLOOD=$${PROCESSION_FLOOD:-30s} PROCESSION_FLOOD_OUT=$(CURDIR)/bin/storm.md go test -count=1 -run '^TestFlood$$' -v ./internal/agent; status=$$?; \
		$(if $(DOCS),hack/section.sh docs/capture.md storm bin/storm.md &&) exit $$status

.PHONY: chaos
chaos: ## break everything for SECONDS (60) and compare spools, store and sinks, as root (SEED, FAULTS, STORE=sqlite|postgres)
	@mkdir -p bin && go build -o bin/chaos ./test/chaos
	@bin/chaos -seconds $(or $(SECONDS),60) -seed $(or $(SEED),0) -faults $(or $(FAULTS),all) -store $(or $(STORE),sqlite)

.PHONY: generate
generate: ## make every generated file anew
	@hack/generate.sh

.PHONY: dist
dist: dist-linux ## static binaries for every architecture, in dist/, and for authors on macOS
	@mkdir -p dist/darwin-arm64 && echo dist/darwin-arm64 && \
		GOOS=darwin GOARCH=arm64 $(GOBUILD) -o dist/darwin-arm64/ ./cmd/agent ./cmd/procession

.PHONY: dist-linux
dist-linux:
	@for a in $(ARCHES); do mkdir -p dist/linux-$$a && echo "dist/linux-$$a" && \
		GOOS=linux GOARCH=$$a $(GOBUILD) -o dist/linux-$$a/ ./cmd/agent ./cmd/collector ./cmd/procession || exit 1; done

.PHONY: image
image: dist-linux ## OCI images of agent and collector in dist/*.oci.tar, without any registry (needs buildah)
	@VERSION=$(VERSION) hack/image.sh $(ARCHES)

.PHONY: deps
deps: ## install what tests and tools need from Debian (as root), or name what is missing
	@hack/deps.sh

.PHONY: clean
clean: ## remove built files (not ./.run)
	rm -rf bin dist
