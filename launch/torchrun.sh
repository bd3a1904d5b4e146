#!/usr/bin/env bash
# Plain torchrun (DDP) on one or several machines, for those who know it better than accelerate. Everything after the script's name is
# passed on. On one machine, on all its GPUs:
# launch/torchrun.sh pretrain/beit.py --config launch/recipes/beit_base_in1k.yaml --out runs/beit
# On two processes of a CPU:
# PROCESSES=2 launch/torchrun.sh pretrain/beit.py --config launch/recipes/demo_pretrained.yaml --out runs/beit
# On two machines, here the first; NODE_RANK=1 on the second:
# NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh pretrain/beit.py --config launch/recipes/beit_base_in1k.yaml --out runs/beit
set -euo pipefail

PROCESSES=${PROCESSES:-gpu}          # on each machine: a number, or gpu for as many as it has
NODES=${NODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-}         # the first machine
MASTER_PORT=${MASTER_PORT:-29500}
# Seconds that a checkpoint may take after SIGTERM, which torchrun passes on; it kills after 30 otherwise.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}

if [ "$NODES" -eq 1 ]; then
    exec torchrun --standalone --nproc-per-node "$PROCESSES" "$@"
fi
exec torchrun --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "$PROCESSES" \
    --master-addr "${MASTER_ADDR:?the address of the first machine}" --master-port "$MASTER_PORT" "$@"
