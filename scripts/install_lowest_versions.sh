#!/usr/bin/env bash
# Installs the oldest transformers that is supported, and the `kernels` that goes with it, into a folder of their own:
#
#   bash scripts/install_lowest_versions.sh TARGET
#
# A Python that is started with PYTHONPATH=TARGET then has them on top of everything else, torch included, from the
# environment that it belongs to. PYTHON names that Python; default: python. A second call with the same list costs nothing.
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "Expected one argument, the folder to install into; got $#. Usage: bash $0 TARGET" >&2
    exit 2
fi
target=$1
python=${PYTHON:-python}

# Without their dependencies, which would be torch once more: what the environment has not or has too new is listed here.
wheels=(
    "transformers==5.17.0"
    "huggingface_hub==1.33.0"
    "kernels==0.16.2"
    "kernels-data==0.16.2"
    "tomlkit>=0.13.3"
    "click>=8.4.2,<9"
    "httpx==0.28.1"
    "httpcore==1.0.9"
    "anyio>=4"
    "certifi"
    "h11>=0.16"
    "idna"
)

installed=$target/installed-wheels
wanted="$("$python" --version) ${wheels[*]}"
if [ "$(cat "$installed" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
rm -rf "$target"
"$python" -m pip install --quiet --quiet --disable-pip-version-check --no-deps --target "$target" "${wheels[@]}" || {
    rm -rf "$target"
    echo "error: the lowest versions could not be installed; the lines above say why. It needs a package index." >&2
    exit 1
}
mkdir -p "$target"
printf '%s\n' "$wanted" >"$installed"
