# docker build -t mssr .                           GPU (the wheels bring CUDA; the host needs only its driver)
# docker build -t mssr-cpu --build-arg DEVICE=cpu .
# docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 mssr doctor
#
# --ipc=host: weights may travel through /dev/shm (16.6 GB of a 7B model), of which docker gives 64 MB otherwise.
# --ulimit memlock=-1, --network=host and --device=/dev/infiniband are for NCCL between machines.
FROM python:3.12-slim

ARG DEVICE=gpu

# A compiler, because triton and vLLM compile small kernels at run time; git for pip's VCS requirements; libibverbs
# with its drivers, without which NCCL goes through TCP between machines. Python's headers are in the image.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        build-essential git ibverbs-providers libgomp1 libibverbs1 libnuma1 wget \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /mssr
ENV MSSR_DEVICE=$DEVICE PIP_NO_CACHE_DIR=1

COPY . .
RUN ./scripts/setup.sh
# Kubernetes asks Ray's dashboard, by wget, whether a node is well.
RUN .venv/bin/pip install -c constraints.txt "ray[default]"

ENV PATH=/mssr/.venv/bin:$PATH
ENTRYPOINT ["mssr"]
CMD ["--help"]
