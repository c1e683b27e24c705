#!/usr/bin/env bash
# Tests of the kernels, compute-sanitizer, all benchmarks and their targets on a GPU, in one call and one JSON.
#
#   bench/gpu.sh                        on a machine with a GPU and the library installed
#   WHEELS=folder bench/gpu.sh          first creates .venv-gpu from the wheels in that folder, without network
#   QUICK=1 bench/gpu.sh                tiny sizes, on any machine, to test this script
#
# PYTHON is the interpreter, LIMIT the time limit of the whole run in seconds (480). A failed part does not stop the
# others; the last line names it, and the exit status is 1.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-480}
QUICK=${QUICK:-}
begin=$SECONDS
failed=()

if [[ -n "${WHEELS:-}" ]]; then
    "$PYTHON" -m venv --system-site-packages .venv-gpu || exit 1
    PYTHON=$PWD/.venv-gpu/bin/python
    "$PYTHON" -m pip install --quiet --no-index --find-links "$WHEELS" "$WHEELS"/*.whl || exit 1
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} AUTOREGEMBED_NATIVE=0
device=$("$PYTHON" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")') || exit 1
if [[ $device == cpu && -z $QUICK ]]; then
    echo "no GPU found; QUICK=1 runs everything at tiny sizes on the CPU" >&2
    exit 2
fi
name=$("$PYTHON" -c 'import re, torch; d = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
print(re.sub(r"\W+", "-", d.lower()))')
results=bench/results
if [[ -n $QUICK ]]; then results=$(mktemp -d); fi
mkdir -p "$results"

part() { # name, percentage of the remaining time, command
    local title=$1 left=$((LIMIT - SECONDS + begin)) share=$2
    shift 2
    if ((left < 10)); then
        echo "== $title: no time left"
        failed+=("$title (no time left)")
        return
    fi
    echo "== $title (at most $((left * share / 100)) s)"
    timeout "$((left * share / 100))" "$@" || failed+=("$title (status $?)")
}

kernels=(tests/test_triton_*.py tests/test_{linear_logprob,alignment_loss,info_nce,packing}.py)
tests=(-q -x -m "not cpu_only" --import-mode=importlib "${kernels[@]}")
if [[ -n $QUICK ]]; then tests=(-q --import-mode=importlib tests/test_bench.py -k compare); fi
part "tests" 40 "$PYTHON" -m pytest "${tests[@]}"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
if [[ -n $sanitizer && $device == cuda ]]; then
    for tool in memcheck racecheck; do
        part "compute-sanitizer $tool" 25 "$sanitizer" --tool "$tool" --error-exitcode 9 \
            "$PYTHON" -m autoregembed bench --suite ops --quick --rounds 1 --device cuda
    done
else
    echo "== compute-sanitizer: not available here"
fi
part "benchmarks" 95 "$PYTHON" -m autoregembed bench --suite all --device "$device" ${QUICK:+--quick} \
    --limit $(((LIMIT - SECONDS + begin) * 80 / 100)) \
    --json "$results/$name.json" --report "$results/$name.html"
part "targets" 100 "$PYTHON" -m bench.targets "$results/$name.json" ${QUICK:+--any-device}

echo "== $((SECONDS - begin)) s; results in $results/$name.json"
printf '== failed: %s\n' "${failed[@]:-nothing}"
[[ ${#failed[@]} == 0 ]]
