#!/bin/bash
# Trains on all hosts of a TPU slice, started from your own machine:
#   TPU=my-v5p ZONE=us-east5-a scripts/launch/tpu_vm.sh configs/transformer_text.py \
#     --workdir /mnt/shared/text
# Each host needs the repository, installed, in ~/ergon, and a disk that all share for --workdir.
# A slice that was preempted has to be made again; the same command then goes on from the newest
# checkpoint.
set -euo pipefail

: "${TPU:?the name of the TPU VM}" "${ZONE:?its zone}"
[ $# -gt 0 ] || { echo "usage: TPU=NAME ZONE=ZONE $0 CONFIG [--field value ...]" >&2; exit 2; }

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

# Quoted once more, for the shells of the hosts. The hosts find one another by what the TPU tells
# each; unbuffered, so that a line is seen when it is written.
arguments=$(printf '%q ' "$@")
train="cd ~/ergon && PYTHONUNBUFFERED=1 .venv/bin/python scripts/train.py $arguments"

# Again where it failed, which may be a host that went away: the run goes on. Not after 2, a
# mistake in the command. A pause, for a TPU is held until the last process that had it has ended.
for attempt in 1 2 3 4 5; do
  status=0
  on_all_hosts "$train" || status=$?
  case "$status" in 0 | 2) break ;; esac
  echo "attempt $attempt ended with status $status" >&2
  sleep 30
done
exit "$status"
