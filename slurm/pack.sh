#!/usr/bin/env bash
# Packs a data set on a node, by one of the recipes in shards/ (or any script of yours), once and for all jobs that train:
#
#   sbatch --partition=cpu --account=mine slurm/pack.sh shards/skincap.py /path/to/SkinCAP --out data/skincap
#
#SBATCH --job-name=pack
#SBATCH --nodes=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

# shellcheck source=/dev/null
[[ -f slurm/site.sh ]] && source slurm/site.sh
# shellcheck source=/dev/null
[[ -f .venv/bin/activate ]] && source .venv/bin/activate

python "${1:?a packing recipe, such as shards/skincap.py, and its words}" "${@:2}"
