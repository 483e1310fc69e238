#!/bin/bash
# Trains on TPU slices of a GKE cluster that xpk has made, from the root of the repository:
#   CLUSTER=my-cluster TPU=v5litepod-16 SLICES=2 scripts/launch/xpk.sh my-run \
#     configs/transformer_text.py --workdir /shared/text --parallel.replica 2
# The repository goes into the image with it; --workdir has to be on a disk that the cluster mounts
# (xpk storage). A slice that is preempted starts again, and goes on from the newest checkpoint.
set -euo pipefail

: "${CLUSTER:?the name of the cluster}" "${TPU:?its kind of slice, such as v5litepod-16}"
[ $# -gt 1 ] || { echo "usage: CLUSTER=NAME TPU=KIND $0 RUN CONFIG [--field value ...]" >&2; exit 2; }

workload=$1
shift
# Quoted once more, for the shell of the container. Its processes find one another by what the TPU
# and the cluster tell each.
arguments=$(printf '%q ' "$@")
xpk workload create \
  --cluster "$CLUSTER" --workload "$workload" --tpu-type "$TPU" --num-slices "${SLICES:-1}" \
  --base-docker-image "${IMAGE:-python:3.12}" --script-dir . --max-restarts "${RESTARTS:-5}" \
  --command "bash -c '. scripts/install.sh tpu' && .venv/bin/python scripts/train.py $arguments"
