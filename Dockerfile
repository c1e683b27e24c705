# Training on a GPU: docker build -t autoregembed . && docker run --gpus all --shm-size 8g -v "$PWD":/work autoregembed doctor
# The base image brings torch, CUDA and Triton; the tag is the newest torch that the tests run with.
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime

# cmake and g++ build the native CPU kernel; without them the package works all the same.
COPY . /opt/autoregembed
RUN pip install --no-cache-dir --break-system-packages "/opt/autoregembed[train]"

WORKDIR /work
ENTRYPOINT ["autoregembed"]
CMD ["--help"]
