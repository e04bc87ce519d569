# amfm on a GPU node: the wheels of one CUDA version, pinned by constraints/, on a plain Python image.
#
#   docker build --build-arg CUDA=13.2 --tag amfm .        CUDA: a version of constraints/ (12.8, 13.0, 13.2)
#   docker run --rm --gpus all --shm-size 64g amfm amfm doctor        --shm-size: NCCL and replicas need more than 64 MB
#
# PyTorch's wheels bring the CUDA libraries; the host needs only the driver, one that serves that CUDA. For Slurm with pyxis: recipes/slurm_cluster.md.
FROM python:3.12-slim-bookworm

ARG CUDA=13.2

# Triton compiles the launchers of its kernels with a C compiler, when they first run; ssh is for launch --on torchrun.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev openssh-client \
    && rm -rf /var/lib/apt/lists/*

# The libraries first: this layer stays when only the sources change.
COPY constraints /opt/amfm/constraints
RUN pip install --no-cache-dir --requirement /opt/amfm/constraints/cuda-${CUDA}.txt

COPY . /opt/amfm
RUN pip install --no-cache-dir --no-deps /opt/amfm

# On the node's own disk: a home directory on the network is slow, and may be read-only in a container.
ENV TRITON_CACHE_DIR=/tmp/triton
WORKDIR /work
CMD ["amfm", "doctor"]
