#!/usr/bin/env bash
# What the nodes of your cluster need before anything runs on them. Copy it, and keep what applies:
#
#   cp slurm/site.example.sh slurm/site.sh
#
# The scripts beside it read slurm/site.sh first, on the first node of a job; what is exported there reaches all nodes.

# module load cuda                        # only where torch does not bring its own
# source /path/to/environment/activate    # another environment than .venv
# export HF_HOME=/path/to/shared/cache    # weights from the hub, once for all nodes
# export HF_HUB_OFFLINE=1                 # nodes without a way out: download on the login node before
# export HTTPS_PROXY=http://proxy:3128
# export NCCL_SOCKET_IFNAME=ib0           # the network that the nodes should talk by
export TOKENIZERS_PARALLELISM=false
