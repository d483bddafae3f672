# Sourced by training/quickstart.sh and tests/run.sh. Sets up a virtual environment and installs this checkout into it.
#
# Reads:
#   VENV    folder of the virtual environment; default: .venv in the checkout. Made if it is missing.
#   PYTHON  the Python to make it with; default: the first on the path that is new enough.
# Offers:
#   setup_environment EXTRA   installs the package with that extra of pyproject.toml, activates the environment and
#                             changes to the checkout. A second call with an unchanged pyproject.toml costs nothing.

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

stop_with() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Prints the Python to use. A name on the path proves nothing (version managers leave stubs), so each one is run.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_new_enough "$PYTHON" || stop_with "Python 3.11 or newer is needed, but PYTHON=$PYTHON is older or does not run."
        printf '%s\n' "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if is_new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    stop_with "Python 3.11 or newer is needed, but the path offers $(python3 --version 2>&1 || true)." \
        "Install a newer one, or name it: PYTHON=/path/to/python3.12"
}

make_environment() {
    local python
    python=$(find_python) || exit 1
    echo "Making a virtual environment in $VENV with $("$python" --version)."
    "$python" -m venv "$VENV" || {
        rm -rf "$VENV"
        stop_with "$python cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"
    }
}

setup_environment() {
    local extra=$1 installed wanted
    VENV=${VENV:-$checkout/.venv}
    case $VENV in
        /*) ;;
        *) VENV=$PWD/$VENV ;;
    esac
    [ -e "$VENV" ] || make_environment
    if ! is_new_enough "$VENV/bin/python" || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        stop_with "$VENV is no working virtual environment with Python 3.11 or newer. Remove it and run this again."
    fi
    export VENV VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH"
    cd "$checkout" || exit 1

    installed=$VENV/mpformer-hf-installed-$extra
    wanted="$checkout $(cat pyproject.toml mpformer_hf/__init__.py | cksum)"
    if [ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]; then
        echo "Installing mpformer-hf[$extra] and what it needs (several GB and some minutes the first time)."
        python -m pip install --quiet --quiet --disable-pip-version-check --editable ".[$extra]" ||
            stop_with "The installation failed; the lines above say why. It needs a connection to a package index."
        printf '%s\n' "$wanted" >"$installed"
    fi
}
