#!/usr/bin/env bash
# Ray on a few machines by hand, and a training over all of them. On the first machine, then on each other, each
# in a terminal of its own (Ctrl-C takes that machine out of the cluster):
#
#   examples/cluster/two_machines.sh head
#   examples/cluster/two_machines.sh worker 10.0.0.1:6379
#
# and on the first, in another terminal, with the number of machines:
#
#   examples/cluster/two_machines.sh train 2 10.0.0.1:6379 /shared/my.yaml trainer.run_dir=/shared/runs/my
#
# Ray lets in who has its token: copy ~/.ray/auth_token, which the first command makes, from the first machine to the
# others, unless they share the home directory. The run directory, data and model are on storage that all machines
# see under the same absolute path. mssr is installed everywhere as here. RAY_OPTIONS are further arguments of
# `ray start`.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
read -ra options <<<"${RAY_OPTIONS:-}"

export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} # not asked for by itself where an address is given

case ${1:-} in
    head)
        if [[ $RAY_AUTH_MODE == token && -z ${RAY_AUTH_TOKEN:-} ]]; then ray get-auth-token --generate >/dev/null; fi
        exec ray start --head --block --disable-usage-stats --include-dashboard=false "${options[@]}"
        ;;
    worker)
        exec ray start --address="$2" --block --disable-usage-stats "${options[@]}"
        ;;
    train)
        nodes=$2 address=$3
        shift 3
        python "$HERE/wait_for_nodes.py" "$nodes" "$address"
        mssr doctor "$@" --address "$address"
        exec mssr train "$@" cluster.address="$address"
        ;;
    *)
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
