#!/bin/bash
# Train on two machines without a scheduler, with all GPUs of both. Run it on each; the first is machine 0:
#
#   bash launch/two_machines.sh 0 10.0.0.5 desc=xl index=1 ...    on 10.0.0.5
#   bash launch/two_machines.sh 1 10.0.0.5 desc=xl index=1 ...    on the other
#
# Both need the same repository and settings, and $RESULTS_ROOT_DIR and $RLHF_FLANT5_CACHE on a file system that both see.
# MASTER_PORT (29500) must be open on machine 0; PROCESSES sets how many run on each machine (default: one a GPU).
# Ctrl-C on either machine stops both: torchrun leaves the processes 30 seconds to write a checkpoint. Go on with resume=true.
if [[ $1 != [01] || -z $2 || $2 == *=* ]]; then
    echo "usage: bash launch/two_machines.sh <0|1> <address of machine 0> settings..." >&2
    exit 2
fi
machine=$1 address=$2
shift 2
PATH=$PWD/.venv/bin:$PATH
exec torchrun --nnodes=2 --node-rank="$machine" --master-addr="$address" --master-port="${MASTER_PORT:-29500}" \
    --nproc-per-node="${PROCESSES:-gpu}" -m rlhf_flant5.train "$@"
