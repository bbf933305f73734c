# dist-ft and PyTorch in an image: `docker build -t dist-ft .`, and in the folder with your files
# `docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD:/work" dist-ft train data=rows.jsonl`.
#
# EXTRAS are optional parts of the package (`--build-arg EXTRAS=sweep,tensorboard`). PIP_FLAGS are options of pip: on
# machines without a GPU, the index with PyTorch's CPU wheels makes the image smaller.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir build && python -m build --wheel --outdir /wheels

FROM python:${PYTHON}-slim-bookworm
ARG EXTRAS=""
ARG PIP_FLAGS=""
# git tells the commit of a plan, ssh and pdsh reach other hosts, and g++ builds DeepSpeed's optimizers for offloading
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /wheels/
COPY --from=build /wheels/ /wheels/
RUN pip install --no-cache-dir ${PIP_FLAGS} -c /wheels/constraints.txt "$(ls /wheels/*.whl)${EXTRAS:+[${EXTRAS}]}"
# a user of the host has no home in the image, and caches of models and data belong beside the runs
ENV HOME=/work/.home
WORKDIR /work
ENTRYPOINT ["dist-ft"]
CMD ["--help"]
