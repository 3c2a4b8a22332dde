#!/usr/bin/env bash
# Installs what the tests need into .venv, and runs every test. Options go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/make_venv.sh
export PIP_DISABLE_PIP_VERSION_CHECK=1
.venv/bin/python -m pip install -q -e ".[test]"
# A second MPI, beside the one in the environment itself: both bring a bin/mpiexec.
[[ -e .venv/mpich/lib/libmpi.so.12 ]] ||
    .venv/bin/python -m pip install -q --ignore-installed --no-deps --prefix .venv/mpich mpich

PATH=$PWD/.venv/bin:$PATH
ruff check .
ruff format --check .
mypy
rm -f .coverage .coverage.*
status=0
if (($#)); then
    coverage run -m pytest "$@" || status=$?
else # units run beside the others, which often wait for their ranks to start
    units=$(mktemp)
    OPENBLAS_NUM_THREADS=1 coverage run -m pytest tests/unit > "$units" 2>&1 &
    trap 'kill $! 2> /dev/null; rm -f "$units"' EXIT
    coverage run -m pytest --ignore tests/unit --durations 25 || status=$?
    wait $! || status=$?
    cat "$units"
fi
coverage combine -q
coverage report
exit $status
