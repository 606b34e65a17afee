#!/usr/bin/env bash
# pack.sh [FOLDER]: collect the wheels of packages.txt for CPython 3.12 on Linux x86-64, to take along
# to a machine without a network. FOLDER is build/gpu/wheels by default, where run.sh looks for them.
# PYTHON is the one whose pip is used, by default that of .venv.
set -euo pipefail
folder=$(realpath -m "${1:-$(dirname "$0")/../../build/gpu/wheels}")
cd "$(dirname "$0")/../.."
limit_mb=60

python=${PYTHON:-.venv/bin/python}
platforms=()
for version in 2_5 2_12 2_17 2_24 2_26 2_27 2_28 2_31 2_34; do
    platforms+=(--platform "manylinux_${version}_x86_64")
done
rm -rf "$folder"
mkdir -p "$folder"
# --no-deps: what the machine has, torch above all, must not come along.
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 \
    -c constraints.txt -r tests/gpu/packages.txt -d "$folder"
kb=$(du -sk --apparent-size "$folder" | cut -f1)
echo "$(find "$folder" -name '*.whl' | wc -l) wheels, $kb KiB, in $folder"
if ((kb > limit_mb * 1000)); then
    echo "that is more than $limit_mb MB" >&2
    exit 1
fi
