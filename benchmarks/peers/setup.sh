#!/usr/bin/env bash
# Environments of the peers that the benchmarks compare with, one each, beside this file: .venv-<peer>.
# Each sees the project's own packages behind its own, so torch is not installed again and is the same for all.
#
#   benchmarks/peers/setup.sh [PEER …]        default: open_clip litdata streaming
#   PYTHON=/path/to/python benchmarks/peers/setup.sh       another environment that holds clipdist
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/../../.venv/bin/python}
behind=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
peers=("$@")
((${#peers[@]})) || peers=(open_clip litdata streaming)

install() { # install PEER PACKAGE…
    local environment=$here/.venv-$1 own
    shift
    "$python" -m venv --without-pip --clear "$environment"
    own=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$behind" >"$own/behind.pth"
    # What is behind counts as installed; what clashes with it is installed in front of it, for this peer alone.
    "$python" -m pip --python "$environment/bin/python" install --quiet --disable-pip-version-check "$@"
}

failed=0
for peer in "${peers[@]}"; do
    case $peer in
        open_clip) packages=('open_clip_torch==3.3.0' 'webdataset==0.2.86') ;; # its reader fails with 1.0
        litdata) packages=('litdata==0.2.76') ;;
        streaming) packages=('mosaicml-streaming==0.13.0') ;;
        *)
            echo "$0: unknown peer $peer, expected open_clip, litdata or streaming" >&2
            exit 2
            ;;
    esac
    if install "$peer" "${packages[@]}"; then
        echo "$peer: $here/.venv-$peer"
    else
        echo "$peer: could not be installed; the benchmark goes without it" >&2
        failed=1
    fi
done
exit "$failed"
