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
# Units run beside the others, which often wait for their ranks to start. So is Horovod built.
status=0 units=$(mktemp) built=$(mktemp) wheels=.venv/horovod building=
if type g++ make > /dev/null 2>&1; then
    nice bash tests/peers/install_horovod.sh --wheels "$wheels" --build > "$built" 2>&1 &
    building=$!
fi
OPENBLAS_NUM_THREADS=1 "${run[@]}" tests/unit > "$units" 2>&1 &
testing=$!
trap 'kill $testing $building 2> /dev/null || true; rm -f "$units" "$built"' EXIT
"${run[@]}" --ignore tests/unit --ignore tests/test_peers.py --durations 25 || status=$?
if [[ -z $building ]]; then
    echo "no g++ or no make: what needs Horovod is skipped"
elif wait $building; then
    bash tests/peers/install_horovod.sh --wheels "$wheels"
else
    status=1
    cat "$built"
fi
"${run[@]}" tests/test_peers.py --durations 10 || status=$?
wait $testing || status=$?
cat "$units"
if (($#)); then
    coverage combine -q
    coverage report
fi
exit $status
