#!/usr/bin/env bash
# Makes every generated file of the repository. The Go plugins are pinned in
# tools/go.mod; protoc comes from Debian (protobuf-compiler).
set -euo pipefail
cd "$(dirname "$0")/.."
command -v protoc >/dev/null || { echo "generate: protoc is missing: apt-get install protobuf-compiler" >&2; exit 1; }
bin=$PWD/bin/tools
mkdir -p "$bin"
(cd tools && go build -o "$bin/" google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc \
	sigs.k8s.io/controller-tools/cmd/controller-gen)
"$bin/controller-gen" object paths=./api/v1alpha1
"$bin/controller-gen" crd paths=./api/v1alpha1 output:crd:dir=deploy/helm/procession/crds
PATH=$bin:$PATH protoc -I api/proto --go_out=api/proto --go_opt=paths=source_relative \
	--go-grpc_out=api/proto --go-grpc_opt=paths=source_relative \
	procession/v1/alert.proto procession/v1/ingest.proto procession/v1/query.proto

# Reference pages that are drawn from the code.
go test ./internal/policy/celenv -run Reference -update >/dev/null
go test ./internal/procconn/recorder -run TestFormatDoc -update >/dev/null
go test ./internal/recording -run TestFormatPage -update >/dev/null
go test ./internal/agent -run TestMetricsPage -update >/dev/null
go test ./internal/collector -run TestMetricsPage -update >/dev/null
