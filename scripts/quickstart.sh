#!/usr/bin/env bash
# Trains the four model families on bundled data, a few minutes on two CPU cores, and prints one
# table. Needs no network after installation. Run again, it continues what is there.
set -euo pipefail
. "$(dirname "$0")/install.sh"

runs=${RUNS:-runs/quickstart}
quick() {  # the text models' full configs train for longer; see their docstrings
  "$python" scripts/train.py "configs/$1.py" --workdir "$runs/$1" "${@:2}"
}

# MFU is a share of the device's peak, which for a CPU no datasheet tells.
echo "measuring this machine's peaks (half a minute, once)"
"$python" scripts/benchmark.py peaks --if_missing 2> /dev/null
echo
quick mlp_cancer
quick cnn_digits
quick lstm_text --steps 250 --optimizer.learning_rate.decay_steps 250 --target.value 2.47
quick transformer_text --steps 250 --optimizer.learning_rate.decay_steps 250 --target.value 2.47
echo
"$python" scripts/table.py "$runs"/{mlp_cancer,cnn_digits,lstm_text,transformer_text}
