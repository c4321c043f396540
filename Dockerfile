# Two images. `preview` previews and plans: no torch, small. `build` merges, measures, quantises and publishes, with CUDA.
#
#     docker build --target preview --tag moerge .
#     docker build --target build --tag moerge-build .
#
# The base needs Python 3.11 or newer with venv, and apt. `build` needs no CUDA of the base: torch's wheels bring their own,
# and the driver comes from the machine.
ARG PYTHON_IMAGE=docker.io/library/python:3.13-slim@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b
ARG BUILD_IMAGE=${PYTHON_IMAGE}

# ------------------------------------------------------------------------------------------------------------- the wheel
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /source
COPY constraints.txt ./
RUN python3 -m venv /opt/installer \
    && /opt/installer/bin/pip install --no-cache-dir --constraint constraints.txt hatchling
COPY . .
RUN /opt/installer/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

# ----------------------------------------------------------------------------------------------------------- the preview
FROM wheel AS preview-environment
# pip stays behind in this stage: the environment that is kept has only what moerge imports.
RUN python3 -m venv --without-pip /opt/moerge \
    && /opt/installer/bin/pip --python /opt/moerge/bin/python install --no-cache-dir --constraint constraints.txt \
        /wheels/*.whl

FROM ${PYTHON_IMAGE} AS preview
# Which recipes changed, git tells. Its version is the base's Debian release's; older ones leave Debian's archive.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        -o Dpkg::Options::=--path-exclude=/usr/share/doc/* -o Dpkg::Options::=--path-exclude=/usr/share/man/* \
        -o Dpkg::Options::=--path-exclude=/usr/share/locale/* \
        ca-certificates git \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
COPY --from=preview-environment /opt/moerge /opt/moerge
# PYTHONSAFEPATH: a folder named `merge` in a recipe repository must not be imported instead of ours.
ENV PATH=/opt/moerge/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_DISABLE_TELEMETRY=1
LABEL org.opencontainers.image.title="moerge" \
      org.opencontainers.image.description="Preview mixture-of-experts recipes" \
      org.opencontainers.image.licenses="Apache-2.0"
# As GitHub asks of a container action: root, and an absolute entry point.
ENTRYPOINT ["/opt/moerge/bin/moerge"]
CMD ["--help"]

# ------------------------------------------------------------------------------------------------------------- the build
FROM wheel AS build-environment
RUN python3 -m venv --without-pip /opt/moerge \
    && wheel="$(echo /wheels/*.whl)" \
    && /opt/installer/bin/pip --python /opt/moerge/bin/python install --no-cache-dir --constraint constraints.txt \
        "${wheel}[build,eval]"

FROM ${BUILD_IMAGE} AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        -o Dpkg::Options::=--path-exclude=/usr/share/doc/* -o Dpkg::Options::=--path-exclude=/usr/share/man/* \
        -o Dpkg::Options::=--path-exclude=/usr/share/locale/* \
        ca-certificates git libgomp1 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
COPY --from=build-environment /opt/moerge /opt/moerge
# The NVIDIA container runtime hands over the machine's GPUs where these ask for it.
ENV PATH=/opt/moerge/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
LABEL org.opencontainers.image.title="moerge-build" \
      org.opencontainers.image.description="Build mixture-of-experts models from recipes, with CUDA" \
      org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["/opt/moerge/bin/moerge"]
CMD ["--help"]

# GitHub builds the last stage where action.yml names this file: the preview.
FROM preview AS action
