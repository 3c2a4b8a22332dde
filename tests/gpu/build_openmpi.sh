#!/bin/sh
# Builds an Open MPI that takes GPU memory, from Debian's source package, into a folder of its own:
#
#     tests/gpu/build_openmpi.sh PREFIX [CUDA]
#
# CUDA is where include/cuda.h is: by default /usr/local/cuda. No GPU is needed to build it, and
# no root but for what apt-get is to install (the compilers, and nothing if they are there). Then:
#
#     MPI4PY_LIBMPI=PREFIX/lib/libmpi.so PATH=PREFIX/bin:$PATH mpidl doctor
#
# tells whether it is CUDA-aware: that is measured, not believed. Debian's own is built without.
set -eu

prefix=${1:?usage: build_openmpi.sh PREFIX [CUDA]}
cuda=${2:-/usr/local/cuda}
[ -f "$cuda/include/cuda.h" ] || { echo "$cuda/include/cuda.h is missing: name the CUDA toolkit"; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# Source packages, whatever the machine's own lists are: those of its binaries, as deb-src.
if ! apt-get source --download-only openmpi; then
    mkdir -p lists/partial
    if [ -f /etc/apt/sources.list.d/debian.sources ]; then
        sed 's/^Types: deb$/Types: deb-src/' /etc/apt/sources.list.d/debian.sources > own.sources
        own="$work/own.sources"
    else
        sed -n 's/^deb /deb-src /p' /etc/apt/sources.list > own.list
        own="$work/own.list"
    fi
    set -- -o "Dir::Etc::SourceList=$own" -o Dir::Etc::SourceParts=/dev/null -o "Dir::State::Lists=$work/lists"
    apt-get "$@" update
    apt-get "$@" source --download-only openmpi
fi

tar xf openmpi_*.orig.tar.*
cd openmpi-*/
# What Debian adds are other libraries for its packages (PMIx, libevent, hwloc): here its own are used.
./configure --prefix="$prefix" --with-cuda="$cuda" --enable-mpi-fortran=no --disable-oshmem \
    --with-libevent=internal --with-hwloc=internal --with-pmix=internal --disable-man-pages
make -j"${JOBS:-$(nproc)}"
make install
"$prefix/bin/ompi_info" --parsable --all | grep mpi_built_with_cuda_support:value
