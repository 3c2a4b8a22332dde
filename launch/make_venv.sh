#!/usr/bin/env bash
# Makes .venv in the current folder, if it is not there, with Python 3.10 or newer.
# PYTHON=/path/to/python chooses one.
set -euo pipefail

if [[ -x .venv/bin/pip ]]; then exit; fi

new_enough='import sys; sys.exit(sys.version_info < (3, 10))'
python=
for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
    if command -v "$candidate" >/dev/null && "$candidate" -c "$new_enough" 2>/dev/null; then
        python=$candidate; break
    fi
done
if [[ -z $python ]]; then
    echo "mpidl needs Python 3.10 or newer; set PYTHON=/path/to/python" >&2; exit 1
fi

# Debian ships Python without ensurepip, which venv needs.
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    if command -v uv >/dev/null; then exec uv venv -q --seed --python "$python" .venv; fi
    if [[ $UID == 0 ]] && command -v apt-get >/dev/null; then
        echo "installing Debian's python3-venv, which $python lacks" >&2
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv; } >/dev/null
    else
        echo "$python cannot make virtual environments: sudo apt-get install python3-venv" >&2; exit 1
    fi
fi
rm -rf .venv
"$python" -m venv .venv
