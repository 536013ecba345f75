#!/usr/bin/env bash
# Packs SkinCAP if there is no shard set yet, trains on it, evaluates, and writes the report:
#
#   export SKINCAP_RAW=/path/to/SkinCAP          # as downloaded, after accepting its terms; see shards/README.md
#   sbatch --partition=gpu --account=mine --nodes=2 --gpus-per-node=4 slurm/train_skincap.sh train.epochs=20
#
# Words after the script are key=value for the recipe. Submit it once: at the time limit, when preempted and when a node is
# lost it saves, goes back into the queue and goes on. Submitting it again resumes too. What a cluster needs besides (an
# environment, modules, proxies) belongs into slurm/site.sh, which is read first where it exists.
#
#SBATCH --job-name=skincap
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# shellcheck source=/dev/null
[[ -f slurm/site.sh ]] && source slurm/site.sh
# shellcheck source=/dev/null
[[ -f .venv/bin/activate ]] && source .venv/bin/activate

RECIPE=${RECIPE:-launch/recipes/skincap.yaml}
ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-launch/accelerate/gpu.yaml}
MAX_CRASHES=${MAX_CRASHES:-10}
PREFLIGHT=${PREFLIGHT:---preflight}
IN_BATCH=${IN_BATCH:-32}

echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, $(date -Is), nodes $SLURM_JOB_NODELIST, words: $*"

# What is wrong in the recipe is wrong before anything is started, and not better after a requeue.
config=$(clipdist train "$RECIPE" "$@" --print-config) || exit 2
value() { sed -n "s/^$1: //p" <<<"$config" | tr -d "'\""; }
run=$(value runs)/$(value name)
data=$(value '  set')

if [[ ! -f $data/manifest.json ]]; then
    python shards/skincap.py "${SKINCAP_RAW:?folder with the downloaded SkinCAP, since $data is not packed yet}" --out "$data"
fi

code=0
# From 22.05 on, srun does not take a task's processors from the job, and binds it to one.
srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 clipdist node "$RECIPE" "$@" --run "$run" --max-crashes "$MAX_CRASHES" \
    --processes-per-node "${PROCESSES_PER_NODE:-0}" --accelerate-config "$ACCELERATE_CONFIG" "$PREFLIGHT" || code=$?
case $code in
    0 | 2 | 75) ;;
    *) clipdist requeue --shared "$(dirname "$run")/.jobs" --max-crashes "$MAX_CRASHES" --code "$code" || code=$? ;;
esac
if ((code == 75)); then
    [[ -e $run/stop ]] && exit 0
    sleep 60 # back in the queue: until SLURM ends this script
fi
((code == 0)) || exit "$code"

# Over the whole gallery, and apart from that in batches of 32, which is what the published study of SkinCAP reports.
in_batch=()
if [[ $(value objective) == contrastive && $IN_BATCH != 0 ]]; then in_batch=(--in-batch "$IN_BATCH"); fi
clipdist eval "$run/model" --data "$data" --split val "${in_batch[@]}"
echo "finished: $run/report.html"
