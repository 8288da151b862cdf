#!/bin/sh
# Trains on several hosts without a scheduler. Run it on every host, HEAD being one of them:
#
#   HEAD=node0 HOSTS=2 RANKS=8 sh host.sh run.toml --tp 8 --dp 2
#
# RANKS of colrow on each host (one for each GPU); the rest is what colrow train takes, the same
# everywhere, with an output directory that all hosts share. A host that died may be started again
# with the same line, and training goes on from the newest checkpoint.

: "${HEAD:?the name of the host where the others meet}" "${HOSTS:?how many}" "${RANKS:?of a host}"

# A host that comes back would otherwise wait for the address of a store that the others know.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun \
    --nnodes "$HOSTS" --nproc-per-node "$RANKS" --max-restarts "${RESTARTS:-10}" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29400}" --rdzv-id "${RUN:-colrow}" \
    -m colrow.cli train "$@"
