# docker build -t mssr .                           GPU (the wheels bring CUDA; the host needs only its driver)
# docker build -t mssr-cpu --build-arg DEVICE=cpu .
# docker run --rm -it --gpus all --shm-size 16g mssr train configs/digits/mssr.yaml
FROM python:3.12-slim

ARG DEVICE=gpu

# A compiler, because triton and vLLM compile small kernels at run time; git for pip's VCS requirements.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git libgomp1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /mssr
ENV MSSR_DEVICE=$DEVICE PIP_NO_CACHE_DIR=1

COPY . .
RUN ./scripts/setup.sh

ENV PATH=/mssr/.venv/bin:$PATH
ENTRYPOINT ["mssr"]
CMD ["--help"]
