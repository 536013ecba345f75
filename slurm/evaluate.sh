#!/usr/bin/env bash
# Scores a finished model on a node, on any split of any shard set:
#
#   sbatch --partition=gpu --account=mine slurm/evaluate.sh runs/skincap/model --data data/skincap --split val
#
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

# shellcheck source=/dev/null
[[ -f slurm/site.sh ]] && source slurm/site.sh
# shellcheck source=/dev/null
[[ -f .venv/bin/activate ]] && source .venv/bin/activate

clipdist eval "${1:?a model folder, such as runs/skincap/model, and the words of clipdist eval}" "${@:2}"
