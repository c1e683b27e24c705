#!/usr/bin/env bash
# First contact with a GPU: correctness and speed of every kernel, the most valuable first, one JSON line a finding.
#
#   bench/gpu.sh first                  in 120 s
#   bench/gpu.sh all                    in 480 s, with more shapes, all tests and compute-sanitizer
#   bench/gpu.sh first --quick          tiny sizes, on any machine, to test this script
#   WHEELS=folder bench/gpu.sh all      takes packages that the machine lacks from the wheels in that folder
#
# The Python needs torch, Triton and pytest, nothing else; nothing is installed into it. Lines go to stdout, to
# bench/results/gpu-MODE.jsonl and, where it is set, to the folder $OUT. bench/gpu.py says what a line holds and what
# the exit status means. PYTHON is the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

if [[ -n "${WHEELS:-}" ]]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    # A folder on the path and not an environment: the machine's Python may lie in one, which a second would not see.
    # One wheel at a time, without dependencies: torch stays the machine's, and a wheel that does not fit is named.
    for wheel in "$WHEELS"/*.whl; do
        "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheel" ||
            echo "not installed: $wheel" >&2
    done
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 AUTOREGEMBED_NATIVE=0
status=0
"$PYTHON" -m bench.gpu "${@:-first}" || status=$?
exit "$status"
