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
# Two at a time, since ranks often wait for others to start: whole jobs and hosts, and all else.
# Meanwhile Horovod is built; it comes last, for what measures finds it where it is installed.
status=0 wheels=.venv/horovod told=$(mktemp) built=$(mktemp) building=
set -m # each in a group of its own, which can be ended whole
if type g++ make > /dev/null 2>&1; then
    nice bash tests/peers/install_horovod.sh --wheels "$wheels" --build > "$built" 2>&1 &
    building=$!
fi
{
    OPENBLAS_NUM_THREADS=1 "${run[@]}" tests/unit || status=$?
    "${run[@]}" tests/test_peers.py tests/test_ranks.py -k "not horovod" --durations 15 || status=$?
    exit $status
} > "$told" 2>&1 &
testing=$!
set +m
trap 'kill -- -$testing ${building:+-$building} 2> /dev/null || true; rm -f "$told" "$built"' EXIT
"${run[@]}" --ignore tests/unit --ignore tests/test_peers.py --ignore tests/test_ranks.py \
    --durations 25 || status=$?
wait $testing || status=$?
cat "$told"
if [[ -z $building ]]; then
    echo "no g++ or no make: what needs Horovod is skipped"
elif wait $building; then
    bash tests/peers/install_horovod.sh --wheels "$wheels"
else
    status=1
    cat "$built"
fi
"${run[@]}" tests/test_peers.py -k horovod || status=$?
if (($#)); then
    coverage combine -q
    coverage report
fi
exit $status
