#!/usr/bin/env bash
# launch.sh SCRIPT PROCESSES ARGUMENTS...: start a script of segmentation/ or detection/ once for each GPU (on a CPU: for each process).
# PYTHON, PORT, NNODES, NODE_RANK, MASTER_ADDR and OMP_NUM_THREADS can be set from outside.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
script=$1 processes=$2
shift 2
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v "$python" || command -v python3)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m torch.distributed.run --nproc_per_node="$processes" --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" "$script" "$@" --launcher pytorch
