#!/usr/bin/env bash
# Makes .venv in the current folder, if it is not there, with Python 3.10 or newer.
# PYTHON=/path/to/python chooses one.
set -euo pipefail

if [[ ! -x .venv/bin/python ]]; then
    new_enough='import sys; sys.exit(sys.version_info < (3, 10))'
    python=
    candidates=(python3 python3.14 python3.13 python3.12 python3.11 python3.10)
    if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if command -v -- "$candidate" >/dev/null && "$candidate" -c "$new_enough" 2>/dev/null; then
            python=$candidate; break
        fi
    done
    if [[ -z $python ]]; then
        echo "mpidl needs Python 3.10 or newer; set PYTHON=/path/to/python" >&2; exit 1
    fi
    "$python" -m venv --without-pip .venv
fi

# Then pip, by what there is. Debian ships Python without ensurepip, and often without pip.
has() { .venv/bin/python -c "import $1" 2>/dev/null; }
if has pip; then exit; fi
outside=$(.venv/bin/python -c 'import sys; print(sys._base_executable)')
if ! has ensurepip && ! "$outside" -m pip --version >/dev/null 2>&1 && ! command -v uv >/dev/null &&
    [[ $UID == 0 ]] && command -v apt-get >/dev/null; then
    echo "installing Debian's python3-venv, which $outside lacks" >&2
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv; } >/dev/null
fi
if has ensurepip; then
    .venv/bin/python -m ensurepip >/dev/null
elif "$outside" -m pip --version >/dev/null 2>&1; then
    "$outside" -m pip --python .venv/bin/python install -q --disable-pip-version-check pip
elif command -v uv >/dev/null; then
    uv pip install -q --python .venv/bin/python pip
else
    echo "$outside has neither pip nor ensurepip: sudo apt-get install python3-venv" >&2; exit 1
fi
