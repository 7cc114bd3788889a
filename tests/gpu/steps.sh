# Sourced by the run_*.sh, which set OUT (absolute) and LIMIT, the seconds for all steps.
set -u
STATUS=0
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" CUDA_MODULE_LOADING=EAGER
# NVLink multicast stays off: a program that dies while it uses it can take the GPUs out of service.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1

left() { echo $((LIMIT - SECONDS)); }

step() { # NAME SECONDS COMMAND...: its output goes to OUT/NAME.log; one that hangs is ended, and the next one runs
    [[ " ${STEPS:-$1} " == *" $1 "* ]] || return 0
    local begin=$SECONDS room status
    room=$(left)
    if [ "$room" -lt 5 ]; then
        echo "$1: not run: no time was left" | tee -a "$OUT/$1.log"
        STATUS=1
        return 1
    fi
    timeout -k 5 $((room < $2 ? room : $2)) "${@:3}" >>"$OUT/$1.log" 2>&1
    status=$?
    echo "$1: status $status, $((SECONDS - begin)) s: $(tail -1 "$OUT/$1.log")"
    [ $status = 0 ] || STATUS=1
    return $status
}

tests() { # NAME SECONDS WORKERS FILE [PYTEST_ARGUMENT ...]
    step "$1" "$2" python3 -m pytest -q -rA -p no:cacheprovider -o addopts= --durations=0 -n "$3" \
        "tests/gpu/$4" "${@:5}"
}

processes() { # SECONDS: faults beside what must go right, since ranks mostly start; then alone what tells times
    local wrong="faults or killed or exits" times="replay or host_time" faults
    tests faults "$1" 0 test_processes.py -k "$wrong" &
    faults=$!
    tests processes "$1" 0 test_processes.py -k "not ($wrong or $times)"
    wait "$faults" || STATUS=1
    tests replays 90 0 test_processes.py -k "$times"
}
