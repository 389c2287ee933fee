#!/usr/bin/env bash
# What is to be learnt from a machine with a GPU, in one command of at most 8 minutes: what is installed, whether the
# kernels are right (`timm-gsa doctor --check`), how fast operations and models are, where the time of a training step goes.
#
#     tools/measure/device_run.sh [FOLDER]
#
# FOLDER, $OUT or ./device_results if not given, receives a table (.txt), figures (.json), a plot (.png) and messages
# (.log) of each step, and summary.txt. A step that fails or runs out of its time leaves the others theirs. The status is
# 1 if one failed. Any python with torch, timm and tqdm will do, named by PYTHON.
#
# Settings, with what they are if not given: DEVICE (cuda), DTYPE (bfloat16), BATCH (256), SIZE (224), ROUNDS (5),
# MODELS (one of each family), BASE (resnet50), ONLY (operations with this text in their name), LIMIT (470 seconds in all).
set -uo pipefail
out=${1:-${OUT:-device_results}}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$(dirname "$0")/../.." || exit 1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
limit=${LIMIT:-470}
read -ra models <<<"${MODELS:-gsa_resnet50 priorattn_resnet50 san10_patchwise san10_pairwise}"
benchmark=("$python" tools/measure/benchmark.py)
common=(--device "$device" --dtype "${DTYPE:-bfloat16}" --channels-last --batch-size "${BATCH:-256}")
common+=(--img-size "${SIZE:-224}" --rounds "${ROUNDS:-5}" --base "${BASE:-resnet50}" --models "${models[@]}")
failed=0
: >"$out/summary.txt"

# step NAME LATER COMMAND...: runs a command in what is left of the time, but for LATER seconds.
step() {
    local name=$1 left=$((limit - SECONDS - $2 * limit / 470)) start=$SECONDS status
    shift 2
    if [ "$left" -lt 5 ]; then
        echo "$name: no time left" | tee -a "$out/summary.txt"
        return
    fi
    local command=("$@")
    if [ "$2" = tools/measure/benchmark.py ]; then  # ends by itself, with what it has, a while before it is stopped
        command+=(--seconds "$((left > 60 ? left - 40 : left / 3 + 1))")
    fi
    timeout --kill-after=5 "$left" "${command[@]}" >"$out/$name.txt" 2>"$out/$name.log"
    status=$?
    case $status in
        0) status=done ;;
        124 | 137) status="out of time" ;;
        *) status="failed with status $status" failed=1 ;;
    esac
    echo "$name: $status after $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

# figures NAME LATER WHAT...: a step of the benchmark that writes its figures and draws them.
figures() {
    local name=$1 later=$2
    shift 2
    step "$name" "$later" "${benchmark[@]}" "$@" "${common[@]}" --json "$out/$name.json" "${plot[@]}"
}

plot=()
# While kernels are checked, the models are compiled, each by a process: what is timed below finds their code in a cache.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(mktemp -d)}
warm() {
    timeout --kill-after=5 "$((130 * limit / 470))" "${benchmark[@]}" "$1" --compile --no-references --rounds 1 \
        "${common[@]:0:9}" --base "$2" --models "$2" || :
}
{
    for model in "${BASE:-resnet50}" "${models[@]}"; do  # at most four at a time, two of them in training
        warm training "$model" &
        warm inference "$model" &
        [ "$(jobs -rp | wc -l)" -lt 4 ] || { wait -n; wait -n; }
    done
    wait
} >"$out/warm.txt" 2>"$out/warm.log" &
step doctor 340 "$python" -m timm_gsa doctor --device "$device" --check
wait
"$python" -c 'import matplotlib' 2>/dev/null && plot=(--plot "$out/operations.png")
figures operations 270 operations --only "${ONLY:-}"
plot=()
figures training 210 training
figures training_compiled 110 training --compile --no-references
figures inference 80 inference
figures inference_compiled 30 inference --compile --no-references
step profile 0 "${benchmark[@]}" profile "${common[@]}"
cat "$out"/{doctor,operations,training,training_compiled,inference,inference_compiled}.txt 2>/dev/null
exit "$failed"
