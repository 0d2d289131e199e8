#!/usr/bin/env bash
# Start the ranks of one node with torchrun (the environment is active); run it on every node.
#   NODES=2 NODE_RANK=0 MASTER_ADDR=node-0 launchers/torchrun.sh --config CONFIG [section.key=value ...]
set -euo pipefail

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
ranks=${RANKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
project=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$project${PYTHONPATH:+:$PYTHONPATH}" # the code of this folder, not an installed package

# Seconds between a signal that torchrun forwards to its ranks and their SIGKILL: a step, a save and a validation, not 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}

program=(python)
# torchrun sets OMP_NUM_THREADS to 1 if it is not set; without it each rank takes its share of the cores.
[[ -n ${OMP_NUM_THREADS:-} ]] || program=(env -u OMP_NUM_THREADS python)

exec torchrun --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$ranks" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
    --no-python "${program[@]}" "$project/launchers/pretrain.py" "$@"
