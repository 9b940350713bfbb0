#!/usr/bin/env bash
# Table 2 on an accelerator, in calls that each end within LIMIT seconds; the next one goes on.
#
#     DATA=DIR OUT=DIR [LIMIT=570] [PYTHON=python] bash benchmarks/gpu.sh
#
# DATA holds cifar10.npz or a TFDS folder; OUT must still be there at the next call. What is finished is
# skipped, and a run that the limit kills goes on from its last checkpoint. Exit status: 0 when all is
# done, 75 ("try again") when the time was up.
set -uo pipefail
: "${DATA:?a folder with cifar10.npz}" "${OUT:?a folder for the results}"
deadline=$((SECONDS + ${LIMIT:-570}))
python=${PYTHON:-python}
mkdir -p "$OUT"

stage() {
    local left=$((deadline - SECONDS))
    ((left > 10)) || exit 75
    echo "== $* (at most $left s)"
    timeout --signal=KILL "$left" "$python" -m "$@"
    local status=$?
    # Killed, and not because the time was up: by the system, for memory, say.
    ((status == 137 && SECONDS >= deadline - 1)) && exit 75
    ((status == 0)) || exit "$status"
}

table2() {
    stage benchmarks.table2 --data-dir "$DATA" --out "$OUT/table2" --save-every 20 --dtype bfloat16 \
        --epochs 30 "$@"
}

# Short schedules need learning rates of their own: hence the grid, on the validation images.
table2 --columns cifar10/resnet20 --seeds 3 --grid
table2 --columns cifar10/resnet18 --seeds 1 --grid
# What the device gives, and whether several seeds at once are worth it. Cannot go on where it ended:
# give it a LIMIT that it fits in.
for model in resnet20 resnet18; do
    [[ -e $OUT/throughput_$model.json ]] ||
        stage benchmarks.throughput --model "$model" --out "$OUT/throughput_$model.json"
done
