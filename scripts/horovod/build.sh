#!/usr/bin/env bash
# Builds Horovod for the TensorFlow of a Python, installs it there and checks
# that it works with an all-reduce of two ranks.
#
# usage: scripts/horovod/build.sh [PYTHON]       (default: .venv/bin/python)
#
# Environment:
#   HOROVOD_GPU_OPERATIONS  NCCL: build with NCCL or fail; installs NCCL's package
#                           if there is no NCCL. Set but empty: build without.
#                           Not set: with NCCL if nvcc and nccl.h exist
#   HOROVOD_NCCL_HOME       where NCCL is, if not in one of the usual places
#   CUDA_HOME               where CUDA is, if its nvcc is neither on PATH nor in
#                           /usr/local/cuda
#   MNIST_DIST_CACHE        where wheels are kept (default: ~/.cache/mnist_dist)
set -euo pipefail

version=0.28.1
sdist_sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
# Needed by the build itself; setup.py requires Horovod's run-time dependencies too.
build_tools=(setuptools==80.9.0 wheel==0.45.1)
# The last series before 4, for which Horovod's copy of Gloo is too old.
cmake_tool=cmake==3.31.10
runtime_needs=(cloudpickle psutil pyyaml packaging)

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
patch_file=$here/tensorflow-2.21.patch

say() { printf 'horovod: %s\n' "$*"; }
die() {
    say "$*" >&2
    exit 1
}

# --- what is installed --------------------------------------------------------

python=${1:-$repo/.venv/bin/python}
[[ $python == */* ]] || python=$(command -v "$python") || die "no such Python: $1"
[[ -x $python ]] || die "no such Python: $python"
# Absolute, but with links kept: their place is what identifies a virtual environment.
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")

"$python" -m pip --version >/dev/null 2>&1 || die "no pip in $python (try: $python -m ensurepip)"

# From the metadata: importing TensorFlow would take seconds.
mapfile -t facts < <("$python" - <<'END'
import importlib.metadata
import sysconfig

for name in ("tensorflow", "tensorflow-cpu", "tensorflow-rocm", "tf-nightly"):
    try:
        print(name + importlib.metadata.version(name))
        break
    except importlib.metadata.PackageNotFoundError:
        pass
else:
    raise SystemExit
print(sysconfig.get_config_var("SOABI"))
print(sysconfig.get_path("platlib"))
print(sysconfig.get_path("scripts"))
# The NCCL that this TensorFlow would install with its CUDA libraries.
needs = importlib.metadata.requires(name) or []
print(*[need.partition(";")[0].strip() for need in needs if need.startswith("nvidia-nccl")][:1])
END
)
tensorflow=${facts[0]:-} abi=${facts[1]:-} site_packages=${facts[2]:-} scripts=${facts[3]:-}
nccl_package=${facts[4]:-}
[[ -n $tensorflow ]] || die "no TensorFlow in $python; install it first"

pip() { "$python" -m pip --disable-pip-version-check "$@"; }

constraints=()
[[ ! -e $repo/pins.txt ]] || constraints=(--constraint "$repo/pins.txt")

# Sets nccl_home. The pip package takes precedence over the system's NCCL because
# TensorFlow loads it, and a process can only load one libnccl.so.2.
find_nccl() {
    local home
    for home in "${HOROVOD_NCCL_HOME:-}" "$site_packages/nvidia/nccl" "${CUDA_HOME:-}" /usr /usr/local; do
        if [[ -n $home && -e $home/include/nccl.h ]]; then
            nccl_home=$home
            return
        fi
    done
    return 1
}

nccl_home=
CUDA_HOME=${CUDA_HOME:-$(command -v nvcc >/dev/null || echo /usr/local/cuda)}
if [[ -x $CUDA_HOME/bin/nvcc ]]; then
    export PATH=$CUDA_HOME/bin:$PATH
fi
case ${HOROVOD_GPU_OPERATIONS-auto} in
    auto) ! command -v nvcc >/dev/null || find_nccl || true ;;
    NCCL)
        command -v nvcc >/dev/null ||
            die "NCCL was requested, but there is no nvcc on PATH or in $CUDA_HOME/bin; install CUDA's toolkit, or set CUDA_HOME"
        [[ -z ${HOROVOD_NCCL_HOME:-} || -e $HOROVOD_NCCL_HOME/include/nccl.h ]] ||
            die "HOROVOD_NCCL_HOME=$HOROVOD_NCCL_HOME has no include/nccl.h; correct it, or unset it"
        if ! find_nccl && [[ -n $nccl_package ]]; then
            say "installing $nccl_package"
            pip install --quiet --no-deps "${constraints[@]}" "$nccl_package" || true
        fi
        find_nccl || die "NCCL was requested, but there is no nccl.h; install NCCL, or set HOROVOD_NCCL_HOME"
        ;;
    "") ;;
    *) die "HOROVOD_GPU_OPERATIONS=$HOROVOD_GPU_OPERATIONS is not supported; it must be NCCL, empty or not set" ;;
esac
if [[ -n $nccl_home ]]; then
    nccl=$(sed -nE 's/^#define NCCL_(MAJOR|MINOR|PATCH) +([0-9]+).*/\2/p' "$nccl_home/include/nccl.h" | paste -sd.)
    flavour=nccl$nccl-cuda$(nvcc --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
else
    flavour=cpu
fi

patch_hash=$(sha256sum "$patch_file" | cut -c1-8)
key=$version-$tensorflow-$abi-$flavour-$patch_hash
cache=${MNIST_DIST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mnist_dist}/horovod/$key
mkdir -p "$cache"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# --- build --------------------------------------------------------------------

build() {
    # Tools go to a separate folder, so that the build leaves no trace in the environment.
    local tools=("${build_tools[@]}" "${runtime_needs[@]}")
    command -v cmake >/dev/null || tools+=("$cmake_tool")
    pip install --target "$work/tools" "${tools[@]}"
    export PYTHONPATH=$work/tools${PYTHONPATH:+:$PYTHONPATH} PATH=$work/tools/bin:$PATH

    # pip checks the hash before it runs any of the downloaded code.
    echo "horovod==$version --hash=sha256:$sdist_sha256" >"$work/sdist.txt"
    pip download --no-binary horovod --no-deps --no-build-isolation --require-hashes \
        --dest "$work" --requirement "$work/sdist.txt"
    tar -xzf "$work/horovod-$version.tar.gz" -C "$work"
    local source=$work/horovod-$version
    if command -v patch >/dev/null; then
        patch -p1 -d "$source" <"$patch_file"
    else
        # git must not find a repository around it, or it would skip every file.
        GIT_CEILING_DIRECTORIES=$work git -C "$source" apply --verbose "$patch_file"
    fi

    if [[ -n $nccl_home ]]; then
        export HOROVOD_GPU_OPERATIONS=NCCL
        # An nvcc on PATH may be a wrapper of the real one, and CMake would look for
        # the headers next to the wrapper.
        local cuda_home
        cuda_home=$(nvcc -v none 2>&1 | sed -n 's/^#\$ _HERE_=\(.*\)\/bin$/\1/p') || true
        if [[ -x $cuda_home/bin/nvcc && -e $cuda_home/include/cuda_runtime.h ]]; then
            export HOROVOD_CUDA_HOME=$cuda_home
        fi
        case $nccl_home in
            /usr | /usr/local) ;; # CMake looks there by itself, including lib/x86_64-linux-gnu
            *)
                export HOROVOD_NCCL_HOME=$nccl_home HOROVOD_NCCL_INCLUDE=$nccl_home/include
                if [[ -e $nccl_home/lib/libnccl.so.2 && ! -e $nccl_home/lib/libnccl.so ]]; then
                    # The pip package has no libnccl.so for the linker. Not in $work, as the
                    # library records this folder as a place to load NCCL from.
                    mkdir -p "$cache/nccl"
                    ln -sf "$nccl_home/lib/libnccl.so.2" "$cache/nccl/libnccl.so"
                    export HOROVOD_NCCL_LIB=$cache/nccl HOROVOD_NCCL_LINK=shared
                fi
                ;;
        esac
    else
        unset HOROVOD_GPU_OPERATIONS
    fi
    export HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1
    export HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1
    # For CMake 4 or later; older ones ignore it.
    export CMAKE_POLICY_VERSION_MINIMUM=3.5
    # Not the MAKEFLAGS of a make that runs this script: its job server is not
    # available through pip, which would leave one job. 8 is Horovod's own choice;
    # a job can take more than a gigabyte of memory.
    local jobs
    jobs=$(nproc)
    export MAKEFLAGS=-j$((jobs < 8 ? jobs : 8))
    pip wheel --verbose --use-pep517 --no-build-isolation --no-deps --no-cache-dir \
        --wheel-dir "$work/wheel" "$source"

    # Renamed into place: another process sees a complete wheel in the cache, or none.
    local built
    built=$(echo "$work"/wheel/horovod-*.whl)
    cp "$built" "$cache/.part.$$"
    mv -f "$cache/.part.$$" "$cache/$(basename "$built")"
}

find_wheel() { compgen -G "$cache/horovod-*.whl" | head -n 1; }

wheel=$(find_wheel) || true
if [[ -n $wheel ]]; then
    say "using $wheel"
else
    # Checked only here: with a wheel in the cache none of this is needed.
    compiler=${CXX:-}
    for candidate in c++ g++ clang++; do
        [[ -n $compiler ]] || ! command -v "$candidate" >/dev/null || compiler=$candidate
    done
    command -v "${compiler%% *}" >/dev/null ||
        die "no C++ compiler found; install one (Debian and Ubuntu: apt-get install g++ make)"
    command -v make >/dev/null || die "make not found; install it"
    command -v patch >/dev/null || command -v git >/dev/null || die "neither patch nor git found; install one"
    if [[ -n $nccl_home && $compiler != *" "* ]]; then
        # A compiler that CUDA does not support, or a part of CUDA that is missing: CMake would take pages to say so.
        printf '#include <nccl.h>\nint main() { return 0; }\n' >"$work/probe.cu"
        nvcc -ccbin "$compiler" -I "$nccl_home/include" -o "$work/probe" "$work/probe.cu" >"$work/probe.log" 2>&1 ||
            die "nvcc cannot compile with $compiler: $(grep -m 1 -i error "$work/probe.log")"
    fi

    log=$cache/build.log
    say "building $version ($flavour) for $tensorflow; this takes minutes; log: $log"
    # In a subshell, and not as a condition, in which set -e would be off.
    set +e
    (
        set -e
        build
    ) >"$log" 2>&1
    status=$?
    set -e
    if ((status)); then
        # The log ends mostly with pip's own output; the cause comes earlier.
        grep -m 5 -A 4 -E ': (fatal )?error: |CMake Error|^ERROR: ' "$log" >&2 || true
        echo ... >&2
        tail -n 30 "$log" >&2
        [[ $flavour == cpu ]] || say "without NCCL: HOROVOD_GPU_OPERATIONS= $0" >&2
        die "the build failed; log: $log"
    fi
    wheel=$(find_wheel)
    say "built $wheel in $SECONDS s"
fi

# --- install ------------------------------------------------------------------

pip install --quiet "${constraints[@]}" "${runtime_needs[@]}"

# pip records the hash of a wheel that it installs from a file.
installed=$("$python" - <<'END'
import importlib.metadata
import json

try:
    record = importlib.metadata.distribution("horovod").read_text("direct_url.json")
except importlib.metadata.PackageNotFoundError:
    record = None
print(json.loads(record or "{}").get("archive_info", {}).get("hash", ""))
END
)
if [[ $installed == "sha256=$(sha256sum "$wheel" | cut -d' ' -f1)" ]]; then
    say "already installed"
else
    # Forced, since other builds of Horovod have the same version.
    pip install --quiet --no-deps --force-reinstall "$wheel"
    say "installed"
fi

# --- check --------------------------------------------------------------------

# Every time: it takes seconds, and a stamp would outlive the changes (of
# TensorFlow, the network, the machine) that the check is for. Unless it fails,
# only the ranks' own output is shown: TensorFlow's messages on import, from
# horovodrun and from each rank, fill more than a screen.
say "all-reduce of 2 ranks:"
if ! timeout -k 15 300 "$scripts/horovodrun" --gloo -np 2 --gloo-timeout-seconds 120 \
    "$python" "$here/check.py" 2 >"$work/check.log" 2>&1; then
    cat "$work/check.log" >&2
    die "the all-reduce failed; to build again, remove $cache"
fi
sed -n 's/^\[[0-9]*\]<stdout>://p' "$work/check.log"
say "works"
