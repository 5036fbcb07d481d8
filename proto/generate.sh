#!/usr/bin/env bash
# Generates the Python stubs of every .proto into the folder $2, with the tools of the virtual environment $1.
set -euo pipefail
venv=$(realpath "$1")
out=$(realpath "$2")
cd "$(dirname "$0")"
PATH="$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc -I . \
    --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" \
    cluster/v1/*.proto
