#!/usr/bin/env bash
# Installs what the tests need into .venv, and tests. Options go to pytest.
# --all, alone: also the long tests, and which lines of the package were run; half an hour and more.
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
if (($#)) && [[ $1 != --all ]]; then
    exec python -m pytest "$@"
fi
run=(python -m pytest)
if (($#)); then
    export MPIDL_TEST_ALL=1
    rm -f .coverage .coverage.*
    run=(coverage run -m pytest)
fi
# Units run beside the others, which often wait for their ranks to start.
status=0 units=$(mktemp)
OPENBLAS_NUM_THREADS=1 "${run[@]}" tests/unit > "$units" 2>&1 &
trap 'kill $! 2> /dev/null || true; rm -f "$units"' EXIT
"${run[@]}" --ignore tests/unit --durations 25 || status=$?
wait $! || status=$?
cat "$units"
if (($#)); then
    coverage combine -q
    coverage report
fi
exit $status
