#!/usr/bin/env bash
# run.sh tests|bench FOLDER [ARGUMENT...]: run the tests that are marked cuda, or the benchmark, and
# write the results into FOLDER as JSON and text. FOLDER need not exist.
#
# Needs Python 3.12 with torch, pytest, hypothesis and numpy (PYTHON, by default python3), and the
# wheels that pack.sh has collected (WHEELS, by default build/gpu/wheels). Installs nothing, needs no
# network and no virtual environment. Ends within 9 minutes (LIMIT, in seconds). Further arguments
# go to pytest or to bench.py.
set -euo pipefail
usage="usage: tests/gpu/run.sh tests|bench FOLDER [ARGUMENT...]"
what=${1:?$usage} folder=$(realpath -m "${2:?$usage}")
shift 2
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
limit=${LIMIT:-540}
wheels=${WHEELS:-build/gpu/wheels}

mkdir -p "$folder"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" tests/gpu/make_site.py "$wheels" "$site"
# In this order: what is packed, the sources of the plugins, the core, gpu_results.
PYTHONPATH=$site:$(printf '%s:' "$PWD"/plugins/*/)$PWD:$PWD/tests/gpu${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

case $what in
tests)
    # Only ours: what else is installed there may bring plugins of pytest that change the tests.
    export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
    mapfile -t files < <(grep -rl --include='test_*.py' 'pytest\.mark\.cuda' tests plugins | sort)
    command=("$python" -m pytest -p no:cacheprovider -p fundamentallm.testing -p pytest_timeout
        -p gpu_results --results "$folder" --time-limit "$((limit - 30))" --timeout 240
        -m cuda "${files[@]}" "$@")
    ;;
bench)
    command=("$python" tests/gpu/bench.py --out "$folder" "$@")
    ;;
*)
    echo "$usage" >&2
    exit 2
    ;;
esac
# Twenty seconds are left for what is under way to end, and for its results.
timeout --signal INT --kill-after 20 "$((limit - 20))" "${command[@]}" 2>&1 | tee "$folder/$what.log"
